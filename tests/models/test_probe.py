"""The online probe against NumPy, and without effect on the encoder."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.config import section
from common.errors import UserError
from common.models import probe

N, D, C = 24, 6, 3


def data(seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, C, N).astype(np.int32)
    features = scale * (rng.normal(size=(N, D)) + np.eye(D)[labels] * 2 + 3)
    return features.astype(np.float32), labels


def by_hand(batches, lr, momentum=0.9):
    """Softmax regression with its own gradient formula, in float64."""
    kernel, bias = np.zeros((D, C)), np.zeros(C)
    v_kernel, v_bias = np.zeros_like(kernel), np.zeros_like(bias)
    means, variances, out = [], [], []
    for features, labels in batches:
        x = features.astype(np.float64)
        means.append(x.mean(0))
        variances.append(x.var(0))
        x = (x - means[-1]) / np.sqrt(variances[-1] + 1e-6) / np.sqrt(D)
        x, y = x[labels >= 0], labels[labels >= 0]
        logits = x @ kernel + bias
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        rows = np.arange(len(y))
        count = max(len(y), 1)
        out.append((-np.log(p[rows, y]).sum() / count, (logits.argmax(1) == y).sum() / count))
        p[rows, y] -= 1
        v_kernel = momentum * v_kernel + x.T @ p / count
        v_bias = momentum * v_bias + p.sum(0) / count
        kernel, bias = kernel - lr * v_kernel, bias - lr * v_bias
    return kernel, bias, means, variances, out


def test_updates_equal_numpy_with_unlabelled_rows_and_running_statistics():
    model = probe.Probe(C, optax.sgd(0.7, momentum=0.9))
    state = model.init(jax.random.key(0), D)
    update = jax.jit(model.update)
    batches = [data(seed, scale=1 + seed) for seed in range(12)]
    for t, (_, labels) in enumerate(batches):
        labels[t::4] = -1
    batches[5][1][:] = -1  # nothing labelled in this one
    metrics = []
    for features, labels in batches:
        state, values = update(state, features, labels)
        metrics.append((values["probe_loss"], values["probe_top1"]))
    kernel, bias, means, variances, want = by_hand(batches, 0.7)
    np.testing.assert_allclose(state.params["kernel"], kernel, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(state.params["bias"], bias, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(np.array(metrics), np.array(want), rtol=1e-4, atol=1e-6)
    # The plain mean of the first ten batches, then an exponential one with 0.9.
    for got, seen in ((state.mean, means), (state.var, variances)):
        running = np.mean(seen[:10], 0)
        for value in seen[10:]:
            running = 0.9 * running + 0.1 * value
        np.testing.assert_allclose(got, running, rtol=1e-4)
    test, _ = data(99)
    running_mean, running_var = (np.asarray(x, np.float64) for x in (state.mean, state.var))
    x = (test - running_mean) / np.sqrt(running_var + 1e-6) / np.sqrt(D)
    np.testing.assert_allclose(model.predict(state, test), x @ kernel + bias, rtol=1e-3, atol=1e-5)


def test_no_gradient_reaches_the_features():
    model = probe.Probe(C, optax.sgd(1.0))
    features, labels = data()
    state, _ = model.update(model.init(jax.random.key(0), D), features, labels)  # weights not 0

    def outer(features):
        new, metrics = model.update(state, features, labels)
        return metrics["probe_loss"] + sum(x.sum() for x in jax.tree.leaves(new.params))

    np.testing.assert_array_equal(jax.grad(outer)(jnp.asarray(features)), np.zeros((N, D)))


def test_a_batch_without_labels_changes_no_weight_and_gives_no_nan():
    model = probe.Probe(C, optax.sgd(1.0))
    features, labels = data()
    state, _ = model.update(model.init(jax.random.key(0), D), features, labels)
    new, metrics = model.update(state, features, np.full(N, -1, np.int32))
    jax.tree.map(np.testing.assert_array_equal, new.params, state.params)
    assert metrics == {"probe_loss": 0.0, "probe_top1": 0.0}


def test_constant_features_stay_finite():
    model = probe.Probe(C, optax.sgd(1.0))
    state = model.init(jax.random.key(0), D)
    for _ in range(3):
        state, metrics = model.update(state, np.full((N, D), 5.0, np.float32), data()[1])
    assert np.isfinite(metrics["probe_loss"])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_switched_off():
    config = section("probe")
    model = probe.make_probe(config, num_classes=0, total_steps=10)
    state = model.init(jax.random.key(0), D)
    assert state is None
    assert model.update(state, *data()) == (None, {})


def test_bfloat16_features_are_worked_on_in_float32():
    model = probe.Probe(C, optax.sgd(1.0))
    features, labels = data()
    low = jnp.asarray(features, jnp.bfloat16)
    got, metrics = model.update(model.init(jax.random.key(0), D), low, labels)
    want, _ = model.update(
        model.init(jax.random.key(0), D), np.asarray(low.astype(jnp.float32)), labels
    )
    jax.tree.map(np.testing.assert_array_equal, got.params, want.params)
    assert metrics["probe_loss"].dtype == got.params["kernel"].dtype != jnp.bfloat16


@pytest.mark.parametrize(
    ("schedule", "width", "scale"),
    [("constant", 16, 10.0), ("constant", 512, 0.1), ("cosine", 16, 0.1), ("cosine", 512, 10.0)],
)
def test_default_learning_rate_learns_at_any_scale_and_width(schedule, width, scale):
    """Ten noisy directions in a space of correlated features: the Bayes rule is right on ~96 %."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(10, 12))
    mixing = rng.normal(size=(12, width))

    def sample(n):
        labels = rng.integers(0, 10, n).astype(np.int32)
        latent = centres[labels] + 0.5 * rng.normal(size=(n, 12))
        return (scale * (latent @ mixing + 4)).astype(np.float32), labels

    config = section("probe")
    config.schedule = schedule
    model = probe.make_probe(config, 10, 200)
    state = model.init(jax.random.key(0), width)
    update = jax.jit(model.update)
    for _ in range(200):
        state, _ = update(state, *sample(128))
    features, labels = sample(2000)
    predicted = np.argmax(model.predict(state, features), -1)
    assert np.mean(predicted == labels) > 0.9


def test_the_cosine_comes_to_0_at_the_end_of_the_run():
    config = section("probe")
    config.update(schedule="cosine", momentum=0.0, learning_rate=3.0)
    tx, weight = probe.make_probe(config, C, total_steps=8).tx, np.zeros(())
    state, rates = tx.init(weight), []
    for _ in range(8):
        update, state = tx.update(np.ones(()), state, weight)
        rates.append(-float(update))
    np.testing.assert_allclose(rates, 1.5 * (1 + np.cos(np.pi * np.arange(8) / 8)), rtol=1e-5)


def test_unknown_schedule():
    config = section("probe")
    config.schedule = "linear"
    with pytest.raises(UserError, match="constant, cosine"):
        probe.make_probe(config, 10, 300)


def test_a_negative_learning_rate():
    c = section("probe")
    c.learning_rate = -1.0
    with pytest.raises(UserError, match=r"probe\.learning_rate=-1.0: expected a finite"):
        probe.make_probe(c, C, 10)
