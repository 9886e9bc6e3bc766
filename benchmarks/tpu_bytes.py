"""What the bytes of a TPU config's step are, by the part of the step that moves them.

    python -m benchmarks.tpu_bytes --config=simclr_vit --topology=v5e:16x16 [--save=step.txt]
    python -m benchmarks.tpu_bytes --text=step.txt

"touched" are operands and results wherever they are; "HBM" those that are in HBM
(`common/plan/traffic.py`). Blocks count together. Needs libtpu, but no TPU.
"""

import argparse
import functools
import pathlib
import re
from collections import defaultdict

import jax
from jax.sharding import Mesh

from benchmarks import tpu_plans
from common.plan import measure, traffic
from common.train.prepare import Extent, prepare
from common.train.step import compile_step


def text_of(name: str, batch: int, mesh: Mesh) -> str:
    """The compiled step of a config, as `tpu_plans.config` names it."""
    c = tpu_plans.config(name, batch, {})
    run = prepare(tpu_plans.METHODS[name], c, mesh, extent=Extent(100, 10, 1000))
    return compile_step(run.method.train_step, run).as_text() or ""


def parts(text: str) -> list[tuple[str, int, int, int]]:
    """(part, instructions, touched, HBM), the most touched first.

    A part is the opcode and the path without what differs from block to block.
    """
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for x in traffic.read(text) or ():
        path = re.sub(r"block\d+", "block*", re.sub(r"^jit\(\w+\)/", "", x.path))
        for entry, more in enumerate((1, x.touched, x.hbm)):
            sums[f"{x.kind} {path}"][entry] += more
    return sorted(((name, *s) for name, s in sums.items()), key=lambda row: -row[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="simclr_vit", choices=tpu_plans.METHODS)
    parser.add_argument("--topology", default="v5e:16x16")
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--text", type=pathlib.Path, help="a program saved before")
    parser.add_argument("--save", type=pathlib.Path, help="where to save the program")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    if options.text:
        text = options.text.read_text()
    else:
        compile_for = functools.partial(text_of, options.config, options.batch)
        text = measure.on_topology(compile_for, options.topology)
        if options.save:
            options.save.write_text(text)
    rows = parts(text)
    rows.append(("all", *(sum(row[i] for row in rows) for i in (1, 2, 3))))
    print("| part | instructions | touched GB | HBM GB |\n| --- | --: | --: | --: |")
    for name, count, touched, hbm in rows:
        if touched > 1e7:
            print(f"| `{name}` | {count} | {touched / 1e9:.2f} | {hbm / 1e9:.2f} |")


if __name__ == "__main__":
    main()
