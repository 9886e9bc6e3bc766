"""All images of a run's data, also those that were held out of its training."""

import dataclasses

import numpy as np

from common.data.sources import shards, slices
from common.data.sources.base import Source, listed
from common.data.sources.folder_source import shown
from common.data.sources.opening import kind_of
from common.errors import UserError
from common.evaluate.pretrained import Pretrained
from common.sharding import any_process_of


@dataclasses.dataclass(frozen=True)
class Images:
    """Features of the images of a split; damaged ones have no row.

    Attributes:
        features: `[n, d]`; float32, or uint8 for raw pixels.
        labels: int32 `[n]`, -1 where unlabelled.
        ids: int64 `[n]`, indices into the split, ascending.
        names: str `[n]`, `Source.names`.
        left_out: str `[m]`, names of the damaged images.
    """

    features: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    names: np.ndarray
    left_out: np.ndarray

    @property
    def damage(self) -> str:
        """The damaged images in words, to end a sentence with; "" where there are none."""
        return listed([shown(name) for name in self.left_out], "damaged image", "left out")


def open_all(opened: Pretrained, split: str = "", flag: str = "") -> Source:
    """Opens all images of the run's data: the split of which train is a part, or train.

    A run that trained on "train[:90%]", and was tested on "train[90%:]" or on nothing, has all of
    "train"; of shards that hold these two parts, both. Where `data.bank_split` voted, train is
    still the split of the training. A split that is named, here or by `--eval.train_split`, is
    opened as it is.

    Args:
        opened: the run; its `train_split` becomes the split opened.
        split: empty for all images.
        flag: that names another split, for the message.
    """
    data = opened.config.data
    with opened.config.unlocked():
        data.train_split = split or _whole(opened)
    try:
        return opened.open("train")
    except UserError as error:
        if not flag:
            raise
        raise UserError(f"{error} (Another split of these data: --{flag}=NAME.)") from error


def _whole(opened: Pretrained) -> str:
    """The split that has all images, as far as the names of train and test tell."""
    data = opened.config.data
    train = str(opened.trained_on or data.train_split)
    name, bounds = slices.parse(train)
    kind, path = kind_of(data.source)
    if bounds is None or opened.settings.train_split:
        return train
    if set("[+") & set(name):  # a sum
        return train
    held_out = slices.parse(data.test_split)[0] if data.test_split else name
    if held_out != name:
        return train
    if kind == "shards" and shards.holds(path, train):  # "train" may not be there
        return shards.with_rest(path, train)
    return name


def features_of(opened: Pretrained, source: Source, limit: int = 0) -> Images:
    """Encodes the images of a split.

    With `on_corrupt="replace"`, which substitutes another image for a damaged one everywhere else,
    damaged images are left out here.

    Args:
        opened: the run.
        source: the split; its `on_corrupt` changes.
        limit: at most this many images, evenly spaced; 0 for all.

    Raises:
        UserError: an image is damaged and `on_corrupt` is "error"; features are not finite.
    """
    if source.on_corrupt == "replace":
        source.on_corrupt = "leave out"  # `common.data.feed.corrupt.LEAVE_OUT`, without TensorFlow
    features, labels, ids = opened.extract(source, limit)
    names, gone = source.names(ids), damaged(source, ids)
    check_finite(features[~gone])
    return Images(features[~gone], labels[~gone], ids[~gone], names[~gone], names[gone])


def damaged(source: Source, ids: np.ndarray) -> np.ndarray:
    """Which of `ids` were replaced by another image, as found by any process."""
    return any_process_of(np.isin(ids, list(source.replaced)))


def check_finite(features: np.ndarray) -> None:
    """Raises a `UserError` if a feature of `[n, d]` is NaN or infinite."""
    bad = int((~np.isfinite(features).all(1)).sum())
    if bad:
        raise UserError(
            f"the features of {bad:,} of {len(features):,} images are NaN or infinite: the run "
            "has diverged, so evaluate an earlier checkpoint with --eval.step=STEP"
        )
