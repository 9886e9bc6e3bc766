"""The train step over 1 to 8 simulated devices and in micro-batches: memory, work and traffic.

    python -m benchmarks.scaling [--devices=1,2,4,8] [--time]

Compiled for simulated devices, so that anybody can check whether a change makes a step send more;
they are not timed. `--time` adds the time that micro-batches cost, on one real device and in turns.
benchmarks/tpu_plans.py has the same figures from the TPU compiler.
"""

import argparse
import functools

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks import side_by_side
from common.config import base_config
from common.plan import collectives, measure
from common.sharding import make_mesh, to_global
from common.train.first_state import draw_state
from common.train.prepare import Extent, prepare
from common.train.step import compile_step
from main import METHODS

BATCH, GROUPS = 256, 32


def config(method: str, microbatch: int = 0, groups: int = GROUPS, **model) -> ConfigDict:
    """A ResNet-18 at 32 px, as for CIFAR-10."""
    c = base_config(method, METHODS[method].default_config())
    c.batch_size, c.microbatch = BATCH, microbatch
    c.data.source, c.data.image_size = "fake", 32
    c.model.depth, c.model.stem, c.model.bn_groups = 18, "cifar", groups
    c.model.update(model)
    c.head.kind = {"moco": "moco_v2"}.get(method, method)
    return c


# a name and the config to compile
STEPS = {
    "SimCLR, global BN": functools.partial(config, "simclr", groups=1),
    "SimCLR, 32 BN groups": functools.partial(config, "simclr"),
    "SimCLR, 4 micro-batches": functools.partial(config, "simclr", microbatch=BATCH // 4),
    "MoCo, 32 BN groups": functools.partial(config, "moco"),
    "MoCo, 4 micro-batches": functools.partial(config, "moco", microbatch=BATCH // 4),
}


def compiled(name: str, devices: int) -> list:
    """A row: one step on a number of devices."""
    c = STEPS[name]()
    task = measure.Task(METHODS[c.method], c, Extent(100, 10, 10))
    found = measure.for_mesh(task, make_mesh(jax.devices()[:devices]))
    moved = [collectives.Collective(*x) for x in found["collectives"]]
    kinds = collectives.totals(x for x in moved if x.group > 1)
    return [
        name, devices, f"{found['temporaries'] / 1e6:,.0f}", f"{found['flops'] / 1e9:,.0f}",
        f"{found['bytes_accessed'] / 1e9:,.1f}",
        ", ".join(f"{x['count']} {kind} {x['bytes'] / 1e6:.2f} MB" for kind, x in kinds.items())
        or "none",
    ]  # fmt: skip


def ready(c: ConfigDict):
    """A function that makes one more step on one device, and the compiled step."""
    mesh = make_mesh(jax.devices()[:1])
    run = prepare(METHODS[c.method], c, mesh, extent=Extent(100, 10, 10))
    step = compile_step(run.method.train_step, run)
    held, key = [draw_state(run)], run.root_key
    size, rng = c.data.image_size, np.random.default_rng(0)
    images = rng.integers(0, 256, (c.batch_size, 2, size, size, 3), dtype=np.uint8)
    batch = to_global(mesh, {"images": images, "labels": np.zeros(c.batch_size, np.int32)})

    def program():
        held[0], metrics = step(held[0], batch, key)
        return metrics

    return program, step


def times(repeats: int, width: int) -> list[list]:
    """Rows: the whole batch, micro-batches, and `model.remat`."""
    steps = {
        "whole batch": config("simclr", width=width),
        **{f"{m} micro-batches": config("simclr", BATCH // m, width=width) for m in (2, 4, 8)},
        "remat=blocks": config("simclr", remat="blocks", width=width),
    }
    made = {name: ready(c) for name, c in steps.items()}
    taken = side_by_side.seconds({name: program for name, (program, _) in made.items()}, repeats)
    whole = taken["whole batch"]
    size = lambda step: step.memory_analysis().temp_size_in_bytes  # noqa: E731
    return [
        [name, side_by_side.milliseconds(taken[name]),
         f"{side_by_side.ratio(taken[name], whole):.2f}", f"{size(step) / 1e6:,.0f}"]
        for name, (_, step) in made.items()
    ]  # fmt: skip


def main() -> None:
    """Prints one table, or two."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    integers = lambda text: [int(x) for x in text.split(",") if x]  # noqa: E731
    parser.add_argument("--devices", type=integers, default=[1, 2, 4, 8])
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--width", type=int, default=64, help="of the network that is timed")
    parser.add_argument("--repeats", type=int, default=5)
    flags = parser.parse_args()
    side_by_side.devices(max(flags.devices, default=1))
    if flags.devices:
        side_by_side.show(
            f"Train step, ResNet-18, 32 px, batch {BATCH}, of one device",
            ["step", "devices", "temporaries MB", "GFLOP", "GB", "collectives"],
            [compiled(name, n) for name in STEPS for n in flags.devices],
        )
    if flags.time:
        side_by_side.show(
            f"SimCLR step in parts, ResNet-18 of width {flags.width}, 32 px, batch {BATCH}",
            ["", "ms, median (range)", "of the whole batch", "temporaries MB"],
            times(flags.repeats, flags.width),
        )


if __name__ == "__main__":
    main()
