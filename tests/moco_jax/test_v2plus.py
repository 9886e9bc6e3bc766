"""MoCo v2+ as in solo-learn: a queue for each view, the mean of the directions, the momentum."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from test_moco_method import Plain

from common import queue as queues
from common.errors import UserError
from common.momentum import QueueState
from configs import moco_v2plus_cifar10
from moco_jax import method as moco

LENGTH, DIM, STEP = 20, 8, 1  # two slots of 16 keys a view, 12 of the oldest one masked


@functools.cache
def one_step(scale=0.5):
    """A step of an encoder that is a matrix: method, state before and after, batch, metrics."""
    c = tiny.config(
        "moco", moco__symmetric=True, moco__queue_per_view=True, moco__queue_length=LENGTH,
        moco__loss_scale=scale,
    )  # fmt: skip
    method, rng = moco.MoCo(Plain(c)), np.random.default_rng(0)
    params, key_params = rng.normal(size=(2, 8 * 8 * 3, DIM)).astype(np.float32)
    state = QueueState(
        step=jnp.int32(STEP), params={"backbone": params, "head": {}}, batch_stats=jnp.int32(0),
        opt_state=optax.EmptyState(), key_params={"backbone": key_params, "head": {}},
        key_batch_stats=jnp.int32(0),
        queue=queues.init(jax.random.key(0), 2 * LENGTH, method.rows, DIM), probe=None,
    )  # fmt: skip
    batch = tiny.host_batch(c, 0)
    after, metrics = jax.jit(method.train_step)(state, batch, jax.random.key(0))
    return c, state, after, batch, metrics


def by_hand(c, state, batch, early=False):
    """The sum of both losses in NumPy. `early`: view 1's keys enter before the second direction."""
    x = batch["images"].reshape(16, 2, -1) / 255
    params = state.params["backbone"]
    k = x @ (0.75 * state.key_params["backbone"] + 0.25 * params)
    q, k = (v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (x @ params, k))
    losses = []
    for direction, (a, b) in enumerate(((0, 1), (1, 0))):
        # every second key is of the other view, from the newest slot back
        past = [key for slot in (1, 0) for key in np.asarray(state.queue.keys)[slot][direction::2]]
        negatives = np.stack(past)[-LENGTH:]
        if early and direction:
            negatives = np.concatenate([negatives[16:], k[:, b]])
        logits = np.concatenate([(q[:, a] * k[:, b]).sum(1)[:, None], q[:, a] @ negatives.T], 1)
        logits = np.exp(logits / c.moco.temperature)
        losses.append(-np.log(logits[:, 0] / logits.sum(1)).mean())
    return sum(losses), k


def test_each_view_meets_the_past_keys_of_the_other():
    """And keys of this step are nobody's negatives, in the second direction neither."""
    c, state, after, batch, metrics = one_step()
    want, k = by_hand(c, state, batch)
    np.testing.assert_allclose(metrics["loss"], want, rtol=1e-5)
    assert abs(by_hand(c, state, batch, early=True)[0] - want) > 0.01 * want
    for direction, view in ((0, 1), (1, 0)):
        of_view = queues.every(after.queue, direction, 2)
        got = queues.contents(of_view, LENGTH, STEP + 1)
        np.testing.assert_allclose(got[-16:], k[:, view], rtol=1e-4, atol=1e-6)
        old = np.asarray(state.queue.keys)[0][direction::2][-4:]
        np.testing.assert_array_equal(got[:4], old)


@pytest.mark.slow
def test_the_gradient_is_that_of_the_mean_and_the_logged_loss_the_sum():
    mean, total = one_step(0.5)[-1], one_step(1.0)[-1]
    assert mean["loss"] == total["loss"]
    np.testing.assert_allclose(2 * mean["gradient_norm"], total["gradient_norm"], rtol=1e-6)


