"""Vision transformers in training: drop path, types, recomputation, and no batch statistics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_vit import drawn, images_of, model

from common.method import stream
from common.models import vit
from common.run.checkpoint import Checkpoints
from common.sharding import replicated

DEPTH, RATE = 5, 0.4


def keys_of(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


@functools.cache
def factors(count=4000):
    deep = vit.ViT(depth=DEPTH, drop_path=RATE)
    return np.asarray(jax.jit(lambda keys: deep.keep(keys, jnp.float32))(keys_of(count)))


def test_rates_of_drop_path_rise_linearly_from_0_and_its_factors_have_a_mean_of_1():
    """Huang et al. 2016, section 3, on both branches of a block, as in timm."""
    keep = factors()
    assert keep.shape == (len(keep), DEPTH, 2) and keep.dtype == np.float32
    for i, rate in enumerate((0.0, 0.1, 0.2, 0.3, 0.4)):
        values = np.unique(keep[:, i])
        np.testing.assert_allclose(values, [0, 1 / (1 - rate)] if rate else [1], rtol=1e-6)
        spread = 5 * np.sqrt(rate * (1 - rate) / len(keep))
        np.testing.assert_allclose((keep[:, i] == 0).mean(0), [rate] * 2, rtol=0, atol=spread)


def test_branches_blocks_and_images_are_dropped_independently():
    dropped = (factors() == 0)[:, 1:].reshape(len(factors()), -1).astype(float)
    bound = 5 / np.sqrt(len(dropped))
    pairs = np.corrcoef(dropped.T) - np.eye(dropped.shape[1])
    assert np.abs(pairs).max() < bound
    assert np.abs(np.corrcoef(dropped[:-1, -1], dropped[1:, -1])[0, 1]) < bound


@functools.cache
def random_encoder():
    """`(encode(images, train, keys), images [8, ...])` of an encoder that drops paths."""
    m, x = model(drop_path=0.5), images_of(8).astype(np.float32)
    variables = tiny.draw_state(
        jax.eval_shape(lambda: m.init(jax.random.key(0), jnp.asarray(x), False))
    )
    apply = jax.jit(m.apply, static_argnums=2)
    return lambda x, train, keys=None: np.asarray(apply(variables, x, train, keys)), x


def test_nothing_is_dropped_in_evaluation_or_without_keys():
    encode, x = random_encoder()
    plain = encode(x, False)
    np.testing.assert_array_equal(encode(x, False, keys_of(8)), plain)
    np.testing.assert_array_equal(encode(x, True), plain)
    assert (np.abs(encode(x, True, keys_of(8)) - plain).max(1) > 1e-3).sum() >= 4


def test_an_image_gets_its_draws_in_any_part_of_a_batch():
    encode, x = random_encoder()
    whole = encode(x, True, keys_of(8))
    parts = [encode(x[i : i + 2], True, keys_of(8)[i : i + 2]) for i in range(0, 8, 2)]
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-5, atol=1e-5)
    order = np.random.default_rng(0).permutation(8)
    np.testing.assert_allclose(encode(x[order], True, keys_of(8)[order]), whole[order], rtol=1e-5,
                               atol=1e-5)  # fmt: skip


def test_each_use_and_step_has_draws_of_its_own():
    root = jax.random.key(0)
    names = ("encoder", "query0", "query1", "key0", "key1")
    made = [stream(root, jnp.int32(step), name) for step in range(3) for name in names]
    rows = [
        jax.random.key_data(keys).tobytes() for key in made for keys in jax.random.split(key, 4)
    ]
    assert len(set(rows)) == len(rows)
    again = stream(root, jnp.int32(2), "key1")
    assert jax.random.key_data(again).tobytes() == jax.random.key_data(made[-1]).tobytes()


def test_equal_views_get_different_draws_in_a_step():
    """Of one image given sixteen times; one key for a whole pass would drop the same for all."""
    run = tiny.build(tiny.config("simclr", **tiny.VIT | {"vit__drop_path": 0.6}), 1).setup
    state = tiny.draw_state(jax.eval_shape(run.init, *jax.random.split(jax.random.key(0))))
    images = np.repeat(tiny.host_batch(tiny.config("simclr"), 0)["images"][:1, 0], 16, 0)
    forward = jax.jit(lambda key: run.forward(state.params, state.batch_stats, images, key)[0])
    first, second = (np.asarray(forward(key)) for key in keys_of(2))
    assert len(np.unique(first.round(4), axis=0)) >= 4  # of the 16 outcomes of two blocks
    assert (np.abs(first - second).max(1) > 1e-3).sum() >= 4


def test_bfloat16_computes_in_it_and_keeps_the_rest_in_float32():
    m, x = model(dtype=jnp.bfloat16, positions="learned"), images_of().astype(np.float32)
    wide = model(positions="learned")
    variables = drawn(wide, jnp.asarray(x), False)
    variables = jax.tree.map(lambda v: v.astype(np.float32), variables)

    def forward(variables):
        return m.apply(
            variables, x, False, mutable=["intermediates"],
            capture_intermediates=lambda part, _: not isinstance(part, vit.ViT),
        )  # fmt: skip

    started = jax.eval_shape(lambda: m.init(jax.random.key(0), x, False))
    features, record = jax.eval_shape(forward, variables)
    kept = jax.tree.leaves([started, features])
    assert {v.dtype for v in kept} == {np.dtype(np.float32)}
    inner = record["intermediates"]
    last = inner.pop("norm")
    assert jax.tree.leaves(last)[0].dtype == np.float32
    assert {v.dtype for v in jax.tree.leaves(inner)} == {jnp.dtype(jnp.bfloat16)}
    got, want = jax.jit(forward)(variables)[0], jax.jit(wide.apply, static_argnums=2)(
        variables, x, False
    )  # fmt: skip
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert 1e-4 < error < 0.03


def equations(jaxpr):
    """All equations of a program, those of inner programs too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (list, tuple)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def test_softmax_and_the_statistics_of_norms_are_float32_in_bfloat16():
    m, x = model(dtype=jnp.bfloat16), images_of().astype(np.float32)
    variables = jax.eval_shape(lambda: m.init(jax.random.key(0), x, False))
    program = jax.make_jaxpr(lambda v: m.apply(v, x, False))(variables)
    types = {}
    for equation in equations(program.jaxpr):
        types.setdefault(equation.primitive.name, set()).add(str(equation.outvars[0].aval.dtype))
    for name in ("exp", "rsqrt", "reduce_max"):
        assert types[name] == {"float32"}, name
    assert "bfloat16" in types["dot_general"]


