"""The figures of docs/tpu.md: plans of the TPU configs, and the traffic of their steps.

    python -m benchmarks.tpu_plans

compiles what docs/tpu_plans.jsonl does not have yet, the most important first (hours on two cores
for all of it; it can be interrupted, and each row is written as soon as it is compiled), then
renders the tables of docs/tpu.md and docs/figures/tpu_collectives.png. `--render` only renders,
`--parts=changes,table` compiles only those parts. Needs the TPU compiler: `make test-tpu` installs
it, or pip install -U "jax[tpu]".
"""

import argparse
import functools
import importlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from benchmarks import tpu_baseline, tpu_figures, tpu_variants, tpu_vit_baseline
from common.errors import UserError
from common.plan import measure, plan
from common.train.prepare import Extent
from moco_jax.method import MoCo
from moco_jax.v3 import MoCoV3
from simclr_jax.method import SimCLR

# configs/NAME_tpu.py, or NAME:ARGUMENT
METHODS = {
    "simclr": SimCLR,
    "moco": MoCo,
    "simclr_vit": SimCLR,
    "moco_v3": MoCoV3,
    "moco_v3:r50": MoCoV3,
    "simclr_v2": SimCLR,
    "simclr_v2:sk": SimCLR,
    "simclr_v2:r152": SimCLR,
}
DRAWN = ("simclr", "moco")
BASELINES = {"baseline": tpu_baseline, "vit_baseline": tpu_vit_baseline}
DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"
ROWS, PAGE, FIGURE = DOCS / "tpu_plans.jsonl", DOCS / "tpu.md", DOCS / "figures/tpu_collectives.png"
PARTS = ("changes", "table", "growth", "vit_changes", "vit_table", "v2_table")
# Compiled with little effort: full effort takes five times that.
QUICK = ("table", "growth", "vit_table", "v2_table")

SLICES = ("v5e:4x8", "v5e:16x16", "v5p:4x4x4", "v4:4x4x4", "v3:8x8")
BATCHES = {"simclr": (4096, 8192), "moco": (1024, 4096)}
# The gain of each change: one slice, one batch.
CHANGES: dict[str, dict[str, Any]] = {
    "all (the default on TPU)": {},
    "neither": {"tpu_compiler_options": False, "model.fold_norm": False},
    "folded norm only": {"tpu_compiler_options": False},
    "compiler options only": {"model.fold_norm": False},
    "all, remat=convs": {"model.remat": "convs"},
    "all, remat=blocks": {"model.remat": "blocks"},
}
# With the fields of `tpu_variants`; "ratio" is the first of these options, and "order" that of the
# tokens in memory.
_RATIO, _SCOPED = "xla_tpu_msa_inefficient_use_to_copy_ratio", "xla_tpu_scoped_vmem_limit_kib"
VIT_CHANGES: dict[str, dict[str, Any]] = {
    "all (the default on TPU): kernel, order, ratio 2.5": {},
    "kernel": {"xla": {}, "row_major": False},
    "kernel, scoped_vmem 32768": {"xla": {_SCOPED: "32768"}, "row_major": False},
    "kernel, ratio 1.5": {"xla": {_RATIO: "1.5"}, "row_major": False},
    "kernel, order, ratio 2": {"xla": {_RATIO: "2"}},
    "kernel, order": {"tpu_compiler_options": False},
    "ratio 2.5": {"vit.tpu_kernel": False},
    "all, remat=blocks": {"model.remat": "blocks"},
    "all, remat=convs": {"model.remat": "convs"},
    "none": {"tpu_compiler_options": False, "vit.tpu_kernel": False},
}
VIT_SLICES = ("v5e:16x16", "v5e:4x8", "v5p:4x4x4", "v4:4x4x4", "v3:8x8")
V2: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("simclr_v2", "v5e:4x8", {}),
    ("simclr_v2:r152", "v5p:4x4x4", {}),
    ("simclr_v2:sk", "v5e:4x8", {}),
    ("simclr_v2:r152", "v5e:16x16", {}),
    ("simclr_v2:r152", "v4:4x4x4", {}),
    ("simclr_v2:r152", "v3:8x8", {}),
    ("simclr_v2:r152", "v5e:4x8", {}),
    # parts of 16 and of 8 images a chip, each a group of batch norm
    ("simclr_v2:r152", "v5e:4x8", {"microbatch": 512, "model.bn_groups": 256}),
    ("simclr_v2:r152", "v5e:4x8", {"microbatch": 256, "model.bn_groups": 512}),
)
GROWTH = (("v5e:2x4", 1024), ("v5e:4x8", 4096), ("v5p:4x4x4", 4096), ("v5e:16x16", 4096))