@pytest.mark.parametrize(
    "length", [20, *(pytest.param(x, marks=pytest.mark.slow) for x in (32, 5))]
)
def test_half_of_a_queue_of_both_views_is_a_queue_of_one(length):
    """Its mask leaves as many keys of each view, from the same steps."""
    rng, both = np.random.default_rng(0), queues.empty(2 * length, 32, 2)
    one = queues.empty(length, 16, 2)
    assert one.keys.shape[0] == both.keys.shape[0]
    for step in range(7):
        keys = rng.normal(size=(16, 2, 2)).astype(np.float32)
        both = queues.push(both, keys.reshape(32, 2), step)
        one = queues.push(one, keys[:, 1], step)
        half = queues.every(both, 1, 2)
        np.testing.assert_array_equal(half.keys, one.keys)
        live = np.asarray(queues.mask(2 * length, 32, step + 1)).reshape(-1, 16, 2)
        np.testing.assert_array_equal(live[..., 1], queues.mask(length, 16, step + 1))
        np.testing.assert_array_equal(live[..., 0], live[..., 1])


def test_the_momentum_goes_from_one_value_to_the_other_on_a_cosine():
    """solo-learn: end - (end - start) (cos(pi t / T) + 1) / 2; a run of `tiny` has 8 steps."""
    changes = {"moco__momentum": 0.99, "model__bn_groups": 4}
    method = tiny.build(tiny.config("moco", moco__momentum_end=0.999, **changes), 1)
    got = [float(method.momentum(jnp.int32(t))) for t in range(9)]
    want = [0.999 - 0.009 * (np.cos(np.pi * t / 8) + 1) / 2 for t in range(9)]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose((got[0], got[4], got[8]), (0.99, 0.9945, 0.999), rtol=1e-6)
    constant = tiny.build(tiny.config("moco", **changes), 1)
    assert constant.momentum(jnp.int32(3)) == 0.99


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"momentum_end": 0.5}, "moco.momentum_end=0.5: expected moco.momentum=0.75 or more, up"),
        ({"momentum_end": 1.1}, "moco.momentum_end=1.1: expected moco.momentum=0.75 or more"),
        ({"queue_per_view": True}, "queue_per_view needs the keys of both views: set"),
        ({"loss_scale": 0.0}, "moco.loss_scale=0.0: expected a finite number above 0, 1 for the"),
    ],
)
def test_values_out_of_range_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        tiny.build(tiny.config("moco", **{f"moco__{k}": v for k, v in changes.items()}), 1)


def test_a_queue_of_both_views_may_hold_two_keys_of_each_image_of_an_epoch(caplog):
    """`tiny.build` has epochs of 4 batches of 16; a batch may have been left over."""
    settings = {"moco__symmetric": True, "model__bn_groups": 4}
    with caplog.at_level(logging.WARNING):
        tiny.build(tiny.config("moco", moco__queue_length=159, **settings), 1)
        tiny.build(
            tiny.config("moco", moco__queue_length=79, moco__queue_per_view=True, **settings), 1
        )
        assert not caplog.records
        tiny.build(tiny.config("moco", moco__queue_length=160, **settings), 1)
        tiny.build(
            tiny.config("moco", moco__queue_length=80, moco__queue_per_view=True, **settings), 1
        )
    assert "moco.queue_length=160 is longer than an epoch, of 128 keys" in caplog.text
    assert "moco.queue_length=80 is longer than an epoch, of 64 keys" in caplog.text


def test_the_config_is_solo_learns():
    """scripts/pretrain/cifar/mocov2plus.yaml and augmentations/symmetric_weak.yaml."""
    c = moco_v2plus_cifar10.get_config()
    m, o = c.moco, c.optimizer
    assert (m.queue_length, m.queue_per_view, m.symmetric, m.loss_scale) == (32768, True, True, 0.5)
    assert (m.momentum, m.momentum_end, m.temperature) == (0.99, 0.999, 0.2)
    assert (c.head.kind, c.head.hidden, c.head.dim) == ("moco_v2", 2048, 256)
    assert (o.name, o.learning_rate, o.weight_decay, o.warmup) == ("sgd", 0.3, 1e-4, "10 epochs")
    assert (c.batch_size, c.duration, c.model.bn_groups) == (256, "1000 epochs", 1)
    small = moco_v2plus_cifar10.get_config("cpu")
    assert small.moco.symmetric and small.moco.queue_per_view and small.moco.loss_scale == 0.5
