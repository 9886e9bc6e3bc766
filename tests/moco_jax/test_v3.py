"""MoCo v3's step against Chen et al. 2021, algorithm 1, written densely; its momentum and heads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tiny

from common.errors import UserError
from common.method import stream
from configs import moco_v3_tpu

VARIANTS = ["moco-v3", pytest.param("moco-v3_vit", marks=pytest.mark.slow)]
MEAN = np.reshape([0.485, 0.456, 0.406], (1, 1, 1, 3))  # of the preset moco_v2, for RGB in [0, 1]
STD = np.reshape([0.229, 0.224, 0.225], (1, 1, 1, 3))
TOTAL = 8  # steps of a run of `tiny`


class Oracle:
    """The step in the order of the paper: queries, momentum update, keys, a table of all logits.

    Only the layers are shared with the code under test.
    """

    def __init__(self, run):
        self.network = run.method.setup.network
        self.random = self.network.backbone.is_random

    def encode(self, params, stats, images, draws):
        """Embeddings of one view, and the statistics after it."""
        keys = jax.random.split(draws, len(images)) if self.random else None
        f, stats = self.layer("backbone", params, stats, (images / 255 - MEAN) / STD, True, keys)
        return self.layer("head", params, stats, f, True)

    def layer(self, part, params, stats, *inputs):
        variables = {"params": params[part], "batch_stats": stats.get(part, {})}
        y, new = getattr(self.network, part).apply(variables, *inputs, mutable=["batch_stats"])
        return y, stats | ({part: new["batch_stats"]} if new.get("batch_stats") else {})

    @functools.partial(jax.jit, static_argnums=0)
    def keys(self, params, stats, images, key, step):
        found = []
        for view in (0, 1):
            k, stats = self.encode(params, stats, images[:, view], stream(key, step, f"key{view}"))
            found.append(k / jnp.linalg.norm(k, axis=1, keepdims=True))
        return found, stats

    @functools.partial(jax.jit, static_argnums=0)
    def loss_and_gradient(self, params, stats, keys, images, key, step):
        def loss_fn(params, stats):
            queries = []
            for view in (0, 1):
                draws = stream(key, step, f"query{view}")
                z, stats = self.encode(params, stats, images[:, view], draws)
                q, stats = self.layer("predictor", params, stats, z, True)
                queries.append(q / jnp.linalg.norm(q, axis=1, keepdims=True))
            loss = 0.0
            for q, k in ((queries[0], keys[1]), (queries[1], keys[0])):
                probabilities = jax.nn.softmax(q @ k.T / 0.2, axis=1)
                loss += -2 * 0.2 * jnp.log(jnp.diagonal(probabilities)).mean()
            return loss, stats

        return jax.value_and_grad(loss_fn, has_aux=True)(params, stats)


def trained(variant):
    """A run, and the first state's momentum encoder moved by hand with each state's parameters."""
    run = tiny.cached_run(variant, 8)
    average, averages = run.states[0].key_params, []
    for t, state in enumerate(run.states[:-1]):
        m = 1 - 0.25 * (1 + np.cos(np.pi * t / TOTAL)) / 2
        params = {part: state.params[part] for part in average}  # no predictor
        average = jax.tree.map(lambda k, p, m=m: m * k + (1 - m) * p, average, params)
        if run.method.setup.network.frozen:
            average["backbone"]["patches"] = run.states[0].key_params["backbone"]["patches"]
        averages.append(average)
    return run, averages


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_momentum_encoder_averages_the_parameters_before_each_update(variant):
    run, averages = trained(variant)
    assert set(run.states[0].key_params) == {"backbone", "head"} < set(run.states[0].params)
    for state, want in zip(run.states[1:], averages, strict=True):
        tiny.assert_close(state.key_params, want, 1e-12, 0)
    # shifted by a step it would be another average
    a, b = (s.params["head"]["dense1"]["kernel"] for s in run.states[1:3])
    assert np.linalg.norm(a - b) > 1e-3 * np.linalg.norm(a)


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_equal_the_dense_oracle(variant):
    """Loss, gradient, statistics of encoder, head, predictor and momentum encoder; in float64.

    On 8 devices, each step from the state before it.
    """
    run, averages = trained(variant)
    oracle, frozen = Oracle(run), run.method.setup.network.frozen
    with jax.enable_x64(True):
        key = jax.random.key(1)
        for step in range(3):
            before, after = run.states[step], run.states[step + 1]
            images = tiny.host_batch(run.method.run.config, step)["images"].astype(np.float64)
            keys, key_stats = oracle.keys(
                averages[step], before.key_batch_stats, images, key, before.step
            )
            tiny.assert_close(after.key_batch_stats, jax.device_get(key_stats), 1e-10, 0)
            (loss, stats), grads = oracle.loss_and_gradient(
                before.params, before.batch_stats, keys, images, key, before.step
            )
            assert loss > 0.5
            np.testing.assert_allclose(run.metrics[step]["loss"], loss, rtol=1e-10)
            tiny.assert_close(after.batch_stats, jax.device_get(stats), 1e-10, 0)
            grads = jax.device_get(grads)
            for part, name in frozen:
                length = np.sqrt(sum((x**2).sum() for x in grads[part].pop(name).values()))
                logged = run.metrics[step]["gradient_norm_patches"]
                np.testing.assert_allclose(logged, length, rtol=1e-8)
                assert length > 1e-3
            got, want = tiny.named_leaves(run.gradient(step)), tiny.named_leaves(grads)
            tiny.assert_close(got, want, 1e-8, 1e-12)


def test_statistics_are_of_one_view_and_then_of_the_other():
    """By hand, of the first layer of the head: two updates of a tenth, view 1 first."""
    run = tiny.cached_run("moco-v3", 8)
    before, after = run.states[0], run.states[1]
    images = tiny.host_batch(run.method.run.config, 0)["images"]
    backbone = run.method.setup.network.backbone
    with jax.enable_x64(True):
        for params, start, end in (
            (before.params, before.batch_stats, after.batch_stats),
            (after.key_params, before.key_batch_stats, after.key_batch_stats),
        ):
            mean, var = start["head"]["bn1"]["mean"], start["head"]["bn1"]["var"]
            for view in (0, 1):
                variables = {"params": params["backbone"], "batch_stats": start["backbone"]}
                x = (images[:, view] / 255 - MEAN) / STD
                f, _ = jax.jit(lambda v, x: backbone.apply(v, x, True, mutable="batch_stats"))(
                    variables, x
                )
                f = np.asarray(f) @ params["head"]["dense1"]["kernel"]
                mean, var = 0.9 * mean + 0.1 * f.mean(0), 0.9 * var + 0.1 * f.var(0)
            np.testing.assert_allclose(end["head"]["bn1"]["mean"], mean, rtol=1e-9)
            np.testing.assert_allclose(end["head"]["bn1"]["var"], var, rtol=1e-9)


@pytest.mark.slow
def test_a_step_in_micro_batches_is_the_step():
    """Encoders in four parts on two devices, with drop path; heads see the whole batch."""
    with jax.enable_x64(True):
        c = tiny.variant_config("moco-v3_vit")
        c.microbatch = 4
        got = tiny.run(tiny.build(c, 2), 2)
    assert got.method.setup.microbatches == 4
    want = tiny.cached_run("moco-v3_vit", 1)
    for a, b in zip(got.states[1:], want.states[1:3], strict=True):
        tiny.assert_close(a, b, 1e-9, 1e-12)
    for a, b in zip(got.metrics, want.metrics[:2], strict=True):
        tiny.assert_close(a, b, 1e-9, 1e-12)


def build(devices=1, **changes):
    return tiny.build(tiny.config("moco_v3", **changes), devices)


@pytest.mark.slow
def test_no_gradient_reaches_the_momentum_encoder():
    method = build(model__stages=(1,))
    state = tiny.place_state(method)
    batch = tiny.host_batch(method.run.config, 0)

    def loss(key_params):
        new = state.replace(key_params=key_params)
        return method.train_step(new, batch, jax.random.key(0))[1]["loss"]

    grads = jax.jit(jax.grad(loss))(state.key_params)
    assert all(not np.any(x) for x in jax.tree.leaves(grads))


def test_the_momentum_goes_from_the_first_value_to_1_on_a_cosine():
    method = build(moco_v3__momentum=0.99)
    got = [float(method.momentum(jnp.int32(t))) for t in range(TOTAL + 1)]
    assert got[0] == pytest.approx(0.99, abs=1e-7) and got[TOTAL] == 1
    assert got[TOTAL // 2] == pytest.approx(0.995, abs=1e-7)
    assert got[TOTAL // 4] == pytest.approx(1 - 0.01 * (2 + np.sqrt(2)) / 4, abs=1e-7)
    assert np.diff(got).min() > 0
    method = build(moco_v3__momentum=0.99, moco_v3__momentum_schedule="constant")
    assert [float(method.momentum(jnp.int32(t))) for t in (0, 3, 8)] == [np.float32(0.99)] * 3


FROZEN = tiny.VIT | {"head__layers": 3, "optimizer__learning_rate": 0.1}
OPTIMIZERS = {"optimizer__weight_decay": 0.1, "optimizer__decay_bn_and_bias": True}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "lars"])
def test_frozen_patches_are_the_same_in_both_encoders_to_the_last_bit(name):
    """After five steps with weight decay on everything, in which all else moves."""
    method = build(2, optimizer__name=name, **(FROZEN | OPTIMIZERS))
    key = jax.random.key(0)
    start = jax.jit(method.init, out_shardings=method.run.shardings)(key)
    begin = jax.device_get(start)
    step, state = jax.jit(method.train_step), start
    for t in range(5):
        batch = tiny.to_global(method.setup.mesh, tiny.host_batch(method.run.config, t))
        state, _ = step(state, batch, key)
    end = jax.device_get(state)
    for params in (end.params, end.key_params):
        backbone = dict(params["backbone"])
        jax.tree.map(
            np.testing.assert_array_equal, backbone.pop("patches"),
            begin.params["backbone"]["patches"],
        )  # fmt: skip
        moved = tiny.named_leaves({"backbone": backbone})
        first = {k: begin.params["backbone"][k] for k in backbone}
        for name, before in tiny.named_leaves({"backbone": first}).items():
            still = tiny.has_no_gradient(name, "moco_v3")
            assert still or np.any(moved[name] != before), name


def test_an_update_leaves_frozen_patches_of_the_momentum_encoder_alone():
    """And nothing else, though both encoders are drawn apart here."""
    method = build(**tiny.VIT)
    state = tiny.draw_state(jax.eval_shape(method.init, jax.random.key(0)))
    got = tiny.named_leaves(jax.jit(method.averaged)(state, 0.75))
    old, new = tiny.named_leaves(state.key_params), tiny.named_leaves(state.params)
    assert got.keys() == old.keys()
    for name, array in got.items():
        frozen = name.startswith("['backbone']['patches']")
        want = old[name] if frozen else 0.75 * old[name] + 0.25 * new[name]
        np.testing.assert_allclose(array, want, rtol=0 if frozen else 1e-6, atol=1e-7)
        assert not frozen or np.any(old[name] != new[name])


def test_init_copies_encoder_and_head():
    method = build(8, model__stages=(1,))
    state = jax.device_get(jax.jit(method.init)(jax.random.key(0)))
    for copy, tree in ((state.key_params, state.params),
                       (state.key_batch_stats, state.batch_stats)):  # fmt: skip
        assert set(tree) - set(copy) == {"predictor"}
        jax.tree.map(np.testing.assert_array_equal, copy, {part: tree[part] for part in copy})
    assert state.step == 0 and state.step.dtype == np.int32


def shapes_of(**changes):
    """Shapes of the parameters of head and predictor, by name."""
    abstract = jax.eval_shape(build(**changes).init, jax.random.key(0))
    names = {"head": abstract.params["head"], "predictor": abstract.params.get("predictor", {})}
    return {name: x.shape for name, x in jax.tree_util.tree_leaves_with_path(names)}


def named(shapes):
    return {"/".join(key.key for key in path): shape for path, shape in shapes.items()}


def test_the_predictor_may_be_left_out_or_end_without_batch_norm():
    assert not any("predictor" in n for n in named(shapes_of(moco_v3__predictor_layers=0)))
    with_norm, without = (
        jax.eval_shape(build(moco_v3__predictor_norm=x).init, jax.random.key(0))
        for x in (True, False)
    )
    assert "bn2" in with_norm.batch_stats["predictor"]
    assert "bn2" not in without.batch_stats["predictor"]
    deep = named(shapes_of(moco_v3__predictor_layers=3, moco_v3__predictor_hidden=5))
    assert [deep[f"predictor/dense{i}/kernel"] for i in (1, 2, 3)] == [(8, 5), (5, 5), (5, 8)]


@pytest.mark.slow
def test_without_a_predictor_the_embeddings_are_the_queries():
    """With a constant momentum: the loss by the oracle of the loss."""
    changes = {"predictor_layers": 0, "momentum_schedule": "constant"}
    method = build(model__stages=(1,), **{f"moco_v3__{k}": v for k, v in changes.items()})
    state = tiny.place_state(method)
    batch = tiny.host_batch(method.run.config, 0)
    _, metrics = jax.jit(method.train_step)(state, batch, jax.random.key(0))
    average = jax.tree.map(lambda k, p: 0.75 * k + 0.25 * p, state.key_params, state.params)

    @jax.jit
    def embed(params, stats, images):
        z, stats = [], dict(stats)
        for view in (0, 1):
            (_, e), stats = method.setup.network.apply(
                {"params": params} | stats, images[:, view], True, mutable=["batch_stats"]
            )
            z.append(e)
        return z

    images = ((batch["images"] / 255 - MEAN) / STD).astype(np.float32)
    q = embed(state.params, {"batch_stats": state.batch_stats}, images)
    k = embed(average, {"batch_stats": state.key_batch_stats}, images)
    want = oracles.ctr(q[0], k[1], 0.2)[0] + oracles.ctr(q[1], k[0], 0.2)[0]
    np.testing.assert_allclose(metrics["loss"], want, rtol=1e-4)


def test_heads_of_the_published_configs():
    """For a ResNet: 2 layers, the predictor's last without BN; for a ViT 3, and all with BN."""
    heads = {}
    for arg in ("", "r50"):
        c = moco_v3_tpu.get_config(arg)
        c.batch_size, c.data.image_size = 16, 32
        c.model.stages, c.model.width, c.vit.width, c.vit.depth = (1,), 8, 24, 1
        c.optimizer.warmup = "0 steps"
        state = jax.eval_shape(tiny.build(c, 1).init, jax.random.key(0))
        heads[arg] = {
            part: {
                "/".join(k.key for k in path): x.shape
                for path, x in jax.tree_util.tree_leaves_with_path(state.params[part])
            }
            for part in ("head", "predictor")
        }
        statistics = {p: sorted(state.batch_stats[p]) for p in ("head", "predictor")}
        heads[arg]["norms"] = statistics
    norm = lambda i: {f"bn{i}/scale": (4096,), f"bn{i}/bias": (4096,)}  # noqa: E731
    predictor = {"dense1/kernel": (256, 4096), "dense2/kernel": (4096, 256)} | norm(1)
    assert heads["r50"] == {
        "head": {"dense1/kernel": (8, 4096), "dense2/kernel": (4096, 256)} | norm(1),
        "predictor": predictor,
        "norms": {"head": ["bn1", "bn2"], "predictor": ["bn1"]},
    }
    assert heads[""] == {
        "head": {
            "dense1/kernel": (24, 4096),
            "dense2/kernel": (4096, 4096),
            "dense3/kernel": (4096, 256),
        } | norm(1) | norm(2),
        "predictor": predictor,
        "norms": {"head": ["bn1", "bn2", "bn3"], "predictor": ["bn1", "bn2"]},
    }  # fmt: skip


def test_features_come_from_the_encoder_that_is_trained():
    run = tiny.cached_run("moco-v3", 8)
    state, images = run.states[1], tiny.host_batch(run.method.run.config, 9)["images"][:, 0]
    with jax.enable_x64(True):
        encode = jax.jit(run.method.encode)
        got = encode(state, images)
        other = jax.tree.map(np.zeros_like, (state.key_params, state.key_batch_stats))
        blind = state.replace(key_params=other[0], key_batch_stats=other[1])
        np.testing.assert_array_equal(encode(blind, images), got)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"momentum": 1.0}, r"moco_v3.momentum=1.0: expected 0 <= momentum < 1"),
        ({"momentum_schedule": "linear"}, "momentum_schedule='linear': choose cosine or constant"),
        ({"predictor_layers": -1}, "predictor_layers=-1 .* expected 0 or more layers, of a width"),
        ({"temperature": 0.0}, "moco_v3.temperature=0.0: expected a finite number > 0, set e.g."),
        ({"predictor_hidden": 0}, "predictor_hidden=0: expected 0 or more layers"),
    ],
)
def test_settings_that_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        build(**{f"moco_v3__{name}": value for name, value in changes.items()})
