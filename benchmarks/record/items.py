"""All items, in order. An item is a function for a worker process, or a command of its own."""

import dataclasses
import functools
from collections.abc import Callable

from benchmarks.record import processes, profile, quality, rates, sanity, steps
from benchmarks.record.ledger import Found
from benchmarks.record.setting import Setting
from benchmarks.record.steps import Sizes

LONG = "linear_augmented"
STAGES = ("sanity", "rates", "quality")


@dataclasses.dataclass(frozen=True)
class Item:
    """One row of the table.

    Attributes:
        name: unique.
        stage: one of `STAGES`.
        seconds: estimate on one H100, with compiling; with less time left the item is not started.
            For a training run, which can be continued: the least time worth starting it.
        work: called by the worker.
        command: of a process of its own, whose result `read` returns.
        read: see `command`.
        training: whether the process saves and exits on SIGTERM, and can be continued.
        after: an item that must be ok first.
        alone: in a worker of its own, with all of the device's memory.
        kept: for a training run: whether its workdir is still there.
    """

    name: str
    stage: str
    seconds: float
    work: Callable[[Setting], Found] | None = None
    command: Callable[[Setting], list[str]] | None = None
    read: Callable[[Setting], Found] | None = None
    training: bool = False
    after: str = ""
    alone: bool = False
    kept: Callable[[Setting], bool] | None = None


def every(sizes: Sizes) -> list[Item]:
    """All items, in the order in which they are tried."""
    found = [*_sanity(sizes), *_rates(sizes), *_quality()]
    if sizes.name == "tiny":  # on a CPU, where the estimates do not hold
        found = [dataclasses.replace(item, seconds=min(item.seconds, 20)) for item in found]
    return found


def _sanity(sizes: Sizes) -> list[Item]:
    item = functools.partial(Item, stage="sanity")
    found = [item("device", seconds=20, work=sanity.device)]
    for name in ("nt_xent", "info_nce"):
        found.append(item(name, seconds=30, work=functools.partial(sanity.losses, name=name)))
    found.append(item("knn", seconds=40, work=sanity.neighbours))
    for method in steps.METHODS:
        for name in steps.sanity(method, sizes):
            found.append(item(name, seconds=40, work=functools.partial(sanity.step, name=name)))
        work = functools.partial(sanity.same_as_cpu, method=method)
        found.append(item(f"{method}_same_as_cpu", seconds=120, work=work))
    for method in steps.METHODS:
        work = functools.partial(processes.resume, method=method)
        found.append(item(f"{method}_resume", seconds=120, work=work))
    found.append(
        item("export", seconds=60, work=functools.partial(processes.exported, method="moco"))
    )
    return found


def _rates(sizes: Sizes) -> list[Item]:
    item = functools.partial(Item, stage="rates")
    found = []
    for batch in sizes.batches:
        for method in steps.METHODS:
            name = f"{method}_batch{batch}"
            work = functools.partial(rates.in_memory, method=method, batch=batch)
            found.append(item(name, seconds=60, work=work))
            work = functools.partial(rates.beside_pytorch, method=method, batch=batch)
            found.append(item(f"{name}_beside_pytorch", seconds=120, work=work, alone=True))
    for method in steps.METHODS:
        work = functools.partial(rates.large, method=method)
        found.append(item(f"{method}_resnet50", seconds=120, work=work, alone=True))
    for what in profile.WHAT:
        found.append(
            item(
                f"profile_{what}", seconds=90,
                command=functools.partial(profile.command, what=what),
                read=functools.partial(profile.read, what=what),
            )
        )  # fmt: skip
    found.append(item("fold_norm", seconds=150, work=rates.fold_norm, alone=True))
    found.append(
        item("dispatch", seconds=100, work=functools.partial(rates.dispatch, method="simclr"))
    )
    for rows in sizes.losses:
        for what in (rates.loss_precision, rates.loss_tiles):
            work = functools.partial(what, rows=rows)
            found.append(item(f"{what.__name__}_{rows}", seconds=40, work=work))
    return found


def _quality() -> list[Item]:
    found = []
    for name in quality.RUNS:
        found.append(
            Item(
                name, "quality", seconds=100, training=True,
                command=functools.partial(quality.train, name=name),
                read=functools.partial(quality.trained, name=name),
                kept=functools.partial(quality.kept, name=name),
            )
        )  # fmt: skip
        found += [_score(name, protocol) for protocol in quality.PROTOCOLS if protocol != LONG]
    # last: it takes minutes and cannot be continued
    return found + [_score(name, LONG, seconds=300) for name in quality.RUNS]


def _score(name: str, protocol: str, seconds: float = 60) -> Item:
    work = functools.partial(quality.evaluate, name=name, protocol=protocol)
    return Item(f"{name}_{protocol}", "quality", seconds, work=work, after=name)
