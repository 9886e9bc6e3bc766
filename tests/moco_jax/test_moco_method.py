"""MoCo's step against He et al. 2020, algorithm 1, written densely and group by group."""

import functools
import logging
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from common import queue as queues
from common.errors import UserError
from common.momentum import QueueState
from common.setup import Setup, make_encoder_setup
from common.sharding import batch_sharding, make_mesh
from moco_jax import method as moco

VARIANTS = [
    "moco",
    *(
        pytest.param(x, marks=pytest.mark.slow)
        for x in ("moco_symmetric", "moco_v2plus", "moco_short_queue")
    ),
]
ONE_GROUP = {"model__bn_groups": 1}
MEAN = np.reshape([0.485, 0.456, 0.406], (1, 1, 1, 3))  # of the preset moco_v2, for RGB in [0, 1]
STD = np.reshape([0.229, 0.224, 0.225], (1, 1, 1, 3))


def groups_of(b, groups, shuffled):
    """Row numbers of each BN group: neighbours, or dealt like cards, one to each in turn."""
    size = b // groups
    if not shuffled:
        return np.arange(b).reshape(groups, size)
    hands = [[] for _ in range(groups)]
    deck = [g * size + j for j in range(size) for g in range(groups)]  # row j of every group
    for place, row in enumerate(deck):
        hands[place // size].append(row)
    return np.array(hands)


class Oracle:
    """The step without grouped BN, without shuffling code, without a sharded queue."""

    def __init__(self, run):
        c = run.method.run.config
        self.c, self.groups = c, c.model.bn_groups
        changes = tiny.VARIANTS["moco"] | {"head__kind": c.head.kind} | ONE_GROUP
        single = tiny.config("moco", model__dtype="float64", **changes)
        with jax.enable_x64(True):
            self.network = tiny.build(single, 1).setup.network  # statistics of all rows it is given
        # (query view, key view)
        self.pairs = [(0, 1), (1, 0)] if c.moco.symmetric else [(0, 1)]

    def forward(self, params, stats, images, shuffled):
        """One group after another: embeddings in the order of the batch, mean statistics."""
        x = (images / 255 - MEAN) / STD
        rows = groups_of(len(x), self.groups, shuffled)

        def one(x):
            (_, z), new = self.network.apply(
                {"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"]
            )
            return z / jnp.linalg.norm(z, axis=1, keepdims=True), new["batch_stats"]

        z, stats = jax.lax.map(one, jnp.asarray(x)[rows])
        back = np.argsort(rows.ravel())
        return z.reshape(len(x), -1)[back], jax.tree.map(lambda s: s.mean(0), stats)

    @functools.partial(jax.jit, static_argnums=0)
    def keys(self, params, stats, images):
        found = []
        for _, view in self.pairs:
            z, stats = self.forward(params, stats, images[:, view], shuffled=True)
            found.append(z)
        return found, stats

    @functools.partial(jax.jit, static_argnums=0)
    def loss_and_gradient(self, params, stats, keys, queues, images):
        def loss_fn(params, stats):
            loss = 0.0
            for (view, _), k, queue in zip(self.pairs, keys, queues, strict=True):
                q, stats = self.forward(params, stats, images[:, view], shuffled=False)
                logits = jnp.concatenate([(q * k).sum(1, keepdims=True), q @ queue.T], 1)
                logits = logits / self.c.moco.temperature
                loss += (jax.nn.logsumexp(logits, 1) - logits[:, 0]).mean()
            return loss, stats

        return jax.value_and_grad(loss_fn, has_aux=True)(params, stats)


def ema(run, steps):
    """Closed form: m^s k_0 + (1 - m) sum_i m^(s-1-i) theta_i, theta_i from *before* step i.

    Where m changes from step to step, each power is a product.
    """
    c, states = run.method.run.config.moco, run.states
    m = np.full(steps, c.momentum)
    if c.momentum_end:
        rest = (1 + np.cos(np.pi * np.arange(steps) / 8)) / 2  # of a run of 8 steps
        m = c.momentum_end - (c.momentum_end - c.momentum) * rest

    def closed(start, *thetas):
        past = [m[i + 1 :].prod() * (1 - m[i]) * theta for i, theta in enumerate(thetas)]
        return m.prod() * start + sum(past)

    return jax.tree.map(closed, states[0].key_params, *(s.params for s in states[:steps]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_key_parameters_are_the_closed_form_of_their_average(variant):
    run = tiny.cached_run(variant, 8)
    for steps in (1, 2, 3):
        tiny.assert_close(run.states[steps].key_params, ema(run, steps), 1e-12, 0)
    # and the terms differ: shifted by one step, or without the last, it is another average
    a, b = (jax.tree.leaves(s.params["head"])[0] for s in (run.states[1], run.states[2]))
    assert np.linalg.norm(a - b) > 1e-3 * np.linalg.norm(a)


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_equal_the_dense_oracle(variant):
    """Keys, queue, loss, gradient, both encoders' statistics; each step from the state before."""
    run = tiny.cached_run(variant, 8)
    oracle, c = Oracle(run), run.method.run.config.moco
    parts = 2 if c.queue_per_view else 1  # keys of a direction lie between those of the other
    length = parts * c.queue_length
    remembered = list(np.asarray(run.states[0].queue.keys).reshape(-1, 8))  # oldest first
    with jax.enable_x64(True):
        for step in range(3):
            before, after = run.states[step], run.states[step + 1]
            images = tiny.host_batch(run.method.run.config, step)["images"].astype(np.float64)
            keys, key_stats = oracle.keys(ema(run, step + 1), before.key_batch_stats, images)
            tiny.assert_close(after.key_batch_stats, jax.device_get(key_stats), 1e-10, 0)
            # the loss sees the queue before this step's keys enter it
            queue = np.stack(remembered[-length:])
            of_direction = [queue[i % parts :: parts] for i in range(len(oracle.pairs))]
            (loss, stats), grads = oracle.loss_and_gradient(
                before.params, before.batch_stats, keys, of_direction, images
            )
            grads = jax.tree.map(lambda x: c.loss_scale * x, grads)
            np.testing.assert_allclose(run.metrics[step]["loss"], loss, rtol=1e-10)
            tiny.assert_close(after.batch_stats, jax.device_get(stats), 1e-10, 0)
            tiny.assert_close(run.gradient(step), jax.device_get(grads), 1e-8, 1e-12)
            # image by image, both directions of one together
            remembered += list(np.stack(keys, 1).reshape(-1, 8))
            np.testing.assert_allclose(
                queues.contents(after.queue, length, step + 1),
                np.stack(remembered[-length:]), rtol=1e-9, atol=1e-12,
            )  # fmt: skip


class Plain:
    """A `Setup` whose network is one matrix and whose optimiser changes nothing."""

    def __init__(self, c):
        self.config, self.batch_size = c.moco, c.batch_size
        self.mesh, self.training = make_mesh(jax.devices()[:1]), False
        self.network = types.SimpleNamespace(
            head=types.SimpleNamespace(bn_groups=c.model.bn_groups), has_batch_norm=True,
            predictor=None, frozen=(), backbone=types.SimpleNamespace(watched=""),
        )  # fmt: skip
        self.tx = optax.set_to_zero()
        self.schedule, self.probe = lambda step: 0.0, self

    next_state = Setup.next_state

    def forward(self, params, batch_stats, images, key):
        features = images.reshape(len(images), -1) / 255
        return features, features @ params["backbone"], batch_stats + 1

    def update(self, state, features, labels):
        """As the probe's."""
        return {"features": features, "labels": labels}, {}


def test_the_loss_of_both_directions_is_their_sum():
    """In NumPy, with an encoder without BN; the probe and the queue get image by image."""
    c = tiny.config("moco", model__bn_groups=4, moco__symmetric=True)
    method, rng = moco.MoCo(Plain(c)), np.random.default_rng(0)
    directions = ((0, 1), (1, 0))
    params, key_params = rng.normal(size=(2, 8 * 8 * 3, 8)).astype(np.float32)
    state = QueueState(
        step=jnp.int32(1), params={"backbone": params, "head": {}}, batch_stats=jnp.int32(0),
        opt_state=optax.EmptyState(), key_params={"backbone": key_params, "head": {}},
        key_batch_stats=jnp.int32(0),
        queue=queues.init(jax.random.key(0), 40, method.rows, 8), probe=None,
    )  # fmt: skip
    batch = tiny.host_batch(c, 0)
    after, metrics = jax.jit(method.train_step)(state, batch, jax.random.key(0))

    x = batch["images"].reshape(16, 2, -1) / 255
    k = x @ (0.75 * key_params + 0.25 * params)
    q, k = (v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (x @ params, k))
    negatives = queues.contents(state.queue, 40, 1)
    losses = []
    for a, b in directions:
        logits = np.concatenate([(q[:, a] * k[:, b]).sum(1)[:, None], q[:, a] @ negatives.T], 1)
        logits = np.exp(logits / c.moco.temperature)
        losses.append(-np.log(logits[:, 0] / logits.sum(1)).mean())
    np.testing.assert_allclose(metrics["loss"], sum(losses), rtol=1e-5)

    pairs = [(image, *views) for image in range(16) for views in directions]
    pushed = [k[image, b] for image, _, b in pairs]
    got = queues.contents(after.queue, len(pairs), 2)
    np.testing.assert_allclose(got, pushed, rtol=1e-4, atol=1e-6)
    seen = [x[image, a] for image, a, _ in pairs]
    np.testing.assert_allclose(after.probe["features"], seen, rtol=1e-5)
    np.testing.assert_array_equal(
        after.probe["labels"], [batch["labels"][image] for image, *_ in pairs]
    )
    assert (after.batch_stats, after.key_batch_stats) == (2, 2)


def test_no_gradient_reaches_the_key_encoder_or_the_queue():
    method = tiny.build(tiny.config("moco", model__bn_groups=4), 1)
    state = tiny.place_state(method)
    batch = tiny.host_batch(method.run.config, 0)

    def loss(key_params, keys):
        new = state.replace(key_params=key_params, queue=queues.Queue(keys=keys))
        return method.train_step(new, batch, jax.random.key(0))[1]["loss"]

    grads = jax.jit(jax.grad(loss, (0, 1)))(state.key_params, state.queue.keys)
    assert all(not np.any(x) for x in jax.tree.leaves(grads))


@pytest.mark.parametrize(("b", "groups"), [(16, 1), (16, 2), (16, 4), (16, 8), (16, 16), (24, 4),
                                           (256, 8), (40, 4)])  # fmt: skip
def test_shuffled_groups_share_few_images_with_the_group_in_their_place(b, groups):
    rows = np.arange(b)
    shuffled = np.asarray(moco.shuffle(rows, groups)).reshape(groups, -1)
    np.testing.assert_array_equal(shuffled, groups_of(b, groups, shuffled=True))
    for mine, theirs in zip(shuffled, rows.reshape(groups, -1), strict=True):
        assert len(set(mine) & set(theirs)) <= math.ceil(b / groups**2)
    np.testing.assert_array_equal(moco.unshuffle(moco.shuffle(rows, groups), groups), rows)
    images = np.random.default_rng(0).integers(0, 256, (b, 2, 2, 3), dtype=np.uint8)
    np.testing.assert_array_equal(moco.shuffle(images, groups), images[shuffled.ravel()])


KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"


def collectives(text):
    """`(kind, dtype, elements)` of every array that a collective of a compiled program makes."""
    found = []
    for line in text.splitlines():
        match = re.search(rf"= (.*?) ({KINDS}|ragged-all-to-all)(-start)?\(", line)
        if match:
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", match[1]):
                found.append((match[2], dtype, math.prod(int(d) for d in dims.split(",") if d)))
    return found


def test_no_collective_of_the_compiled_step_is_as_large_as_a_share_of_the_queue():
    run = tiny.cached_run("moco", 8)
    queue = run.state.queue.keys
    assert {s.data.shape for s in queue.addressable_shards} == {(512, 2, 8)}
    found = collectives(run.step_fn.as_text())
    assert {"all-reduce", "all-gather"} <= {kind for kind, _, _ in found}, "parsed nothing"
    assert max(size for _, _, size in found) < 512 * 2 * 8
    # Shuffling moves images, as bytes; only reductions (of gradients) are as large.
    moved = [x for x in found if x[0] != "all-reduce" and x[2] >= 16 * 8 * 8 * 3 // 8]
    assert moved and {dtype for _, dtype, _ in moved} == {"u8"}, moved


@pytest.mark.optimised
def test_the_parser_sees_a_queue_that_does_travel():
    """What the test above would find if the queue were gathered."""
    mesh = make_mesh()
    place = jax.NamedSharding(mesh, jax.P(None, "data"))
    keys = jax.ShapeDtypeStruct((512, 16, 8), np.float32, sharding=place)
    gather = jax.jit(lambda x: x, out_shardings=jax.NamedSharding(mesh, jax.P()))
    found = collectives(gather.lower(keys).compile().as_text())
    assert ("all-gather", "f32", 512 * 16 * 8) in found


# on 8 devices: whole groups on a device, with many and with few rows; groups that span devices,
# with more and with fewer rows than there are groups; numbers that do not divide each other
SPREADS = [(64, 8), (128, 8), (64, 16), (32, 16), (64, 32), (64, 2), (128, 4), (32, 4), (16, 4),
           (16, 8), (8, 2), (24, 4), (40, 4)]  # fmt: skip


@pytest.mark.parametrize(("b", "groups"), SPREADS)
@pytest.mark.parametrize("devices", [2, 8])
def test_shuffling_is_the_same_on_any_number_of_devices(b, groups, devices):
    mesh = make_mesh(jax.devices()[:devices])
    images = np.random.default_rng(0).integers(0, 256, (b, 2, 2, 3), dtype=np.uint8)
    placed = jax.device_put(images, batch_sharding(mesh))
    there = jax.jit(lambda x: moco.shuffle(x, groups, mesh))(placed)
    np.testing.assert_array_equal(there, moco.shuffle(images, groups))
    back = jax.jit(lambda x: moco.unshuffle(x, groups, mesh))(there)
    np.testing.assert_array_equal(back, images)


@pytest.mark.optimised
@pytest.mark.parametrize(("b", "groups"), SPREADS[:-2])
def test_shuffling_moves_a_local_batch_twice_at_most(b, groups):
    mesh = make_mesh()
    rows = batch_sharding(mesh)
    images = jax.ShapeDtypeStruct((b, 4, 4, 3), np.uint8, sharding=rows)
    deal = jax.jit(lambda x: moco.shuffle(x, groups, mesh), out_shardings=rows)
    found = collectives(deal.lower(images).compile().as_text())
    assert found and {dtype for _, dtype, _ in found} == {"u8"}
    assert sum(size for _, _, size in found) <= 2 * b * 4 * 4 * 3 // 8, found


def test_init_copies_the_query_encoder_and_fills_the_queue_with_unit_vectors():
    method = tiny.build(tiny.config("moco", model__bn_groups=4, model__stages=(1,)), 8)
    state = jax.device_get(jax.jit(method.init)(jax.random.key(0)))
    jax.tree.map(np.testing.assert_array_equal, state.key_params, state.params)
    jax.tree.map(np.testing.assert_array_equal, state.key_batch_stats, state.batch_stats)
    assert state.queue.keys.shape == (3, 16, 8)  # ceil(40 / 16) slots
    np.testing.assert_allclose(np.linalg.norm(state.queue.keys, axis=2), 1, rtol=1e-5)
    assert state.step == 0 and state.step.dtype == np.int32


def test_features_come_from_the_query_encoder():
    run = tiny.cached_run("moco", 8)
    state, images = run.states[1], tiny.host_batch(run.method.run.config, 9)["images"][:, 0]
    with jax.enable_x64(True):
        encode = jax.jit(run.method.encode)
        got = encode(state, images)
        other = jax.tree.map(np.zeros_like, (state.key_params, state.key_batch_stats))
        blind = state.replace(key_params=other[0], key_batch_stats=other[1])
        np.testing.assert_array_equal(encode(blind, images), got)
        x = (images / 255 - MEAN) / STD
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        want = jax.jit(lambda v, x: run.method.setup.network.apply(v, x, False)[0])(variables, x)
        np.testing.assert_allclose(got, want, rtol=1e-9)


def test_one_group_warns_that_statistics_leak(caplog):
    with caplog.at_level(logging.WARNING):
        tiny.build(tiny.config("moco", model__bn_groups=4), 1)
        assert not caplog.records
        tiny.build(tiny.config("moco", model__bn_groups=1), 1)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "bn_groups=1" in caplog.text and "cheat" in caplog.text


def test_a_queue_that_is_longer_than_an_epoch_is_remarked_on_by_who_trains(caplog):
    """`tiny.build` has epochs of 4 batches of 16; a batch may have been left over."""
    with caplog.at_level(logging.WARNING):
        tiny.build(tiny.config("moco", model__bn_groups=4, moco__queue_length=79), 1)
        assert not caplog.records
        c = tiny.config("moco", model__bn_groups=4, moco__queue_length=80)
        tiny.build(c, 1)
        assert "moco.queue_length=80 is longer than an epoch, of 64 keys" in caplog.text
        caplog.clear()
        c.model.bn_groups = 1
        moco.MoCo(make_encoder_setup(c, make_mesh(jax.devices()[:1])))
        assert not caplog.records


@pytest.mark.parametrize("momentum", [1.0, -0.1])
def test_momentum_out_of_range_is_refused(momentum):
    with pytest.raises(UserError, match=f"moco.momentum={momentum}"):
        tiny.build(tiny.config("moco", model__bn_groups=4, moco__momentum=momentum), 1)
