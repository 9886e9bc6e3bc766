"""Weighted k-nearest-neighbour classification: how good features are, without training.

Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018,
section 3.4. One protocol serves trained features, untrained ones and raw pixels.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from common.errors import UserError, one_of
from common.evaluate.accuracy import labelled, top_k
from common.sharding import AXIS, local_rows, make_mesh, replicated, to_global

METRICS = ("cosine", "euclidean")
# Similarities held at once on a device: 512 MB of float32.
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
    metric: str = "cosine",
    mesh: Mesh | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the k training rows that are most similar to each query.

    Both sets stay on the host and pass through the devices in blocks; a block is centred and
    normalised there, so memory is O(chunk) whatever n is, and uint8 pixels stay uint8 here. Each
    device searches its own contiguous part of the training rows, and the best of all are merged at
    the end, so the result (the order of ties included) is that of one device.

    Args:
        train_features: `[n, d]`, any real type.
        query_features: `[m, d]`.
        k: neighbours, in [1, n].
        center: subtract the mean of the training rows from both sets first. (Euclidean
            distances do not change.)
        chunk: queries scored at once.
        metric: "cosine", or "euclidean": similarity -r^2 / (2 s^2) at distance r, where s^2 is the
            mean squared distance of a training row from their mean. Scale and temperature then
            mean what they do for unit vectors, whose cosine is 1 - r^2 / 2.
        mesh: devices that share the work; None is the first one of this process, without any
            communication between processes.

    Returns:
        indices int32 `[m, k]` into the training rows and similarities float32 `[m, k]`, nearest
        first.

    Raises:
        UserError: if k is out of range, or for an unknown metric.
    """
    one_of("knn.metric", metric, METRICS)
    mesh = mesh or make_mesh(jax.local_devices()[:1])
    train = _rows(train_features)
    queries = _rows(query_features)
    n, d = train.shape
    if not 1 <= k <= n:
        raise UserError(f"k={k} neighbours among {n} training rows: choose k from 1 to {n}")
    if queries.shape[1] != d:
        raise UserError(f"queries have {queries.shape[1]} features and training rows {d}")
    euclidean = metric == "euclidean"
    mean, scale = np.zeros(d), 1.0
    if center or euclidean:  # centred, |a|^2 + |b|^2 - 2ab loses the fewest digits
        mean = train.mean(0, dtype=np.float64)
    if euclidean:
        scale = _spread(train, mean)
    chunk = max(1, min(chunk, len(queries)))
    per_device = -(-n // mesh.size)  # training rows
    # A block of training rows must hold k of them, and k more have to fit beside it.
    block = min(per_device, max(k, min(_TILE // chunk, _TILE // d)))
    block = -(-per_device // -(-per_device // block))  # of about one size, for little padding
    block = max(k, block)
    mine = local_rows(mesh, mesh.size)  # devices of this process
    prepare, merge, finish = _programs(mesh, euclidean)
    everywhere = functools.partial(jax.device_put, device=replicated(mesh))
    mean, scale = everywhere((mean.astype(np.float32), np.float32(scale)))
    starts = range(0, len(queries), chunk)
    nothing = np.full((len(mine), chunk, k), -np.inf, np.float32)
    best = [to_global(mesh, (np.zeros(nothing.shape, np.int32), nothing)) for _ in starts]
    for begin in range(0, per_device, block):
        ends = np.minimum((mine + 1) * per_device, n)
        firsts = np.minimum(mine * per_device + begin, ends)
        pieces = [
            _padded(train[first : min(first + block, end)], block)
            for first, end in zip(firsts, ends, strict=True)
        ]
        limits = np.stack([firsts, ends], axis=1).astype(np.int32)
        rows, limits = to_global(mesh, (np.concatenate(pieces), limits))
        rows = prepare(rows, mean, scale)
        for i, start in enumerate(starts):
            part = everywhere(_padded(queries[start : start + chunk], chunk))
            best[i] = merge(best[i], prepare(part, mean, scale), rows, limits)
    best = jax.device_get([finish(pair) for pair in best])
    indices, similarities = (
        np.concatenate(parts)[: len(queries)] for parts in zip(*best, strict=True)
    )
    return indices, similarities


def knn_top1(*args: Any, **options: Any) -> float:
    """Returns the top-1 accuracy of a weighted kNN classifier; see `knn_scores`."""
    return knn_scores(*args, **options)["top1"]


def knn_scores(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    num_classes: int,
    k: int | None = None,
    temperature: float = 0.1,
    center: bool = False,
    chunk: int = 1024,
    metric: str = "cosine",
    mesh: Mesh | None = None,
) -> dict[str, Any]:
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
        metric, mesh: as in `neighbours`.

    Returns:
        `top1` and `top5` in [0, 1] (`top5` None with 5 classes or fewer; a class without a vote is
        no prediction), `k`, and `num_train` and `num_test`, the labelled rows of both sets.

    Raises:
        UserError: if either set has no labelled row, or k or the temperature is out of range.
    """
    _check_temperature(temperature)
    train_features, train_labels = labelled("training", train_features, train_labels)
    test_features, test_labels = labelled("test", test_features, test_labels)
    k = default_k(len(train_labels)) if k is None else k
    counted = votes(
        train_features, train_labels, test_features, num_classes,
        k, temperature, center, chunk, metric, mesh,
    )  # fmt: skip
    sizes = {"num_train": len(train_labels), "num_test": len(test_labels)}
    return top_k(counted, test_labels, least=0.0) | {"k": k} | sizes


def votes(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    queries: np.ndarray,
    num_classes: int,
    k: int,
    temperature: float = 0.1,
    center: bool = False,
    chunk: int = 1024,
    metric: str = "cosine",
    mesh: Mesh | None = None,
) -> np.ndarray:
    """The weight of the votes for each class, float64 `[m, num_classes]`; see `knn_scores`.

    Args:
        train_features: `[n, d]`.
        train_labels: int `[n]`, all labelled.
        queries: `[m, d]`.
        num_classes: classes.
        k, temperature, center: as in `knn_scores`.
        chunk, metric, mesh: as in `neighbours`.
    """
    _check_temperature(temperature)
    indices, similarities = neighbours(train_features, queries, k, center, chunk, metric, mesh)
    # Subtracting the nearest changes no argmax and prevents overflow at a small temperature.
    weights = np.exp((similarities - similarities[:, :1]).astype(np.float64) / temperature)
    counted = np.zeros((len(queries), num_classes))
    np.add.at(counted, (np.arange(len(counted))[:, None], train_labels[indices]), weights)
    return counted


def _check_temperature(temperature: float) -> None:
    if temperature <= 0:
        raise UserError(f"kNN temperature={temperature}: it must be above 0 (0.1 is usual)")


def _rows(features: np.ndarray) -> np.ndarray:
    features = np.asarray(features)
    return features.reshape(len(features), -1)


def _spread(rows: np.ndarray, mean: np.ndarray) -> float:
    """1 / s of `rows [n, d]`: the inverse root mean squared distance from their mean."""
    squares = 0.0
    for part in np.array_split(rows, -(-rows.size // _TILE)):
        squares += float(((part.astype(np.float64) - mean[None]) ** 2).sum())
    return 1 / max(np.sqrt(squares / len(rows)), 1e-12)


def _padded(rows: np.ndarray, length: int) -> np.ndarray:
    """Zero rows up to one length for all blocks, so that each function compiles once."""
    return np.pad(rows, ((0, length - len(rows)), (0, 0)))


@functools.lru_cache(maxsize=8)
def _programs(mesh: Mesh, euclidean: bool) -> tuple[Callable, Callable, Callable]:
    """The device programs: prepare rows, merge a block into the best so far, finish."""

    @jax.jit
    def prepare(rows: jax.Array, mean: jax.Array, scale: jax.Array) -> jax.Array:
        rows = rows.astype(jnp.float32) - mean[None]
        if euclidean:
            return rows * scale
        return rows * lax.rsqrt(jnp.maximum((rows * rows).sum(1, keepdims=True), 1e-24))

    def local_merge(best: tuple, queries: jax.Array, rows: jax.Array, limits: jax.Array) -> tuple:
        """Of this device's rows, which start at index limits[0, 0] and end before limits[0, 1]."""
        indices, similarities = best[0][0], best[1][0]
        k = similarities.shape[1]
        new = jnp.matmul(queries, rows.T, precision="highest")
        if euclidean:
            squares = ((x * x).sum(1) for x in (queries, rows))
            new = new - 0.5 * jnp.add.outer(*squares)
        places = limits[0, 0] + jnp.arange(rows.shape[0], dtype=jnp.int32)
        new, chosen = lax.top_k(jnp.where((places < limits[0, 1])[None], new, -jnp.inf), k)
        # `top_k` breaks ties by position: rows with a lower index come first
        similarities, order = lax.top_k(jnp.concatenate([similarities, new], 1), k)
        indices = jnp.concatenate([indices, places[chosen]], 1)
        return jnp.take_along_axis(indices, order, 1)[None], similarities[None]

    split, whole = jax.P(AXIS), jax.P()
    merge = jax.shard_map(
        local_merge,
        mesh=mesh,
        in_specs=((split, split), whole, split, split),
        out_specs=(split, split),
    )

    def finish(best: tuple) -> tuple:
        """`[devices, chunk, k]` to `[chunk, k]`."""
        k = best[0].shape[2]
        indices, similarities = (x.swapaxes(0, 1).reshape(x.shape[1], -1) for x in best)
        similarities, order = lax.top_k(similarities, k)
        return jnp.take_along_axis(indices, order, 1), similarities

    finish = jax.jit(finish, out_shardings=replicated(mesh))
    return prepare, jax.jit(merge, donate_argnums=0), finish
