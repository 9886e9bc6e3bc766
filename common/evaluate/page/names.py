"""Names of images that can be read under a picture."""

import os

import numpy as np

from common.evaluate.feature_files import printable

_MOST = 22  # characters: two lines under a small picture


def below(names: np.ndarray) -> tuple[str, list[str]]:
    """The folder that all names share, and the names below it.

    The folder ends in a slash, or is "": none, or an absolute path (shards keep those), which would
    tell of the user's disk.
    """
    shown = [printable(str(name)) for name in names]
    common = os.path.commonprefix(shown) if len(shown) > 1 else shown[0]  # noqa: RUF071
    common = common[: common.rfind("/") + 1]  # a prefix of characters, cut at a slash
    hidden = common.startswith("/") or "://" in common
    return "" if hidden else common, [name.removeprefix(common) for name in shown]


def middle(name: str, most: int = _MOST) -> str:
    """A name of at most so many characters, shortened in its middle.

    Names of one set often begin alike, so that more of the end is kept.
    """
    if len(name) <= most:
        return name
    head = (most - 1) // 3
    return f"{name[:head]}…{name[len(name) - (most - 1 - head) :]}"
