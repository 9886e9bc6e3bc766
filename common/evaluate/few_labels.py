"""Classifiers on frozen features from a few labels, and how good they are, by cross-validation."""

import dataclasses
from collections.abc import Iterator

import numpy as np
from ml_collections import ConfigDict

from common.evaluate import knn, linear, logistic

_FOLDS = 5
_REPEATS, _ROWS = 10, 500  # of the folds: until about as many rows were scored, at most ten times


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What two classifiers say of some images.

    Attributes:
        probabilities: float64 `[n, c]`, of the logistic regression; a row sums to 1.
        knn: int `[n]`, the class with the most votes.
    """

    probabilities: np.ndarray
    knn: np.ndarray


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Cross-validated accuracy.

    Attributes:
        accuracy: share of the scored rows that the logistic regression gets right, in [0, 1], mean
            of the repeats; nan if no row could be scored.
        error: its standard error, by which it is uncertain since so few rows are scored.
        knn: the same of kNN.
        majority: accuracy of predicting the most frequent class.
        scored: rows that were scored, of classes with two rows or more.
        folds, repeats: 0 if no row could be scored.
        predictions: of the scored rows by classifiers that had not seen them: the mean over the
            repeats of the probabilities and the most frequent class of kNN. Zeros and -1 elsewhere.
    """

    accuracy: float
    error: float
    knn: float
    majority: float
    scored: int
    folds: int
    repeats: int
    predictions: Predictions


@dataclasses.dataclass(frozen=True)
class Trainer:
    """How a classifier is made of some labelled rows.

    Attributes:
        features: `[n, d]` of all images, labelled or not.
        num_classes: c.
        settings: `--eval`: sections `label`, `knn` and `logistic`.
        statistics: mean and scale of all images, see `linear.standardiser`. Those of a few labelled
            rows would be inexact, and no label goes into them.
    """

    features: np.ndarray
    num_classes: int
    settings: ConfigDict
    statistics: tuple[np.ndarray, np.ndarray]

    @classmethod
    def of(cls, features: np.ndarray, num_classes: int, settings: ConfigDict) -> "Trainer":
        """Computes the statistics."""
        return cls(features, num_classes, settings, linear.standardiser(features))

    def predict(self, rows: np.ndarray, labels: np.ndarray, queries: np.ndarray) -> Predictions:
        """Trains on some rows of the features and predicts others.

        Args:
            rows: int `[m]`.
            labels: int `[m]`, in [0, c), of two classes at least.
            queries: int `[q]`, rows too; q may be 0.

        Raises:
            UserError: one class only, or a setting out of range.
        """
        if not len(queries):
            return Predictions(np.zeros((0, self.num_classes)), np.zeros(0, np.int64))
        s, d = self.settings, self.features.shape[1]
        trained, asked = self.features[rows], self.features[queries]
        (fit,) = logistic.fit(
            trained, labels, self.num_classes, [s.label.l2 * d], s.logistic.max_iterations,
            quiet=True, statistics=self.statistics,
        )  # fmt: skip
        logits = fit.classifier.logits(asked).astype(np.float64)
        likelihood = np.exp(logits - logits.max(1, keepdims=True))
        k = min(s.knn.k or knn.default_k(len(rows)), len(rows))
        votes = knn.votes(
            trained, labels, asked, self.num_classes,
            k, s.knn.temperature, s.knn.center, metric=s.knn.metric,
        )  # fmt: skip
        return Predictions(likelihood / likelihood.sum(1, keepdims=True), votes.argmax(1))


def cross_validate(trainer: Trainer, rows: np.ndarray, labels: np.ndarray, seed: int) -> Estimate:
    """Accuracy on labelled rows of classifiers that were trained on the others.

    Stratified folds, five, or as many as the largest class has rows. Where labels are few, the
    folds are drawn again, up to ten times, so that the result depends less on the draw; the
    standard error counts each row once all the same. It is that of a proportion with two right and
    two wrong answers added (Agresti & Coull 1998), which is not 0 where all are right.

    Args:
        trainer: has the features.
        rows: int `[n]`, the labelled rows of the features.
        labels: int `[n]`, in [0, c).
        seed: of the folds.
    """
    n, c = len(rows), trainer.num_classes
    counts = np.bincount(labels, minlength=c)
    scored = counts[labels] > 1  # the only one of a class cannot be held out
    m, folds = int(scored.sum()), int(min(_FOLDS, counts.max()))
    total, votes = np.zeros((n, c)), np.zeros((n, c))
    if not m or len(np.unique(labels)) < 2:
        nothing = Predictions(total, np.full(n, -1))
        return Estimate(np.nan, np.nan, np.nan, np.nan, 0, 0, 0, nothing)
    repeats = int(np.clip(_ROWS // m, 1, _REPEATS))
    right, right_knn = np.zeros(n), np.zeros(n)
    for repeat in range(repeats):
        for train, test in splits(labels, folds, seed, repeat):
            found = trainer.predict(rows[train], labels[train], rows[test])
            right[test] += found.probabilities.argmax(1) == labels[test]
            right_knn[test] += found.knn == labels[test]
            total[test] += found.probabilities
            votes[test, found.knn] += 1
    accuracy = float(right[scored].mean() / repeats)
    shrunk = (accuracy * m + 2) / (m + 4)
    return Estimate(
        accuracy=accuracy,
        error=float(np.sqrt(shrunk * (1 - shrunk) / (m + 4))),
        knn=float(right_knn[scored].mean() / repeats),
        majority=float(counts.max() / m),
        scored=m,
        folds=folds,
        repeats=repeats,
        predictions=Predictions(total / repeats, np.where(scored, votes.argmax(1), -1)),
    )


def splits(
    labels: np.ndarray, folds: int, seed: int, repeat: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Places (train, test) of stratified folds; the only one of a class is always in train.

    The rows of each class are dealt to the folds in random order, each class beginning where the
    one before has ended: sizes of folds, and of a class in them, differ by one at most.

    Args:
        labels: int `[n]`.
        folds: at least 2.
        seed, repeat: of the order.
    """
    counts = np.bincount(labels)
    order = np.random.default_rng([seed, repeat]).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    order = order[counts[labels[order]] > 1]
    fold = np.full(len(labels), -1)
    fold[order] = np.arange(len(order)) % folds
    for number in range(folds):
        yield np.flatnonzero(fold != number), np.flatnonzero(fold == number)


def margins(probabilities: np.ndarray) -> np.ndarray:
    """How much likelier the first choice is than the second, `[n]` in [0, 1], of rows `[n, c]`."""
    ranked = np.sort(probabilities, axis=1)
    found: np.ndarray = ranked[:, -1] - ranked[:, -2]
    return found
