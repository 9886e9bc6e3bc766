"""NT-Xent and DCL against NumPy in float64 and optax, and the same on any number of devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

from common import contrast
from common.errors import UserError
from common.sharding import batch_sharding, make_mesh
from simclr_jax.loss import nt_xent, nt_xent_with_metrics

TEMPERATURES = (0.05, 0.1, 0.5, 1.0)


def views(n, d=8, seed=0, noise=1.0):
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(n, d))
    z1, z2 = (base + noise * rng.normal(size=(n, d)) for _ in range(2))
    return z1.astype(np.float32), (3 * z2).astype(np.float32)  # lengths must have no effect


def mesh_of(devices):
    return None if devices is None else make_mesh(jax.devices()[:devices])


@functools.cache  # compiling is most of the time of these tests
def value_and_grad(devices, block=None, **options):
    def loss(z1, z2, temperature):
        return nt_xent(z1, z2, temperature, mesh=mesh_of(devices), block_size=block, **options)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


@jax.jit
def optax_value_and_grad(z1, z2, temperature):
    labels = jnp.tile(jnp.arange(len(z1)), 2)

    def loss(z1, z2):
        return optax.losses.ntxent(jnp.concatenate([z1, z2]), labels, temperature)

    return jax.value_and_grad(loss, argnums=(0, 1))(z1, z2)


def assert_close(got, want, rtol=1e-5, grad_rtol=1e-4):
    np.testing.assert_allclose(got[0], want[0], rtol=rtol)
    got, want = np.concatenate(got[1]), np.concatenate(want[1])
    assert np.linalg.norm(got - want) <= grad_rtol * np.linalg.norm(want)


@pytest.mark.parametrize("oracle", [oracles.nt_xent, oracles.dcl])
def test_the_oracle_agrees_with_finite_differences(oracle):
    z1, z2 = (z.astype(np.float64) for z in views(5, d=3))
    gradient = oracle(z1, z2, 0.3)[1][0]
    for i, j in np.ndindex(*z1.shape):
        step = np.zeros_like(z1)
        step[i, j] = 1e-5
        difference = oracle(z1 + step, z2, 0.3)[0] - oracle(z1 - step, z2, 0.3)[0]
        assert abs(difference / 2e-5 - gradient[i, j]) < 1e-8


@pytest.mark.parametrize(
    ("devices", "n", "block"),
    [(None, 24, 7), (1, 13, 4), (2, 24, 7), (4, 24, 5), (8, 24, 7), (8, 8, None)],
)
def test_against_numpy_and_optax(devices, n, block):
    """Block sizes divide neither the 2n columns nor the rows of a device."""
    run = value_and_grad(devices, block)
    for temperature in TEMPERATURES:
        for noise in (1.0, 0.05):  # 0.05: almost aligned views, the loss is small
            z1, z2 = views(n, noise=noise)
            got = run(z1, z2, temperature)
            assert_close(got, oracles.nt_xent(z1, z2, temperature))
            if noise == 1:  # a loss near 0 is a difference of large logits there
                assert_close(got, optax_value_and_grad(z1, z2, temperature))


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"decoupled": True}, marks=pytest.mark.slow)],
    ids=["nt_xent", "dcl"],
)
def test_float64_is_the_same_on_any_number_of_devices(options):
    z1, z2 = (z.astype(np.float64) for z in views(16))
    oracle = oracles.dcl if options else oracles.nt_xent
    with jax.enable_x64(True):
        one = value_and_grad(1, 5, **options)(z1, z2, 0.1)
        assert one[0].dtype == np.float64
        assert_close(one, oracle(z1, z2, 0.1), 1e-12, 1e-12)
        for devices in (2, 8):
            assert_close(value_and_grad(devices, 5, **options)(z1, z2, 0.1), one, 1e-12, 1e-9)


@pytest.mark.parametrize(
    ("devices", "n", "block"),
    [(1, 13, 4), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((8, 24, 7), (None, 2, 3)))],
)
def test_dcl_against_numpy(devices, n, block):
    """Of 2 images too, and of almost aligned views, where it is below 0."""
    run = value_and_grad(devices, block, decoupled=True)
    for temperature in TEMPERATURES:
        for noise in (1.0, 0.05):
            z1, z2 = views(n, noise=noise)
            want = oracles.dcl(z1, z2, temperature)
            assert_close(run(z1, z2, temperature), want)
            assert noise == 1 or temperature > 0.1 or want[0] < 0


def test_dcl_of_collapsed_embeddings_is_the_log_of_their_negatives():
    loss, metrics = jax.jit(lambda z: nt_xent_with_metrics(z, 0.1, decoupled=True))(
        jnp.full((10, 2, 3), 0.7)
    )
    np.testing.assert_allclose(loss, np.log(18), rtol=1e-6)
    assert metrics["contrastive_top1"] == 0


def test_gradient_of_shared_parameters_is_not_scaled_by_the_device_count():
    """Inside a sharded step: SGD sees a factor of n that LARS would hide."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(16, 2, 5)), rng.normal(size=(5, 4))

    def gradient(devices):
        mesh = make_mesh(jax.devices()[:devices])
        images = jax.device_put(x.astype(np.float32), batch_sharding(mesh))
        loss = jax.grad(lambda w, x: nt_xent_with_metrics(x @ w, 0.2, mesh=mesh)[0])
        return np.asarray(jax.jit(loss)(w.astype(np.float32), images))

    d_z = np.stack(oracles.nt_xent(x[:, 0] @ w, x[:, 1] @ w, 0.2)[1], axis=1)
    want = np.einsum("bvi,bvo->io", x, d_z)
    for devices in (1, 8):
        np.testing.assert_allclose(gradient(devices), want, atol=1e-5 * np.linalg.norm(want))


