"""Parts of a labelled set: class balanced, held out, or any list of examples.

Which examples are chosen follows from (seed, example id) alone, as all draws do; a smaller fraction
is a part of a larger one.
"""

import dataclasses
import hashlib
from typing import Any

import numpy as np

from common.data.order import hash64
from common.data.sources.base import ArraySource, Source
from common.errors import UserError

_BALANCED, _HELD_OUT = 101, 102  # streams of `hash64`
_PIECE = 4096  # examples read at once


@dataclasses.dataclass(kw_only=True)
class Subset(Source):
    """Examples chosen from another source with random access; example i is `base`'s `ids[i]`."""

    base: Source
    ids: np.ndarray

    def read(self, ids):
        return self.base.read(self.ids[ids])

    def views(self, ids, size):
        return self.base.views(self.ids[ids % self.num_examples], size)

    def describe(self, index):
        return self.base.describe(int(self.ids[index]))

    def names(self, ids):
        return self.base.names(self.ids[ids])

    @property
    def listing(self):
        text = self.base.listing.encode() + np.asarray(self.ids, np.int64).tobytes()
        return hashlib.sha256(text).hexdigest()[:16]


def select(source: Source, ids: np.ndarray) -> Source:
    """The examples `ids`, in that order, as a source of their own.

    A streamed set has no random access: its encoded images are read into memory.
    """
    ids = np.asarray(ids, np.int64)
    common: dict[str, Any] = dict(
        name=source.name, split=source.split, num_examples=len(ids),
        num_classes=source.num_classes, class_names=source.class_names,
        on_corrupt=source.on_corrupt, decoding=source.decoding, account=source.account,
    )  # fmt: skip
    if source.kind == "stream":
        images, found = _from_stream(source, ids)
        return ArraySource(kind="encoded", labels=found, images=images, **common)
    labels = None if source.labels is None else source.labels[ids]
    return Subset(
        kind=source.kind, labels=labels, image_shape=source.image_shape, base=source, ids=ids,
        **common,
    )  # fmt: skip


def labels_of(source: Source) -> np.ndarray:
    """int32 `[num_examples]`, -1 where unlabelled; some sets have to be read for it."""
    if source.labels is not None:
        return source.labels
    if source.kind == "stream":
        return _from_stream(source, np.zeros(0, np.int64))[1]
    pieces = np.array_split(
        np.arange(source.num_examples), -(-source.num_examples // _PIECE)
    )  # fmt: skip
    return np.concatenate([source.read(ids)[1] for ids in pieces]).astype(np.int32)


def balanced(labels: np.ndarray, fraction: float, num_classes: int, seed: int) -> np.ndarray:
    """Ids of a share of the labelled examples, the same number of each class.

    A class that has fewer gives all it has.

    Args:
        labels: int `[n]`, -1 where unlabelled.
        fraction: in (0, 1]; 1 is every labelled example.
        num_classes: classes c; each gives round(fraction x labelled / c).
        seed: which ones.

    Returns:
        int64, ascending.

    Raises:
        UserError: if that is less than one image of a class, or the fraction is out of range.
    """
    labelled = np.flatnonzero(labels >= 0)
    if not 0 < fraction <= 1:
        raise UserError(f"a fraction of {fraction:g} of the labels: choose more than 0, at most 1")
    if fraction == 1:
        return labelled
    count = round(fraction * len(labelled) / num_classes)
    if count < 1:
        raise UserError(
            f"a fraction of {fraction:g} of {len(labelled)} labelled images in {num_classes} "
            f"classes is less than one image a class: choose at least "
            f"{num_classes / max(1, len(labelled)):.2g}"
        )
    return _first_of_each(labels, labelled, lambda _: count, _BALANCED, seed)


def held_out(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Ids of the same share of each class, to choose settings by.

    Args:
        labels: int `[n]`, -1 where unlabelled.
        share: in (0, 1). A class of two images or more is on both sides.
        seed: which ones.

    Returns:
        int64, ascending.

    Raises:
        UserError: if the share is out of range, or no class can be split.
    """
    if not 0 < share < 1:
        raise UserError(f"a held-out share of {share:g}: choose between 0 and 1, e.g. 0.1")

    def count(size: int) -> int:
        return min(size - 1, max(1, round(share * size)))

    ids = _first_of_each(labels, np.flatnonzero(labels >= 0), count, _HELD_OUT, seed)
    if not len(ids):
        raise UserError(
            "no class has two labelled training images, so none can be held out to choose the "
            "settings by: give more data, or a single setting"
        )
    return ids


def _first_of_each(labels, ids, count, stream: int, seed: int) -> np.ndarray:
    """Of each class the `count(size of the class)` ids that rank first in a random order."""
    ids = ids[np.argsort(hash64(stream, seed, ids), kind="stable")]
    groups = (ids[labels[ids] == label] for label in np.unique(labels[ids]))
    chosen = [group[: count(len(group))] for group in groups]
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, np.int64)


def _from_stream(source: Source, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Encoded images of `ids` and their labels; without ids the labels of all."""
    places = {int(example): place for place, example in enumerate(ids)}
    count = len(ids) or source.num_examples
    images, labels = np.empty(len(ids), object), np.full(count, -1, np.int32)
    for example, image, label in source.in_order():
        place = places.get(int(example)) if len(ids) else int(example)
        if place is None:
            continue
        labels[place] = label
        if len(ids):
            images[place] = image
    return images, labels
