"""One run at a time in a workdir.

On a disk the operating system holds the lock (`flock`) and releases it when the process ends,
however it ends. Object stores and some network disks have no locks: there the owner writes a
heartbeat every few seconds, and the next run watches for one before it takes over. Evaluations only
read, and need no lock.
"""

import contextlib
import datetime
import errno
import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any, Protocol

from etils import epath

from common.errors import UserError
from common.run import files

if sys.platform == "win32":
    fcntl = None
else:
    import fcntl

FILE = "lock"
BEAT_SECONDS = 20.0  # between two heartbeats
WATCHED_BEATS = 2.5  # after this many missed heartbeats the owner counts as dead
SETTLE_SECONDS = 2.0  # of two runs that start together, one sees the other in this time
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class Lock(Protocol):
    """The lock of a workdir."""

    def check(self) -> None:
        """Raises a `UserError` if another run has taken the workdir over in the meantime."""

    def release(self) -> None:
        """Lets other runs in; `hold` calls it."""


@contextlib.contextmanager
def hold(workdir: epath.Path) -> Iterator[Lock]:
    """Keeps other runs out of `workdir`, an existing directory, while the context is open.

    Raises:
        UserError: another run is in it; the message names its host, process and start time.
    """
    lock = None if files.is_remote(workdir) else _flock(workdir)
    lock = lock or _Heartbeat(workdir)
    try:
        yield lock
    finally:
        lock.release()


def _me() -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": now}


def _refusal(workdir: epath.Path, owner: dict[str, Any]) -> UserError:
    who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
    return UserError(
        f"{workdir} is in use by another run ({who}, since {owner.get('since', '?')}): wait for "
        "it, stop it, or give another --workdir"
    )


def _flock(workdir: epath.Path) -> Lock | None:
    """The lock of the operating system; None if it has none for this disk."""
    if fcntl is None:
        return None
    path = workdir / FILE
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = _read(path)
        file.close()
        if error.errno in _NO_LOCKS:
            return None
        raise _refusal(workdir, owner) from None
    file.truncate(0)
    file.write(json.dumps(_me()))
    file.flush()
    return _Flock(file)


class _Flock:
    def __init__(self, file: Any) -> None:
        self._file = file

    def check(self) -> None:
        """No other process can take this lock."""

    def release(self) -> None:
        self._file.close()  # the file stays: another process may have it open


class _Heartbeat:
    """A file with a counter, which its owner keeps increasing."""

    def __init__(self, workdir: epath.Path) -> None:
        self._workdir, self._path = workdir, workdir / FILE
        self._record = _me() | {"owner": uuid.uuid4().hex, "beat": 0}
        self._taken_by: dict[str, Any] | None = None
        before = _read(self._path)
        if before:
            seconds = WATCHED_BEATS * BEAT_SECONDS
            logging.warning(
                "%s is locked by process %s on %s: watching for a heartbeat for %.0f s",
                workdir, before.get("pid"), before.get("host"), seconds,
            )  # fmt: skip
            self._watch(before, seconds)
        self._write()
        time.sleep(SETTLE_SECONDS)
        now = _read(self._path)
        if now.get("owner") != self._record["owner"]:
            raise _refusal(workdir, now)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="workdir lock", daemon=True)
        self._thread.start()

    def _watch(self, before: dict[str, Any], seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(min(1.0, seconds / 10))
            now = _read(self._path)
            if not now:  # the owner has finished
                return
            if now != before:
                raise _refusal(self._workdir, now)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # the store is unreachable for a moment
                now = _read(self._path)
                if now and now.get("owner") != self._record["owner"]:
                    self._taken_by = now
                    return
                self._record["beat"] += 1
                self._write()

    def _write(self) -> None:
        files.write_text(self._path, json.dumps(self._record))

    def check(self) -> None:
        if self._taken_by:
            raise _refusal(self._workdir, self._taken_by)

    def release(self) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if _read(self._path).get("owner") == self._record["owner"]:
                self._path.unlink()


def _read(path: epath.Path) -> dict[str, Any]:
    """The record in a lock file; {} if it is missing or unreadable."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
