"""The command line: see `benchmarks/record/__init__.py`."""

import argparse
import contextlib
import fcntl
import importlib
import json
import pathlib
import signal
import sys
import time
from collections.abc import Iterator, Sequence

import benchmarks.record as package
from benchmarks.record import items, steps
from benchmarks.record.ledger import TABLE, Ledger
from benchmarks.record.schedule import Schedule
from benchmarks.record.setting import LOGS, Setting
from common.data.sources.shards import INDEX
from common.errors import UserError
from common.run import files

SETTING, LOCK = "setting.json", "lock"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.record", description=package.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    listing = "--list" in (sys.argv[1:] if argv is None else argv)  # needs neither
    add(
        "--minutes",
        type=float,
        required=not listing,
        help="of this call; saving may take half a minute more",
    )
    add("--out", type=pathlib.Path, required=not listing, help="folder of the records and runs")
    add("--data", default="", help="shards of CIFAR-10 (main.py --mode=prepare), for quality")
    add(
        "--stages",
        default="sanity,rates,quality",
        help="stages or single items, separated by commas",
    )
    add("--tiny", action="store_true", help="tiny networks and runs, to try this on a CPU")
    add(
        "--patience",
        type=float,
        default=5,
        help="stop an item after this multiple of its estimate (5)",
    )
    add("--list", action="store_true", help="only print the items and their estimates")
    return parser.parse_args(argv)


def wanted(flags: argparse.Namespace, every: list[items.Item]) -> list[items.Item]:
    """The items named in `--stages`; without data, only those that need none.

    Raises:
        UserError: for an unknown name, or an item named without the data that it needs.
    """
    names = [name.strip() for name in flags.stages.split(",") if name.strip()]
    known = [*items.STAGES, *(item.name for item in every)]
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--stages={unknown[0]} is unknown: expected some of {', '.join(known)}")
    chosen = [item for item in every if item.stage in names or item.name in names]
    need_data = [item for item in chosen if item.stage == "quality" and not flags.tiny]
    if flags.data and not (pathlib.Path(flags.data) / INDEX).exists():
        raise UserError(
            f"--data={flags.data} holds no {INDEX}: expected what main.py --mode=prepare wrote, or "
            "benchmarks.pieces put together"
        )
    if need_data and not flags.data and not flags.list:
        if "sanity" not in names and "rates" not in names:
            raise UserError(
                "quality needs --data=DIR, CIFAR-10 as main.py --mode=prepare writes it"
            )
        print("quality is left out: it needs --data=DIR", file=sys.stderr)
        chosen = [item for item in chosen if item not in need_data]
    return chosen


@contextlib.contextmanager
def claimed(out: pathlib.Path, sizes: steps.Sizes) -> Iterator[None]:
    """Locks the folder against a second call and against other sizes.

    Raises:
        UserError: if another call holds it, or it has records of other sizes.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / LOCK, "w")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"cannot write to --out={out}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another call is writing into {out}: wait for its end") from error
        path = out / SETTING
        before = sizes.name
        with contextlib.suppress(OSError, ValueError, KeyError):  # missing, or half-written
            before = json.loads(path.read_text())["sizes"]
        if before != sizes.name:
            raise UserError(
                f"{out} holds records of the {before} sizes, and these are the {sizes.name} ones: "
                "give another --out"
            )
        files.write_text(path, json.dumps({"sizes": sizes.name}) + "\n")
        yield


@contextlib.contextmanager
def stopped_by_signals(schedule: Schedule) -> Iterator[None]:
    """SIGTERM and Ctrl-C act as the end of the time: a training run is saved."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, schedule.stop) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None, catalogue: str = "benchmarks.record.items") -> int:
    """Runs the items that fit into the time.

    Args:
        argv: of the command line.
        catalogue: see `Setting`.

    Returns:
        0: all items are done; 1: one or more have failed; 3: one or more are left.
    """
    begin = time.time()
    flags = parse(argv)
    sizes = steps.TINY if flags.tiny else steps.FULL
    chosen = wanted(flags, importlib.import_module(catalogue).every(sizes))
    if flags.list:
        for item in chosen:
            print(f"{item.stage:8} {item.name:36} {item.seconds:5.0f} s")
        return 0
    if flags.minutes <= 0 or flags.patience <= 0:
        raise UserError("--minutes and --patience: expected more than 0")
    out, data = flags.out.expanduser().resolve(), flags.data
    data = str(pathlib.Path(data).expanduser().resolve()) if data else ""
    with claimed(out, sizes):
        ledger = Ledger(out)
        deadline = begin + 60 * flags.minutes
        setting = Setting(out, data, sizes, catalogue)
        schedule = Schedule(setting, ledger, chosen, deadline, flags.patience)
        with stopped_by_signals(schedule):
            schedule.run()
        states = [schedule.state_of(item) for item in chosen]
    failed, done = states.count("failed"), states.count("ok")
    left = len(states) - done - failed
    lines = [f"{done} of {len(states)} ok, {failed} failed, {left} left: {out / TABLE}"]
    if failed:
        lines.append(f"failed items are tried again by the next call; see {out / LOGS}")
    if left:
        lines.append(f"the same command continues: {schedule.waiting()}")
    print("\n".join(lines), file=sys.stderr)
    return 1 if failed else 3 if left else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
