"""The loss of MoCo v3 against a NumPy float64 oracle, and the same on any number of devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from test_moco_loss import assert_close, collectives, mesh_of

from common.errors import UserError
from common.sharding import batch_sharding
from moco_jax.v3_loss import batch_info_nce

D = 6


def example(b=16, noise=1.0, seed=0):
    """Queries and keys, whose likeness falls with the noise."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(b, D))
    queries, keys = (base + noise * rng.normal(size=(b, D)) for _ in range(2))
    return (2 * queries).astype(np.float32), keys.astype(np.float32)


@functools.cache  # compiling is most of the time of these tests
def value_and_grad(devices, block=None):
    def loss(queries, keys, temperature):
        return batch_info_nce(queries, keys, temperature, mesh=mesh_of(devices), block_size=block)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def test_the_oracle_agrees_with_finite_differences():
    queries, keys = (x.astype(np.float64) for x in example(b=4))
    gradient = oracles.ctr(queries, keys, 0.3)[1]
    for i, j in np.ndindex(*queries.shape):
        step = np.zeros_like(queries)
        step[i, j] = 1e-5
        up, down = (oracles.ctr(queries + s, keys, 0.3)[0] for s in (step, -step))
        assert abs((up - down) / 2e-5 - gradient[i, j]) < 1e-8


# blocks: of all logits at once; of 7, which divides neither the queries nor a device's keys
@pytest.mark.parametrize(
    ("devices", "b", "block"),
    [
        (None, 16, 7), (1, 16, None), (8, 16, 7), (None, 45, 16), (8, 72, 16),
        *(pytest.param(n, 16, 7, marks=pytest.mark.slow) for n in (2, 4)),
    ],
)  # fmt: skip
def test_against_numpy(devices, b, block):
    run = value_and_grad(devices, block)
    for temperature, noise in [(0.05, 1), (0.05, 0.05), (0.2, 1), (1.0, 1)]:
        queries, keys = example(b, noise)
        (value, _), gradients = run(queries, keys, temperature)
        assert_close(value, gradients[0], oracles.ctr(queries, keys, temperature))
        np.testing.assert_array_equal(gradients[1], 0)  # keys carry no gradient


def test_float64_is_the_same_on_any_number_of_devices():
    args = *(x.astype(np.float64) for x in example()), 0.1
    with jax.enable_x64(True):
        (value, _), gradients = value_and_grad(1, 7)(*args)
        assert value.dtype == np.float64
        assert_close(value, gradients[0], oracles.ctr(*args), 1e-12, 1e-12)
        for devices in (2, 8):
            (other, _), other_gradients = value_and_grad(devices, 7)(*args)
            assert_close(other, other_gradients[0], (value, gradients[0]), 1e-12, 1e-9)


def test_gradient_of_shared_parameters_is_not_scaled_by_the_device_count():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(16, 5)), rng.normal(size=(5, D))
    _, keys = example()

    def gradient(devices):
        mesh = mesh_of(devices)
        queries = jax.device_put(x.astype(np.float32), batch_sharding(mesh))
        loss = jax.grad(lambda w, x: batch_info_nce(x @ w, keys, mesh=mesh)[0])
        return np.asarray(jax.jit(loss)(w.astype(np.float32), queries))

    want = x.T @ oracles.ctr(x @ w, keys, 0.2)[1]
    for devices in (1, 8):
        np.testing.assert_allclose(gradient(devices), want, atol=1e-5 * np.linalg.norm(want))


