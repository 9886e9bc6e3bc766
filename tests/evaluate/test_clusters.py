"""`common/evaluate/clusters.py` against blobs whose clusters are known, and scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score, silhouette_score
from threadpoolctl import threadpool_info, threadpool_limits

from common.evaluate import clusters

SIZES = (40, 25, 15, 10)


def blobs(sizes=SIZES, d=12, noise=0.05, seed=0):
    """Features of clusters along orthogonal axes, in random order and of random lengths."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    rows = np.eye(len(sizes), d)[labels] + noise * rng.normal(size=(len(labels), d))
    return (rows * rng.uniform(1, 100, (len(labels), 1))).astype(np.float32), labels


@pytest.mark.parametrize("d", [12, 80])  # below and above the number of principal components
def test_blobs_are_found_and_numbered_by_size(d):
    features, wanted = blobs(d=d)
    found = clusters.cluster(features, seed=1)
    np.testing.assert_array_equal(found.labels, wanted)
    assert found.labels.dtype == np.int32 and found.sizes.tolist() == list(SIZES)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    assert found.score == pytest.approx(silhouette_score(unit, wanted, metric="cosine"), abs=1e-4)
    for i, centre in enumerate(found.centres):
        own = np.flatnonzero(wanted == i)
        distances = np.linalg.norm(unit[own] - unit[own].mean(0), axis=1)
        # of up to 50 components of 80 the nearest may be another, but one that is near
        assert centre in own[np.argsort(distances)[: 1 if d <= 50 else 3]]


def test_the_number_is_that_of_the_best_silhouette():
    features, _ = blobs()
    scores = {k: clusters.cluster(features, 0, ks=(k,)).score for k in (2, 3, 4, 6, 8)}
    assert max(scores, key=scores.get) == 4
    assert clusters.cluster(features, 0).score == scores[4]
    three = clusters.cluster(features, 0, ks=(3, 2))
    assert (len(three.centres), three.score) == (3, scores[3])
    # 90 rows are too few for ten clusters of ten
    assert len(clusters.cluster(features, 0, ks=(10, 90)).centres) == 1


def test_a_given_number_is_kept_and_has_no_score():
    features, _ = blobs()
    found = clusters.cluster(features, 0, k=7)
    assert len(found.centres) == len(set(found.labels)) == 7 and np.isnan(found.score)
    assert (np.diff(found.sizes) <= 0).all() and found.sizes.sum() == 90
    np.testing.assert_array_equal(found.labels[found.centres], np.arange(7))


@pytest.mark.parametrize("d", [3, 60])
@pytest.mark.parametrize("k", [None, 5])
def test_one_row_and_equal_rows_are_one_cluster(d, k, recwarn):
    for n in (1, 2, 40):
        found = clusters.cluster(np.full((n, d), 0.3), 0, k=k)
        assert found.labels.tolist() == [0] * n and found.centres.tolist() == [0]
        assert np.isnan(found.score)
    assert clusters.cluster(np.zeros((30, d)), 0, k=k).sizes.tolist() == [30]
    assert not recwarn.list


def test_rows_that_repeat_are_no_more_clusters_than_distinct_ones(recwarn):
    features = np.repeat(np.eye(3, 70), (20, 30, 10), axis=0)
    found = clusters.cluster(features, 0, k=8)
    assert found.sizes.tolist() == [30, 20, 10] and found.centres.tolist() == [20, 0, 50]
    assert clusters.cluster(features, 0).score == pytest.approx(1)
    assert not recwarn.list


def test_many_rows_are_chosen_for_by_a_sample(monkeypatch):
    features, wanted = blobs(sizes=(1500, 900, 600))
    seen = []
    inner = clusters._silhouette
    monkeypatch.setattr(
        clusters, "_silhouette", lambda d, labels: seen.append(d.shape) or inner(d, labels)
    )
    found = clusters.cluster(features, 0, ks=(2, 3, 4))
    assert seen == [(2000, 2000)] * 3
    assert adjusted_rand_score(found.labels, wanted) == 1


def test_one_thread_computes_so_that_the_clusters_are_the_same_on_any_machine(monkeypatch):
    features, _ = blobs(d=80)
    threads = set()

    def spy(name):
        inner = getattr(clusters, name)

        def wrapped(*args):
            threads.update(pool["num_threads"] for pool in threadpool_info())
            return inner(*args)

        monkeypatch.setattr(clusters, name, wrapped)

    for name in ("_reduced", "_k_means", "_silhouette"):
        spy(name)
    with threadpool_limits(2):
        found = [clusters.cluster(features, 3) for _ in range(2)]
        assert threads == {1}
    for a, b in zip(*(vars(x).values() for x in found), strict=True):
        np.testing.assert_array_equal(a, b)
