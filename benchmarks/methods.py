"""Every version of SimCLR and MoCo on one network: negatives, memory, speed, and accuracy.

    python -m benchmarks.methods --figure=docs/figures/simclr_or_moco.png

The whole train step of configs/*_cifar10.py:cpu, compiled for one device as a run compiles it.
Memory is from XLA's analysis of that program. All programs are timed in turns in one process, on
random images in memory: no augmentation, no files. The accuracies are those of the recorded runs in
docs/results.md; here they are only drawn.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from benchmarks import scaling, side_by_side
from common.data.feed.recipe import FeedRecipe
from common.run import pictures
from configs import moco_cifar10, moco_v2plus_cifar10, moco_v3_cifar10, simclr_cifar10


def simclr(loss: str = "nt_xent", head_layers: int = 2, memory: int = 0) -> ConfigDict:
    """`simclr_cifar10.py:cpu` with another loss, or with SimCLR v2's head and memory."""
    c = simclr_cifar10.get_config("cpu")
    c.simclr.loss, c.simclr.memory_length, c.head.layers = loss, memory, head_layers
    return c


# What makes the config of each, in the order of the table.
VARIANTS: dict[str, Callable[[], ConfigDict]] = {
    "SimCLR": simclr,
    "SimCLR, DCL": lambda: simclr("dcl"),
    # as many keys as MoCo's queue
    "SimCLR v2": lambda: simclr(head_layers=3, memory=4096),
    "MoCo v2": lambda: moco_cifar10.get_config("cpu"),
    "MoCo v2+": lambda: moco_v2plus_cifar10.get_config("cpu"),
    "MoCo v3": lambda: moco_v3_cifar10.get_config("cpu"),
}
COLOURS = {
    "SimCLR": "#2f62c9", "SimCLR, DCL": "#7aa3ec", "SimCLR v2": "#1b2f66", "MoCo v2": "#d9822b",
    "MoCo v2+": "#f0b878", "MoCo v3": "#8c3f0f",
}  # fmt: skip
# docs/results.md, "CIFAR-10 on two cores" and the table below it: per cent after the last epoch;
# a method without a recorded run is not in it
RECORDED: dict[str, dict[str, float]] = {
    "SimCLR": {"kNN": 61.5, "linear": 65.4, "epochs": 20, "minutes": 38.9},
    "MoCo v2": {"kNN": 59.2, "linear": 61.3, "epochs": 28, "minutes": 33.6},
    "MoCo v3": {"kNN": 59.3, "linear": 62.2, "epochs": 18, "minutes": 47.7},
}
MIB = 2**20


def config(name: str, batch: int) -> ConfigDict:
    """The config of a variant at a batch size, with images as large as its views."""
    c = VARIANTS[name]()
    c.batch_size = batch
    c.data.image_size = FeedRecipe.of(c).size
    return c


def negatives(c: ConfigDict) -> int:
    """The number of negatives of a view."""
    if c.method == "moco":
        return int(c.moco.queue_length)
    if c.method == "moco_v3":
        return int(c.batch_size) - 1
    return 2 * (c.batch_size - 1) + c.simclr.memory_length


def measured(batches: list[int], repeats: int) -> list[dict[str, Any]]:
    """A record for each batch and method, by batch."""
    rows, programs = [], {}
    for batch in batches:
        for name in VARIANTS:
            c = config(name, batch)
            programs[name, batch], step = scaling.ready(c)
            memory = step.memory_analysis()
            rows.append(
                {
                    "method": name,
                    "batch": batch,
                    "negatives": negatives(c),
                    "arguments": memory.argument_size_in_bytes / MIB,
                    "temporaries": memory.temp_size_in_bytes / MIB,
                }
            )
    taken = side_by_side.seconds(programs, repeats)
    for row in rows:
        mine, batch = taken[row["method"], row["batch"]], row["batch"]
        row["memory"] = row["arguments"] + row["temporaries"]
        row["speed"] = batch / statistics.median(mine)
        row["slowest"], row["fastest"] = batch / max(mine), batch / min(mine)
        # of speeds, so seconds are swapped
        row["of_simclr"] = side_by_side.ratio(taken["SimCLR", batch], mine)
    return rows


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The rows as printed; with accuracies where the batch is that of the recorded run."""
    lines = []
    for row in rows:
        name, line = row["method"], RECORDED.get(row["method"])
        lines.append(
            [
                f"{row['batch']}",
                name,
                f"{row['negatives']:,}",
                f"{row['arguments']:.0f} + {row['temporaries']:.0f} = {row['memory']:.0f}",
                f"{row['speed']:,.0f} ({row['slowest']:,.0f}-{row['fastest']:,.0f})",
                f"{row['of_simclr']:.2f}",
                *(
                    [
                        f"{line['kNN']} %",
                        f"{line['linear']} %",
                        f"{line['epochs']}, {line['minutes']} min",
                    ]
                    if line and row["batch"] == run_batch(name)
                    else [""] * 3
                ),
            ]
        )
    return lines


def run_batch(name: str) -> int:
    """The batch of the recorded run."""
    return VARIANTS[name]().batch_size


def draw(rows: list[dict[str, Any]], path: str) -> None:
    """Draws memory and speed by batch, and the recorded accuracies."""
    figure = pictures._figure(9.6, 3.1, top=0.1)
    memory, speed, accuracy = figure.subplots(1, 3)
    batches = sorted({row["batch"] for row in rows})
    for name, colour in COLOURS.items():
        mine = [row for row in rows if row["method"] == name]
        x = [row["batch"] for row in mine]
        style = {"color": colour, "marker": "o", "markersize": 4, "linewidth": 1.5, "label": name}
        memory.plot(x, [row["memory"] for row in mine], **style)
        speed.plot(x, [row["speed"] for row in mine], **style)
    for axes, title in ((memory, "memory of a step (MiB)"), (speed, "images/s of a step")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set(title=title, xlabel="batch")
        axes.legend(fontsize=8, frameon=False)
    scores, width = ("kNN", "linear"), 0.8 / len(RECORDED)
    for i, (name, line) in enumerate(RECORDED.items()):
        places = [j + (i - (len(RECORDED) - 1) / 2) * width for j in range(len(scores))]
        label = f"{name}, {line['epochs']} epochs, {line['minutes']:.0f} min"
        bars = accuracy.bar(
            places, [line[s] for s in scores], width * 0.94, color=COLOURS[name], label=label
        )
        accuracy.bar_label(bars, fmt="%.1f", fontsize=8, padding=1)
    accuracy.set_xticks(range(len(scores)), scores)
    accuracy.set_ylim(0, 100)  # room for the legend above the bars
    accuracy.set(title=f"CIFAR-10 top-1 (%), batch {run_batch('SimCLR')}")
    accuracy.legend(fontsize=8, frameon=False, loc="upper left")
    for axes in (memory, speed, accuracy):
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.25, axis="y")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    pictures._save(figure, path)


def main() -> None:
    """Prints the table, and draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    integers = lambda text: [int(x) for x in text.split(",")]  # noqa: E731
    parser.add_argument("--batches", type=integers, default=[64, 128, 256, 512])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--figure", default="", help="PNG to write")
    flags = parser.parse_args()
    rows = measured(flags.batches, flags.repeats)
    side_by_side.show(
        "Every method, network and data of *_cifar10.py:cpu",
        ["batch", "", "negatives of a view", "MiB: arguments + temporaries",
         "images/s, median (range)", "speed / SimCLR's", "kNN", "linear", "epochs, time"],
        table(rows),
    )  # fmt: skip
    if flags.figure:
        draw(rows, flags.figure)


if __name__ == "__main__":
    main()
