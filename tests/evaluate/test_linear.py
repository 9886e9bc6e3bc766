"""Linear classifiers against gradient descent by hand, optimality conditions and scikit-learn."""

import warnings

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from sklearn.linear_model import LogisticRegression

from common.errors import UserError
from common.evaluate import accuracy, batches, linear, logistic
from common.evaluate.linear import Candidate
from common.sharding import make_mesh

CLASSES = 3


def data(n=96, d=5, seed=0, classes=CLASSES):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n).astype(np.int32)
    centres = np.random.default_rng(9).normal(size=(classes, d))
    return (3 + centres[y] + rng.normal(size=(n, d))).astype(np.float32), y


def softmax(z):
    z = np.exp(z - z.max(1, keepdims=True))
    return z / z.sum(1, keepdims=True)


def by_hand(x, y, steps, batch, order, candidate, momentum, nesterov):
    """SGD with momentum in float64, the gradient written out."""
    w, b = np.zeros((x.shape[1], CLASSES)), np.zeros(CLASSES)
    vw, vb = np.zeros_like(w), np.zeros_like(b)
    for t in range(steps):
        ids = order(t)
        ids, known = ids, y[ids] >= 0
        error = softmax(x[ids] @ w + b) - np.eye(CLASSES)[y[ids]]
        error = error * known[:, None] / max(known.sum(), 1)
        gw, gb = x[ids].T @ error + candidate.weight_decay * w, error.sum(0)
        vw, vb = momentum * vw + gw, momentum * vb + gb
        rate = candidate.learning_rate * batch / 256 * (1 + np.cos(np.pi * t / steps)) / 2
        if nesterov:
            gw, gb = gw + momentum * vw, gb + momentum * vb
        else:
            gw, gb = vw, vb
        w, b = w - rate * gw, b - rate * gb
    return w, b


@pytest.mark.parametrize(("devices", "nesterov"), [(1, True), (8, True), (1, False)])
def test_sgd_equals_gradient_descent_by_hand(devices, nesterov):
    x, y = data()
    y[::7] = -1
    mesh, size, steps = make_mesh(jax.devices()[:devices]), 16, 15
    grid = [Candidate(0.5, 0.0), Candidate(4.0, 0.03)]
    mean, scale = np.linspace(2, 4, 5), np.linspace(0.5, 1.5, 5)
    pairs = batches.cached(x, y, mesh, size, seed=5)
    args = (size, CLASSES, mean, scale, mesh, 0.8, nesterov)
    got = linear.fit(pairs, steps, grid, *args, quiet=True)
    per_epoch = len(y) // size

    def order(t):
        epoch, step = divmod(t, per_epoch)
        return batches.pipeline.order(5, epoch, len(y))[step * size : (step + 1) * size]

    inputs = (x.astype(np.float64) - mean) * scale
    for candidate, classifier in zip(grid, got, strict=True):
        w, b = by_hand(inputs, y, steps, size, order, candidate, 0.8, nesterov)
        want = inputs @ w + b
        np.testing.assert_allclose(classifier.logits(x), want, rtol=1e-4, atol=1e-4)
    assert np.abs(got[0].kernel - got[1].kernel).max() > 0.1  # the settings make a difference


def test_the_loss_on_the_progress_line_is_that_of_its_step(monkeypatch):
    shown = []

    class Seen:
        def __init__(self, steps, stream):
            pass

        def show(self, step, epoch, values, timing, eta):
            shown.append((step, values["loss"]))

        def close(self):
            pass

    taken = iter(range(1, 99))
    monkeypatch.setattr(linear, "_step", lambda state, *_, **__: (state, np.float32(next(taken))))
    monkeypatch.setattr(linear, "Progress", Seen)
    x, y = data()
    mesh = make_mesh(jax.devices()[:1])
    pairs = batches.cached(x, y, mesh, 16, seed=0)
    linear.fit(pairs, 9, [Candidate(1.0, 0.0)], 16, CLASSES, *linear.standardiser(x), mesh)
    assert [step for step, _ in shown][-1] == 9 and len(shown) > 3
    assert all(step == loss for step, loss in shown)


def test_sgd_converges_to_scikit_learns_solution():
    x, y = data()
    mesh, decay = make_mesh(jax.devices()[:1]), 0.02
    mean, scale = linear.standardiser(x)
    pairs = batches.cached(x, y, mesh, len(y), seed=0)
    args = (len(y), CLASSES, mean, scale, mesh)
    (got,) = linear.fit(pairs, 400, [Candidate(4.0, decay)], *args, quiet=True)
    model = LogisticRegression(C=1 / (decay * len(y)), tol=1e-8, max_iter=1000)
    model.fit((x - mean) * scale, y)
    np.testing.assert_allclose(
        softmax(got.logits(x)), model.predict_proba((x - mean) * scale), atol=1e-4
    )


