"""Optimisers and schedules against NumPy, written from the papers and PyTorch's documentation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common import optim
from common.config import section
from common.errors import UserError

STEPS, EPOCH = 12, 4


def make_config(batch_size=512, **fields):
    """The optimizer section with these fields, and the batch size."""
    return section("optimizer", **fields), batch_size


def rate_by_hand(t, peak, warmup, total):
    if t < warmup:
        return peak * (t + 1) / (warmup + 1)
    return peak / 2 * (1 + math.cos(math.pi * (t - warmup) / (total - warmup)))


def make_params():
    """A kernel, a bias, a batch-norm scale, and an untouched kernel of zeros."""
    rng = np.random.default_rng(0)
    return {
        "conv": {"kernel": rng.normal(size=(3, 3, 2, 4)), "bias": rng.normal(size=4)},
        "norm": {"scale": rng.normal(size=4)},
        "zero": {"kernel": np.zeros((2, 2))},
    }


def make_gradients(t):
    rng = np.random.default_rng(100 + t)
    return jax.tree.map(lambda p: rng.normal(size=p.shape), make_params())


def run_optax(config, steps=STEPS):
    tx, _ = optim.make_optimizer(*config, STEPS, EPOCH)
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), make_params())
    state = tx.init(params)
    update = jax.jit(tx.update)
    for t in range(steps):
        grads = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), make_gradients(t))
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def run_by_hand(rule, steps=STEPS):
    """Applies rule(param, gradient, memory, t) -> param to each tensor on its own, in float64."""
    leaves, tree = jax.tree.flatten(make_params())
    memories = [{} for _ in leaves]
    for t in range(steps):
        grads = jax.tree.leaves(make_gradients(t))
        leaves = [rule(p, g, m, t) for p, g, m in zip(leaves, grads, memories, strict=True)]
    return jax.tree.unflatten(tree, leaves)


def assert_same(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), got, want)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay_all", [False, True])
def test_sgd_is_pytorchs(nesterov, decay_all):
    config = make_config(
        name="sgd",
        learning_rate=0.1,
        weight_decay=0.05,
        warmup="3 steps",
        nesterov=nesterov,
        decay_bn_and_bias=decay_all,
    )

    def rule(p, g, m, t):
        lr = rate_by_hand(t, 0.2, 3, STEPS)  # 0.1 x 512 / 256
        if p.ndim > 1 or decay_all:
            g = g + 0.05 * p
        m["v"] = 0.9 * m.get("v", 0) + g
        return p - lr * (g + 0.9 * m["v"] if nesterov else m["v"])

    assert_same(run_optax(config), run_by_hand(rule))


@pytest.mark.parametrize(("decay_all", "nesterov"), [(False, False), (True, False), (False, True)])
def test_lars_is_simclrs(decay_all, nesterov):
    config = make_config(
        batch_size=1024,
        name="lars",
        learning_rate=0.5,
        scaling="sqrt",
        weight_decay=0.05,
        warmup="1 epoch",
        decay_bn_and_bias=decay_all,
        trust_coefficient=0.002,
        nesterov=nesterov,
    )

    def rule(p, g, m, t):
        lr = rate_by_hand(t, 16.0, 4, STEPS)  # 0.5 x sqrt(1024)
        if p.ndim > 1 or decay_all:
            g = g + 0.05 * p
        if p.ndim > 1:
            norm_p, norm_g = np.sqrt((p**2).sum()), np.sqrt((g**2).sum())
            g = g * (0.002 * norm_p / norm_g if norm_p > 0 and norm_g > 0 else 1.0)
        m["v"] = 0.9 * m.get("v", 0) + lr * g
        return p - (lr * g + 0.9 * m["v"] if nesterov else m["v"])

    assert_same(run_optax(config), run_by_hand(rule))


@pytest.mark.parametrize("nesterov", [False, True])
def test_adamw(nesterov):
    """With the look-ahead as Dozat 2016, algorithm 2, has it."""
    config = make_config(
        name="adamw",
        nesterov=nesterov,
        learning_rate=0.01,
        scaling="none",
        weight_decay=0.3,
        b1=0.8,
        b2=0.95,
        warmup="25 %",
    )

    def rule(p, g, m, t):
        lr = rate_by_hand(t, 0.01, 3, STEPS)
        m["m"] = 0.8 * m.get("m", 0) + 0.2 * g
        m["v"] = 0.95 * m.get("v", 0) + 0.05 * g**2
        mean = m["m"] / (1 - 0.8 ** (t + 1))
        if nesterov:
            mean = 0.8 * m["m"] / (1 - 0.8 ** (t + 2)) + 0.2 * g / (1 - 0.8 ** (t + 1))
        step = mean / (np.sqrt(m["v"] / (1 - 0.95 ** (t + 1))) + 1e-8)
        return p - lr * (step + (0.3 * p if p.ndim > 1 else 0))

    assert_same(run_optax(config), run_by_hand(rule))


def test_clipping_is_by_the_norm_of_all_gradients_and_comes_first():
    config = make_config(
        clip_norm=0.5, momentum=0.0, weight_decay=0.1, schedule="constant", scaling="none"
    )
    grads = jax.tree.leaves(make_gradients(0))
    norm = np.sqrt(sum((g**2).sum() for g in grads))
    assert norm > 0.5

    def rule(p, g, m, t):
        return p - 0.06 * (g * 0.5 / norm + (0.1 * p if p.ndim > 1 else 0))

    assert_same(run_optax(config, steps=1), run_by_hand(rule, steps=1))


@pytest.mark.parametrize("warmup", ["0 steps", "1 step", "5 steps", "2 epochs"])
def test_cosine_schedule_at_every_step(warmup):
    steps = {"0 steps": 0, "1 step": 1, "5 steps": 5, "2 epochs": 8}[warmup]
    _, schedule = optim.make_optimizer(*make_config(warmup=warmup), STEPS, EPOCH)
    got = [float(schedule(t)) for t in range(STEPS + 1)]
    want = [rate_by_hand(t, 0.12, steps, STEPS) for t in range(STEPS + 1)]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-8)
    assert got[0] > 0  # the first update counts
    assert got[steps] == pytest.approx(0.12)
    assert got[STEPS] == pytest.approx(0, abs=1e-8)


def test_step_schedule_with_warmup_decays_at_the_named_epochs():
    config = make_config(
        schedule="step", decay_at=(1, "9 steps"), decay_rate=0.1, warmup="2 steps", scaling="none"
    )
    schedule = optim.learning_rate_schedule(*config, STEPS, EPOCH)
    got = [float(schedule(t)) for t in range(STEPS)]
    want = [0.02, 0.04] + [0.06] * 2 + [0.006] * 5 + [0.0006] * 3
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_moco_v1_and_simclr_published_rates():
    moco = make_config(256, learning_rate=0.03, schedule="step", decay_at=(120, 160))
    schedule = optim.learning_rate_schedule(*moco, 200 * 5004, 5004)
    epochs = [0, 119, 120, 159, 160, 199]
    np.testing.assert_allclose(
        [float(schedule(e * 5004)) for e in epochs],
        [0.03, 0.03, 0.003, 0.003, 0.0003, 0.0003],
        rtol=1e-6,
    )
    # SimCLR's README: 0.075 with square-root scaling is 4.8 at a batch of 4096, as is 0.3 linear.
    for base, scaling in ((0.075, "sqrt"), (0.3, "linear")):
        config = make_config(4096, learning_rate=base, scaling=scaling)
        assert optim.peak_learning_rate(*config) == pytest.approx(4.8)


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        ("10 epochs", 1560),
        ("1 epoch", 156),
        ("0.5 epochs", 78),
        ("500 steps", 500),
        ("1step", 1),
        ("5 %", 50),
        ("5%", 50),
        ("0 epochs", 0),
        ("0.001 epochs", 1),  # never rounded away
        ("0.06 epochs", 9),  # 9.36
        ("0.1 epochs", 16),  # 15.6
        ("0.14 %", 1),  # 1.4
        ("0.16 %", 2),
        ("0.35 %", 4),  # 3.5, in floating point 3.4999999999999996
        (7, 7),
        ("7", 7),
        (0, 0),
        (3.0, 3),
    ],
)
def test_durations(duration, steps):
    assert optim.steps_of(duration, 156, 1000) == steps


@pytest.mark.parametrize(
    "duration", ["", "ten epochs", "10 epocs", "-3 steps", 0.05, "1.5 steps", None, True, "5 %% "]
)
def test_malformed_durations_name_the_accepted_forms(duration):
    with pytest.raises(UserError, match=r'eval_every=.*"10 epochs", "500 steps", "5 %"'):
        optim.steps_of(duration, 156, 1000, "eval_every")


def test_bad_values_are_user_errors():
    with pytest.raises(UserError, match='did you mean "lars"'):
        optim.make_optimizer(*make_config(name="larz"), STEPS, EPOCH)
    with pytest.raises(UserError, match="linear, sqrt, none"):
        optim.make_optimizer(*make_config(scaling="cubic"), STEPS, EPOCH)
    with pytest.raises(UserError, match="cosine, step, constant"):
        optim.make_optimizer(*make_config(schedule="exp"), STEPS, EPOCH)
    with pytest.raises(UserError, match="40 steps, the whole run only 12"):
        optim.make_optimizer(*make_config(warmup="10 epochs"), STEPS, EPOCH)
    with pytest.raises(UserError, match='"5 %" is a percentage, not possible here: use'):
        optim.steps_of("5 %", 156)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("learning_rate", -0.1, "-0.1 is out of range: expected a finite number, 0 or more"),
        ("weight_decay", math.nan, "nan is out of range: expected a finite number, 0 or more"),
        ("clip_norm", -1.0, "-1.0 is out of range: expected a finite number, 0 or more"),
        ("momentum", 1.0, "1.0 is not a decay rate: expected 0 or more, and less than 1"),
        ("b2", -0.5, "-0.5 is not a decay rate"),
    ],
)
def test_a_number_out_of_its_range(name, value, words):
    with pytest.raises(UserError, match=rf"^optimizer.{name}={words}"):
        optim.make_optimizer(*make_config(**{name: value}), STEPS, EPOCH)
