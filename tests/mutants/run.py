"""Puts single faults into copies of this checkout: each has to make the test named for it fail.

    python tests/mutants/run.py [--only TEXT] [--every N] [--jobs N] [--timeout SECONDS] [--list]

The faults are in the `*.toml` files beside this one. Nothing is written into the checkout. The exit
status is 0 if every fault was killed, 1 if one survived, 2 if nothing can be said of some of them.
"""

import argparse
import concurrent.futures
import contextlib
import os
import pathlib
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time

sys.dont_write_bytecode = True  # nothing is written into the checkout
from checkout import copy_checkout  # noqa: E402
from fault_list import ROOT, ListError, Mutant, problems, read_lists  # noqa: E402

SECONDS = 300  # that a test may take
PASSED, FAILED = 0, 1  # exit statuses of pytest; with any other the test did not run


class Pytest:
    """Runs pytest in copies of the checkout, and leaves no process behind."""

    def __init__(self) -> None:
        self._lock, self._stopped = threading.Lock(), False
        self._running: set[subprocess.Popen] = set()

    def run(self, copy: pathlib.Path, tests: list[str], seconds: float) -> tuple[int | None, str]:
        """Returns pytest's exit status (None if time ran out) and what it printed."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "", "-p", "no:cacheprovider"]
        temporary = copy.with_name(copy.name + ".tmp")  # what tests leave there goes with the copy
        temporary.mkdir(exist_ok=True)
        # Python would take the .pyc of a source for that of another of its size and second.
        ours = {"PYTHONDONTWRITEBYTECODE": "1", "PYTEST_ADDOPTS": "", "TMPDIR": str(temporary)}
        # A fault changes few programs: all others were compiled by the run without any.
        compiled = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(copy.with_name("compiled")))
        ours["JAX_COMPILATION_CACHE_DIR"] = compiled
        with tempfile.TemporaryFile(dir=temporary) as output:
            with self._lock:
                if self._stopped:
                    raise concurrent.futures.CancelledError
                process = subprocess.Popen(
                    [*command, *tests], cwd=copy, env=os.environ | ours, stdin=subprocess.DEVNULL,
                    stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
                self._running.add(process)
            try:
                status = process.wait(seconds)
            except subprocess.TimeoutExpired:
                status = None
            _kill(process)
            self._running.discard(process)
            if self._stopped:  # and killed
                raise concurrent.futures.CancelledError
            output.seek(0)
            return status, output.read().decode("utf-8", "replace")

    def stop(self) -> None:
        """Kills what runs and lets nothing else start."""
        with self._lock:
            self._stopped = True
        for process in self._running.copy():
            _kill(process)


def _kill(process: subprocess.Popen) -> None:
    """Kills what is left of a process and of all that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # the second on macOS
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def check_without_faults(pytest: Pytest, copy: pathlib.Path, tests: list[str]) -> None:
    """Raises ListError unless the tests pass as they are: one that fails would kill any fault."""
    status, output = pytest.run(copy, tests, SECONDS * len(tests))
    if status != PASSED:
        raise ListError(f"the tests do not pass without any fault:\n{_last_lines(output)}")


def try_fault(pytest: Pytest, copy: pathlib.Path, m: Mutant, seconds: float) -> tuple[str, str]:
    """Puts a fault into a copy, runs its test, and takes the fault out again.

    Returns:
        "killed", "timed out" (which counts as killed), "survived" or "error", and what to add.
    """
    path = copy / m.file
    source = path.read_bytes()
    changed = source.replace(m.line.encode(), m.fault.encode())
    if changed == source:  # lines that end in another way, say
        return "error", f"\n    {m.source}: the bytes of {m.file} do not have its line"
    path.write_bytes(changed)
    try:
        status, output = pytest.run(copy, [m.test], seconds)
    finally:
        path.write_bytes(source)
    if status is None:
        return "timed out", ""
    if status == FAILED or status < 0:  # the second: the process itself was, by a signal
        return "killed", ""
    if status == PASSED:
        return "survived", f"\n    {m.test} ({m.source})"
    return "error", f"\n    {m.source}: pytest ended with status {status}\n{_last_lines(output)}"


def _last_lines(output: str) -> str:
    return "\n".join(f"    {line}" for line in output.strip().splitlines()[-12:])


def try_all(scratch: pathlib.Path, mutants: list[Mutant], jobs: int, seconds: float) -> list[str]:
    """The verdicts on all faults, which are also printed as they come."""
    pytest, copies = Pytest(), queue.Queue()
    folders = [scratch / str(number) for number in range(min(jobs, len(mutants)))]
    for folder in folders:
        copy_checkout(ROOT, folder)
        copies.put(folder)

    def attempt(m: Mutant) -> str:
        copy, begin = copies.get(), time.monotonic()
        try:
            verdict, more = try_fault(pytest, copy, m, seconds)
        finally:
            copies.put(copy)
        took = time.monotonic() - begin
        print(f"{verdict:<9} {took:5.1f} s  {m.file}  {m.what}{more}", flush=True)
        return verdict

    with concurrent.futures.ThreadPoolExecutor(len(folders)) as pool:
        try:  # this thread, which Ctrl-C interrupts, only waits
            tests = sorted({m.test for m in mutants})
            pool.submit(check_without_faults, pytest, folders[0], tests).result()
            return list(pool.map(attempt, mutants))
        except BaseException:
            pytest.stop()
            raise


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="faults whose `what` or `file` contains this")
    parser.add_argument("--every", type=positive, default=1, help="a sample: every N-th of them")
    jobs = min(4, os.cpu_count() or 1)  # each takes gigabytes
    parser.add_argument("--jobs", type=positive, default=jobs, help="faults at a time")
    parser.add_argument("--timeout", type=positive, default=SECONDS, help="of a fault, in seconds")
    parser.add_argument("--list", action="store_true", help="say which, and run nothing")
    return parser.parse_args()


def main() -> int:
    """Runs the command; returns its exit status."""
    options, begin, mutants = arguments(), time.monotonic(), read_lists()
    if wrong := problems(mutants):
        raise ListError("\n".join(wrong))
    chosen = [m for m in mutants if options.only in m.what or options.only in m.file]
    chosen = chosen[:: options.every]
    if not chosen:
        raise ListError(f"no fault has {options.only!r} in its `what` or `file`")
    if options.list:
        print("\n".join(f"{m.file}  {m.what}  ({m.test})" for m in chosen))
        return 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        verdicts = try_all(pathlib.Path(scratch), chosen, options.jobs, options.timeout)
    killed = sum(verdict in ("killed", "timed out") for verdict in verdicts)
    late = verdicts.count("timed out")
    how = f", {late} of them by the time limit" if late else ""
    seconds = time.monotonic() - begin
    print(f"{killed} of {len(chosen)} faults killed in {seconds:.0f} s{how}")
    return 2 if "error" in verdicts else int(killed < len(chosen))


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        sys.exit(main())
    except (ListError, OSError, UnicodeError, SyntaxError) as error:  # 1 means a survivor
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
