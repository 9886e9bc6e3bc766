"""Part of a split, as in "train[:80%]": which examples that is.

TFDS slices its own sets, whose files are shuffled. Everything else is sorted by class, or by date,
so that here a slice is of a fixed random order: the same part each time, of all classes, and
"train[:80%]" and "train[80%:]" share no example.
"""

import re

import numpy as np

from common.data.order import hash64
from common.errors import UserError

_LARGE = 10**6
_STREAM = 103  # of `hash64`
_SLICE = re.compile(r"(?P<name>.*)\[(?P<first>[^:\[\]]*):(?P<last>[^:\[\]]*)\]")
_BOUND = re.compile(r"\s*(?P<value>-?\d+)\s*(?P<percent>%?)\s*")


def parse(split: str) -> tuple[str, tuple[str, str] | None]:
    """The name of a split, and the bounds of the slice that it is: ("", "80%") of "[:80%]"."""
    match = _SLICE.fullmatch(split)
    return (match["name"], (match["first"], match["last"])) if match else (split, None)


def ids(split: str, bounds: tuple[str, str], n: int) -> np.ndarray:
    """The examples of a slice.

    Args:
        split: the whole text, for the message.
        bounds: from `parse`: counts, or whole percents, from the start or (negative) from the end.
        n: examples of the whole split.

    Returns:
        int64, ascending, at least one.

    Raises:
        UserError: bounds that are no numbers, or nothing between them.
    """
    first, last = _range(split, bounds, n)
    if first >= last:
        raise UserError(
            f"the slice {split!r} is empty ({first} to {last} of {n} examples): expected e.g. "
            "train[:80%]"
        )
    order = np.argsort(hash64(_STREAM, np.arange(n)), kind="stable")
    return np.sort(order[first:last])


def rest(split: str) -> str | None:
    """What a slice leaves of its split, as a slice; None where that is not one piece.

    Of a split that is no slice nothing is left: None too.
    """
    name, bounds = parse(split)
    if bounds is None or ("" not in (bounds[0].strip(), bounds[1].strip())) or not any(bounds):
        return None
    first, last = (bound.strip() for bound in bounds)
    return f"{name}[{last}:]" if last else f"{name}[:{first}]"


def overlap(a: str, b: str) -> bool:
    """Whether two splits share examples, as far as their names tell.

    Of a percentage against a count that depends on the size of the set, which is taken to be large.
    """
    (name, first), (other, second) = parse(a), parse(b)
    if name != other:
        return False
    everything = ("", "")
    try:
        low, high = _range(a, first or everything, _LARGE)
        start, end = _range(b, second or everything, _LARGE)
    except UserError:  # TFDS has more kinds of slices
        return a == b
    return max(low, start) < min(high, end)


def _range(split: str, bounds: tuple[str, str], n: int) -> tuple[int, int]:
    return _bound(split, bounds[0], 0, n), _bound(split, bounds[1], n, n)


def _bound(split: str, text: str, default: int, n: int) -> int:
    """One bound as a position in [0, n]; a percentage is rounded to the nearest one, as in TFDS.

    (But TFDS takes -1% of a small set, which rounds to 0, for a position from the start.)
    """
    if not text.strip():
        return default
    match = _BOUND.fullmatch(text)
    if not match:
        raise UserError(
            f"the slice {split!r} has the bound {text!r}: expected a count or whole percents, as "
            "in train[:80%] or train[1000:]"
        )
    value = abs(int(match["value"]))
    if match["percent"]:
        value = round(value * n / 100)
    return min(max(n - value if "-" in match["value"] else value, 0), n)
