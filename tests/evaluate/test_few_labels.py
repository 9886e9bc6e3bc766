"""Cross-validation and suggestions against loops over NumPy and scikit-learn."""

import numpy as np
import opened_run
import pytest
from sklearn.linear_model import LogisticRegression
from test_knn import by_hand

from common.evaluate import few_labels
from common.evaluate.few_labels import Trainer
from common.evaluate.suggest import suggest

NONE = np.zeros(0, np.int64)


def data(n=80, classes=3, d=6, noise=0.8, seed=0):
    """Features with classes that overlap, of all images."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    return (5 * np.eye(classes, d)[y] + 5 * noise * rng.normal(size=(n, d)) + 3).astype("f4"), y


def settings(**changes):
    return opened_run.config(**changes)


def regression(features, l2):
    """Standardised by all rows, and a classifier with scikit-learn's strength for `l2`."""
    inputs = (features - features.mean(0)) / features.std(0)
    return inputs, LogisticRegression(C=1 / (l2 * features.shape[1]), max_iter=1000)


def test_predictions_are_those_of_scikit_learn_and_of_knn():
    features, y = data()
    rows, queries = np.array([70, 3, 5, 8, 21, 40, 50, 60, 1, 2, 9, 30]), np.array([0, 4, 79])
    trainer = Trainer.of(features, 3, settings(label__l2=0.3, knn__k=4))
    found = trainer.predict(rows, y[rows], queries)
    inputs, model = regression(features, 0.3)
    want = model.fit(inputs[rows], y[rows]).predict_proba(inputs[queries])
    np.testing.assert_allclose(found.probabilities, want, atol=2e-3)
    for query, label in zip(queries, found.knn, strict=True):
        one = features[[query]], np.array([label])
        assert by_hand(features[rows], y[rows], *one, 4, 0.1, False) == 1.0


@pytest.mark.parametrize("counts", [(10, 7, 5), (3, 2, 2), (12, 1, 2), (2, 2), (40, 3, 1, 1, 5)])
def test_folds_are_stratified_and_hold_out_each_row_once(counts):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    alone = np.bincount(labels)[labels] == 1
    folds = min(5, max(counts))
    seen, sizes, orders = np.zeros(len(labels), int), [], []
    for repeat in range(2):
        for train, test in few_labels.splits(labels, folds, 0, repeat):
            assert not set(train) & set(test)
            assert len(train) + len(test) == len(labels)
            assert set(labels[train]) == set(labels)  # each class can be predicted
            for c in range(len(counts)):
                dealt = counts[c] / folds if counts[c] > 1 else 0
                assert np.floor(dealt) <= (labels[test] == c).sum() <= np.ceil(dealt)
            seen[test] += 1
            sizes.append(len(test))
            orders.append(test.tolist())
    np.testing.assert_array_equal(seen, np.where(alone, 0, 2))
    assert max(sizes) - min(sizes) <= 1
    if sum(counts) > 9:
        assert orders[:folds] != orders[folds:]  # drawn again


def test_cross_validation_by_hand():
    """A loop over the same folds, with scikit-learn; singletons train and are not scored."""
    features, y = data(classes=4)
    rows = np.concatenate([np.flatnonzero(y == c)[:m] for c, m in enumerate((6, 5, 3, 1))])
    labels, n = y[rows], len(rows)
    trainer = Trainer.of(features, 4, settings(knn__k=3))
    found = few_labels.cross_validate(trainer, rows, labels, seed=4)
    assert (found.scored, found.folds, found.repeats) == (14, 5, 10)
    inputs, model = regression(features, 0.1)
    right, nearest, p = [], [], np.zeros((n, 4))
    for repeat in range(10):
        for train, test in few_labels.splits(labels, 5, 4, repeat):
            model.fit(inputs[rows[train]], labels[train])
            likely = model.predict_proba(inputs[rows[test]])
            p[np.ix_(test, model.classes_)] += likely / 10
            right += (model.classes_[likely.argmax(1)] == labels[test]).tolist()
            asked = features[rows[test]], labels[test]
            one = by_hand(features[rows[train]], labels[train], *asked, 3, 0.1, False)
            nearest += [one * len(test)]
    assert len(right) == 140
    assert found.accuracy == pytest.approx(np.mean(right))
    assert 0.3 < found.accuracy < 0.95 and found.accuracy != found.knn
    assert found.knn == pytest.approx(sum(nearest) / 140)
    assert found.majority == pytest.approx(6 / 14)
    shrunk = (14 * found.accuracy + 2) / 18
    assert found.error == pytest.approx(np.sqrt(shrunk * (1 - shrunk) / 18))
    np.testing.assert_allclose(found.predictions.probabilities, p, atol=2e-3)
    assert (found.predictions.knn >= 0).tolist() == [True] * 14 + [False]


