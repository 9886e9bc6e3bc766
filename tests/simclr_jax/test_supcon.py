"""SupCon against its definition in NumPy, against NT-Xent, and on any number of devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tiny
from test_nt_xent import assert_close, mesh_of, views

from common import contrast
from common.errors import UserError
from common.setup import make_encoder_setup
from simclr_jax.loss import nt_xent_with_metrics
from simclr_jax.method import SimCLR
from simclr_jax.supcon import supcon_with_metrics

N = 16
RNG = np.random.default_rng(3)
LABELS = {
    # large numbers with gaps, a class with one image, unknown ones between the others
    "mixed": np.array([7, -1, 20_999, 7, 0, 7, -1, 0, 3, 20_999, 0, 7, -1, 0, 7, 0]),
    "one class": np.full(N, 4),
    "different": RNG.permutation(1000)[:N],
    "unknown": np.full(N, -1),
}


def stacked(z1, z2):
    return np.stack([z1, z2], axis=1)


@functools.cache
def value_and_grad(devices, block=None):
    """As of NT-Xent: of both views."""

    def loss(z1, z2, labels, temperature):
        z = jnp.stack([z1, z2], axis=1)
        return supcon_with_metrics(z, labels, temperature, mesh=mesh_of(devices), block_size=block)

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))

    def call(z1, z2, labels, temperature):
        (value, metrics), gradients = run(z1, z2, labels.astype(np.int32), temperature)
        return value, gradients, metrics

    return call


@pytest.mark.parametrize("labels", LABELS)
def test_the_oracle_agrees_with_finite_differences(labels):
    z1, z2 = (z.astype(np.float64) for z in views(N, d=3))
    gradient = oracles.supcon(z1, z2, LABELS[labels], 0.3)[1][0]
    for i, j in ((0, 0), (1, 2), (8, 1)):
        step = np.zeros_like(z1)
        step[i, j] = 1e-5
        above, below = (oracles.supcon(z, z2, LABELS[labels], 0.3) for z in (z1 + step, z1 - step))
        assert abs((above[0] - below[0]) / 2e-5 - gradient[i, j]) < 1e-8


@pytest.mark.parametrize("devices", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 8))])
def test_float64_against_numpy_on_any_number_of_devices(devices):
    """Tiles of 5 divide neither the rows of a device nor all of them."""
    z1, z2 = (z.astype(np.float64) for z in views(N))
    with jax.enable_x64(True):
        for labels in LABELS.values():
            for temperature in (0.05, 0.1, 0.5, 1.0):
                got = value_and_grad(devices, 5)(z1, z2, labels, temperature)
                assert got[0].dtype == np.float64
                assert_close(got, oracles.supcon(z1, z2, labels, temperature), 1e-12, 1e-11)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "block"), [(13, 4), (2, None), (1, 3), (29, None), (7, 1)])
def test_float32_against_numpy(n, block):
    labels = RNG.integers(-1, 3, n)
    for temperature in (0.05, 0.1, 0.5, 1.0):
        for noise in (1.0, 0.05):  # 0.05: almost aligned views
            z1, z2 = views(n, noise=noise)
            got = value_and_grad(1, block)(z1, z2, labels, temperature)
            want = oracles.supcon(z1, z2, labels, temperature)
            np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-6)
            error = np.concatenate(got[1]) - np.concatenate(want[1])
            size = np.linalg.norm(np.concatenate(want[1]))
            assert np.linalg.norm(error) <= 1e-4 * size + 1e-5 * (n == 1)


@pytest.mark.slow
@pytest.mark.parametrize("labels", ["different", "unknown"])
def test_without_two_images_of_a_class_it_is_nt_xent(labels):
    """Loss, gradient and metrics: what is added to NT-Xent is 0 then."""
    z1, z2 = views(N)
    value, gradients, metrics = value_and_grad(1, 5)(z1, z2, LABELS[labels], 0.1)
    run = jax.value_and_grad(lambda z: nt_xent_with_metrics(z, 0.1, block_size=5), has_aux=True)
    (want, want_metrics), gradient = jax.jit(run)(stacked(z1, z2))
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(stacked(*gradients), gradient, rtol=1e-5, atol=1e-7)
    assert metrics.keys() == want_metrics.keys()
    for name, x in want_metrics.items():
        np.testing.assert_allclose(metrics[name], x, rtol=1e-5, atol=1e-6, err_msg=name)


def dense_metrics(z1, z2, labels):
    """By their definition, pair by pair."""
    rows = np.repeat(np.arange(len(labels)), 2), np.tile([0, 1], len(labels))
    unit = oracles.unit(stacked(z1, z2)[rows].astype(np.float64))
    cosine, images = unit @ unit.T, rows[0]
    alike, unlike, ranks = [], [], []
    for i, a in enumerate(images):
        known = labels[a] >= 0
        same = {j for j, b in enumerate(images) if b == a or (known and labels[b] == labels[a])}
        alike += [cosine[i, j] for j in same - {i}]
        others = [cosine[i, j] for j in range(len(images)) if j not in same]
        unlike += others
        ranks.append(sum(x >= cosine[i, i ^ 1] for x in others))
    return {
        "contrastive_top1": np.mean(np.array(ranks) < 1),
        "contrastive_top5": np.mean(np.array(ranks) < 5),
        "positive_similarity": np.mean(alike),
        "negative_similarity": np.mean(unlike) if unlike else 0.0,
    }


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_metrics_against_numpy(devices):
    z1, z2 = views(N, noise=1.2)
    for labels in LABELS.values():
        metrics = value_and_grad(devices, 5)(z1, z2, labels, 0.3)[2]
        want = dense_metrics(z1, z2, labels)
        assert metrics.keys() == want.keys()
        for name, value in want.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    want = dense_metrics(z1, z2, LABELS["mixed"])
    assert 0 < want["contrastive_top1"] < want["contrastive_top5"] < 1  # or it would show little


@pytest.mark.slow
@pytest.mark.parametrize("value", [0.0, 0.7])
def test_collapsed_embeddings_have_no_accuracy_and_a_loss_of_log_2n_minus_1(value):
    z = np.full((N, 8), value, np.float32)
    loss, gradients, metrics = value_and_grad(1, 5)(z, z, LABELS["mixed"], 0.05)
    np.testing.assert_allclose(loss, np.log(2 * N - 1), rtol=1e-6)
    assert metrics["contrastive_top1"] == metrics["contrastive_top5"] == 0
    assert all(np.isfinite(g).all() for g in gradients)


@pytest.mark.slow
def test_classes_that_have_collapsed_to_a_point_each_reach_the_lowest_loss():
    """Of two opposite classes: each row has 15 positives, and 16 negatives that weigh nothing."""
    labels = np.arange(N) % 2
    z = np.eye(8, dtype=np.float32)[np.zeros(N, int)] * (1 - 2 * labels[:, None])
    loss, gradients, metrics = value_and_grad(1, 5)(z, 2 * z, labels, 0.05)
    np.testing.assert_allclose(loss, np.log(N - 1), rtol=1e-6)
    np.testing.assert_allclose(np.concatenate(gradients), 0, atol=1e-6)
    want = {"contrastive_top1": 1, "positive_similarity": 1, "negative_similarity": -1}
    for name, value in want.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_bfloat16_embeddings_are_scored_in_float32_and_the_temperature_has_a_gradient():
    z = jnp.asarray(stacked(*views(N)), jnp.bfloat16)
    labels = LABELS["mixed"].astype(np.int32)
    loss = lambda z, t: supcon_with_metrics(z, labels, t)[0]  # noqa: E731
    value, (d_z, d_t) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(z, 0.2)
    assert value.dtype == jnp.float32 and d_z.dtype == jnp.bfloat16
    z1, z2 = np.asarray(z, np.float64).swapaxes(0, 1)
    want, gradient = oracles.supcon(z1, z2, labels, 0.2)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    error = np.asarray(d_z, np.float64) - stacked(*gradient)
    assert np.linalg.norm(error) < 1e-2 * np.linalg.norm(gradient)
    above, below = (oracles.supcon(z1, z2, labels, t)[0] for t in (0.2 + 1e-5, 0.2 - 1e-5))
    np.testing.assert_allclose(d_t, (above - below) / 2e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.optimised
def test_memory_of_the_gradient_is_the_embeddings_and_tiles():
    """2N = 131,072, d = 128 on one device: full logits would be 69 GB. Compiled, not run."""
    z = jax.ShapeDtypeStruct((65_536, 2, 128), jnp.float32)
    labels = jax.ShapeDtypeStruct((65_536,), jnp.int32)
    run = jax.jit(jax.value_and_grad(lambda z, y: supcon_with_metrics(z, y, 0.1), has_aux=True))
    memory = run.lower(z, labels).compile().memory_analysis()
    allowed = 7 * (4 * 131_072 * 128) + 3 * (4 * contrast.BLOCK_SIZE**2)
    assert memory.temp_size_in_bytes <= allowed, memory.temp_size_in_bytes


@pytest.mark.parametrize(
    "labels", [np.zeros(5, np.int32), np.zeros((4, 2), np.int32), np.zeros(4, np.float32)]
)
def test_labels_are_one_integer_for_each_image(labels):
    with pytest.raises(UserError, match=r"expected one integer for each of the n=4 images, -1"):
        supcon_with_metrics(jnp.ones((4, 2, 3)), jnp.asarray(labels))


def test_it_needs_labels_to_train_but_not_to_be_evaluated():
    c = tiny.config("simclr", simclr__loss="supcon")
    with pytest.raises(UserError, match=r"loss=supcon learns from labels, and the training split"):
        tiny.prepared(c, 1, classes=0)
    method = SimCLR(make_encoder_setup(c, mesh_of(1)))
    assert method.supervised and not tiny.build(tiny.config("simclr"), 1).supervised
