"""`metrics.csv`: the records of `metrics.jsonl` as one table, for a spreadsheet or pandas.

The columns of a run are not known before its last line, object stores cannot append, and a resumed
run takes lines back. So the table is never continued: it is made from the whole of `metrics.jsonl`
and replaced at once, when a run scores or saves and at its end.
"""

import csv
import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from common.run import files, jsonl

FILE = "metrics.csv"
_SHARE = 0.01  # of a run's time that may go into tables before the last


def of_records(records: Iterable[Mapping[str, Any]]) -> str:
    """The text of a table with a row for each record, in order.

    Columns stand in the order in which the records first have them. A cell is empty where a record
    lacks the column, or has null there (a number that is not finite).
    """
    columns: dict[str, None] = {}
    rows, widths = _Rows(), []  # text, and how many columns there were by then
    writer = csv.writer(rows, lineterminator="")
    for record in records:
        columns |= dict.fromkeys(record)
        writer.writerow([record.get(name) for name in columns])
        widths.append(len(columns))
    writer.writerow(columns)
    header = rows.pop()
    filled = [row + "," * (len(columns) - width) for row, width in zip(rows, widths, strict=True)]
    return "\n".join([header, *filled]) + "\n"


class _Rows(list[str]):
    """A file for `csv.writer` that keeps its lines apart."""

    write = list.append


class CsvCopy:
    """Keeps the `metrics.csv` of a workdir up to date; never stops the run.

    Args:
        workdir: whose `metrics.jsonl` is copied.
    """

    def __init__(self, workdir: epath.Path) -> None:
        self._workdir, self._warned = workdir, False
        self._next = 0.0  # when the table may be made again

    def add(self, record: Mapping[str, Any]) -> None:
        """Nothing: the line is in `metrics.jsonl`."""

    def flush(self) -> None:
        """Makes the table, unless that would take more than its share of the run's time."""
        if time.monotonic() >= self._next:
            self.close()

    def close(self) -> None:
        """Makes the table."""
        begin, path = time.monotonic(), self._workdir / FILE
        try:
            files.write_text(path, of_records(jsonl.each(self._workdir / jsonl.FILE)))
            self._warned = False
        except Exception as error:  # of a disk, or of the client of an object store
            if not self._warned:
                logging.warning(
                    "cannot write %s (%s): training continues, and metrics.jsonl has the same "
                    "numbers", path, error,
                )  # fmt: skip
            self._warned = True
        now = time.monotonic()
        self._next = now + (now - begin) / _SHARE
