"""SimCLR's memory: the loss with all its logits, and the step written densely."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tiny

from common import queue as queues
from common.errors import UserError
from common.sharding import make_mesh
from simclr_jax.loss import nt_xent_with_metrics
from simclr_jax.memory_loss import memory_nt_xent_with_metrics

N, D = 16, 6  # images of a batch; a slot of the memory holds 32 keys
MEAN = np.reshape([0.485, 0.456, 0.406], (1, 1, 1, 3))  # of the preset moco_v2, for RGB in [0, 1]
STD = np.reshape([0.229, 0.224, 0.225], (1, 1, 1, 3))


def example(length=75, noise=1.0, seed=0):
    """Two views of N images, their keys, and the slots of a memory."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(N, D))
    z1, z2, k1, k2 = (base + noise * rng.normal(size=(N, D)) for _ in range(4))
    slots = queues.slots(length, 2 * N)
    memory = oracles.unit(rng.normal(size=(slots * 2 * N, D))).reshape(slots, 2 * N, D)
    # lengths must have no effect
    return np.stack([z1, 3 * z2], axis=1), np.stack([2 * k1, k2], axis=1), memory


def last_keys(memory, length, step):
    """The last `length` keys, found without the module under test."""
    slots = len(memory)
    order = [(step + i) % slots for i in range(slots)]
    return memory[order].reshape(-1, D)[-length:]


def oracle(z, keys, memory, temperature, decoupled=False):
    """`oracles.with_memory` of arrays `[N, 2, D]`."""
    views = z[:, 0], z[:, 1], keys[:, 0], keys[:, 1]
    value, gradients = oracles.with_memory(*views, memory, temperature, decoupled)
    return value, np.stack(gradients, axis=1)


@functools.cache  # compiling is most of the time of these tests
def value_and_grad(devices, length, decoupled=False):
    """Blocks of 7 divide neither the rows nor the keys of a device."""

    def loss(z, keys, memory, step, temperature):
        return memory_nt_xent_with_metrics(
            z, keys, queues.Queue(memory), temperature, decoupled=decoupled, length=length,
            step=step, mesh=make_mesh(jax.devices()[:devices]), block_size=7,
        )  # fmt: skip

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


def assert_equals_numpy(devices, length, decoupled):
    run = value_and_grad(devices, length, decoupled)
    for temperature, noise, step in [(0.1, 1, 0), (0.1, 0.05, 7), (0.5, 1, 3)]:
        z, keys, memory = example(length, noise)
        (value, _), (d_z, *others) = run(z, keys, memory, step, temperature)
        past = last_keys(memory, length, step)
        want, gradient = oracle(z, keys, past, temperature, decoupled)
        assert value.dtype == d_z.dtype == np.float64
        np.testing.assert_allclose(value, want, rtol=1e-12)
        assert np.linalg.norm(d_z - gradient) <= 1e-11 * np.linalg.norm(gradient)
        for gradient in others:  # none reaches keys or memory
            np.testing.assert_array_equal(gradient, 0)


def test_the_oracle_agrees_with_finite_differences_and_without_memory_with_nt_xent():
    z, keys, memory = example()
    z, keys, memory = z[:4], keys[:4], memory.reshape(-1, D)[:9]
    for decoupled, plain in ((False, oracles.nt_xent), (True, oracles.dcl)):
        gradient = oracle(z, keys, memory, 0.3, decoupled)[1]
        for place in np.ndindex(*z.shape):
            step = np.zeros_like(z)
            step[place] = 1e-5
            ends = (oracle(z + x, keys, memory, 0.3, decoupled)[0] for x in (step, -step))
            assert abs((next(ends) - next(ends)) / 2e-5 - gradient[place]) < 1e-8
        # where keys are the embeddings; a gradient reaches these as rows only
        got, want = oracle(z, z, memory[:0], 0.3, decoupled), plain(z[:, 0], z[:, 1], 0.3)
        np.testing.assert_allclose(got[0], want[0], rtol=1e-12)
        if not decoupled:  # symmetric logits, but other log-sum-exps of their rows and columns
            assert np.vdot(got[1], np.stack(want[1], 1)) > 0


# two keys an image and step: no multiple of them, a multiple, fewer than a step brings, one
CASES = [(1, 75, False), (8, 64, True), (1, 5, True), (8, 5, False), (2, 1, False), (4, 75, True)]