def test_statistics_of_a_norm_are_those_of_its_rounded_input():
    """Means of a hundred deviations: sums in bfloat16 would lose the variance."""
    x = jnp.asarray(np.random.default_rng(3).normal(20, 0.2, (64, 256)), jnp.bfloat16)
    norm = vit.layer_norm(jnp.bfloat16)
    y = jax.jit(lambda: norm.init_with_output(jax.random.key(0), x)[0])()
    exact = np.asarray(x, np.float64)
    exact = exact - exact.mean(1, keepdims=True)
    exact /= np.sqrt((exact**2).mean(1, keepdims=True) + 1e-6)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=0, atol=0.03)


@functools.cache
def recomputed(remat):
    """`(gradient, bytes that the forward pass leaves for the backward one)`."""
    m, x = model(depth=2, drop_path=0.2, remat=remat), images_of().astype(np.float32)
    variables = jax.tree.map(lambda v: v.astype(np.float32), drawn(m, jnp.asarray(x), False))

    def loss(params):
        return (m.apply({"params": params}, x, True, keys_of(4)) ** 2).sum()

    # XLA for CPUs takes recomputation out again, so that its memory says nothing here.
    kept = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], variables["params"])
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
    return jax.device_get(jax.jit(jax.grad(loss))(variables["params"])), size


@pytest.mark.slow
def test_what_is_recomputed_changes_no_gradient_and_saves_memory():
    """Stored: everything; inputs of blocks and results of products; inputs of blocks only."""
    gradient, stored = recomputed("none")
    sizes = [stored]
    for remat in ("convs", "blocks"):
        again, size = recomputed(remat)
        tiny.assert_close(again, gradient, 1e-5, 1e-5)
        sizes.append(size)
    parameters = sum(x.nbytes for x in jax.tree.leaves(gradient))
    none, convs, blocks = (size - parameters for size in sizes)
    assert none > 1.5 * convs
    # Of a block of width d: query, key, value, attention, and 2 d in the perceptron. The biases of
    # these products are then of no more use.
    rows, d = 4 * 5, 12
    assert convs - blocks == 2 * 4 * (rows * (3 + 1 + 2) * d - (3 + 2) * d), (none, convs, blocks)


WITHOUT_NORM = tiny.VIT | {"head__kind": "moco_v2"}


@pytest.mark.parametrize("method", ["simclr", pytest.param("moco", marks=pytest.mark.slow)])
def test_a_state_without_batch_statistics_goes_to_the_disk_and_back(method, tmp_path):
    """Frozen parameters have no place in the state of the optimiser either."""
    c = tiny.config(method, optimizer__name="adamw", **WITHOUT_NORM)
    run = tiny.prepared(c, 2)
    assert run.abstract.batch_stats == {}
    assert not run.setup.network.has_batch_norm
    state = tiny.place_state(run.method, seed=5)
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(3, state, {})
    with Checkpoints(tmp_path, 1) as checkpoints:
        got, _ = checkpoints.restore(3, run.abstract, run.shardings)
    assert jax.tree.structure(got) == jax.tree.structure(state)
    tiny.assert_close(got, state, 0, 0)
    assert "patches" in got.params["backbone"]
    moments = [name for name in tiny.named_leaves(got.opt_state) if "mu" in name]
    assert moments and not any("patches" in name for name in moments)
    images = tiny.host_batch(c, 0)["images"][:, 0]
    encode = jax.jit(run.method.encode, out_shardings=replicated(run.mesh))
    assert np.isfinite(encode(got, images)).all()