EXTENT = Extent(93_600, 312, 1000)  # ImageNet, 300 epochs of 4,096

Job = tuple[str, str, int, dict[str, Any]]  # of METHODS or BASELINES, topology, batch, changes


def config(method: str, batch: int, changes: dict[str, Any]) -> ConfigDict:
    """A TPU config with another batch; MoCo's groups stay at 32 images."""
    name, _, argument = method.partition(":")
    c = importlib.import_module(f"configs.{name}_tpu").get_config(argument)
    c.batch_size = batch
    if method == "moco":
        c.model.bn_groups = batch // 32
    for name, value in changes.items():
        section, _, field = name.rpartition(".")
        (c[section] if section else c)[field] = value
    return c


def jobs(part: str) -> Iterator[tuple[str, Job]]:
    """(name, what to compile) of every row of a part, the most important first."""
    if part == "changes":
        yield "baseline", ("baseline", "v5e:4x8", 4096, {})
        for name, changes in CHANGES.items():
            yield name, ("simclr", "v5e:4x8", 4096, changes)
    elif part == "table":
        for topology in SLICES:
            for method, batches in BATCHES.items():
                for batch in batches:
                    yield topology, (method, topology, batch, {})
    elif part == "vit_changes":
        yield "baseline", ("vit_baseline", "v5e:16x16", 4096, {})
        for name, changes in VIT_CHANGES.items():
            yield name, ("simclr_vit", "v5e:16x16", 4096, changes)
    elif part == "vit_table":
        for topology in VIT_SLICES:
            for method in ("simclr_vit", "moco_v3"):
                yield topology, (method, topology, 4096, {})
        yield "v5e:4x8", ("moco_v3:r50", "v5e:4x8", 4096, {})
    elif part == "v2_table":
        for method, topology, changes in V2:
            yield topology, (method, topology, 4096, changes)
    else:
        for topology, batch in GROWTH:
            for method in DRAWN:
                yield topology, (method, topology, batch, {})


def read() -> list[dict[str, Any]]:
    """The rows so far: what `--mode=plan` prints, and the job of each."""
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def rows_of(job: Job, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a job: more than one where the plain step did not fit."""
    return [row for row in rows if row["job"] == list(job)]


def measured(job: Job, quick: bool) -> list[dict[str, Any]]:
    """Compiles; a crash of the compiler is a row too."""
    method, topology, batch, changes = job
    fields = {k: v for k, v in changes.items() if k not in tpu_variants.FIELDS}
    try:
        if fields != changes:
            task = measure.Task(METHODS[method], config(method, batch, fields), EXTENT, quick)
            compile_for = functools.partial(tpu_variants.compile_for, task, changes)
            return [plan.row_of(task, topology, measure.on_topology(compile_for, topology, quick))]
        if method in BASELINES:
            compile_for = functools.partial(BASELINES[method].compile_for, batch)
            found = measure.on_topology(compile_for, topology)
            same = {"baseline": "simclr", "vit_baseline": "simclr_vit"}[method]
            task = measure.Task(SimCLR, config(same, batch, {}), Extent(100, 10))
            return [plan.row_of(task, topology, found)]
        return plan.plan(METHODS[method], config(method, batch, changes), [topology], quick)
    except UserError as error:
        return [{"error": str(error)}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--parts", default=",".join(PARTS))
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    rows = read()
    for part in () if options.render else options.parts.split(","):
        for _, job in jobs(part):
            if not rows_of(job, rows):
                rows += [{"job": list(job), **row} for row in measured(job, part in QUICK)]
                ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {part: [(name, rows_of(job, rows)) for name, job in jobs(part)] for part in PARTS}
    tpu_figures.write(
        PAGE,
        tpu_figures.changes(found["changes"], "SimCLR at 4096 on v5e:4x8"),
        tpu_figures.table(found["table"]),
        tpu_figures.changes(found["vit_changes"], "SimCLR on ViT-B/16 at 4096 on v5e:16x16"),
        tpu_figures.table(found["vit_table"], theory_of),
        tpu_figures.table(found["v2_table"], theory_of),
    )
    growth = [rows[-1] for _, rows in found["growth"] if rows and "error" not in rows[-1]]
    if {row["method"] for row in growth} == set(DRAWN):
        tpu_figures.draw(growth, {m: functools.partial(theory_of, m) for m in DRAWN}, FIGURE)


def theory_of(method: str, batch: int, devices: int) -> dict[str, float]:
    """`tpu_figures.theory` of a method at a batch."""
    return tpu_figures.theory(METHODS[method], config(method, batch, {}), devices)


if __name__ == "__main__":
    main()
