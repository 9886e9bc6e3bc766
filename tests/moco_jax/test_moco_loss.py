"""InfoNCE against a NumPy float64 oracle, and the same on any number of devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from common import queue as queue_lib
from common.errors import UserError
from common.sharding import batch_sharding, make_mesh, replicated
from moco_jax.loss import info_nce

D = 6
# length, queue rows a step: wrapped with a remainder, a multiple, one key (less than a batch),
# and two keys an image (symmetric loss). The batch is 16 queries.
QUEUES = [(75, 16), (64, 16), (1, 16), (75, 32)]


def example(length=75, rows=16, b=16, noise=1.0, seed=0):
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(b, D))
    queries, keys = (base + noise * rng.normal(size=(b, D)) for _ in range(2))
    shape = queue_lib.slots(length, rows), rows, D
    negatives = oracles.unit(rng.normal(size=shape).reshape(-1, D)).reshape(shape)
    return (2 * queries).astype(np.float32), keys.astype(np.float32), negatives.astype(np.float32)


def last_keys(negatives, length, step):
    """The last `length` keys, found without the module under test."""
    slots = negatives.shape[0]
    order = [(step + i) % slots for i in range(slots)]
    return negatives[order].reshape(-1, negatives.shape[2])[-length:]


def mesh_of(devices):
    return None if devices is None else make_mesh(jax.devices()[:devices])


@functools.cache  # compiling is most of the time of these tests
def value_and_grad(devices, length, block=None):
    def loss(queries, keys, negatives, step, temperature):
        return info_nce(
            queries,
            keys,
            queue_lib.Queue(keys=negatives),
            length=length,
            step=step,
            temperature=temperature,
            mesh=mesh_of(devices),
            block_size=block,
        )

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


def assert_close(value, gradient, want, rtol=1e-5, grad_rtol=1e-4):
    np.testing.assert_allclose(value, want[0], rtol=rtol)
    error = np.linalg.norm(np.asarray(gradient) - np.asarray(want[1]))
    assert error <= grad_rtol * np.linalg.norm(want[1])


def collectives(text):
    """`(kind, elements)` of every array that a collective of a compiled program makes."""
    kinds = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
    return [
        (kind, int(np.prod([int(s) for s in dims.split(",") if s] or [1])))
        for shape, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text)
        for dims in re.findall(r"\[([\d,]*)\]", shape)
    ]


def test_the_oracle_agrees_with_finite_differences():
    queries, keys, negatives = (x.astype(np.float64) for x in example(b=3))
    negatives = negatives.reshape(-1, D)
    gradient = oracles.info_nce(queries, keys, negatives, 0.3)[1]
    for i, j in np.ndindex(*queries.shape):
        step = np.zeros_like(queries)
        step[i, j] = 1e-5
        up, down = (oracles.info_nce(queries + s, keys, negatives, 0.3)[0] for s in (step, -step))
        assert abs((up - down) / 2e-5 - gradient[i, j]) < 1e-8


@pytest.mark.parametrize(
    ("devices", "length", "rows"),
    [(None, 75, 16), *[(n, 75, 16) for n in (1, 2, 4)], *[(8, *size) for size in QUEUES]],
)
def test_against_numpy(devices, length, rows):
    """Blocks of 7 divide neither the queries nor the rows of a device."""
    run = value_and_grad(devices, length, block=7)
    for temperature, noise, step in [(0.05, 1, 0), (0.05, 0.05, 7), (0.2, 1, 3), (1.0, 1, 9)]:
        queries, keys, negatives = example(length, rows, noise=noise)
        want = oracles.info_nce(queries, keys, last_keys(negatives, length, step), temperature)
        (value, _), gradients = run(queries, keys, negatives, step, temperature)
        assert_close(value, gradients[0], want)
        np.testing.assert_array_equal(gradients[1], 0)  # keys carry no gradient
        np.testing.assert_array_equal(gradients[2], 0)  # nor does the queue


def test_float64_is_the_same_on_any_number_of_devices():
    args = *(x.astype(np.float64) for x in example()), 3, 0.1
    with jax.enable_x64(True):
        (value, _), gradients = value_and_grad(1, 75, 7)(*args)
        assert value.dtype == np.float64
        want = oracles.info_nce(*args[:2], last_keys(args[2], 75, 3), 0.1)
        assert_close(value, gradients[0], want, 1e-12, 1e-12)
        for devices in (2, 8):
            (other, _), other_gradients = value_and_grad(devices, 75, 7)(*args)
            assert_close(other, other_gradients[0], (value, gradients[0]), 1e-12, 1e-9)


def test_gradient_of_shared_parameters_is_not_scaled_by_the_device_count():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(16, 5)), rng.normal(size=(5, D))
    _, keys, negatives = example(64)
    queue = queue_lib.Queue(keys=jnp.asarray(negatives))

    def gradient(devices):
        mesh = mesh_of(devices)

        def loss(w, x):
            return info_nce(x @ w, keys, queue, length=64, step=1, mesh=mesh)[0]

        queries = jax.device_put(x.astype(np.float32), batch_sharding(mesh))
        return np.asarray(jax.jit(jax.grad(loss))(w.astype(np.float32), queries))

    want = x.T @ oracles.info_nce(x @ w, keys, negatives.reshape(-1, D), 0.2)[1]
    for devices in (1, 8):
        np.testing.assert_allclose(gradient(devices), want, atol=1e-5 * np.linalg.norm(want))


@pytest.mark.parametrize("devices", [1, 4])
def test_metrics_against_numpy(devices):
    length, step = 75, 7
    queries, keys, negatives = example(length, noise=0.6)
    (_, got), _ = value_and_grad(devices, length, 7)(queries, keys, negatives, step, 0.2)
    q, k = oracles.unit(queries.astype(np.float64)), oracles.unit(keys.astype(np.float64))
    cosine, positive = q @ last_keys(negatives, length, step).T, (q * k).sum(axis=1)
    rank = (cosine >= positive[:, None]).sum(axis=1)
    want = {
        "contrastive_top1": np.mean(rank < 1),
        "contrastive_top5": np.mean(rank < 5),
        "positive_similarity": positive.mean(),
        "negative_similarity": cosine.mean(),
    }
    assert 0 < want["contrastive_top1"] < want["contrastive_top5"] < 1  # or it would show little
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_masked_keys_have_no_influence():
    """Neither on the loss, nor on the gradient, nor on the metrics, whatever they hold."""
    length, step = 75, 7
    queries, keys, negatives = example(length)
    run = value_and_grad(4, length, 7)
    want = run(queries, keys, negatives, step, 0.2)
    negatives[step % 5, :5] = 1e6  # 80 entries, 75 count
    got = run(queries, keys, negatives, step, 0.2)
    jax.tree.map(np.testing.assert_array_equal, got[0], want[0])
    np.testing.assert_array_equal(got[1][0], want[1][0])


def test_zero_queries_have_finite_gradients_and_bfloat16_is_scored_in_float32():
    queries, keys, negatives = example()
    queries[3] = 0
    queries, keys = (jnp.asarray(x, jnp.bfloat16) for x in (queries, keys))
    (value, _), gradients = value_and_grad(4, 75, 7)(queries, keys, negatives, 2, 0.05)
    assert value.dtype == jnp.float32
    assert np.isfinite(np.asarray(gradients[0], np.float32)).all()
    want = oracles.info_nce(queries, keys, last_keys(negatives, 75, 2), 0.05)
    np.testing.assert_allclose(value, want[0], rtol=1e-5)


@pytest.mark.optimised
def test_no_collective_moves_the_queue():
    """Compiled for 8 devices: the shapes of all collectives, with a queue of 128 batches."""
    b, slots, d = 16, 128, 8
    mesh = mesh_of(8)
    rows = jax.ShapeDtypeStruct((b, d), jnp.float32, sharding=batch_sharding(mesh))
    place = NamedSharding(mesh, PartitionSpec(None, "data"))
    negatives = jax.ShapeDtypeStruct((slots, b, d), jnp.float32, sharding=place)
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))

    def train_step(queries, keys, negatives, step):
        queue = queue_lib.Queue(keys=negatives)

        def loss(queries):
            return info_nce(queries, keys, queue, length=slots * b - 3, step=step, mesh=mesh)

        gradient, metrics = jax.grad(loss, has_aux=True)(queries)
        return gradient, metrics, queue_lib.push(queue, keys, step)

    text = jax.jit(train_step).lower(rows, rows, negatives, step).compile().as_text()
    found = collectives(text)
    # the gathered queries; a device's part of the queue is 16 times that
    assert max(size for _, size in found) == b * d, found
    assert slots * b * d // 8 == 16 * b * d


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": jnp.ones((8, D))}, "info_nce: queries are .* expected two equal shapes"),
        ({"queries": jnp.ones((16, 2, 3)), "keys": jnp.ones((16, 2, 3))}, "equal shapes"),
        ({"queries": jnp.ones((16, 3)), "keys": jnp.ones((16, 3))}, "the queue is"),
        ({"length": 64}, "make it with queue.init of that length"),
        ({"length": 0}, "length"),
        ({"temperature": 0}, "temperature"),
        ({"mesh": 3}, "16 queries and 16 queue rows cannot be split over 3 devices"),
    ],
)
def test_user_mistakes(change, message):
    queries, keys, negatives = example()
    args = {"queries": queries, "keys": keys, "length": 75, "step": 0} | change
    args["mesh"] = mesh_of(args.get("mesh"))
    with pytest.raises(UserError, match=message):
        info_nce(queue=queue_lib.Queue(keys=negatives), **args)
