"""L2-regularised multinomial logistic regression, its strength chosen on held-out rows.

Chen et al. 2020, B.8, after Kornblith et al. 2019: L-BFGS, no augmentation, 45 strengths spaced
evenly on a log scale. scikit-learn minimises sum of cross-entropies + l2 / 2 |kernel|^2,
l2 = 1 / C, on features of mean 0 and standard deviation 1.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from common.data.sources import subset
from common.errors import UserError
from common.evaluate import linear
from common.run import console
from common.run.console import Progress

# Below this many elements one thread is used: BLAS threads synchronise after each of these small
# products, which costs more than it gains; on a busy machine, twenty times as much (measured).
_ONE_THREAD = 2**25
# Bias of a class without a training image: it is never predicted, and logits stay finite.
_NEVER = -1e9


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The classifier with the best l2, what to record about it, and its description."""

    classifier: linear.Classifier
    record: dict[str, Any]
    words: str


@dataclasses.dataclass(frozen=True)
class Fit:
    """A classifier, and whether the solver reached its minimum in the iterations allowed."""

    classifier: linear.Classifier
    converged: bool


def choose(
    features: np.ndarray, labels: np.ndarray, num_classes: int, settings: ConfigDict, seed: int
) -> Chosen:
    """Chooses l2 on held-out rows, and fits a classifier with it to all rows.

    Args:
        features: `[n, d]`, of training images.
        labels: int `[n]`, all labelled.
        num_classes: c.
        settings: `eval.logistic`.
        seed: of the held-out part.
    """
    s = settings
    values, held = strengths(s.low, s.high, s.num_values), np.zeros(0, np.int64)
    l2, stopped, words = float(values[0]), 0, ""
    if len(values) > 1:
        held = subset.held_out(labels, s.held_out, seed)
        console.say(f"Choosing among {len(values)} values of l2 by {len(held):,} training images.")
        rest = np.setdiff1d(np.arange(len(labels)), held)
        fits = fit(features[rest], labels[rest], num_classes, values, s.max_iterations)
        best = linear.best([f.classifier for f in fits], features[held], labels[held])
        l2, stopped = float(values[best]), sum(not f.converged for f in fits)
        words = f", chosen from {len(values)} by {len(held):,} held-out training images"
    console.say(f"Fitting all {len(labels):,} images.")
    (last,) = fit(features, labels, num_classes, [l2], s.max_iterations, quiet=True)
    if not last.converged:
        words += f"; NOT converged in {s.max_iterations} iterations, see eval.logistic"
    record = {
        "l2": l2,
        "values_tried": len(values),
        "values_not_converged": stopped,
        "converged": last.converged,
        "num_held_out": len(held),
        "num_train": len(labels),
    }
    return Chosen(last.classifier, record, f"l2 = {l2:.3g}{words}")


def strengths(low: float, high: float, count: int) -> np.ndarray:
    """`count` values of l2 from `high` down to `low`, evenly spaced on a log scale."""
    if not 0 < low <= high or count < 1:
        raise UserError(f"{count} values of l2 from {low:g} to {high:g}: expected 0 < low <= high")
    return np.geomspace(high, low, count) if count > 1 else np.array([high])


def fit(
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    values: Sequence[float] | np.ndarray,
    max_iterations: int,
    quiet: bool = False,
    statistics: tuple[np.ndarray, np.ndarray] | None = None,
) -> list[Fit]:
    """Fits one classifier for each l2, each starting from the one before.

    A fit that runs out of iterations is kept: on separable data the minimum moves out without limit
    as regularisation weakens, and the classifier reached is judged on held-out rows like any other.
    Whether it converged is returned, for the caller to report.

    Args:
        features: `[n, d]`, any real type.
        labels: int `[n]`, all labelled.
        num_classes: c.
        values: of l2; strong to weak is the fastest order.
        max_iterations: of each.
        quiet: no progress line.
        statistics: `linear.standardiser` of other rows; None: of these.

    Raises:
        UserError: if all rows are of one class.
    """
    # here: importing it takes seconds
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    if len(np.unique(labels)) < 2:
        raise UserError("all labelled training images are of one class: expected two or more")
    mean, scale = statistics or linear.standardiser(features)
    inputs = np.concatenate(
        [((x - mean) * scale).astype(np.float32) for x in linear.parts(features)]
    )
    model = LogisticRegression(max_iter=max_iterations, warm_start=True)
    progress, fits = Progress(len(values), False if quiet or jax.process_index() else None), []
    for i, l2 in enumerate(values):
        model.set_params(C=1 / l2)
        threads = threadpool_limits(1 if inputs.size < _ONE_THREAD else None)
        with threads, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            model.fit(inputs, labels)
        converged = True
        for warning in caught:
            if issubclass(warning.category, ConvergenceWarning):
                converged = False
            else:
                warnings.warn_explicit(
                    warning.message, warning.category, warning.filename, warning.lineno
                )
        kernel, bias = _columns(model, num_classes)
        classifier = linear.Classifier.of_standardised(kernel, bias, mean, scale)
        fits.append(Fit(classifier, converged))
        progress.show(i + 1, None, {"l2": float(l2)}, {}, None)
    progress.close()
    return fits


def _columns(model: Any, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Kernel `[d, c]` and bias `[c]` of softmax logits of a fitted `LogisticRegression`."""
    coefficients, intercepts = model.coef_, model.intercept_
    if len(coefficients) == 1:  # two classes: scikit-learn keeps their difference
        coefficients = np.concatenate([-coefficients, coefficients]) / 2
        intercepts = np.concatenate([-intercepts, intercepts]) / 2
    kernel = np.zeros((coefficients.shape[1], num_classes))
    bias = np.full(num_classes, _NEVER)
    kernel[:, model.classes_] = coefficients.T
    bias[model.classes_] = intercepts
    return kernel, bias
