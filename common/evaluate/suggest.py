"""Which images to label, so that a few labels say most about all images."""

import dataclasses

import numpy as np

from common.evaluate import clusters

# Nearer than this share of the distance of two random images: nearly the same picture.
_NEAR = 0.1
_PAIRS = 2000  # of random images, for their median distance


@dataclasses.dataclass(frozen=True)
class Suggestions:
    """Images to label, first those that stand for most others.

    Attributes:
        rows: int64 `[m]`, of the features.
        sizes: int64 `[m]`, how many images the cluster of each has.
        passed_over: images passed over since they are nearly the same as another of the list, or as
            a labelled one.
    """

    rows: np.ndarray
    sizes: np.ndarray
    passed_over: int


def suggest(
    features: np.ndarray, labelled: np.ndarray, pool: np.ndarray, number: int, seed: int
) -> Suggestions:
    """Chooses the image nearest to the centre of each cluster, the largest cluster first.

    There are as many clusters as images wanted and labelled together. Those with a labelled image
    are left out. Where the image at a centre is nearly the same as one chosen before, or as a
    labelled one, the next nearest takes its place; so the list is shorter than wanted if the images
    are too much alike.

    Args:
        features: `[n, d]`, any real type.
        labelled: int `[l]`, rows that have a label.
        pool: int `[p]`, rows to choose from, ascending; labelled ones are not chosen.
        number: images wanted, at least 1.
        seed: of k-means.
    """
    unit = np.asarray(features, np.float32).reshape(len(features), -1)
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    known = np.isin(pool, labelled)
    found = clusters.cluster(features[pool], seed, k=number + int(known.sum()))
    near = _NEAR * _usual_distance(unit, seed)
    taken, passed_over = [int(row) for row in labelled], 0
    rows: list[int] = []
    sizes: list[int] = []
    for cluster in range(len(found.centres)):
        inside = found.labels == cluster
        if len(rows) == number:
            break
        if known[inside].any():
            continue
        own, centre = pool[inside], pool[found.centres[cluster]]
        for row in own[np.argsort(_distances(unit, own, centre), kind="stable")]:
            if taken and _distances(unit, np.array(taken), row).min() <= near:
                passed_over += 1
                continue
            taken.append(row)
            rows.append(row)
            sizes.append(int(inside.sum()))
            break
    return Suggestions(np.array(rows, np.int64), np.array(sizes, np.int64), passed_over)


def _distances(unit: np.ndarray, rows: np.ndarray, row: int) -> np.ndarray:
    """Euclidean distances of rows of `unit` to one of them; exactly 0 to an equal row."""
    offsets = unit[rows] - unit[row][None]
    return np.sqrt((offsets * offsets).sum(1))


def _usual_distance(unit: np.ndarray, seed: int) -> float:
    """Median distance of random pairs of rows."""
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, len(unit), (2, _PAIRS))
    offsets = unit[a[a != b]] - unit[b[a != b]]
    return float(np.median(np.linalg.norm(offsets, axis=1))) if len(offsets) else 0.0
