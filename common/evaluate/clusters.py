"""Groups of images that look alike to an encoder: k-means, and how many groups."""

import dataclasses

import numpy as np

NUMBERS = (2, 3, 4, 6, 8, 10, 12, 16, 20, 25, 30)  # of clusters, to choose from
_LEAST = 10  # images a cluster, on average, for a number to be tried
_SAMPLE = 2000  # rows at most, of which the silhouette needs all pairs
_PCA = 50  # principal components at most, as in `page.feature_map`
_STARTS = 4  # of k-means, of which the best is kept
_DECIMALS = 5  # rows that agree in as many are equal, up to the rounding of float32


@dataclasses.dataclass(frozen=True)
class Clusters:
    """Clusters of n rows, numbered by size, the largest first.

    Attributes:
        labels: int32 `[n]`, the cluster of each row in [0, k).
        centres: int64 `[k]`, the row of each cluster that is nearest to its mean.
        score: mean silhouette of the sample, in [-1, 1], by which k was chosen; nan where it was
            given, or where there is one cluster.
    """

    labels: np.ndarray
    centres: np.ndarray
    score: float

    @property
    def sizes(self) -> np.ndarray:
        """Rows in each cluster, int64 `[k]`, not ascending."""
        return np.bincount(self.labels, minlength=len(self.centres))


def cluster(
    features: np.ndarray, seed: int, k: int | None = None, ks: tuple[int, ...] | None = None
) -> Clusters:
    """Groups rows by k-means (Lloyd 1982; k-means++, Arthur & Vassilvitskii 2007).

    Features are scaled to unit length, so that squared distances are twice the cosine distance, and
    reduced to 50 principal components. Without `k` the number is that of `ks` with the highest mean
    silhouette (Rousseeuw 1987; cosine distance) of k-means on at most 2,000 random rows; of equal
    ones the smallest. The same seed gives the same clusters on any number of cores.

    Args:
        features: `[n, d]`, any real type, finite, n at least 1.
        seed: of the starts of k-means and of the sample.
        k: clusters wanted, at least 1; there are fewer where rows are equal.
        ks: numbers to choose from where `k` is None, default `NUMBERS`; those above n / 10 are not
            tried, and where none is left all rows are one cluster.
    """
    from threadpoolctl import threadpool_limits

    unit = np.asarray(features, np.float32).reshape(len(features), -1)
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    with threadpool_limits(1):  # a fixed order of sums: the same clusters on any number of cores
        rows = _reduced(unit, seed)
        distinct = len(np.unique(rows, axis=0))
        score = np.nan
        if k is None:
            numbers = [k for k in ks or NUMBERS if 1 < k <= min(distinct, len(rows) // _LEAST)]
            sample = np.random.default_rng(seed).permutation(len(rows))[:_SAMPLE]
            k, score = _best_number(rows[sample], unit[sample], sorted(numbers), seed)
        return _numbered(rows, _k_means(rows, min(k, distinct), seed), score)


def _best_number(
    rows: np.ndarray, unit: np.ndarray, numbers: list[int], seed: int
) -> tuple[int, float]:
    """The number of clusters of a sample with the highest silhouette, and that silhouette."""
    distances = np.clip(1 - unit @ unit.T, 0, 2)
    np.fill_diagonal(distances, 0)  # as exactly as the function below demands
    best, score = 1, np.nan
    for number in numbers:
        found = _silhouette(distances, _k_means(rows, number, seed))
        if best == 1 or found > score:
            best, score = number, found
    return best, score


def _reduced(unit: np.ndarray, seed: int) -> np.ndarray:
    """Rows in at most 50 dimensions, float64, rounded; zero where all are equal."""
    from sklearn.decomposition import PCA

    n, d = unit.shape
    if n < 2 or np.ptp(unit, axis=0).max() < 10**-_DECIMALS:
        return np.zeros((n, 1))
    if d > _PCA:
        pca = PCA(min(_PCA, n), svd_solver="randomized", random_state=seed)
        unit = pca.fit_transform(unit)
    return unit.astype(np.float64).round(_DECIMALS)


def _k_means(rows: np.ndarray, k: int, seed: int) -> np.ndarray:
    """The cluster of each row, in no order; k is at most the number of distinct rows."""
    from sklearn.cluster import KMeans

    if k < 2:
        return np.zeros(len(rows), np.int64)
    labels: np.ndarray = KMeans(k, n_init=_STARTS, random_state=seed).fit_predict(rows)
    return labels


def _silhouette(distances: np.ndarray, labels: np.ndarray) -> float:
    """Mean silhouette in [-1, 1] of clusters of rows `[n]` with distances `[n, n]`."""
    from sklearn.metrics import silhouette_score

    if not 1 < len(np.unique(labels)) < len(labels):  # of equal rows
        return -1.0
    return float(silhouette_score(distances, labels, metric="precomputed"))


def _numbered(rows: np.ndarray, labels: np.ndarray, score: float) -> Clusters:
    """Numbers clusters by size, of equal ones by their first row, and finds their centres."""
    _, first, labels, sizes = np.unique(
        labels, return_index=True, return_inverse=True, return_counts=True
    )
    order = np.lexsort((first, -sizes))
    labels = np.argsort(order)[labels]
    centres = np.empty(len(order), np.int64)
    for cluster in range(len(order)):
        own = np.flatnonzero(labels == cluster)
        offsets = rows[own] - rows[own].mean(0)
        centres[cluster] = own[np.argmin((offsets**2).sum(1))]
    return Clusters(labels.astype(np.int32), centres, float(score))