def test_standardiser_and_flat_features():
    x, _ = data(50)
    x[:, 1] = 7.0
    mean, scale = linear.standardiser(x)
    z = (x - mean) * scale
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(z.std(0), [1, 0, 1, 1, 1], atol=1e-6)
    assert scale[1] < 1.5e3  # not 1 / 0
    pixels = np.full((4, 3), 9, np.uint8)
    assert np.isfinite(linear.standardiser(pixels)[1]).all()


def test_best_by_accuracy_and_then_by_cross_entropy():
    x, y = np.eye(2, dtype=np.float32), np.array([0, 1])
    right = linear.Classifier(np.eye(2, dtype=np.float32), np.zeros(2, np.float32))
    sure = linear.Classifier(5 * np.eye(2, dtype=np.float32), np.zeros(2, np.float32))
    wrong = linear.Classifier(-right.kernel, right.bias)
    assert linear.best([wrong, right, sure, right], x, y) == 2
    assert linear.cross_entropy(x, y) == pytest.approx(np.log1p(np.exp(-1)))


@pytest.mark.parametrize("classes", [2, 3])
def test_logistic_regression_is_at_its_minimum(classes):
    x, y = data(classes=classes)
    values = [30.0, 1.0]
    fits = logistic.fit(x, y, classes, values, 1000, quiet=True)
    mean, scale = linear.standardiser(x)
    for l2, found in zip(values, fits, strict=True):
        assert found.converged
        c = found.classifier
        error = softmax(c.logits(x).astype(np.float64)) - np.eye(classes)[y]
        kernel = c.kernel / scale[:, None]
        gradient = ((x - mean) * scale).T @ error
        # two classes: scikit-learn decays the difference of the columns
        gradient += kernel * l2 * (2 if classes == 2 else 1)
        assert np.abs(gradient).max() < 0.002 * len(y)
        assert np.abs(error.sum(0)).max() < 0.002 * len(y)


def test_logistic_regression_reports_that_it_stopped_early_without_a_warning():
    x, y = data()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (stopped,) = logistic.fit(x, y, CLASSES, [1e-6], 2, quiet=True)
    assert not stopped.converged
    settings = ConfigDict({"num_values": 2, "low": 1e-6, "high": 1.0, "max_iterations": 2,
                           "held_out": 0.2})  # fmt: skip
    found = logistic.choose(x, y, CLASSES, settings, seed=0)
    assert "NOT converged in 2 iterations" in found.words
    assert found.record["values_not_converged"] == 2 and not found.record["converged"]


def test_a_class_without_training_images_is_never_predicted():
    x, y = data()
    (found,) = logistic.fit(x, np.where(y == 1, 3, y), 5, [1.0], 100, quiet=True)
    logits = found.classifier.logits(x)
    assert set(logits.argmax(1)) == {0, 2, 3} and np.isfinite(logits).all()
    with pytest.raises(UserError, match="are of one class: expected two or more"):
        logistic.fit(x, np.zeros_like(y), 3, [1.0], 100, quiet=True)


def test_strengths():
    values = logistic.strengths(1e-6, 1e5, 45)
    assert len(values) == 45 and values[0] == 1e5 and values[-1] == pytest.approx(1e-6)
    np.testing.assert_allclose(np.diff(np.log10(values)), -11 / 44)
    with pytest.raises(UserError, match="expected 0 < low <= high"):
        logistic.strengths(0.0, 1.0, 3)


@pytest.mark.parametrize(("candidates", "steps"), [([], 5), ([Candidate(0.1, 0.0)], 0)])
def test_nothing_to_fit(candidates, steps):
    mesh = make_mesh(jax.devices()[:1])
    message = f"{len(candidates)} candidates, {steps} steps: expected at least 1"
    with pytest.raises(ValueError, match=message):
        linear.fit([], steps, candidates, 4, 3, np.zeros(2), np.ones(2), mesh)


def test_top1_and_top5():
    scores = np.array([[9, 8, 7, 6, 5, 4, 3], [1, 2, 3, 4, 5, 6, 7.0]])
    assert accuracy.top_k(scores, np.array([0, 0])) == {"top1": 0.5, "top5": 0.5}
    assert accuracy.top_k(scores, np.array([4, 5])) == {"top1": 0.0, "top5": 1.0}
    assert accuracy.top_k(scores, np.array([5, 1])) == {"top1": 0.0, "top5": 0.0}
    assert accuracy.top_k(scores[:, :5], np.array([0, 4])) == {"top1": 1.0, "top5": None}
    # collapsed features score all classes alike: that is chance and not success
    flat = accuracy.top_k(np.zeros((20, 10)), np.arange(20) % 10)
    assert flat == {"top1": 0.1, "top5": 0.5}
    assert accuracy.top_k(np.zeros((20, 10)), np.arange(20) % 10, least=0.0)["top5"] == 0


def test_batch_sizes():
    one, eight = make_mesh(jax.devices()[:1]), make_mesh()
    assert batches.batch_size_for(256, 100, one) == 100
    assert batches.batch_size_for(256, 100, eight) == 96
    assert batches.batch_size_for(4, 100, eight) == 8
    with pytest.raises(UserError, match="5 training examples on 8 devices"):
        batches.batch_size_for(256, 5, eight)
