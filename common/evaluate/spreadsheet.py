"""CSV files about images, for spreadsheets and pandas: UTF-8 with a byte order mark, for Excel."""

import csv
import io
from collections.abc import Iterable, Sequence

import numpy as np
from etils import epath

from common.evaluate.duplicates import Group
from common.evaluate.feature_files import Embedded, printable
from common.evaluate.structure import Structure
from common.run import files

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def cell(text: str) -> str:
    """Text that no spreadsheet takes for a formula: one that would be gets an apostrophe."""
    text = printable(text)
    return "'" + text if text.startswith(_FORMULA) else text


def content(cell: str) -> str:
    """The text that `cell` made this of: without the apostrophe before a formula."""
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(_FORMULA) else cell


def write(path: epath.Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Writes a table: text by `cell`, numbers as they are, None and nan as nothing."""
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow(header)
    for row in rows:
        writer.writerow([_value(value) for value in row])
    files.write_bytes(path, b"\xef\xbb\xbf" + out.getvalue().encode())


def _value(value: object) -> object:
    if isinstance(value, str):
        return cell(value)
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, float | np.floating):
        return "" if np.isnan(value) else f"{value:.6g}"
    return "" if value is None else value


def images(
    embedded: Embedded,
    structure: Structure | None = None,
    groups: Sequence[Group] = (),
    places: dict[int, tuple[float, float]] | None = None,
    features: bool = False,
) -> tuple[list[str], Iterable[list[object]]]:
    """One row an image: header and rows for `write`.

    Args:
        embedded: the images.
        structure: of their features: cluster (1 is the largest), oddness, nearest image. Without
            it the table has none of these columns, and those of images not compared are empty.
        groups: of near-duplicates, numbered from 1.
        places: (x, y) of the rows that are on the map.
        features: whether to add f0, f1, ...
    """
    n, names = len(embedded.ids), embedded.shown_names
    header = ["id", "file", "label", "class"]
    if structure:
        header += ["cluster", "x", "y", "oddness", "nearest", "nearest_cosine", "duplicate_group"]
        at = np.full(n, -1)
        at[structure.rows] = np.arange(len(structure.rows))
        group_of = {int(row): g for g, group in enumerate(groups, 1) for row in group.rows}
    if features:
        header += [f"f{i}" for i in range(embedded.features.shape[1])]

    def found(row: int) -> list[object]:
        assert structure
        i, (x, y) = at[row], (places or {}).get(row, (None, None))
        if i < 0:
            return [None, x, y, None, None, None, None]
        near = structure.neighbours[i]
        nearest = (names[near[0]], structure.cosines[i, 0]) if len(near) else (None,) * 2
        return [
            structure.clusters.labels[i] + 1, x, y, structure.oddness[i], *nearest,
            group_of.get(row),
        ]  # fmt: skip

    def row_of(row: int) -> list[object]:
        label = int(embedded.labels[row])
        named = 0 <= label < len(embedded.class_names)
        out: list[object] = [embedded.ids[row], names[row]]
        out += [label if label >= 0 else None, embedded.class_names[label] if named else None]
        out += found(row) if structure else []
        return out + (list(embedded.features[row]) if features else [])

    return header, map(row_of, range(n))


def duplicates(embedded: Embedded, groups: Sequence[Group]) -> tuple[list[str], list[list[object]]]:
    """One row an image that has near-duplicates, group by group: header and rows for `write`.

    The first one of a group is what the others are compared with.
    """
    header = ["group", "id", "file", "compared_with", "cosine", "pixel_difference", "mirrored"]
    rows: list[list[object]] = []
    names = embedded.shown_names
    for number, group in enumerate(groups, 1):
        first = names[group.rows[0]]
        for i, row in enumerate(group.rows):
            found = (first, group.cosines[i], group.differences[i], group.mirrored[i])
            rows.append([number, embedded.ids[row], names[row], *(found if i else (None,) * 4)])
    return header, rows
