"""Top-1 and top-5 accuracy: which rows count, how they are computed and reported."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common.data.sources import slices
from common.data.sources.base import Source
from common.errors import UserError


def warn_of_overlap(votes: str, scored: str) -> None:
    """Warns where two splits share images, as far as their names tell.

    Args:
        votes: the split that votes or trains, e.g. "train[:80%]".
        scored: the split that is scored.
    """
    if slices.overlap(votes, scored):
        logging.warning(
            "the splits %s and %s share images: what is scored was seen, so scores are too "
            "good; name other splits, e.g. train[:80%%] and train[80%%:]", votes, scored,
        )  # fmt: skip


def labelled(name: str, features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows that have a label.

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
            "evaluate on a labelled dataset"
        )
    # Indexing copies, and pixels are large: only where rows have to be dropped.
    return (features, labels) if keep.all() else (np.asarray(features)[keep], labels[keep])


def top_k(scores: np.ndarray, labels: np.ndarray, least: float = -np.inf) -> dict[str, Any]:
    """Scores predictions.

    Args:
        scores: `[n, c]`, larger is likelier. A tie goes to the class with the lower index, so that
            constant scores are worth no more than chance.
        labels: int `[n]`, in [0, c).
        least: a class whose score is not above this is not predicted at all.

    Returns:
        `top1` and `top5` in [0, 1]; `top5` is None with 5 classes or fewer, where it means nothing.
    """
    ranked = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    hits = (ranked == labels[:, None]) & (np.take_along_axis(scores, ranked, 1) > least)
    top5 = float(hits.any(1).mean()) if scores.shape[1] > 5 else None
    return {"top1": float(hits[:, 0].mean()), "top5": top5}


def unlike(names: Sequence[str], source: Source) -> str:
    """How the classes of a network differ from those of a source, in words; "" if they are those.

    Order counts. Classes without names, which are "0", "1" ... of a network, are taken for those of
    the other side if there are as many.

    Args:
        names: of the network's classes.
        source: whose labels are to score it.
    """
    ours, theirs = tuple(names), source.class_names
    numbers = tuple(map(str, range(len(ours))))
    if len(ours) != source.num_classes:
        return f"{source.num_classes} classes and not {len(ours)}"
    if not theirs or numbers in (ours, tuple(theirs)) or ours == tuple(theirs):
        return ""
    i = next(i for i, pair in enumerate(zip(ours, theirs, strict=True)) if len(set(pair)) > 1)
    return f"other classes: its class {i} is {theirs[i]!r} and not {ours[i]!r}"


def in_words(metrics: Mapping[str, Any], source: Source) -> str:
    """Returns e.g. "71.20 % of 10,000 images of cifar10 (test) right, top-5 97.10 %"."""
    top5 = metrics.get("top5")
    return (
        f"{100 * metrics['top1']:.2f} % of {metrics['num_test']:,} images of {source.name} "
        f"({source.split}) right" + (f", top-5 {100 * top5:.2f} %" if top5 is not None else "")
    )
