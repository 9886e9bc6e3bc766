"""`data.train_split="auto"`, `data.test_split="auto"`: which images are held out to score a run by.

People who have a folder of photographs have no test split, and what is measured on the training
images themselves flatters every encoder. Here a part of them is set aside, without looking at a
label.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from common.data.sources import folder_source, shards, slices
from common.errors import UserError
from common.fields import AUTO

_LEAST, _MOST = 100, 2_000  # images held out, but never more than a quarter of all
# of splits made for testing, in the order of preference
_TESTS = ("test", "validation", "val")


def splits(
    config: ConfigDict, kind: str, path: str, count: Callable[[str], int]
) -> tuple[str, str]:
    """The training split and the test split of a config that leaves one of them, or both, open.

    Args:
        config: the config's `data` section.
        kind, path: of its source.
        count: how many images a split of the source has, by its name.

    Returns:
        Their names, or slices such as "train[:-367]" and "train[-367:]".

    Raises:
        UserError: as `count`, or a test split is given that is the middle of another split.
    """
    train = "train" if config.train_split == AUTO else config.train_split
    if config.test_split != AUTO:  # a test set is given, or none is wanted
        return _train_beside(config.test_split) or train, config.test_split
    if config.train_split == AUTO and (prepared := _prepared(kind, path)):
        return prepared
    if slices.parse(train)[1] is not None:
        return train, ""  # whoever trains on a slice knows what the rest of the split is for
    if test := _test_split(config, kind, path):
        return train, test
    images = count(train)
    held_out = size(images)
    if held_out >= images:  # one image
        return train, ""
    return f"{train}[:-{held_out}]", f"{train}[-{held_out}:]"


def decided(train: str, test: str) -> bool:
    """Whether these splits were decided here, and so say nothing of other data."""
    name, bounds = slices.parse(test)
    counted = bounds is not None and bounds[0].startswith("-") and "%" not in bounds[0]
    return counted and slices.rest(test) == train and slices.parse(train)[0] == name


def _train_beside(test: str) -> str | None:
    """The rest of the split of which the test split is a slice; None where it is no slice."""
    if slices.parse(test)[1] is None:
        return None
    if (rest := slices.rest(test)) is None:
        raise UserError(
            f"data.train_split=auto and data.test_split={test}: what is left of the split is not "
            "one piece, so name the part to train on in data.train_split"
        )
    return rest


def size(images: int) -> int:
    """How many of the images are held out: a tenth, at least 100, at most 2,000 or a quarter."""
    return max(1, min(max(images // 10, _LEAST), _MOST, images // 4))


def _test_split(config: ConfigDict, kind: str, path: str) -> str:
    """The split of a source that was made for testing; "" if there is none."""
    if kind == "folder":
        return folder_source.test_split(path)
    if kind == "tfds":
        from common.data.sources import tfds_source  # TensorFlow, only where it is used

        known = tfds_source.counts(path, config)
        return next((name for name in _TESTS if name in known), "")
    if kind == "shards":
        return next((name for name in _TESTS if shards.holds(path, name)), "")
    return "test"  # of what ships with this code


def _prepared(kind: str, path: str) -> tuple[str, str] | None:
    """The two parts of one split that `--mode=prepare` wrote, the larger one first."""
    if kind != "shards":
        return None
    counts = shards.counts(path)
    parts = [name for name in counts if slices.parse(name)[1] is not None]
    if len(parts) != 2 or slices.overlap(*parts):
        return None
    if slices.parse(parts[0])[0] != slices.parse(parts[1])[0]:
        return None
    train, test = sorted(parts, key=lambda name: -counts[name])
    return train, test
