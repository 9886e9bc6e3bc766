"""Linear classifiers on frozen features by SGD, a whole grid of settings in one pass.

Chen et al. 2020, B.6: SGD with Nesterov momentum and a cosine schedule, learning rate x batch /
256. All candidates of a grid see the same batches, so images are encoded once for all of them.
"""

import collections
import dataclasses
import functools
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh

from common.run.console import Progress
from common.sharding import batch_sharding, replicated

_PART = 2**24  # elements of a feature array processed at a time
_IN_FLIGHT = 2  # steps the host may run ahead of the device
_FLAT = 1e-3  # of the root mean square: smaller standard deviations are raised to it


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Settings of one classifier; the learning rate is the base value, x batch / 256."""

    learning_rate: float
    weight_decay: float


@dataclasses.dataclass(frozen=True)
class Classifier:
    """logits = features @ kernel + bias, on features as the encoder gives them.

    Attributes:
        kernel: float32 `[d, c]`.
        bias: float32 `[c]`.
    """

    kernel: np.ndarray
    bias: np.ndarray

    def logits(self, features: np.ndarray) -> np.ndarray:
        """float32 `[n, c]` of features `[n, d]`, any real type."""
        pieces = (x.astype(np.float32) for x in parts(features))
        return np.concatenate([x @ self.kernel + self.bias[None] for x in pieces])

    @classmethod
    def of_standardised(
        cls, kernel: np.ndarray, bias: np.ndarray, mean: np.ndarray, scale: np.ndarray
    ) -> "Classifier":
        """From a classifier of `(features - mean) * scale`: both are folded into the weights."""
        kernel = kernel.astype(np.float64) * scale[:, None]
        bias = bias.astype(np.float64) - mean @ kernel
        return cls(kernel.astype(np.float32), bias.astype(np.float32))


def standardiser(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float64 `mean [d]` and `scale [d]` = 1 / standard deviation of features `[n, d]`.

    A nearly constant feature keeps a small scale: its variation in the test split would otherwise
    outweigh all other features.
    """
    n, d = features.shape
    mean, square = np.zeros(d), np.zeros(d)
    for part in parts(features):
        mean += part.sum(0, dtype=np.float64) / n
    for part in parts(features):
        square += ((part - mean) ** 2).sum(0) / n
    floor = _FLAT * np.sqrt(square.mean()) or 1.0
    return mean, 1 / np.maximum(np.sqrt(square), floor)


def fit(
    batches: Iterable[tuple[jax.Array, jax.Array]],
    steps: int,
    candidates: Sequence[Candidate],
    batch_size: int,
    num_classes: int,
    mean: np.ndarray,
    scale: np.ndarray,
    mesh: Mesh,
    momentum: float = 0.9,
    nesterov: bool = True,
    quiet: bool = False,
) -> list[Classifier]:
    """Trains one classifier for each candidate.

    The loss is the mean cross-entropy over the labelled rows of a batch; weight decay adds
    `weight_decay * kernel` to its gradient. The problem is convex: weights start at zero.

    Args:
        batches: features `[b, d]` and labels int32 `[b]` (-1: none), global arrays.
        steps: taken from `batches`.
        candidates: the grid.
        batch_size: b.
        num_classes: c.
        mean, scale: `[d]`; the classifiers are trained on `(features - mean) * scale`.
        mesh: the device mesh.
        momentum: of SGD.
        nesterov: whether it is Nesterov's.
        quiet: no progress line.

    Returns:
        Classifiers of the features as given, in the order of the candidates.
    """
    if not candidates or steps < 1:
        raise ValueError(f"{len(candidates)} candidates, {steps} steps: expected at least 1")
    d, g = len(mean), len(candidates)
    kernel, bias = (d, g, num_classes), (g, num_classes)
    params = {"kernel": np.zeros(kernel, np.float32), "bias": np.zeros(bias, np.float32)}
    state = jax.device_put((params, jax.tree.map(np.zeros_like, params)), replicated(mesh))
    peaks = np.array([c.learning_rate * batch_size / 256 for c in candidates], np.float32)
    shape = np.asarray(jax.vmap(optax.cosine_decay_schedule(1.0, steps))(np.arange(steps)))
    decays = np.array([c.weight_decay for c in candidates], np.float32)
    fixed = jax.device_put(
        (mean.astype(np.float32), scale.astype(np.float32), decays), replicated(mesh)
    )
    silent = quiet or jax.process_index() > 0
    progress, begin = Progress(steps, False if silent else None), None
    in_flight: collections.deque = collections.deque()
    for step, (features, labels) in zip(range(steps), batches, strict=False):
        state, loss = _step(
            state, features, labels, peaks * shape[step], fixed,
            momentum=momentum, nesterov=nesterov, mesh=mesh,
        )  # fmt: skip
        in_flight.append(loss)
        if len(in_flight) > _IN_FLIGHT:
            value = float(in_flight.popleft())
            done, begin = step + 1 - len(in_flight), begin or time.monotonic()  # without compiling
            eta = (time.monotonic() - begin) / (done - 1) * (steps - done) if done > 1 else None
            progress.show(done, None, {"loss": value}, {}, eta)
    progress.show(steps, None, {"loss": float(loss)}, {}, None)
    progress.close()
    params = jax.device_get(state[0])
    return [
        Classifier.of_standardised(params["kernel"][:, i], params["bias"][i], mean, scale)
        for i in range(g)
    ]


