"""What a step hands on: labels with their features to the probe, the rate that moved the weights.

The network is one matrix, so that the features of every view are known and a step compiles quickly.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny

from common.setup import Setup

STEPS, PIXELS = 6, 8 * 8 * 3
CASES = {
    "simclr": {},
    "moco": {"moco__symmetric": True, "model__bn_groups": 4},  # both views are queries
    "moco_v3": {"moco_v3__predictor_layers": 0},
}


@dataclasses.dataclass(frozen=True)
class Linear(Setup):
    """A setup whose encoder is a matrix, and its head another one."""

    def init_network(self, key):
        width = self.network.backbone.feature_dim
        rng = np.random.default_rng(0)
        shapes = {"backbone": (PIXELS, width), "head": (width, self.network.head.dim)}
        return {name: {"kernel": rng.normal(size=shape)} for name, shape in shapes.items()}, {}

    def forward(self, params, batch_stats, images, key):
        pixels = self.scale(images).reshape(len(images), -1)
        features = pixels @ params["backbone"]["kernel"]
        return features, features @ params["head"]["kernel"], batch_stats


@functools.cache
def steps(method):
    """`tiny.run` of a warm-up of three steps and a cosine, in float64 on two devices."""
    with jax.enable_x64(True):
        c = tiny.config(
            method, optimizer__schedule="cosine", optimizer__warmup="3 steps",
            model__dtype="float64", **CASES[method],
        )  # fmt: skip
        run = tiny.prepared(c, 2)
        run = tiny.attach(tiny.METHODS[method](Linear(**vars(run.setup))), run)
        return tiny.run(run.method, STEPS)


@pytest.mark.parametrize("method", CASES)
def test_the_logged_learning_rate_is_the_one_that_moved_the_parameters(method):
    """SGD: what a step takes off the parameters is its rate times the new momentum."""
    run, used = steps(method), []
    for before, after in zip(run.states, run.states[1:], strict=False):
        moved = (before.params["backbone"]["kernel"] - after.params["backbone"]["kernel"]).ravel()
        momentum = after.opt_state[0][0].trace["backbone"]["kernel"].ravel()
        used.append(moved @ momentum / (momentum @ momentum))
    assert np.abs(np.diff(used)).min() > 0.01  # no two steps in a row have one rate
    logged = [metrics["learning_rate"] for metrics in run.metrics]
    np.testing.assert_allclose(logged, used, rtol=1e-6)
    np.testing.assert_allclose(used[:4], 0.5 * np.arange(1, 5) / 4, rtol=1e-6)


def probe_step(kernel, bias, features, labels):
    """One step of SGD with rate 1 on standardised features: `(kernel, bias, loss, top1)`."""
    x = (features - features.mean(0)) / np.sqrt(features.var(0) + 1e-6) / np.sqrt(len(kernel))
    x, y = x[labels >= 0], labels[labels >= 0]
    logits = x @ kernel + bias
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    own = p[np.arange(len(y)), y]
    error = (p - np.eye(p.shape[1])[y]) / len(y)
    top1 = (logits.argmax(1) == y).mean()
    return kernel - x.T @ error, bias - error.sum(0), -np.log(own).mean(), top1


@pytest.mark.parametrize("method", CASES)
def test_the_probe_sees_each_feature_with_the_label_of_its_image(method):
    """By hand with all first views and then all second ones; the step has another order."""
    run = steps(method)
    setup, before, after = run.method.setup, run.states[0], run.states[1]
    batch = tiny.host_batch(run.method.run.config, 0)
    pixels = (batch["images"] / 255 - np.array(setup.mean)) / np.array(setup.std)
    kernel = before.params["backbone"]["kernel"]
    features = [pixels[:, view].reshape(len(pixels), -1) @ kernel for view in (0, 1)]
    labels = np.concatenate([batch["labels"]] * 2)
    assert -1 in labels and len(set(labels)) == 1 + tiny.CLASSES
    start = before.probe.params
    want = probe_step(start["kernel"], start["bias"], np.concatenate(features), labels)
    got = after.probe.params["kernel"], after.probe.params["bias"]
    for a, b in zip(got, want[:2], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    metrics = run.metrics[0]
    np.testing.assert_allclose((metrics["probe_loss"], metrics["probe_top1"]), want[2:], rtol=1e-6)
