"""Top-1 and top-5 accuracy, and how to say them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from common.data.sources.base import Source
from common.errors import UserError


def labelled(name: str, features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows that have a label.

    Args:
        name: "training" or "test", for the error.
        features: `[n, ...]`.
        labels: int `[n]`, -1 where unlabelled.

    Raises:
        UserError: if no row has one.
    """
    labels = np.asarray(labels)
    keep = labels >= 0
    if not keep.any():
        raise UserError(
            f"none of the {len(labels)} {name} rows has a label, and a score needs some: "
            "evaluate on a labelled data set"
        )
    # Indexing copies, and pixels are large: only when something has to go.
    return (features, labels) if keep.all() else (np.asarray(features)[keep], labels[keep])


def top_k(scores: np.ndarray, labels: np.ndarray, least: float = -np.inf) -> dict[str, Any]:
    """Scores predictions.

    Args:
        scores: `[n, c]`, larger is likelier. Of equal ones the first class is predicted, so that
            constant scores are worth no more than chance.
        labels: int `[n]`, in [0, c).
        least: a class whose score is not above it is no prediction at all.

    Returns:
        `top1` and `top5` in [0, 1]; `top5` is None with 5 classes or fewer, where it says nothing.
    """
    ranked = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    hits = (ranked == labels[:, None]) & (np.take_along_axis(scores, ranked, 1) > least)
    top5 = float(hits.any(1).mean()) if scores.shape[1] > 5 else None
    return {"top1": float(hits[:, 0].mean()), "top5": top5}


def in_words(metrics: Mapping[str, Any], source: Source) -> str:
    """E.g. "71.20 % of 10,000 images of cifar10 (test) right, top-5 97.10 %"."""
    top5 = metrics.get("top5")
    return (
        f"{100 * metrics['top1']:.2f} % of {metrics['num_test']:,} images of {source.name} "
        f"({source.split}) right" + (f", top-5 {100 * top5:.2f} %" if top5 is not None else "")
    )
