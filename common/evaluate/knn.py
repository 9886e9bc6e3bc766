"""Weighted k-nearest-neighbour classification: how good features are, with nothing to train.

Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018,
section 3.4. One protocol serves trained features, untrained ones and raw pixels.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from common.errors import UserError

# Similarities held at once, in numbers: 512 MB of float32.
_TILE = 2**27


def default_k(n: int) -> int:
    """Returns min(200, n / 10), at least 1: the usual 200, less where it would be most of a class.

    Args:
        n: number of labelled training rows.
    """
    return max(1, min(200, n // 10))


def neighbours(
    train_features: np.ndarray,
    query_features: np.ndarray,
    k: int,
    center: bool = False,
    chunk: int = 1024,
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the k training rows with the largest cosine similarity to each query.

    Both sets stay on the host and pass through the device in blocks; a block is centred and
    normalised there, so memory is O(chunk) whatever n is, and uint8 pixels stay uint8 here.

    Args:
        train_features: `[n, d]`, any real type.
        query_features: `[m, d]`.
        k: neighbours, in [1, n].
        center: subtract the mean of the training rows from both sets first.
        chunk: queries scored at once.

    Returns:
        indices int32 `[m, k]` into the training rows and similarities float32 `[m, k]`, nearest
        first.

    Raises:
        UserError: if k is out of range.
    """
    train = _rows(train_features)
    queries = _rows(query_features)
    n, d = train.shape
    if not 1 <= k <= n:
        raise UserError(f"k={k} neighbours among {n} training rows: choose k from 1 to {n}")
    if queries.shape[1] != d:
        raise UserError(f"queries have {queries.shape[1]} features and training rows {d}")
    mean = train.mean(0, dtype=np.float64) if center else np.zeros(d)
    mean = jax.device_put(mean.astype(np.float32))
    chunk = max(1, min(chunk, len(queries)))
    # A block of training rows must hold k of them, and k more have to fit beside it.
    block = min(n, max(k, min(_TILE // chunk, _TILE // d)))
    block = -(-n // -(-n // block))  # all of about one size, so that little is padding
    block = max(k, block)
    starts = range(0, len(queries), chunk)
    best = [
        jax.device_put((np.zeros((chunk, k), np.int32), np.full((chunk, k), -np.inf, np.float32)))
        for _ in starts
    ]
    for begin in range(0, n, block):
        rows = jax.device_put(_padded(train[begin : begin + block], block))
        rows = _unit(rows, mean)
        limits = jax.device_put(np.array([begin, n], np.int32))
        for i, start in enumerate(starts):
            part = jax.device_put(_padded(queries[start : start + chunk], chunk))
            best[i] = _merge(best[i], _unit(part, mean), rows, limits)
    best = jax.device_get(best)
    indices, similarities = (
        np.concatenate(parts)[: len(queries)] for parts in zip(*best, strict=True)
    )
    return indices, similarities


def knn_top1(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    num_classes: int,
    k: int | None = None,
    temperature: float = 0.1,
    center: bool = False,
    chunk: int = 1024,
) -> float:
    """Returns the accuracy of a weighted kNN classifier.

    Each of the k nearest training rows votes for its class with weight exp(similarity /
    temperature). Rows labelled -1 neither vote nor count towards the mean, and are not scored.

    Args:
        train_features: `[n, d]` features or flattened pixels; rows of length 0 are allowed.
        train_labels: int `[n]`, -1 where unlabelled.
        test_features: `[m, d]`.
        test_labels: int `[m]`, -1 where unlabelled.
        num_classes: classes.
        k: neighbours; None takes `default_k` of the labelled training rows.
        temperature: > 0.
        center: subtract the mean of the labelled training rows from both sets first.
        chunk: queries scored at once.

    Returns:
        Top-1 accuracy in [0, 1].

    Raises:
        UserError: if either set has no labelled row, or k or the temperature is out of range.
    """
    if temperature <= 0:
        raise UserError(f"kNN temperature={temperature}: it must be above 0 (0.1 is usual)")
    train_features, train_labels = _labelled("training", train_features, train_labels)
    test_features, test_labels = _labelled("test", test_features, test_labels)
    k = default_k(len(train_labels)) if k is None else k
    indices, similarities = neighbours(train_features, test_features, k, center, chunk)
    # The shift by the nearest changes no argmax and keeps a small temperature from overflowing.
    weights = np.exp((similarities - similarities[:, :1]).astype(np.float64) / temperature)
    votes = np.zeros((len(test_labels), num_classes))
    np.add.at(votes, (np.arange(len(votes))[:, None], train_labels[indices]), weights)
    return float(np.mean(votes.argmax(1) == test_labels))


def _rows(features: np.ndarray) -> np.ndarray:
    features = np.asarray(features)
    return features.reshape(len(features), -1)


def _labelled(name: str, features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    labels = np.asarray(labels)
    keep = labels >= 0
    if not keep.any():
        raise UserError(
            f"none of the {len(labels)} {name} rows has a label, and kNN needs some: "
            "evaluate on a labelled data set"
        )
    # Indexing copies, and pixels are large: only when something has to go.
    return (features, labels) if keep.all() else (np.asarray(features)[keep], labels[keep])


def _padded(rows: np.ndarray, length: int) -> np.ndarray:
    """Zero rows up to one length for all blocks, so that each function compiles once."""
    return np.pad(rows, ((0, length - len(rows)), (0, 0)))


@jax.jit
def _unit(rows: jax.Array, mean: jax.Array) -> jax.Array:
    rows = rows.astype(jnp.float32) - mean[None]
    return rows * lax.rsqrt(jnp.maximum((rows * rows).sum(1, keepdims=True), 1e-24))


@functools.partial(jax.jit, donate_argnums=0)
def _merge(
    best: tuple[jax.Array, jax.Array], queries: jax.Array, rows: jax.Array, limits: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Best neighbours so far, and those among `rows`, which start at index limits[0]."""
    indices, similarities = best
    begin, n = limits[0], limits[1]
    new = jnp.matmul(queries, rows.T, precision="highest")
    real = begin + jnp.arange(rows.shape[0]) < n
    new, places = lax.top_k(jnp.where(real[None], new, -jnp.inf), similarities.shape[1])
    new_indices = (begin + places).astype(jnp.int32)
    similarities, places = lax.top_k(jnp.concatenate([similarities, new], 1), similarities.shape[1])
    indices = jnp.take_along_axis(jnp.concatenate([indices, new_indices], 1), places, 1)
    return indices, similarities
