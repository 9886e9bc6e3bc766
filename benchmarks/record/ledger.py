"""What was found: a JSON line for each item, and a Markdown table of them."""

import dataclasses
import datetime
import json
import pathlib
from typing import Any

from common.run import files, jsonl

LINES, TABLE = "records.jsonl", "records.md"
# failed: it gave a wrong result, or crashed; cut: the time was up; saved: likewise, and the next
# call continues the training run
STATES = ("ok", "failed", "cut", "saved")

_FIELDS = {"stage", "item", "state", "figure", "seconds", "time"}


@dataclasses.dataclass(frozen=True)
class Found:
    """What an item found.

    Attributes:
        figure: the result in a few words, for the table.
        values: the numbers behind it, as JSON.
        ok: whether the result is right.
        hardware: that it ran on; "" if unknown.
    """

    figure: str
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    ok: bool = True
    hardware: str = ""


class Ledger:
    """The records of a folder. Several processes may add to them, one after the other."""

    def __init__(self, out: pathlib.Path) -> None:
        self.out = out
        out.mkdir(parents=True, exist_ok=True)

    def records(self) -> list[dict[str, Any]]:
        """All records, in order; skips a line that is incomplete because a process was killed."""
        found = []
        path = self.out / LINES
        for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and record.keys() >= _FIELDS and record["state"] in STATES:
                found.append(record)
        return found

    def state_of(self, item: str) -> str | None:
        """The state of its newest record; None if there is none."""
        states = [r["state"] for r in self.records() if r["item"] == item]
        return states[-1] if states else None

    def add(self, stage: str, item: str, state: str, found: Found, seconds: float) -> None:
        """Appends a record, and writes the table.

        Args:
            stage: "sanity", "rates" or "quality".
            item: its name.
            state: one of `STATES`.
            found: what was found.
            seconds: how long it took.
        """
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        record = {
            "stage": stage, "item": item, "state": state, "figure": found.figure,
            "seconds": round(seconds, 1), "time": now, "values": found.values,
            "hardware": found.hardware,
        }  # fmt: skip
        path = self.out / LINES
        text = path.read_text(errors="replace") if path.exists() else ""
        with path.open("a") as file:
            torn = "\n" if text and not text.endswith("\n") else ""
            file.write(torn + json.dumps(_finite(record), allow_nan=False) + "\n")
        self.write_table()

    def write_table(self) -> None:
        """One row for each item: its newest record."""
        files.write_text(self.out / TABLE, "\n".join(self.table()) + "\n")

    def table(self) -> list[str]:
        """Lines of Markdown."""
        newest = {(r["stage"], r["item"]): r for r in self.records()}
        where = list(dict.fromkeys(r["hardware"] for r in newest.values() if r.get("hardware")))
        days = sorted({r["time"][:10] for r in newest.values()})
        marks = {name: f" [{i}]" if len(where) > 1 else "" for i, name in enumerate(where, 1)}
        names = "; ".join(name + marks[name] for name in where)
        lines = ["; ".join(filter(None, [names, *days])), "", "| stage | item | | found | s |"]
        lines.append("| --- | --- | --- | --- | --: |")
        for r in newest.values():
            item = r["item"] + marks.get(r.get("hardware"), "")
            cells = r["stage"], item, r["state"], r["figure"], f"{r['seconds']:,.0f}"
            lines.append(
                "| " + " | ".join(" ".join(c.replace("|", "/").split()) for c in cells) + " |"
            )
        return lines


def _finite(x: Any) -> Any:
    """Replaces NaN, which strict JSON does not have, by null."""
    if isinstance(x, dict):
        return {name: _finite(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(value) for value in x]
    if isinstance(x, float):
        return json.loads(jsonl.dump({"x": x}))["x"]
    return x
