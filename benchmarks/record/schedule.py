"""Chooses the next item that fits into the time, and stops one that does not end."""

import contextlib
import itertools
import os
import pathlib
import signal
import subprocess
import sys
import time

from benchmarks.record import worker
from benchmarks.record.items import Item
from benchmarks.record.ledger import Found, Ledger
from benchmarks.record.setting import (
    LOGS,
    ROOT,
    Setting,
    bound,
    environment,
    last_words,
)
from common.distributed import STOPPED
from common.errors import UserError

SAVING = 30.0  # seconds before the deadline at which a training run gets SIGTERM
LAST = 30.0  # seconds after the deadline at which it is killed if it has not saved
POLL = 0.1


class Schedule:
    """Runs items until all are done or the time is up.

    Args:
        setting: of this call.
        ledger: the records so far.
        items: all items to run, in order.
        deadline: in seconds since 1970; `stop` brings it forward.
        patience: an item that takes this many times its `seconds` counts as hanging.
    """

    def __init__(
        self,
        setting: Setting,
        ledger: Ledger,
        items: list[Item],
        deadline: float,
        patience: float,
    ) -> None:
        self.setting, self.ledger, self.items = setting, ledger, items
        self.deadline, self.patience = deadline, patience
        self._tried: set[str] = set()
        self._said = len(ledger.records())

    def stop(self, *_: object) -> None:
        """Ends as if the time were up: a training run is saved, other items are killed."""
        self.deadline = min(self.deadline, time.time())

    def run(self) -> None:
        """Runs the items that fit."""
        while (chosen := self._next()) is not None:
            if chosen.work:  # together with those that follow it, in one process
                opened = self._open()
                rest = opened[opened.index(chosen) :]
                batch = itertools.takewhile(lambda item: item.work and not item.alone, rest)
                self._by_worker([chosen] if chosen.alone else list(batch))
            else:
                self._by_command(chosen)
            self._say()

    def _open(self) -> list[Item]:
        """Items that can be run: first those not tried yet, then those that failed before."""
        states = {item.name: self.state_of(item) for item in self.items}
        ready = [
            item for item in self.items
            if states[item.name] != "ok" and item.name not in self._tried
            and (not item.after or self.ledger.state_of(item.after) == "ok")
        ]  # fmt: skip
        return sorted(ready, key=lambda item: states[item.name] == "failed")

    def state_of(self, item: Item) -> str | None:
        """The state in the ledger; None for a finished run whose workdir is gone."""
        state = self.ledger.state_of(item.name)
        gone = state == "ok" and item.kept and not item.kept(self.setting)
        return None if gone else state

    def _next(self) -> Item | None:
        left = self.deadline - time.time()
        return next((item for item in self._open() if self.need(item) <= left), None)

    def need(self, item: Item) -> float:
        """Seconds that must be left to start it."""
        return item.seconds + (SAVING if item.training else 0)

    def waiting(self) -> str:
        """Why the next item was not run; "" if none is left."""
        left = [item for item in self.items if self.state_of(item) not in ("ok", "failed")]
        if not left:
            return ""
        first = left[0]
        if first.after and self.ledger.state_of(first.after) != "ok":
            return f"{first.name} waits for {first.after}"
        return f"{first.name} is next and needs {self.need(first):.0f} s"

    def _by_worker(self, items: list[Item]) -> None:
        """Runs items in a worker, and records for it one in which it crashes or hangs."""
        now = self.setting.out / worker.NOW
        now.unlink(missing_ok=True)
        names = [item.name for item in items]
        known = {item.name: item for item in items}
        before = {name: self._count(name) for name in names}
        with open(self._log("worker"), "a") as log:
            written = log.tell()
            s = self.setting
            process = self._start(
                [sys.executable, "-m", "benchmarks.record.worker", str(s.out), s.data,
                 s.sizes.name, s.catalogue, str(self.deadline), *names], log
            )  # fmt: skip
            current, begin, reason = None, time.time(), ""
            while process.poll() is None:
                time.sleep(POLL)
                found = _read(now)
                if found != current:
                    current, begin = found, time.time()
                self._say()
                limit = self.patience * (known[current].seconds if current in known else 60)
                if time.time() > self.deadline:
                    reason = "cut"
                elif time.time() - begin > limit:
                    reason = "hangs"
                if reason:
                    _kill(process)
        current = _read(now)
        done = {name for name in names if self._count(name) > before[name]}
        self._tried |= done
        words = last_words(self._log("worker").read_bytes()[written:].decode(errors="replace"))
        if current and current not in done:
            status = process.returncode
            self._unfinished(known[current], reason, status, time.time() - begin, words)
        elif not process.returncode:
            self._tried |= set(names)  # the rest does not fit
        elif not current and reason != "cut":
            raise UserError(f"the worker cannot start: {words} (see {self._log('worker')})")

    def _unfinished(self, item: Item, reason: str, status: int, seconds: float, words: str) -> None:
        self._tried.add(item.name)
        if reason == "cut":
            found, state = Found("the time was up"), "cut"
        elif reason == "hangs":
            words = f"no end after {seconds:.1f} s (see --patience)"
            found, state = Found(words, ok=False), "failed"
        else:
            found, state = Found(f"died (exit status {status}): {words}", ok=False), "failed"
        self.ledger.add(item.stage, item.name, state, found, seconds)

    def _by_command(self, item: Item) -> None:
        """Runs an item's own process; a training run gets SIGTERM when the time is up."""
        self._tried.add(item.name)
        begin, cut = time.time(), ""
        with open(self._log(item.name), "a") as log:
            written = log.tell()
            try:
                process = self._start(item.command(self.setting), log)
            except Exception as error:
                found = Found(f"cannot be started: {error!r}"[:300], ok=False)
                self.ledger.add(item.stage, item.name, "failed", found, 0)
                return
            while process.poll() is None:
                time.sleep(POLL)
                if item.training and time.time() > self.deadline - SAVING:
                    if not cut:
                        process.send_signal(signal.SIGTERM)
                    cut = "stopped"
                    if time.time() > self.deadline + LAST:
                        _kill(process)
                elif not item.training and time.time() > self.deadline:
                    cut = "cut"
                    _kill(process)
                elif not item.training and time.time() - begin > self.patience * item.seconds:
                    cut = "hangs"
                    _kill(process)
        words = last_words(self._log(item.name).read_bytes()[written:].decode(errors="replace"))
        seconds = time.time() - begin
        state, found = self._of_command(item, process.returncode, cut, words, seconds)
        self.ledger.add(item.stage, item.name, state, found, seconds)

    def _of_command(
        self, item: Item, status: int, cut: str, words: str, seconds: float
    ) -> tuple[str, Found]:
        if not status:
            try:
                found = item.read(self.setting)
            except Exception as error:  # its files may hold anything
                found = Found(f"its result cannot be read: {error!r}"[:300], ok=False)
            return ("ok" if found.ok else "failed"), found
        if status in STOPPED and item.training:
            return "saved", Found(words)
        if cut in ("stopped", "cut"):
            return "cut", Found("the time was up")
        what = f"no end after {seconds:.1f} s" if cut else f"exit status {status}"
        return "failed", Found(f"{what}: {words}", ok=False)

    def _log(self, name: str) -> pathlib.Path:
        (self.setting.out / LOGS).mkdir(exist_ok=True)
        return self.setting.out / LOGS / f"{name}.log"

    def _start(self, command: list[str], log) -> subprocess.Popen:
        return subprocess.Popen(
            bound(command), cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=log,
            stderr=log, start_new_session=True,
        )  # fmt: skip

    def _count(self, name: str) -> int:
        return sum(r["item"] == name for r in self.ledger.records())

    def _say(self) -> None:
        """Prints new records."""
        records = self.ledger.records()
        for r in records[self._said :]:
            text = f"{r['state']:>6}  {r['item']}: {r['figure']} ({r['seconds']:.0f} s)"
            print(text, file=sys.stderr, flush=True)
        self._said = len(records)


def _kill(process: subprocess.Popen) -> None:
    """Kills it with all its children, which would keep using the device."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(path: pathlib.Path) -> str | None:
    return path.read_text() or None if path.exists() else None
