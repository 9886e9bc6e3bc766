"""Compiles every step of `benchmarks.record` for a TPU slice: does it fit, what does it cost?

    python -m benchmarks.record.plan [--topology=v5e:1x1] [--steps=NAME,...] [--quick]

Needs libtpu (`pip install "jax[tpu]"`) but no TPU. A JSON line for each step goes to --out.
"""

import argparse
import json
import pathlib
import sys

from ml_collections import ConfigDict

from benchmarks.record import quality, steps
from common.errors import UserError
from common.plan import measure
from common.train.prepare import Extent
from main import METHODS

GIB = 2**30


def every(sizes: steps.Sizes) -> dict[str, ConfigDict]:
    """Every train step by name, including those of the training runs."""
    runs = {f"run_{name}": quality.config(run, sizes) for name, run in quality.RUNS.items()}
    return steps.every(sizes) | runs


def planned(c: ConfigDict, topology: str, quick: bool = False) -> dict:
    """What `common.plan.measure.for_mesh` returns for a step on a slice."""
    per_epoch = max(1, c.data.fake_examples // c.batch_size)
    extent = Extent(100 * per_epoch, per_epoch, num_classes=10)
    return measure.for_topology(measure.Task(METHODS[c.method], c, extent, quick=quick), topology)


def row(name: str, c: ConfigDict, found: dict) -> str:
    """A row of the table."""
    if "out_of_memory" in found:
        used, there = (found["out_of_memory"][x] / GIB for x in ("peak", "capacity"))
        words = f"{used:.1f} | does not fit into {there:.1f} GiB | - "
    else:
        moved = found["hbm_bytes"]  # unknown after --quick
        traffic = f"{moved / 1e9:.2f}" if moved else "-"
        words = f"{found['peak'] / GIB:.2f} | {found['flops'] / 1e9:,.0f} | {traffic} "
    return f"| {name} | {c.batch_size:,} | {words}| {found['compile_seconds']:.0f} |"


def main() -> None:
    """Prints a row for each step as soon as it is compiled."""
    parser = argparse.ArgumentParser("python -m benchmarks.record.plan", description=__doc__)
    parser.add_argument("--topology", default="v5e:1x1")
    parser.add_argument("--steps", default="", help="names separated by commas; default all")
    parser.add_argument("--quick", action="store_true", help="see main.py --mode=plan --quick")
    parser.add_argument("--out", type=pathlib.Path)
    flags = parser.parse_args()
    known = every(steps.FULL)
    names = [n for n in flags.steps.split(",") if n] or list(known)
    if unknown := [n for n in names if n not in known]:
        raise SystemExit(f"error: no step {unknown[0]!r}: expected some of {', '.join(known)}")
    print(f"{flags.topology}\n\n| step | batch | peak GiB | GFLOP | GB of memory traffic | s |")
    print("| --- | --: | --: | --: | --: | --: |", flush=True)
    for name in names:
        try:
            found = planned(known[name], flags.topology, flags.quick)
        except UserError as error:
            print(f"error: {name}: {error}", file=sys.stderr)
            continue
        print(row(name, known[name], found), flush=True)
        if flags.out:
            with flags.out.open("a") as file:
                file.write(json.dumps({"step": name, "topology": flags.topology} | found) + "\n")


if __name__ == "__main__":
    main()