@pytest.mark.parametrize("devices", [1, 4])
def test_metrics_against_numpy(devices):
    queries, keys = example(noise=0.6)
    (_, got), _ = value_and_grad(devices, 7)(queries, keys, 0.2)
    cosine = oracles.unit(queries.astype(np.float64)) @ oracles.unit(keys.astype(np.float64)).T
    own = np.eye(16, dtype=bool)
    rank = ((cosine >= np.diagonal(cosine)[:, None]) & ~own).sum(axis=1)
    want = {
        "contrastive_top1": np.mean(rank < 1),
        "contrastive_top5": np.mean(rank < 5),
        "positive_similarity": cosine[own].mean(),
        "negative_similarity": cosine[~own].mean(),
    }
    assert 0 < want["contrastive_top1"] < want["contrastive_top5"] < 1  # or it would show little
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("temperature", "b"),
    [(0.2, 1000), *(pytest.param(t, 4096, marks=pytest.mark.slow) for t in (0.2, 1.0))],
)
def test_random_vectors_start_near_2_t_log_b(temperature, b):
    """Of 256 dimensions, as in the recipes; their cosines have a deviation of 1 / 16.

    1,000 is no multiple of a tile of 512. The mean of the exponentials adds 2 T / (2 T^2 256).
    """
    rng = np.random.default_rng(0)
    queries, keys = rng.normal(size=(2, b, 256)).astype(np.float32)
    loss, metrics = jax.jit(functools.partial(batch_info_nce, block_size=512))(
        queries, keys, temperature
    )
    start = 2 * temperature * np.log(b)
    assert loss == pytest.approx(start + 1 / (256 * temperature), abs=0.02)
    assert metrics["contrastive_top1"] < 0.02
    np.testing.assert_allclose(loss, oracles.ctr(queries, keys, temperature)[0], rtol=1e-5)


def test_collapsed_vectors_have_no_accuracy_and_a_loss_of_2_t_log_b():
    ones = np.ones((16, D), np.float32)
    (loss, metrics), _ = value_and_grad(4, 7)(ones, ones, 0.2)
    np.testing.assert_allclose(loss, 0.4 * np.log(16), rtol=1e-6)
    assert metrics["contrastive_top1"] == metrics["contrastive_top5"] == 0


def test_the_gradient_does_not_grow_with_1_over_t():
    """Of vectors that are told apart badly: bounded by 4 / b a row, whatever T is."""
    queries, keys = example(noise=3)
    queries = oracles.unit(queries).astype(np.float32)
    for temperature in (1.0, 0.1, 0.01):
        _, gradients = value_and_grad(1, None)(queries, keys, temperature)
        rows = np.linalg.norm(gradients[0], axis=1)
        assert 0.2 / 16 < rows.max() <= 4 / 16 + 1e-6


def test_one_query_has_no_negatives():
    (loss, metrics), gradients = value_and_grad(None, None)(*example(1), 0.2)
    assert loss == metrics["negative_similarity"] == 0 and metrics["contrastive_top1"] == 1
    np.testing.assert_allclose(gradients[0], 0, atol=1e-6)


def test_zero_queries_have_finite_gradients_and_bfloat16_is_scored_in_float32():
    queries, keys = example()
    queries[3] = 0
    queries, keys = (jnp.asarray(x, jnp.bfloat16) for x in (queries, keys))
    (value, _), gradients = value_and_grad(4, 7)(queries, keys, 0.05)
    assert value.dtype == jnp.float32
    assert np.isfinite(np.asarray(gradients[0], np.float32)).all()
    np.testing.assert_allclose(value, oracles.ctr(queries, keys, 0.05)[0], rtol=1e-5)


@pytest.mark.optimised
def test_only_the_keys_are_gathered():
    """Compiled for 8 devices, with its gradient: nothing larger moves, and it moves once."""
    rows = jax.ShapeDtypeStruct((64, 8), jnp.float32, sharding=batch_sharding(mesh_of(8)))
    gradient = jax.grad(lambda q, k: batch_info_nce(q, k, mesh=mesh_of(8)), has_aux=True)
    found = collectives(jax.jit(gradient).lower(rows, rows).compile().as_text())
    large = [(kind, size) for kind, size in found if size > 8]
    assert large == [("all-gather", 64 * 8)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"keys": jnp.ones((8, D))},
            r"batch_info_nce: queries are \[16, 6\] and keys \[8, 6\]: expected two equal shapes",
        ),
        ({"queries": jnp.ones((16, 2, 3)), "keys": jnp.ones((16, 2, 3))}, r"expected .* \[b, d\]"),
        ({"temperature": 0}, "temperature=0: expected a finite number > 0"),
        (
            {"mesh": 3},
            "batch_info_nce: 16 queries cannot be split over 3 devices: use a multiple of 3",
        ),
    ],
)
def test_user_mistakes(change, message):
    queries, keys = example()
    args = {"queries": queries, "keys": keys} | change
    args["mesh"] = mesh_of(args.get("mesh"))
    with pytest.raises(UserError, match=message):
        batch_info_nce(**args)
