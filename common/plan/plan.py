"""`--mode=plan`: what a config costs on given devices, before anybody rents them."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from common import config as configs
from common.data.sources.opening import open_source
from common.errors import UserError
from common.fields import AUTO, REMAT
from common.method import Method
from common.optim import steps_of
from common.plan import chips, collectives, measure, table
from common.run import console
from common.setup import Setup
from common.sharding import make_mesh
from common.train import by_number
from common.train.prepare import Extent

# (name, split) -> images and classes of datasets that people plan for before they have them.
KNOWN = {
    ("imagenet2012", "train"): (1_281_167, 1000),
    ("cifar10", "train"): (50_000, 10),
    ("cifar100", "train"): (50_000, 100),
    ("stl10", "train"): (5_000, 10),
    ("stl10", "unlabelled"): (100_000, 0),
    ("stl10", "train+unlabelled"): (105_000, 10),
}
LOCAL = "local"


def plan(
    make_method: Callable[[Setup], Method],
    config: ConfigDict,
    topologies: Sequence[str] = (),
    quick: bool = False,
) -> list[dict[str, Any]]:
    """Compiles the train step of `config` for each topology, and prints what it costs.

    A table goes to stderr, a JSON object for each row to stdout. A step that does not fit is
    compiled again with stronger `model.remat` until it does.

    Args:
        make_method: class of the method.
        config: of the run.
        topologies: TPU slices such as "v5e:4x8"; none means the devices of this machine.
        quick: for slices: compile with little effort. Work, memory and collectives are nearly the
            same in a fifth of the time; docs/tpu.md has both.

    Returns:
        What was printed as JSON: one dictionary a row, sizes in GiB (`_gib`), work in 1e12
        operations and traffic in 1e9 bytes of one device and one step, times in ms, `hours` of the
        whole run; `rates` are the datasheet rates behind the bounds.

    Raises:
        UserError: for a mistake in the config, an unknown topology, or without libtpu.
    """
    configs.check(config)
    n, classes = data_of(config)
    rows, errors = [], []
    for topology in topologies or (LOCAL,):
        devices = make_mesh().size if topology == LOCAL else chips.devices_of(topology)
        try:
            decided, extent = _extent(config, n, classes, devices)
            found = _plan_one(make_method, decided, topology, extent, quick)
        except UserError as error:  # the other slices are still useful
            errors.append(str(error))
            continue
        rows += found
        for row in found:
            console.result(json.dumps(row))
    if rows:
        console.say("\n" + table.render(rows))
    if errors:
        raise UserError("; ".join(dict.fromkeys(errors)))
    return rows


def _extent(config: ConfigDict, n: int, classes: int, devices: int) -> tuple[ConfigDict, Extent]:
    """The config with what a run on so many devices decides, and how long that run is."""
    config = by_number.decide(config, n, devices)
    if config.batch_size > n:
        raise UserError(f"batch_size={config.batch_size}: the data has only {n} images")
    per_epoch = n // config.batch_size
    total = steps_of(config.duration, per_epoch, name="duration")
    return config, Extent(max(1, total), per_epoch, classes)


def _plan_one(
    make_method: Callable[[Setup], Method],
    config: ConfigDict,
    topology: str,
    extent: Extent,
    quick: bool,
) -> list[dict[str, Any]]:
    """The row of a topology; where the step does not fit, also those of stronger `model.remat`."""
    rows = []
    for remat in REMAT[REMAT.index(config.model.remat) :]:
        changed = config.copy_and_resolve_references()
        with changed.unlocked():
            changed.model.remat = remat
        task = measure.Task(make_method, changed, extent, quick)
        text = f"compiling for {topology}, remat={remat} (minutes on a laptop) ..."
        if topology == LOCAL:
            found = measure.for_mesh(task, make_mesh(), functools.partial(console.say, text))
        else:
            measure.check(task)
            console.say(text)
            found = measure.for_topology(task, topology)
        rows.append(row_of(task, topology, found))
        if rows[-1]["fits"] is not False:
            break
    for row in rows[:-1] if rows[-1]["fits"] else ():
        rest = row["advice"].removeprefix("does not fit")
        row["advice"] = f"does not fit, but does with model.remat={remat}{rest}"
    return rows


def data_of(config: ConfigDict) -> tuple[int, int]:
    """Number of images to train on, and of classes; well-known datasets need not be here.

    Raises:
        UserError: if the dataset is neither here nor in `KNOWN`.
    """
    kind, _, name = config.data.source.partition(":")
    split = "train" if config.data.train_split == AUTO else config.data.train_split
    known = KNOWN.get((name.partition(":")[0].partition("/")[0], split))
    if kind == "tfds" and known:
        return known
    source = open_source(config.data, "train")
    return source.num_examples, source.num_classes


def row_of(task: measure.Task, topology: str, found: dict[str, Any]) -> dict[str, Any]:
    """One line of the table: what `measure` found, in readable units."""
    config, devices = task.config, found["devices"]
    device = _device(topology)
    hbm_gib = device.hbm_gib if device else _local_hbm_gib(topology)
    row: dict[str, Any] = {
        "topology": topology,
        "device": device.name if device else _kind(topology),
        "devices": devices,
        "chips": devices // (device.devices_per_chip if device else 1),
        "method": config.method,
        "batch": config.batch_size,
        "batch_per_device": config.batch_size // devices,
        "dtype": config.model.dtype,
        "remat": config.model.remat,
        "steps": task.extent.total_steps,
        "quick": task.quick,
        "compile_seconds": round(found["compile_seconds"], 1),
        "hbm_gib": hbm_gib,
        "versions": _versions(topology),
    }
    if "out_of_memory" in found:
        peak, capacity = found["out_of_memory"]["peak"], found["out_of_memory"]["capacity"]
        advice = "does not fit: " + _advice(config, row, peak / capacity)
        return row | {"fits": False, "peak_gib": _gib(peak), "advice": advice}
    names = ("arguments", "temporaries", "outputs", "aliased", "peak")
    row |= {f"{name}_gib": _gib(found[name]) for name in names}
    row["fits"] = None
    if hbm_gib:
        full = found["peak"] / (hbm_gib * chips.GIB)
        row["fits"] = full <= 1
        if full > 1:
            row["advice"] = "does not fit: " + _advice(config, row, full)
    moved = [collectives.Collective(*c) for c in found["collectives"]]
    row |= {
        "tflop": _rounded(found["flops"], 1e12),
        "gb_accessed": _rounded(found["bytes_accessed"], 1e9),
        "hbm_gb": _rounded(found["hbm_bytes"], 1e9),
        "collectives": collectives.totals(moved),
    }
    return row | (_bounds(task, found, device) if device else {})


def _bounds(task: measure.Task, found: dict[str, Any], device: chips.Device) -> dict[str, Any]:
    """The least time of a step by arithmetic, memory and links, and what follows for the run."""
    traffic = sum(collectives.Collective(*c).traffic for c in found["collectives"])
    bounds = {
        "arithmetic_ms": 1e-9 * found["flops"] / device.tflops,
        "memory_ms": 1e-6 * found["bytes_accessed"] / device.hbm_gb_per_s,
        # the links belong to the chip
        "ici_ms": 1e-6 * traffic / device.ici_gb_per_s if found["devices"] > 1 else 0.0,
    }
    slowest = max(bounds.values())
    return {name: round(value, 2) for name, value in bounds.items()} | {
        "images_per_second": round(1e3 * task.config.batch_size / slowest),
        "hours": round(task.extent.total_steps * slowest / 3.6e6, 2),
        "rates": dataclasses.asdict(device),
    }


def _kind(topology: str) -> str:
    return jax.devices()[0].device_kind if topology == LOCAL else topology.partition(":")[0]


def _device(topology: str) -> chips.Device | None:
    return chips.of_kind(jax.devices()[0].device_kind) if topology == LOCAL else (
        chips.of_topology(topology))  # fmt: skip


def _local_hbm_gib(topology: str) -> float | None:
    """Memory of an accelerator of this machine that is not in `chips`, from the runtime."""
    stats = jax.local_devices()[0].memory_stats() if topology == LOCAL else None
    return _gib(stats["bytes_limit"]) if stats and "bytes_limit" in stats else None


def _versions(topology: str) -> dict[str, str]:
    """Versions of the packages that decide the figures; libtpu compiles for TPU slices."""
    names = ["jax", "jaxlib"] + ([] if topology == LOCAL else ["libtpu"])
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _advice(config: ConfigDict, row: dict[str, Any], full: float) -> str:
    """What would fit, for `full` = peak / capacity: memory grows with the images of a device."""
    scale, devices = 0.9 / full, row["devices"]
    options = []
    a_device = int(row["batch_per_device"] * scale)
    while a_device and a_device * devices % config.model.bn_groups:
        a_device -= 1
    if a_device:
        options.append(f"batch_size={a_device * devices}")
    chips_needed = 2 * row["chips"]
    while chips_needed * scale < row["chips"]:
        chips_needed *= 2
    options.append(f"{chips_needed} chips")
    options.append("a smaller microbatch" if config.microbatch else "microbatch")
    if stronger := REMAT[REMAT.index(row["remat"]) + 1 :]:
        options.append(f"model.remat={' or '.join(stronger)}")
    return f"try {', or '.join(options)}"


def _gib(size: float) -> float:
    return round(size / chips.GIB, 4)


def _rounded(value: float | None, unit: float) -> float | None:
    return None if value is None else round(value / unit, 6)
