"""Names of images that can be read under a picture."""

import numpy as np

from common.evaluate import feature_files

_MOST = 22  # characters: two lines under a small picture


def below(names: np.ndarray) -> tuple[str, list[str]]:
    """`feature_files.below`, with "" for a folder that would tell of the user's disk."""
    folder, shown = feature_files.below(names)
    return "" if feature_files.rooted(folder) else folder, shown


def middle(name: str, most: int = _MOST) -> str:
    """A name of at most so many characters, shortened in its middle.

    Names of one set often begin alike, so that more of the end is kept.
    """
    if len(name) <= most:
        return name
    head = (most - 1) // 3
    return f"{name[:head]}…{name[len(name) - (most - 1 - head) :]}"