@pytest.mark.parametrize("devices", [1, 4])
def test_metrics_against_numpy(devices):
    n, temperature = 24, 0.3
    z1, z2 = views(n, noise=1.2)
    z = np.stack([z1, z2], axis=1)
    got_loss, got = jax.jit(
        lambda z: nt_xent_with_metrics(z, temperature, mesh=mesh_of(devices), block_size=7)
    )(z)
    unit = z.reshape(2 * n, -1).astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosine = unit @ unit.T
    rank, negatives = [], []
    for i in range(2 * n):
        others = [cosine[i, j] for j in range(2 * n) if j // 2 != i // 2]
        negatives += others
        rank.append(sum(other >= cosine[i, i ^ 1] for other in others))
    rank = np.array(rank)
    want = {
        "contrastive_top1": np.mean(rank < 1),
        "contrastive_top5": np.mean(rank < 5),
        "positive_similarity": np.mean([cosine[i, i ^ 1] for i in range(2 * n)]),
        "negative_similarity": np.mean(negatives),
    }
    assert 0 < want["contrastive_top1"] < want["contrastive_top5"] < 1  # or it would show little
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(got_loss, oracles.nt_xent(z1, z2, temperature)[0], rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_collapsed_embeddings_have_no_accuracy_and_a_loss_of_log_2n_minus_1(value):
    loss, metrics = jax.jit(nt_xent_with_metrics)(jnp.full((10, 2, 3), value), 0.1)
    np.testing.assert_allclose(loss, np.log(19), rtol=1e-6)
    assert metrics["contrastive_top1"] == 0 and metrics["contrastive_top5"] == 0


def test_one_image_has_no_negatives():
    z = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 4)), jnp.float32)
    run = jax.jit(jax.value_and_grad(nt_xent_with_metrics, has_aux=True))
    (loss, metrics), gradient = run(z)
    assert loss == 0 and metrics["contrastive_top1"] == 1
    assert metrics["negative_similarity"] == 0
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("devices", [None, 8])
def test_zero_vectors_have_finite_gradients(devices):
    z1, z2 = views(24)
    z1[0], z2[5] = 0, 0
    value, gradients = value_and_grad(devices, 7)(z1, z2, 0.05)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradients)


