"""The figures of docs/tpu.md: plans of the TPU configs, and what their steps send.

    python -m benchmarks.tpu_plans

compiles everything that is not in docs/tpu_plans.jsonl yet (two hours on two cores from nothing; it
can be interrupted), then writes the table into docs/tpu.md and docs/figures/tpu_collectives.png.
Needs the TPU compiler: `make test-tpu` installs it, or pip install -U "jax[tpu]".
"""

import importlib
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from common import pictures
from common.method import make_setup
from common.plan.plan import plan
from common.sharding import make_mesh
from moco_jax.method import MoCo
from simclr_jax.method import SimCLR

METHODS = {"simclr": SimCLR, "moco": MoCo}
DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"
ROWS, PAGE, FIGURE = DOCS / "tpu_plans.jsonl", DOCS / "tpu.md", DOCS / "figures/tpu_collectives.png"
BEGIN, END = "<!-- benchmarks.tpu_plans begin -->", "<!-- benchmarks.tpu_plans end -->"

SLICES = ("v5e:4x8", "v5e:16x16", "v4:4x4x4", "v5p:4x4x4", "v3:8x8")
BATCHES = {"simclr": (4096, 8192), "moco": (1024, 4096)}
# What the changes bought: one slice, one batch.
CHANGES = {
    "all": {},
    "no compiler options": {"tpu_compiler_options": False},
    "no folded norm": {"model.fold_norm": False},
    "neither": {"tpu_compiler_options": False, "model.fold_norm": False},
    "remat=convs": {"model.remat": "convs"},
    "remat=blocks": {"model.remat": "blocks"},
}
GROWTH = ("v5e:2x4", "v5e:4x4", "v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16")
GROWTH_IMAGES = 32  # a chip


def config(method: str, batch: int, changes: dict[str, Any]) -> ConfigDict:
    """The TPU config of a method with another batch; MoCo's groups stay at 32 images."""
    c = importlib.import_module(f"configs.{method}_tpu").get_config()
    c.batch_size = batch
    if method == "moco":
        c.model.bn_groups = batch // 32
    for name, value in changes.items():
        section, _, field = name.rpartition(".")
        (c[section] if section else c)[field] = value
    return c


def wanted() -> Iterator[tuple[str, str, str, int, dict[str, Any]]]:
    """(part, method, topology, batch, changes) of every plan, the most wanted first."""
    for name, changes in CHANGES.items():
        yield f"change: {name}", "simclr", "v5e:4x8", 4096, changes
    for topology in SLICES:
        for method, batches in BATCHES.items():
            for batch in batches:
                yield "table", method, topology, batch, {}
    for topology in GROWTH:
        for method in METHODS:
            rows, columns = topology.partition(":")[2].split("x")
            batch = int(rows) * int(columns) * GROWTH_IMAGES
            yield "growth", method, topology, batch, {}


