"""What can be said of images from their features alone: neighbours, odd ones out, clusters."""

import dataclasses

import numpy as np

from common.evaluate import clusters, knn
from common.evaluate.clusters import Clusters

NEIGHBOURS = 10  # of each image
# The work grows with the square of the images: minutes on two cores at this many.
MOST = 50_000
# Of many images two or three clusters, which silhouettes often prefer, tell a person little.
MANY = 200
SEVERAL = tuple(k for k in clusters.NUMBERS if k >= 6)
_EQUAL = 1e-5  # cosine distances below are rounding


@dataclasses.dataclass(frozen=True)
class Structure:
    """Of n images, of which m were compared with each other; `rows` are rows of all n.

    Attributes:
        rows: int64 `[m]`, ascending: all, or `MOST` of them at even distances.
        neighbours: int64 `[m, k]`, the images among `rows` nearest to each, without itself, nearest
            first; k is `NEIGHBOURS`, or m - 1.
        cosines: float32 `[m, k]`, theirs.
        oddness: float32 `[m]`, see `oddness`.
        clusters: of `rows`; its `labels` and `centres` count within them.
        distance: mean cosine distance of two images drawn at random, in [0, 2].
    """

    rows: np.ndarray
    neighbours: np.ndarray
    cosines: np.ndarray
    oddness: np.ndarray
    clusters: Clusters
    distance: float

    @property
    def collapsed(self) -> bool:
        """Whether all features are the same, up to rounding."""
        return self.distance < _EQUAL

    def spread_out(self, values: np.ndarray, n: int, nothing: float) -> np.ndarray:
        """Values `[m]` of `rows` as values `[n]` of all images, `nothing` of the others."""
        out = np.full(n, nothing, values.dtype)
        out[self.rows] = values
        return out


def of_features(features: np.ndarray, seed: int, k: int = 0, most: int = MOST) -> Structure:
    """Compares images by the cosine similarity of their features.

    Args:
        features: `[n, d]`, any real type, n at least 1.
        seed: of the clusters.
        k: clusters wanted; 0 lets `clusters.cluster` choose, from `SEVERAL` of `MANY` images.
        most: at most this many images are compared.
    """
    n = len(features)
    rows = np.arange(min(n, most)) * n // min(n, most)
    features = features[rows]
    near, cosines = nearest_others(features, NEIGHBOURS)
    return Structure(
        rows=rows,
        neighbours=rows[near],
        cosines=cosines,
        oddness=oddness(cosines),
        clusters=clusters.cluster(features, seed, k or None, numbers(len(rows))),
        distance=mean_distance(features),
    )


def numbers(n: int) -> tuple[int, ...]:
    """Of how many clusters one number is chosen for n images: `SEVERAL` of `MANY` or more."""
    return SEVERAL if n >= MANY else clusters.NUMBERS


def nearest_others(features: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows nearest to each of `[n, d]` but itself, and their cosines: `[n, min(k, n - 1)]`."""
    n = len(features)
    k = min(k, n - 1)
    if k < 1:
        return np.zeros((n, 0), np.int64), np.zeros((n, 0), np.float32)
    found, cosines = knn.neighbours(features, features, k + 1)
    other = found != np.arange(n)[:, None]
    # a row with more than k equals need not be among them itself
    other[other.all(1), -1] = False
    return found[other].reshape(n, k).astype(np.int64), cosines[other].reshape(n, k)


def oddness(cosines: np.ndarray) -> np.ndarray:
    """How far each image is from the others: 1 - the cosine of its k-th nearest.

    The distance to the k-th neighbour as a measure of outliers is that of Ramaswamy et al. 2000
    ("Efficient algorithms for mining outliers from large data sets", section 2). It is not the
    nearest one, so that a pair of the same odd image stays odd.

    Args:
        cosines: `[n, k]` of the nearest others, nearest first; k may be 0.

    Returns:
        float32 `[n]` in [0, 2]; 0 where there is no other image.
    """
    if not cosines.shape[1]:
        return np.zeros(len(cosines), np.float32)
    return np.clip(1 - cosines[:, -1], 0, 2).astype(np.float32)


def mean_distance(features: np.ndarray) -> float:
    """Mean cosine distance of two different rows of `[n, d]`; 0 of a single one."""
    n = len(features)
    if n < 2:
        return 0.0
    unit = np.asarray(features, np.float32)
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    total = float((unit.sum(0, dtype=np.float64) ** 2).sum())
    squares = float(np.einsum("nd,nd->", unit, unit, dtype=np.float64))
    return max(0.0, 1 - (total - squares) / (n * (n - 1)))