@pytest.mark.parametrize(
    ("devices", "length", "decoupled"),
    [(8, 75, False), *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES)],
)
def test_against_numpy(devices, length, decoupled):
    """NT-Xent and DCL with the matrix of all logits, in float64: values and gradients."""
    with jax.enable_x64(True):
        assert_equals_numpy(devices, length, decoupled)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_an_empty_memory_is_none(devices):
    """Loss and metrics of plain NT-Xent if keys are embeddings; what is masked has no influence."""
    mesh = make_mesh(jax.devices()[:devices])
    with jax.enable_x64(True):
        z, keys, memory = example(75)
        run = value_and_grad(devices, 75)
        empty = np.array(queues.empty(75, 2 * N, D).keys)
        (got, metrics), _ = run(z, z, empty, 0, 0.1)
        want, wanted = jax.jit(lambda z: nt_xent_with_metrics(z, 0.1, mesh=mesh, block_size=7))(z)
        np.testing.assert_allclose(got, want, rtol=1e-13)
        tiny.assert_close(metrics, wanted, 1e-12, 1e-15)
        (least, _), (gradient, *_) = run(z, keys, empty, 0, 0.1)
        want, wanted_gradient = oracle(z, keys, memory[0][:0], 0.1)
        np.testing.assert_allclose(least, want, rtol=1e-12)
        np.testing.assert_allclose(gradient, wanted_gradient, rtol=1e-9, atol=1e-12)
        # a third of it is filled: the rest waits, and the masked rows of a full slot are none
        empty[0] = memory[0]
        (got, metrics), (gradient, *_) = run(z, keys, empty, 1, 0.1)
        want, wanted_gradient = oracle(z, keys, memory[0], 0.1)
        np.testing.assert_allclose(got, want, rtol=1e-12)
        np.testing.assert_allclose(gradient, wanted_gradient, rtol=1e-9, atol=1e-12)
        full = run(z, keys, memory, 1, 0.1)
        spoilt = memory.copy()
        spoilt[1, : 3 * 2 * N - 75] = 1e6
        jax.tree.map(np.testing.assert_array_equal, run(z, keys, spoilt, 1, 0.1)[0], full[0])
        assert full[0][0] > got > least  # more keys, a larger log-sum-exp