def measure() -> list[dict[str, Any]]:
    """All rows, those of earlier calls included."""
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    done = {(r["part"], r["method"], r["topology"], r["batch"]) for r in rows}
    for part, method, topology, batch, changes in wanted():
        if (part, method, topology, batch) in done:
            continue
        found = plan(METHODS[method], config(method, batch, changes), [topology])
        rows += [{"part": part, **row} for row in found]
        ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def theory(method: str, batch: int, devices: int) -> dict[str, float]:
    """Bytes that a device has to contribute to or receive from collectives in one step."""
    c = config(method, batch, {})
    built = METHODS[method](make_setup(c, make_mesh(jax.devices()[:1]), 100, 10, 1000))
    state = jax.eval_shape(built.init, jax.random.key(0))
    parameters = sum(x.size for x in jax.tree.leaves((state.params, state.probe.params)))
    parts = {"gradients": 4 * parameters}
    dim = c.head.dim
    if method == "simclr":
        # forward: two sums a channel, where the norm is folded the moments of the input (c^2 + c);
        # backward: two sums a channel again, but those are the gradients of scale and shift
        statistics = 0
        for path, mean in jax.tree_util.tree_leaves_with_path(state.batch_stats):
            names = [k.key for k in path]
            if names[-1] != "mean":
                continue
            block = state.params["backbone"].get(names[-3], {}) if len(names) > 2 else {}
            kernel = block.get(names[-2].replace("bn", "conv"), {}).get("kernel")
            folded = kernel is not None and kernel.shape[:2] == (1, 1)
            folded = folded and kernel.shape[3] > kernel.shape[2]
            statistics += kernel.shape[2] * (kernel.shape[2] + 1) if folded else 2 * mean.size
        parts["batch statistics"] = 4 * statistics
        parts["embeddings"] = 4 * 2 * batch * dim * 2  # gathered, and their gradients scattered
    else:
        size = c.data.image_size
        parts["shuffled images (uint8)"] = batch / devices * size * size * 3
        parts["embeddings"] = 4 * batch * dim * 2 + 4 * batch / devices * dim
        parts["log-sum-exps"] = 4 * batch * 3
    return parts


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of the table and of the changes, in Markdown."""
    lines = [
        "| config | batch | slice | chips | remat | peak GiB of | TFLOP | GB | arithmetic ms | "
        "memory ms | ICI ms | images/s | hours |",
        "| --- | --: | --- | --: | --- | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for r in (r for r in rows if r["part"] == "table"):
        first = (f"| `{r['method']}_tpu.py` | {r['batch']} | {r['topology']} | {r['chips']} | "
                 f"{r['remat']} | {r['peak_gib']:.1f} of {r['hbm_gib']}")  # fmt: skip
        if r["fits"]:
            first += (f" | {r['tflop']:.2f} | {r['gb_accessed']:.1f} | {r['arithmetic_ms']:.1f} | "
                      f"{r['memory_ms']:.1f} | {r['ici_ms']:.2f} | {r['images_per_second']:,} | "
                      f"{r['hours']:.2f} |")  # fmt: skip
        else:
            first += " **does not fit** | | | | | | | |"
        lines.append(first)
    lines += [
        "",
        "One change at a time, `simclr_tpu.py` at 4096 on v5e:4x8, a chip and step:",
        "",
        "| | GB accessed | temporaries GiB | peak GiB | TFLOP | compile s |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for r in (r for r in rows if r["part"].startswith("change") and r["fits"]):
        lines.append(
            f"| {r['part'].partition(': ')[2]} | {r['gb_accessed']:.1f} | "
            f"{r['temporaries_gib']:.2f} | {r['peak_gib']:.2f} | {r['tflop']:.2f} | "
            f"{r['compile_seconds']:.0f} |"
        )
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]]) -> None:
    """Measured collective bytes beside the theoretical ones, against the number of chips."""
    figure = pictures._figure(8.4, 3.4, top=0.1)
    for axes, method in zip(figure.subplots(1, 2), METHODS, strict=True):
        found = [r for r in rows if r["part"] == "growth" and r["method"] == method]
        bottom = [0.0] * len(found)
        places = range(len(found))
        parts = [theory(method, r["batch"], r["devices"]) for r in found]
        for name in parts[0] if parts else ():
            heights = [p[name] / 1e6 for p in parts]
            axes.bar(places, heights, bottom=bottom, width=0.6, label=f"theory: {name}")
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
        total = [sum(c["bytes"] for c in r["collectives"].values()) / 1e6 for r in found]
        axes.plot(places, total, "k_", markersize=22, markeredgewidth=2, label="compiled step")
        axes.set_xticks(list(places), [f"{r['chips']}\n{r['batch']}" for r in found])
        axes.set(title=method, xlabel="chips, batch", ylabel="MB a chip and step")
        axes.legend(fontsize=7, frameon=False, loc="lower right")
        for r, t, b in zip(found, total, bottom, strict=True):
            print(f"{method} {r['chips']} chips: {t:.2f} MB compiled, {b:.2f} MB theory")
    figure.tight_layout()
    pictures._save(figure, FIGURE)


def main() -> None:
    rows = measure()
    head, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n{table(rows)}\n{END}{rest.partition(END)[2]}")
    draw(rows)


if __name__ == "__main__":
    sys.exit(main())