def test_bfloat16_embeddings_are_scored_in_float32():
    z1, z2 = (jnp.asarray(z, jnp.bfloat16) for z in views(16))
    value, gradients = value_and_grad(1)(z1, z2, 0.1)
    assert value.dtype == jnp.float32 and gradients[0].dtype == jnp.bfloat16
    want, want_gradients = oracles.nt_xent(*(np.asarray(z, np.float64) for z in (z1, z2)), 0.1)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    got = np.asarray(gradients[0], np.float64)
    assert np.linalg.norm(got - want_gradients[0]) < 1e-2 * np.linalg.norm(want_gradients[0])


def test_temperature_has_a_gradient():
    z1, z2 = views(8)
    loss = jax.grad(lambda t: nt_xent(z1, z2, t, mesh=mesh_of(2), block_size=5))
    got = jax.jit(loss)(0.2)
    want = (oracles.nt_xent(z1, z2, 0.2 + 1e-5)[0] - oracles.nt_xent(z1, z2, 0.2 - 1e-5)[0]) / 2e-5
    np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.optimised
def test_memory_of_the_gradient_is_the_embeddings_and_a_tile():
    """2N = 131,072, d = 128 on one device: full logits would be 69 GB. Compiled, not run."""
    z = jax.ShapeDtypeStruct((65_536, 2, 128), jnp.float32)
    run = jax.jit(jax.value_and_grad(lambda z: nt_xent_with_metrics(z, 0.1), has_aux=True))
    memory = run.lower(z).compile().memory_analysis()
    allowed = 4 * (4 * 131_072 * 128) + 2 * (4 * contrast.BLOCK_SIZE**2)
    assert memory.temp_size_in_bytes <= allowed, memory.temp_size_in_bytes


@pytest.mark.optimised
def test_what_travels_is_the_embeddings_once():
    """Compiled for 8 devices: one gather of z, nothing else of its size, no all-to-all."""
    n, d = 64, 32
    mesh = mesh_of(8)
    z = jax.ShapeDtypeStruct((n, 2, d), jnp.float32, sharding=batch_sharding(mesh))
    run = jax.jit(jax.value_and_grad(lambda z: nt_xent_with_metrics(z, 0.1, mesh=mesh)[0]))
    text = run.lower(z).compile().as_text()
    kinds = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
    found = re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text)
    sizes = [
        (kind, sum(int(np.prod([int(s) for s in dims.split(",") if s] or [1])) for dims in shapes))
        for shape, kind in found
        for shapes in [re.findall(r"\[([\d,]*)\]", shape)]
    ]
    assert found and not [kind for kind, _ in sizes if kind == "all-to-all"], sizes
    large = [(kind, size) for kind, size in sizes if size > 4 * n]
    assert large == [("all-gather", 2 * n * d)], sizes


@pytest.mark.parametrize(
    ("shapes", "kwargs", "message"),
    [
        (((4, 3), (5, 3)), {}, "expected two equal shapes .n, d., the two views"),
        (((4, 3, 2), (4, 3, 2)), {}, r"expected \[n, d\], flatten them"),
        (((0, 3), (0, 3)), {}, "with n >= 1 and d >= 1"),
        (((4, 3), (4, 3)), {"temperature": 0.0}, "temperature"),
        (((4, 3), (4, 3)), {"temperature": -1}, "temperature"),
        (((4, 3), (4, 3)), {"temperature": np.inf}, "temperature=inf"),
        (((1, 3), (1, 3)), {"decoupled": True}, "dcl: a batch of 1 image has no negatives"),
        (((6, 3), (6, 3)), {"mesh": 4}, "n=6 images cannot be split over 4"),
    ],
)
def test_user_mistakes(shapes, kwargs, message):
    if "mesh" in kwargs:
        kwargs = {"mesh": mesh_of(kwargs["mesh"])}
    with pytest.raises(UserError, match=message):
        nt_xent(jnp.ones(shapes[0]), jnp.ones(shapes[1]), **kwargs)