@pytest.mark.slow
def test_metrics_count_the_keys_of_the_memory():
    length, step = 75, 7
    z, keys, memory = example(length, noise=0.4)
    with jax.enable_x64(True):
        (_, got), _ = value_and_grad(4, length)(z, keys, memory, step, 0.1)
    u, k = (oracles.unit(x.reshape(-1, D)) for x in (z, keys))
    cosine, past = u @ k.T, u @ last_keys(memory, length, step).T
    ranks, negatives = [], []
    for i in range(2 * N):
        others = [cosine[i, j] for j in range(2 * N) if j // 2 != i // 2] + list(past[i])
        ranks.append(sum(x >= cosine[i, i ^ 1] for x in others))
        negatives += others
    ranks = np.array(ranks)
    want = {
        "contrastive_top1": np.mean(ranks < 1),
        "contrastive_top5": np.mean(ranks < 5),
        "positive_similarity": np.mean([cosine[i, i ^ 1] for i in range(2 * N)]),
        "negative_similarity": np.mean(negatives),
    }
    assert 0 < want["contrastive_top1"] < want["contrastive_top5"] < 1  # or it would show little
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.slow
def test_one_image_with_a_memory_has_negatives_and_without_keys_none():
    rng = np.random.default_rng(0)
    z, keys = rng.normal(size=(2, 1, 2, D))
    memory = oracles.unit(rng.normal(size=(4, D))).reshape(2, 2, D)

    def loss(z, keys, memory):
        return memory_nt_xent_with_metrics(z, keys, queues.Queue(memory), 0.2, length=4)

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    z, keys, memory = (x.astype(np.float32) for x in (z, keys, memory))
    (value, metrics), _ = run(z, keys, memory)
    want = oracle(z, keys, memory.reshape(-1, D), 0.2)[0]
    np.testing.assert_allclose(value, want, rtol=1e-5)
    mean = (oracles.unit(z[0]) @ memory.reshape(-1, D).T).mean()
    np.testing.assert_allclose(metrics["negative_similarity"], mean, rtol=1e-4)
    (value, metrics), gradient = run(z, keys, np.zeros_like(memory))
    assert value == 0 and metrics["contrastive_top1"] == 1 and metrics["negative_similarity"] == 0
    np.testing.assert_array_equal(gradient, 0)


@functools.cache
def dense():
    """`(network, jitted keys, jitted loss and gradient)` of the run `simclr_memory`."""
    network = tiny.cached_run("simclr_memory", 8).method.setup.network

    def encode(params, stats, images):
        (_, z), new = network.apply(
            {"params": params, "batch_stats": stats}, (images / 255 - MEAN) / STD, train=True,
            mutable=["batch_stats"],
        )  # fmt: skip
        return z / jnp.linalg.norm(z, axis=1, keepdims=True), new["batch_stats"]

    def loss(params, stats, images, keys, memory):
        u, stats = encode(params, stats, images)
        b = len(u) // 2
        other_view = np.roll(np.arange(2 * b), b)
        positive = (u * keys[other_view]).sum(1)
        negatives = jnp.concatenate([u @ keys.T, u @ memory.T], 1) / 0.1
        own = np.arange(2 * b)[:, None] % b == np.arange(2 * b) % b
        own = np.concatenate([own, np.zeros((2 * b, len(memory)), bool)], 1)
        total = jnp.exp(positive / 0.1) + jnp.where(own, 0, jnp.exp(negatives)).sum(1)
        return (jnp.log(total) - positive / 0.1).mean(), stats

    return jax.jit(encode), jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.slow
def test_steps_equal_a_dense_one():
    """Momentum encoder, keys, memory, loss, gradient, statistics; each from the state before.

    First all first views, then all second ones; the memory has them image by image.
    """
    run, length = tiny.cached_run("simclr_memory", 8), 40
    encode, loss_and_gradient = dense()
    remembered = list(np.asarray(run.states[0].queue.keys).reshape(-1, 8))  # oldest first
    average = run.states[0].key_params
    with jax.enable_x64(True):
        for step in range(3):
            before, after = run.states[step], run.states[step + 1]
            average = jax.tree.map(lambda k, p: 0.75 * k + 0.25 * p, average, before.params)
            tiny.assert_close(after.key_params, average, 1e-12, 0)
            images = tiny.host_batch(run.method.run.config, step)["images"].astype(np.float64)
            images = np.concatenate([images[:, 0], images[:, 1]])
            keys, stats = encode(average, before.key_batch_stats, images)
            tiny.assert_close(after.key_batch_stats, jax.device_get(stats), 1e-10, 0)
            # the loss sees the memory before this step's keys enter it
            (loss, stats), grads = loss_and_gradient(
                before.params, before.batch_stats, images, keys, np.stack(remembered[-length:])
            )
            np.testing.assert_allclose(run.metrics[step]["loss"], loss, rtol=1e-10)
            tiny.assert_close(after.batch_stats, jax.device_get(stats), 1e-10, 0)
            tiny.assert_close(run.gradient(step), jax.device_get(grads), 1e-8, 1e-12)
            remembered += [np.asarray(keys[i + 16 * view]) for i in range(16) for view in (0, 1)]
            np.testing.assert_allclose(
                queues.contents(after.queue, length, step + 1),
                np.stack(remembered[-length:]), rtol=1e-9, atol=1e-12,
            )  # fmt: skip


@pytest.mark.slow
def test_a_new_run_begins_as_one_without_memory():
    """The first loss is the same to rounding, the second is not."""
    runs = {}
    for length in (0, 40):
        c = tiny.config("simclr", simclr__memory_length=length, model__stages=(1,))
        method = tiny.build(c, 2)
        state = jax.jit(method.init)(jax.random.key(0))
        if length:
            assert not np.any(state.queue.keys) and state.queue.keys.shape == (2, 32, 8)
            jax.tree.map(np.testing.assert_array_equal, state.key_params, state.params)
            jax.tree.map(np.testing.assert_array_equal, state.key_batch_stats, state.batch_stats)
        step_fn, losses = jax.jit(method.train_step), []
        for step in range(2):
            batch = tiny.host_batch(method.run.config, step)
            state, metrics = step_fn(state, batch, jax.random.key(1))
            losses.append(float(metrics["loss"]))
        runs[length] = losses
    assert runs[40][0] == pytest.approx(runs[0][0], rel=1e-6)
    assert abs(runs[40][1] - runs[0][1]) > 0.1


def test_what_a_memory_refuses():
    for changes, message in (
        ({"memory_length": -1}, "simclr.memory_length=-1: expected 0 for no memory, or a number"),
        ({"memory_momentum": 1.0}, "simclr.memory_momentum=1.0: expected 0 <= momentum < 1"),
        (
            {"memory_length": 40, "loss": "supcon"},
            "simclr.memory_length=40 with simclr.loss=supcon: the memory holds no labels",
        ),
    ):
        with pytest.raises(UserError, match=message):
            tiny.build(tiny.config("simclr", **{f"simclr__{k}": v for k, v in changes.items()}), 1)
    z, memory = jnp.ones((N, 2, D)), queues.Queue(jnp.zeros((3, 2 * N, D)))
    with pytest.raises(UserError, match=r"nt_xent: the queue is .* for length 64 and queries"):
        memory_nt_xent_with_metrics(z, z, memory, length=64)
    with pytest.raises(
        UserError, match=r"the views are \[16, 2, 6\] and their keys \[15, 2, 6\]: ex"
    ):
        memory_nt_xent_with_metrics(z, z[1:], memory, length=75)
    one = queues.Queue(jnp.zeros((2, 2, D)))
    with pytest.raises(UserError, match="a single image has no negatives while the memory is"):
        memory_nt_xent_with_metrics(z[:1], z[:1], one, length=4, decoupled=True)


def test_a_memory_that_is_longer_than_an_epoch_is_remarked_on(caplog):
    """Epochs of 4 batches of 16 images, two keys of each; a batch may have been left over."""
    with caplog.at_level(logging.WARNING):
        tiny.build(tiny.config("simclr", simclr__memory_length=159), 1)
        assert not caplog.records
        tiny.build(tiny.config("simclr", simclr__memory_length=160), 1)
    assert "simclr.memory_length=160 is longer than an epoch, of 128 keys" in caplog.text


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({}, None),
        ({"simclr__loss": "dcl"}, "dcl"),
        (
            {"simclr__loss": "dcl", "simclr__memory_length": 4096},
            "dcl, a memory of 4,096 keys of a momentum encoder, m 0.999",
        ),
    ],
)
def test_a_start_says_what_is_contrasted(changes, note):
    assert tiny.build(tiny.config("simclr", **changes), 1).notes.get("contrast") == note
