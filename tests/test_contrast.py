"""The functions that both losses use, against plain NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from common import contrast
from common.errors import UserError
from common.sharding import make_mesh


def dense(queries, keys, query_ids, key_ids):
    """Log-sum-exp per row over the pairs that count, by loops; and the softmax weights."""
    queries, keys = np.asarray(queries, np.float64), np.asarray(keys, np.float64)
    lse, weights = np.full(len(queries), -np.inf), np.zeros((len(queries), len(keys)))
    for i, q in enumerate(queries):
        js = [j for j in range(len(keys)) if key_ids[j] >= 0 and key_ids[j] != query_ids[i]]
        if not js or query_ids[i] < 0:
            continue
        logits = np.array([q @ keys[j] for j in js])
        shift = logits.max()
        lse[i] = shift + np.log(np.exp(logits - shift).sum())
        weights[i, js] = np.exp(logits - lse[i])
    return lse, weights


def test_normalize_values_and_zero():
    x = np.array([[3.0, 4.0], [0.0, 0.0], [-1e-3, 0.0], [1e-9, 0.0]], np.float32)
    got = contrast.normalize(jnp.asarray(x))
    # The last is shorter than sqrt(eps) = 1e-6: divided by 1e-6, not by its length.
    np.testing.assert_allclose(got, [[0.6, 0.8], [0, 0], [-1, 0], [1e-3, 0]], rtol=1e-6)
    gradient = jax.grad(lambda x: contrast.normalize(x).sum())(jnp.zeros((2, 3)))
    assert np.isfinite(gradient).all()


def test_normalize_promotes_but_never_demotes():
    assert contrast.normalize(jnp.ones((1, 2), jnp.bfloat16)).dtype == jnp.float32
    with jax.enable_x64(True):
        assert contrast.normalize(jnp.ones((1, 2), jnp.float64)).dtype == jnp.float64


@pytest.mark.parametrize("block", [1, 7, None])
def test_rows_lse_against_loops(block):
    rng = np.random.default_rng(0)
    n, m, d = 11, 17, 4
    queries, keys = rng.normal(size=(n, d)) * 3, rng.normal(size=(m, d)) * 3
    query_ids, key_ids = rng.integers(0, 4, n), rng.integers(-1, 4, m)
    cotangent = rng.normal(size=n)
    want, weights = dense(queries, keys, query_ids, key_ids)

    def run(q, k):
        ids = jnp.asarray(query_ids, jnp.int32), jnp.asarray(key_ids, jnp.int32)
        return contrast.rows_lse(q, k, *ids, block_size=block)[0]

    got, vjp = jax.vjp(jax.jit(run), *(jnp.asarray(x, jnp.float32) for x in (queries, keys)))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    d_queries, d_keys = vjp(jnp.asarray(cotangent, jnp.float32))
    np.testing.assert_allclose(d_queries, cotangent[:, None] * (weights @ keys), atol=1e-4)
    np.testing.assert_allclose(d_keys, (cotangent[:, None] * weights).T @ queries, atol=1e-4)


def test_rows_lse_defaults_to_all_pairs_and_large_logits_do_not_overflow():
    queries = jnp.array([[1000.0], [-1000.0], [0.0]])
    keys = jnp.array([[1.0], [2.0], [2.0]])
    lse, above = contrast.rows_lse(queries, keys, block_size=2)
    np.testing.assert_allclose(lse, [2000 + np.log(2), -1000, np.log(3)], rtol=1e-6)
    np.testing.assert_array_equal(above, 0)


def test_rows_lse_of_no_keys_is_minus_infinity_without_gradient():
    rng = np.random.default_rng(0)
    queries, keys = (jnp.asarray(rng.normal(size=(3, 2)), jnp.float32) for _ in range(2))
    query_ids = jnp.array([5, 1, -1])  # the first sees no other id, the last is left out
    key_ids = jnp.array([5, -1, 5])

    def run(q, k):
        lse = contrast.rows_lse(q, k, query_ids, key_ids, block_size=2)[0]
        return jax.nn.softplus(lse).sum(), lse

    gradients, lse = jax.grad(run, argnums=(0, 1), has_aux=True)(queries, keys)
    assert np.isneginf(lse[0]) and np.isneginf(lse[2]) and np.isfinite(lse[1])
    assert np.isfinite(gradients[0]).all() and np.isfinite(gradients[1]).all()
    np.testing.assert_array_equal(np.abs(gradients[0]).sum(axis=1) > 0, [False, True, False])
    np.testing.assert_array_equal(np.abs(gradients[1]).sum(axis=1) > 0, [True, False, True])


def test_non_finite_input_gives_a_non_finite_result():
    """Divergence must stay visible: nothing here may turn a NaN into a number."""
    queries = jnp.array([[1.0, 0.0], [jnp.nan, 1.0]])
    lse, _ = contrast.rows_lse(queries, jnp.ones((3, 2)), block_size=2)
    np.testing.assert_array_equal(np.isnan(lse), [False, True])


@pytest.mark.parametrize("block", [3, None])
def test_above_counts_logits_that_reach_the_threshold(block):
    queries = jnp.array([[1.0], [1.0], [-1.0]])
    keys = jnp.array([[0.1], [0.5], [0.9], [0.5], [-2.0]])
    key_ids = jnp.array([1, 1, 1, -1, 1])
    threshold = jnp.array([0.5, 0.95, -0.5])
    ids = jnp.array([0, 0, 0])
    _, above = contrast.rows_lse(queries, keys, ids, key_ids, threshold, block_size=block)
    np.testing.assert_array_equal(above, [2, 0, 3])


@pytest.mark.parametrize("devices", [1, 4])
def test_self_lse_is_rows_lse_of_the_gathered_rows(devices):
    """The shortcut by symmetry against loops, with a cotangent that differs from row to row."""
    rng = np.random.default_rng(1)
    n, d = 12, 3
    z, cotangent = rng.normal(size=(n, d)), rng.normal(size=n)
    ids = np.repeat(np.arange(n // 2), 2)
    want, weights = dense(z, z, ids, ids)
    pull = cotangent[:, None] * weights
    mesh = make_mesh(jax.devices()[:devices])

    def local(z, ids):
        return contrast.self_lse(z, ids, jnp.zeros(len(z)), axis="data", block_size=2)[0]

    mapped = jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    args = jnp.asarray(z, jnp.float32), jnp.asarray(ids, jnp.int32)
    got, vjp = jax.vjp(jax.jit(mapped), *args)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    gradient = vjp(jnp.asarray(cotangent, jnp.float32))[0]
    np.testing.assert_allclose(gradient, (pull + pull.T) @ z, atol=1e-5)


def test_gather_rows_sums_the_cotangents_of_all_devices():
    mesh = make_mesh(jax.devices()[:4])
    weight = np.arange(8.0, dtype=np.float32) + 1

    def local(x, w):
        everyone = contrast.gather_rows(x, "data")
        scale = 1.0 + jax.lax.axis_index("data")  # device i weighs all rows by 1 + i
        return jax.lax.psum(scale * jnp.sum(everyone * w), "data")

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P()), out_specs=P())
    value, gradient = jax.value_and_grad(mapped)(jnp.ones(8), weight)
    np.testing.assert_allclose(value, (1 + 2 + 3 + 4) * weight.sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient, 10 * weight, rtol=1e-6)


def test_scattered_lse_with_devices_that_hold_no_key():
    """Row r of device i; huge values must not overflow, -inf on some devices must not give NaN."""
    mesh = make_mesh(jax.devices()[:4])
    parts = np.full((4, 4), -np.inf)
    parts[0, 0], parts[1, 0], parts[2, 1], parts[3, 2] = 1000.0, 1001.0, -1000.0, 0.5
    want = [1001 + np.log1p(np.exp(-1)), -1000.0, 0.5, -np.inf]

    def local(x):
        return contrast.scattered_lse(x[0], "data")

    mapped = jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    x = jnp.asarray(parts, jnp.float32)
    np.testing.assert_allclose(jax.jit(mapped)(x), want, rtol=1e-6)
    loss = jax.grad(lambda x: jnp.where(jnp.arange(4) < 3, mapped(x), 0).sum())
    gradient = jax.jit(loss)(x)
    share = 1 / (1 + np.exp(-1))
    expected = np.zeros((4, 4))
    expected[0, 0], expected[1, 0], expected[2, 1], expected[3, 2] = 1 - share, share, 1, 1
    np.testing.assert_allclose(gradient[:, :3], expected[:, :3], atol=1e-6)


def test_cross_entropy_keeps_the_digits_of_a_small_loss():
    positive, negatives = jnp.array([20.0, 1.0]), jnp.array([3.0, 2.0])
    want = np.log1p(np.exp(np.array([3.0, 2.0]) - [20.0, 1.0]))
    np.testing.assert_allclose(contrast.cross_entropy(positive, negatives), want, rtol=1e-6)


@pytest.mark.parametrize("temperature", [0, -0.1, float("nan"), np.float32(0)])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(UserError, match="temperature"):
        contrast.check_temperature(temperature)


@pytest.mark.parametrize("method", tiny.METHODS)
def test_a_temperature_that_is_refused_has_the_name_of_its_field(method):
    with pytest.raises(UserError, match=f"^{method}.temperature=0.0: .* set e.g. {method}.temp"):
        tiny.build(tiny.config(method, **{f"{method}__temperature": 0.0}), 1)


def test_the_log_sum_exp_of_two_sets_with_and_without_keys():
    a = np.array([0.3, -np.inf, 2.0, -np.inf, 300.0], np.float32)
    b = np.array([-1.2, 1.0, -np.inf, -np.inf, 301.0], np.float32)
    joint, pullback = jax.vjp(contrast.joint_lse, jnp.asarray(a), jnp.asarray(b))
    want = np.logaddexp(a.astype(np.float64), b)
    np.testing.assert_allclose(joint, want, rtol=1e-6)
    for side, gradient in zip((a, b), pullback(jnp.ones(5)), strict=True):
        share = np.exp(side - np.where(want == -np.inf, 0, want))
        np.testing.assert_allclose(gradient, share, rtol=1e-5)
