"""Tables of image files and labels that a person types: CSV as Excel, LibreOffice or R write it."""

import csv
import dataclasses
import hashlib
import io
import re
import unicodedata
from collections.abc import Callable

from etils import epath

from common.data.sources.folder_source import shown
from common.errors import UserError
from common.evaluate import spreadsheet
from common.run import console, files, jsonl

_NOT_GIVEN = ("no", "n", "false", "0")  # as spreadsheets and people write it
FILE, LABEL, GIVEN = "file", "label", "given"  # columns; the last is of what `--mode=label` wrote
_SEPARATORS = ("\t", ";", ",")  # Excel writes semicolons where the comma is the decimal sign
_TELLS_SEPARATOR = re.compile(r"sep=([,;\t])(?:\r\n|\r|\n)", re.IGNORECASE)  # Excel's first line
_WORKBOOK = b"PK\x03\x04"  # .xlsx and .ods are zip files


@dataclasses.dataclass(frozen=True)
class Row:
    """A row with a label, and the table and the line, from 1, that it is in.

    `file` is what the cell says, space around it included, which may be part of a name.
    """

    table: str
    line: int
    file: str
    label: str

    def __str__(self) -> str:
        return f"{shown(self.file)!r} ({self.place})"

    @property
    def place(self) -> str:
        """Where it is, for a message."""
        return f"line {self.line} of {shown(self.table)}"


def read_all(paths: str, flag: str) -> list[Row]:
    """The rows of one table, or of several with commas between their paths; see `read`."""
    return [row for path in files.several(paths) for row in read(files.path(path), flag)]


def read(path: epath.Path, flag: str) -> list[Row]:
    """The rows of a table that have a label.

    Columns are separated by commas, semicolons or tabs. If the first line names the columns "file"
    and "label", others may stand beside them, in any order; without such a line they are the first
    two. A row without a label is skipped, and so is one whose column "given" says "no": a label
    that `--mode=label` predicted. The text is UTF-8 or UTF-16, else taken for Windows-1252.

    Args:
        path: of the file, local or remote.
        flag: that names it, for the messages.

    Raises:
        UserError: no such file, or not text, or without two columns.
    """
    if path.is_dir():
        raise UserError(f"{shown(path)} is a folder; --{flag} takes the path of a CSV file")
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(
            f"no file {shown(path)}; --{flag} takes a table with the columns file,label, such as "
            "the label_these.csv that --mode=suggest writes"
        ) from error
    if data.startswith(_WORKBOOK):
        raise UserError(
            f"{shown(path)} is a workbook and not text: save the sheet as CSV (UTF-8) and give that"
        )
    table = _table(_decoded(data), path)
    head = [cell.strip().lower() for cell in table[0][1]] if table else []
    named = FILE in head and LABEL in head
    columns = [head.index(FILE), head.index(LABEL)] if named else [0, 1]
    given = head.index(GIVEN) if named and GIVEN in head else None
    if not named and any(len(cells) < 2 for _, cells in table):
        line = next(line for line, cells in table if len(cells) < 2)
        raise UserError(
            f"line {line} of {shown(path)} has no second column: expected a file name and a label "
            "in each line, separated by a comma, a semicolon or a tab"
        )
    rows, predictions = [], 0
    for line, cells in table[named:]:
        cells = [unicodedata.normalize("NFC", cell) for cell in cells] + [""] * len(head)
        file, label = cells[columns[0]], spreadsheet.content(cells[columns[1]].strip())
        predicted = given is not None and cells[given].strip().lower() in _NOT_GIVEN
        predictions += predicted
        if label and not predicted:
            rows.append(Row(str(path), line, file, label))
    if predictions:
        console.say(
            f"{shown(path)}: labels that count: {len(rows):,}; predictions, which do not (given: "
            f"no): {predictions:,}. Write yes there where you have changed one."
        )
    return rows


def _decoded(data: bytes) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):  # "Unicode text" of Excel
        return data.decode("utf-16", "replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


def _table(text: str, path: epath.Path) -> list[tuple[int, list[str]]]:
    """(line, cells) of each row that is not empty, with the separator that fits best."""
    found: list[tuple[tuple[bool, int], list[tuple[int, list[str]]]]] = []
    faults: list[str] = []
    told = _TELLS_SEPARATOR.match(text)
    first = told.end() if told else 0
    for separator in told[1] if told else _SEPARATORS:
        # strict: a quote that is never closed would take all rows behind it for one cell
        reader = csv.reader(io.StringIO(text[first:], newline=""), delimiter=separator, strict=True)
        try:
            table = [
                (reader.line_num + bool(told), cells)
                for cells in reader
                if any(map(str.strip, cells))
            ]
        except csv.Error as error:
            faults.append(f"{error}, line {reader.line_num + bool(told)}")
            continue
        head = [cell.strip().lower() for cell in table[0][1]] if table else []
        fits = FILE in head and LABEL in head, sum(len(cells) > 1 for _, cells in table)
        found.append((fits, table))
    best = max(found, key=lambda pair: pair[0], default=((False, 0), []))  # of equal ones the first
    if faults and not best[0][1]:  # nothing separates columns but where the quotes do not fit
        raise UserError(
            f"{shown(path)} is no table that can be read ({faults[-1]}): look for a quotation mark "
            "that is not closed"
        )
    return best[1]


def digest(path: epath.Path) -> str:
    """Of a table's bytes, for `results.jsonl`."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def as_written(path: epath.Path) -> bool:
    """Whether a table in a workdir is as a mode wrote it: `results.jsonl` has its digest.

    Only such a one may be replaced. Whether a person has typed into another cannot be told from its
    labels: they may be in a column of their own, or behind a quotation mark.
    """
    results = path.parent / jsonl.RESULTS
    return results.exists() and digest(path) in results.read_text()


def free(path: epath.Path, spare: Callable[[epath.Path], bool]) -> epath.Path:
    """The first of NAME.csv, NAME_2.csv, ... that is not there, or that need not be kept.

    Args:
        path: the first.
        spare: whether an existing one may be replaced.
    """
    number, found = 1, path
    while found.exists() and not spare(found):
        number += 1
        found = path.with_name(f"{path.stem}_{number}{path.suffix}")
    return found
