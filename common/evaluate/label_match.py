"""Which images the rows of a table of labels mean."""

import collections
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from common.data.sources.base import Source, listed
from common.data.sources.folder_source import shown
from common.errors import UserError
from common.evaluate import feature_files, spreadsheet
from common.evaluate.everything import Images
from common.evaluate.label_file import Row

_MOST = 3  # offenders that a message names


def match(rows: Sequence[Row], names: Sequence[str]) -> dict[int, str]:
    """The label of each image that the rows name.

    A row names an image by its name in `names`, or by the part behind the last slash where only
    one image has it; in upper or lower case where only one image fits. Characters may be composed
    (Windows, Linux) or decomposed (macOS). Space around a name, and the apostrophe of
    `spreadsheet.cell`, count only where an image has them.

    Args:
        rows: from `read`.
        names: of all images, damaged ones among them, as `names_of` gives them.

    Returns:
        {index into `names`: label}, ascending.

    Raises:
        UserError: a row that fits no image, or several; two rows that give one image two labels.
    """
    steps = _lookups(names)
    found: dict[int, Row] = {}
    unknown, ambiguous, disagree = [], [], []
    for row in rows:
        tries = (step(text) for text in _spellings(row.file) for step in steps)
        fits = next(filter(None, tries), [])
        if len(fits) > 1:
            ambiguous.append((row, [names[i] for i in fits]))
        elif not fits:
            unknown.append(row)
        elif found.setdefault(fits[0], row).label != row.label:
            disagree.append((found[fits[0]], row))
    if unknown:
        raise UserError(
            f"{_first(unknown)} {'are' if len(unknown) > 1 else 'is'} not among the {len(names):,} "
            f"images, whose names are like {shown(names[0])!r}: give the path below the folder, or "
            f"the file name, and leave out rows of images that are gone{_heading(unknown)}"
        )
    if ambiguous:
        row, several = ambiguous[0]
        raise UserError(
            f"{row} fits several images, {', '.join(map(shown, several[:_MOST]))}: give the path "
            "below the folder, in its own upper and lower case"
        )
    if disagree:
        first, row = disagree[0]
        raise UserError(
            f"{shown(row.file)!r} has two labels, {first.label!r} in {first.place} and "
            f"{row.label!r} in {row.place}: keep one of them"
        )
    return {i: found[i].label for i in sorted(found)}


def check(rows: Sequence[Row], source: Source) -> dict[int, str]:
    """`match` of the images of a source, damaged or not, before minutes are spent on encoding."""
    return match(rows, feature_files.shown_names(source.names(np.arange(source.num_examples))))


def given(rows: Sequence[Row], images: Images) -> tuple[dict[int, str], str]:
    """`match` of images, damaged ones among them.

    Returns:
        {row of the features: label}, ascending, and how many labels are of damaged images, in
        words to end a sentence with.
    """
    names = names_of(images)
    found = match(rows, names)
    n = len(images.names)
    lost = [names[i] for i in found if i >= n]
    kept = {i: label for i, label in found.items() if i < n}
    return kept, listed([shown(name) for name in lost], "label", "of a damaged image unused")


def names_of(images: Images) -> list[str]:
    """Names for people of all images: of the rows of the features, and behind them of damaged ones.

    What a table calls an image must not change with the images that are damaged.
    """
    return feature_files.shown_names([*images.names, *images.left_out])


def _heading(unknown: Sequence[Row]) -> str:
    """What to do where the first line, which names no image, may name the columns."""
    row = next((row for row in unknown if row.line == 1), None)
    if row is None:
        return ""
    return (
        f"; if the first line ({shown(row.file)}, {shown(row.label)}) is a heading, call the "
        "columns 'file' and 'label'"
    )


def _spellings(text: str) -> Iterator[str]:
    """What a cell of a table may mean: exactly what it says, or what is left without additions."""
    yield text
    yield text.strip()
    yield spreadsheet.content(text)
    yield spreadsheet.content(text.strip())
    yield text.strip().replace("\\", "/")  # of Windows


def _lookups(names: Sequence[str]) -> list[Callable[[str], list[int]]]:
    """Ways to find the images that a text names, the strictest first."""

    def plain(text: str) -> str:
        return unicodedata.normalize("NFC", text).removeprefix("./")

    def table(key: Callable[[str], str]) -> dict[str, list[int]]:
        places = collections.defaultdict(list)
        for i, name in enumerate(names):
            places[key(name)].append(i)
        return dict(places)

    def last(text: str) -> str:
        return plain(text).rpartition("/")[2]

    def lookup(key: Callable[[str], str], of: Callable[[str], str]) -> Callable[[str], list[int]]:
        places = table(key)
        return lambda text: places.get(of(text), [])

    def lower(text: str) -> str:
        return plain(text).casefold()

    return [
        lookup(plain, plain),
        lookup(last, plain),  # a text with a folder in it is no last part, and fits none
        lookup(lower, lower),
        lookup(lambda name: last(name).casefold(), lower),
    ]


def _first(rows: Sequence[Row]) -> str:
    more = f" and {len(rows) - _MOST:,} more" if len(rows) > _MOST else ""
    return ", ".join(str(row) for row in rows[:_MOST]) + more


def classes_of(labels: Iterable[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """The classes of some labels, sorted, and the class of each, int32 `[n]`."""
    classes, numbers = np.unique(np.array(list(labels), str), return_inverse=True)
    return tuple(classes.tolist()), numbers.astype(np.int32)