def test_labels_without_signal_score_no_better_than_chance():
    """A row in its own training set would be right: features of many dimensions tell all apart."""
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(60, 200)).astype("f4"), np.arange(60) % 2
    trainer = Trainer.of(features, 2, settings(knn__k=1))
    found = few_labels.cross_validate(trainer, np.arange(60), labels, 0)
    seen = trainer.predict(np.arange(60), labels, np.arange(60))
    assert (seen.probabilities.argmax(1) == labels).all() and (seen.knn == labels).all()
    assert 0.2 < found.accuracy < 0.7 and 0.2 < found.knn < 0.7


def test_more_labels_are_drawn_less_often():
    features, y = data(300)
    trainer = Trainer.of(features, 3, settings())
    assert few_labels.cross_validate(trainer, np.arange(300), y, 0).repeats == 1
    assert few_labels.cross_validate(trainer, np.arange(120), y[:120], 0).repeats == 4


def test_nothing_can_be_scored_where_each_class_has_one_row():
    features, _ = data()
    trainer = Trainer.of(features, 2, settings())
    found = few_labels.cross_validate(trainer, np.array([3, 5]), np.array([0, 1]), 0)
    assert found.scored == found.folds == 0 and np.isnan([found.accuracy, found.error]).all()
    assert found.predictions.knn.tolist() == [-1, -1]


def test_margins():
    p = np.array([[0.5, 0.2, 0.3], [0.1, 0.8, 0.1]])
    np.testing.assert_allclose(few_labels.margins(p), [0.2, 0.7])


def groups(sizes, seed=0):
    """Far clusters of different widths; a row each and its cluster."""
    rng = np.random.default_rng(seed)
    which = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    return np.eye(len(sizes), 20)[which] + 0.1 * rng.normal(size=(len(which), 20)), which


def test_the_image_nearest_to_the_centre_of_each_cluster_largest_first():
    features, which = groups((40, 30, 20, 10))
    found = suggest(features, NONE, np.arange(100), 4, 0)
    assert which[found.rows].tolist() == [0, 1, 2, 3] and found.sizes.tolist() == [40, 30, 20, 10]
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for row in found.rows:
        own = np.flatnonzero(which == which[row])
        assert row == own[np.linalg.norm(unit[own] - unit[own].mean(0), axis=1).argmin()]
    assert found.passed_over == 0


def test_clusters_with_a_label_are_left_out():
    features, which = groups((40, 30, 20, 10))
    labelled = np.array([np.flatnonzero(which == 1)[5], np.flatnonzero(which == 3)[2]])
    found = suggest(features, labelled, np.arange(100), 2, 0)
    assert which[found.rows].tolist() == [0, 2]
    assert not set(found.rows) & set(labelled)


def test_only_rows_of_the_pool_are_chosen():
    features, which = groups((40, 30, 20, 10))
    pool = np.flatnonzero(which != 0)[::2]
    found = suggest(features, NONE, pool, 3, 0)
    assert set(found.rows) <= set(pool) and sorted(which[found.rows]) == [1, 2, 3]
    assert found.sizes.sum() == len(pool)


def test_nearly_equal_images_are_not_chosen_twice():
    """Twelve photographs, four copies of each, and as many clusters as files."""
    rng = np.random.default_rng(0)
    photos = rng.normal(size=(12, 60))
    features = np.concatenate([photos + 0.01 * rng.normal(size=photos.shape) for _ in range(4)])
    found = suggest(features, NONE, np.arange(48), 40, 0)
    assert sorted(found.rows % 12) == list(range(12)) and found.passed_over > 10
    again = suggest(features, np.array([3, 16]), np.arange(48), 40, 0)
    assert sorted(again.rows % 12) == [0, 1, 2, *range(5, 12)]  # nor copies of labelled ones


def test_equal_features_give_one_image():
    found = suggest(np.ones((9, 5)), NONE, np.arange(9), 4, 0)
    assert found.rows.tolist() == [0] and found.sizes.tolist() == [9]
    assert suggest(np.ones((1, 5)), NONE, np.arange(1), 4, 0).rows.tolist() == [0]
