"""A whole train step: the same on any number of devices, and what a few dense lines compute."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from common.method import embedding_metrics
from common.sharding import replicated

QUICK = ("simclr",)
# Eight devices have every collective. With fewer, other groups of batch norm lie on one device (all
# of the 4 groups of moco_symmetric and distil_groups two by two, or one by one), and the queues'
# pieces are longer.
FEWER = {2: ("simclr", "moco", "moco_symmetric", "distil_groups"), 4: ("moco_symmetric",)}
CASES = [
    *((name, 8) for name in QUICK),
    *(pytest.param(name, 8, marks=pytest.mark.slow) for name in tiny.VARIANTS if name not in QUICK),
    *(pytest.param(x, n, marks=pytest.mark.slow) for n, names in FEWER.items() for x in names),
]


@pytest.mark.parametrize(("variant", "devices"), CASES)
def test_steps_do_not_depend_on_the_number_of_devices(variant, devices):
    """Loss, gradient, batch statistics, queue, parameters, probe: float64, per tensor 1e-9.

    The first state's momentum is the gradient; later ones show that errors do not build up. What
    is truly 0 differs from 0 by rounding: 1e-12, where the gradient as a whole is of order 1.
    """
    one, many = tiny.cached_run(variant, 1), tiny.cached_run(variant, devices)
    assert len(many.state.step.sharding.device_set) == devices
    kind = one.method.run.config.head.kind
    for name, x in tiny.named_leaves(one.gradient()).items():
        says = np.linalg.norm(x) > 1e-4
        assert says != tiny.has_no_gradient(name, kind), f"a gradient that says nothing: {name}"
    for got, want in zip(many.states[1:], one.states[1:], strict=True):
        tiny.assert_close(got, want, 1e-9, 1e-12)
    for got, want in zip(many.metrics, one.metrics, strict=True):
        tiny.assert_close(got, want, 1e-9, 1e-12)


@pytest.mark.slow
@pytest.mark.optimised
@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_the_first_step_in_float32_is_the_same_on_eight_devices(variant):
    one, many = (tiny.cached_run(variant, n, "float32") for n in (1, 8))
    np.testing.assert_allclose(many.metrics[0]["loss"], one.metrics[0]["loss"], rtol=1e-5)
    got, want = (
        np.concatenate([x.ravel() for x in jax.tree.leaves(r.gradient())]) for r in (many, one)
    )
    assert got.dtype == np.float32
    assert np.linalg.norm(got - want) <= 1e-2 * np.linalg.norm(want)
    exact = tiny.cached_run(variant, 1)
    np.testing.assert_allclose(one.metrics[0]["loss"], exact.metrics[0]["loss"], rtol=1e-5)


@pytest.mark.parametrize(
    "variant",
    [
        *QUICK,
        *(
            pytest.param(x, marks=pytest.mark.slow)
            for x in ("moco_symmetric", "moco", "moco-v3_vit")
        ),
    ],
)
def test_a_step_compiles_once_and_leaves_its_state_as_it_was(variant):
    """Shape, dtype, weak type, sharding: the same before and after, or `jit` would compile anew."""
    run = tiny.cached_run(variant, 8)
    assert run.traces == 1
    assert run.first == run.last
    share = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(run.state))
    assert run.step_fn.memory_analysis().alias_size_in_bytes == share  # all of it is donated
    assert int(run.states[-1].step) == 3
    assert {x.dtype for x in jax.tree.leaves(run.states[-1].params)} == {np.dtype("float64")}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["simclr", "moco", "moco_v3"])
def test_a_plain_jit_of_the_step_compiles_once_too(method):
    """In float32, with nothing but arrays that are already in their place."""
    chex.clear_trace_counter()  # it counts by name, and methods may share a step
    method = tiny.build(tiny.config(method, model__bn_groups=4), 2)
    state = tiny.place_state(method)
    key = jax.device_put(jax.random.key(0), state.step.sharding)
    before = tiny.avals(state)
    step = jax.jit(chex.assert_max_traces(method.train_step, n=1), donate_argnums=0)
    for i in range(3):
        batch = tiny.to_global(method.setup.mesh, tiny.host_batch(method.run.config, i))
        with jax.transfer_guard("disallow"):
            state, _ = step(state, batch, key)
    assert step._cache_size() == 1
    assert [x[:3] for x in tiny.avals(state).values()] == [x[:3] for x in before.values()]


def dense_losses(variant, labels, similarity):
    """Of each row, from `exp(cosine / T)` with itself left out: `[2b, 2b]`, 0 on the diagonal."""
    b = len(labels)
    positive = np.roll(np.eye(2 * b), b, axis=1)
    denominator = similarity - similarity * positive if variant == "simclr_dcl" else similarity
    if variant == "simclr_supcon":
        twice = np.tile(labels, 2)
        same = (twice[:, None] == twice) & (twice >= 0)[:, None] & ~np.eye(2 * b, dtype=bool)
        positive = np.maximum(positive, same)
    shares = jnp.where(positive > 0, similarity, 1) / denominator.sum(1, keepdims=True)
    return -(positive * jnp.log(shares)).sum(1) / positive.sum(1)


@pytest.mark.parametrize(
    "variant",
    ["simclr", *(pytest.param(f"simclr_{x}", marks=pytest.mark.slow) for x in ("dcl", "supcon"))],
)
def test_simclr_step_equals_a_dense_one_in_another_order(variant):
    """The loss as a 2N x 2N matrix, first all first views, then all second ones; float64."""
    run = tiny.cached_run(variant, 8)
    setup, before, after = run.method.setup, run.states[0], run.states[1]
    batch = tiny.host_batch(run.method.run.config, 0)
    images, b = batch["images"], len(batch["images"])
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    x = (np.concatenate([images[:, 0], images[:, 1]]) / 255 - mean) / std

    def loss_fn(params):
        (_, z), new = setup.network.apply(
            {"params": params, "batch_stats": before.batch_stats},
            jnp.asarray(x), train=True, mutable=["batch_stats"],
        )  # fmt: skip
        z = z / jnp.linalg.norm(z, axis=1, keepdims=True)
        similarity = jnp.exp(z @ z.T / 0.1) * (1 - np.eye(2 * b))
        return dense_losses(variant, batch["labels"], similarity).mean(), new["batch_stats"]

    with jax.enable_x64(True):
        (loss, stats), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(before.params)
        np.testing.assert_allclose(run.metrics[0]["loss"], loss, rtol=1e-10)
        tiny.assert_close(run.gradient(), jax.device_get(grads), 1e-9, 1e-12)
        tiny.assert_close(after.batch_stats, jax.device_get(stats), 1e-10, 0)
        want = jax.tree.map(lambda p, g: p - 0.5 * np.asarray(g), before.params, grads)
        tiny.assert_close(after.params, want, 1e-10, 0)


VITS = ("moco-v3_vit", "simclr_vit")


@pytest.mark.parametrize(
    "variant", [*QUICK, *(pytest.param(x, marks=pytest.mark.slow) for x in ("moco-v3", *VITS))]
)
def test_metrics_say_what_they_are_called(variant):
    """The norm of a gradient is of what trains; that of frozen patches is in test_v3."""
    run = tiny.cached_run(variant, 8)
    metrics, before = run.metrics[1], run.states[1]
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])  # noqa: E731
    grads = run.gradient(1)
    lengths = {"gradient_norm": np.linalg.norm(flat(grads))}
    if variant == "simclr_vit":
        lengths["gradient_norm_patches"] = np.linalg.norm(flat(grads["backbone"]["patches"]))
    for name, length in lengths.items():
        np.testing.assert_allclose(metrics[name], length, rtol=1e-9, err_msg=name)
    np.testing.assert_allclose(
        metrics["parameter_norm"], np.linalg.norm(flat(before.params)), rtol=1e-9
    )
    assert metrics["learning_rate"] == 0.5
    assert all(np.shape(x) == () for x in metrics.values())


@pytest.mark.parametrize("spread", [1.0, 0.0])
def test_signs_of_collapse(spread):
    """`feature_std` by its definition; 0 when all features are one."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(1, 5)) + spread * rng.normal(size=(40, 5))
    embeddings = rng.normal(size=(40, 3))
    got = embedding_metrics(jnp.asarray(features, jnp.float32), jnp.asarray(embeddings))
    unit = np.array([row / np.sqrt((row**2).sum()) for row in features])
    std = np.mean([np.sqrt(((c - c.mean()) ** 2).mean()) for c in unit.T]) * np.sqrt(5)
    np.testing.assert_allclose(got["feature_std"], std, rtol=1e-5, atol=1e-6)
    assert std == pytest.approx(0, abs=1e-12) if spread == 0 else std > 0.5
    length = np.mean([np.sqrt((row**2).sum()) for row in embeddings])
    np.testing.assert_allclose(got["embedding_norm"], length, rtol=1e-5)


def test_the_probe_learns_without_moving_the_encoder():
    """Other labels: another probe, the same encoder bit by bit."""
    run = tiny.cached_run("simclr", 8)
    mesh, batch = run.method.setup.mesh, tiny.host_batch(run.method.run.config, 0)
    batch["labels"] = (batch["labels"] + 1) % tiny.CLASSES
    with jax.enable_x64(True):
        key = jax.device_put(jax.random.key(1), replicated(mesh))
        state = tiny.place_state(run.method)
        state = jax.device_get(run.step_fn(state, tiny.to_global(mesh, batch), key)[0])
    want = run.states[1]
    assert not np.array_equal(state.probe.params["kernel"], want.probe.params["kernel"])
    jax.tree.map(np.testing.assert_array_equal, state.replace(probe=None), want.replace(probe=None))