@functools.partial(jax.jit, donate_argnums=0, static_argnames=("momentum", "nesterov", "mesh"))
def _step(
    state: tuple,
    features: jax.Array,
    labels: jax.Array,
    rates: jax.Array,
    fixed: tuple,
    momentum: float,
    nesterov: bool,
    mesh: Mesh,
) -> tuple[tuple, jax.Array]:
    """One update of all candidates; returns the state and the smallest loss."""
    params, trace = state
    mean, scale, decays = fixed
    # an encoder returns its features replicated: each device takes its own rows
    features = lax.with_sharding_constraint(features, batch_sharding(mesh))
    inputs = (features.astype(jnp.float32) - mean[None]) * scale[None]
    known = labels >= 0
    targets = jnp.where(known, labels, 0)[:, None]

    def loss_fn(params: Any) -> tuple:
        d, g, c = params["kernel"].shape
        logits = jnp.matmul(inputs, params["kernel"].reshape(d, g * c), precision="highest")
        logits = logits.reshape(-1, g, c) + params["bias"][None]
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, jnp.broadcast_to(targets, logits.shape[:2])
        )
        losses = jnp.where(known[:, None], losses, 0).sum(0) / jnp.maximum(known.sum(), 1)
        return losses.sum(), losses.min()  # a sum: candidates are independent

    (_, loss), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    grads["kernel"] += decays[None, :, None] * params["kernel"]
    tx = optax.trace(momentum, nesterov=nesterov)
    updates, trace = tx.update(grads, optax.TraceState(trace))
    # not in place: without Nesterov the updates are the trace itself
    updates = {
        "kernel": updates["kernel"] * -rates[None, :, None],
        "bias": updates["bias"] * -rates[:, None],
    }
    return (optax.apply_updates(params, updates), trace.trace), loss


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean cross-entropy of logits `[n, c]`."""
    logits = logits.astype(np.float64)
    logits = logits - logits.max(1, keepdims=True)
    own = np.take_along_axis(logits, labels[:, None], 1)[:, 0]
    return float((np.log(np.exp(logits).sum(1)) - own).mean())


def best(classifiers: Sequence[Classifier], features: np.ndarray, labels: np.ndarray) -> int:
    """Index of the classifier with the best top-1; ties go to the lowest cross-entropy."""
    scores = []
    for i, classifier in enumerate(classifiers):
        logits = classifier.logits(features)
        scores.append((-(logits.argmax(1) == labels).mean(), cross_entropy(logits, labels), i))
    return min(scores)[2]


def parts(features: np.ndarray) -> list[np.ndarray]:
    """Splits features `[n, d]` by rows, so that no copy of all of them is made."""
    return np.array_split(features, -(-features.size // _PART))
