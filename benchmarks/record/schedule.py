"""Which item is next, whether it still fits, and what becomes of one that does not end."""

import ctypes
import itertools
import pathlib
import signal
import subprocess
import sys
import time

from benchmarks.record import worker
from benchmarks.record.items import Item
from benchmarks.record.ledger import Found, Ledger
from benchmarks.record.setting import ROOT, Setting, environment
from common.errors import UserError
from common.preemption import EXIT_STATUS

SAVING = 30.0  # seconds before the end at which a training run is told to save
LAST = 60.0  # that it has for it, the end notwithstanding
POLL = 0.1


class Schedule:
    """Does items until all are done or the time is up.

    Args:
        setting: of this call.
        ledger: what was found so far.
        items: all that are wanted, in order.
        deadline: in seconds since 1970; `stop` brings it forward.
        patience: an item that takes so many times its `seconds` is taken to hang.
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
        """Ends as if the time were up: a training run is saved, all else is cut off."""
        self.deadline = min(self.deadline, time.time())

    def run(self) -> None:
        """Does what fits."""
        while (chosen := self._next()) is not None:
            if chosen.work:  # and what follows it, in one process
                opened = self._open()
                rest = opened[opened.index(chosen) :]
                self._by_worker(list(itertools.takewhile(lambda item: item.work, rest)))
            else:
                self._by_command(chosen)
            self._say()

    def _open(self) -> list[Item]:
        """What is to be done: first what was not tried yet, then what has failed another time."""
        states = {item.name: self.ledger.state_of(item.name) for item in self.items}
        ready = [
            item for item in self.items
            if states[item.name] != "ok" and item.name not in self._tried
            and (not item.after or self.ledger.state_of(item.after) == "ok")
        ]  # fmt: skip
        return sorted(ready, key=lambda item: states[item.name] == "failed")

    def _next(self) -> Item | None:
        left = self.deadline - time.time()
        need = lambda item: item.seconds + (SAVING if item.training else 0)  # noqa: E731
        return next((item for item in self._open() if need(item) <= left), None)

    def _by_worker(self, items: list[Item]) -> None:
        """Starts a worker, and records for it the item in which it dies or does not end."""
        now = self.setting.out / worker.NOW
        now.unlink(missing_ok=True)
        names = [item.name for item in items]
        known = {item.name: item for item in items}
        before = {name: self._count(name) for name in names}
        with open(self.setting.out / "worker.log", "a") as log:
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
                    process.kill()
                    process.wait()
        current = _read(now)
        done = {name for name in names if self._count(name) > before[name]}
        self._tried |= done
        if current and current not in done:
            self._unfinished(known[current], reason, process.returncode, time.time() - begin)
        elif not process.returncode:
            self._tried |= set(names)  # the rest does not fit
        elif not current and reason != "cut":
            path = self.setting.out / "worker.log"
            raise UserError(f"the worker cannot start: {_last_line(path)}: see {path}")

    def _unfinished(self, item: Item, reason: str, status: int, seconds: float) -> None:
        self._tried.add(item.name)
        if reason == "cut":
            found, state = Found("the time was up"), "cut"
        elif reason == "hangs":
            found, state = (
                Found(f"no end after {seconds:.0f} s (see --patience)", ok=False),
                "failed",
            )
        else:
            line = _last_line(self.setting.out / "worker.log")
            found, state = Found(f"died (exit status {status}): {line}", ok=False), "failed"
        self.ledger.add(item.stage, item.name, state, found, seconds)

    def _by_command(self, item: Item) -> None:
        """Runs a process of the item's own; one that trains is told to save when the time is up."""
        self._tried.add(item.name)
        logs = self.setting.out / "logs"
        logs.mkdir(exist_ok=True)
        path, begin = logs / f"{item.name}.log", time.time()
        with open(path, "a") as log:
            process = self._start(item.command(self.setting), log)
            cut = ""
            while process.poll() is None:
                time.sleep(POLL)
                if item.training and time.time() > self.deadline - SAVING:
                    cut = cut or self._tell(process)
                    if time.time() > self.deadline + LAST:
                        process.kill()
                elif not item.training and time.time() > self.deadline:
                    cut = "cut"
                    process.kill()
                elif not item.training and time.time() - begin > self.patience * item.seconds:
                    cut = "hangs"
                    process.kill()
        self._of_command(item, process.returncode, cut, path, time.time() - begin)

    def _tell(self, process: subprocess.Popen) -> str:
        process.send_signal(signal.SIGTERM)
        return "told"

    def _of_command(
        self, item: Item, status: int, cut: str, log: pathlib.Path, seconds: float
    ) -> None:
        if not status:
            try:
                found = item.read(self.setting)
            except (OSError, ValueError, KeyError, IndexError) as error:
                found = Found(f"its result cannot be read: {error!r}"[:300], ok=False)
            state = "ok" if found.ok else "failed"
        elif status == EXIT_STATUS and item.training:
            found, state = Found(_last_line(log)), "saved"
        elif cut in ("told", "cut"):
            found, state = Found("the time was up"), "cut"
        else:
            words = f"no end after {seconds:.0f} s" if cut else f"exit status {status}"
            found, state = Found(f"{words}: {_last_line(log)}", ok=False), "failed"
        self.ledger.add(item.stage, item.name, state, found, seconds)

    def _start(self, command: list[str], log) -> subprocess.Popen:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=log,
            stderr=log, preexec_fn=_end_with_parent,
        )  # fmt: skip

    def _count(self, name: str) -> int:
        return sum(r["item"] == name for r in self.ledger.records())

    def _say(self) -> None:
        """Prints the records that are new."""
        records = self.ledger.records()
        for r in records[self._said :]:
            text = f"{r['state']:>6}  {r['item']}: {r['figure']} ({r['seconds']:.0f} s)"
            print(text, file=sys.stderr, flush=True)
        self._said = len(records)


def _end_with_parent() -> None:
    """In a child on Linux: SIGTERM, on which a training run saves, when this process is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _read(path: pathlib.Path) -> str | None:
    return path.read_text() or None if path.exists() else None


def _last_line(path: pathlib.Path) -> str:
    lines = [x.strip() for x in path.read_text(errors="replace").splitlines() if x.strip()]
    return lines[-1][:300] if lines else "it said nothing"
