"""The picture of `--mode=compare`: loss, kNN and what else there is, a curve for each run."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from common.evaluate.compare_runs import Run

# (scalar, title, factor); the loss is always drawn, the others where a run has them.
PANELS = (
    ("loss", "training loss", 1.0),
    ("knn_top1", "kNN top-1 (%)", 100.0),
    ("view_agreement", "agreement of views", 1.0),
    ("rankme", "RankMe", 1.0),
)
POINTS = 100  # of a curve: more lines are averaged, or the noise of one hides the others
_DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
_PANEL = 4.6, 3.2  # inches
_LETTER, _LINE = 0.075, 0.155  # inches in the legend


def draw(runs: Sequence[Run]) -> bytes:
    """A PNG with a panel for each scalar, against the epoch (the step, if a run has no epochs).

    Runs have ten colours, and after each ten other dashes. One that has no value of a scalar, such
    as kNN without labels, is missing from that panel, and stays in the legend.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [p for p in PANELS if p[0] == "loss" or any(r.last(p[0]) is not None for r in runs)]
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    width = _PANEL[0] * max(columns, 1.4)
    names = [run.name for run in runs]
    beside = max(1, min(len(names), int(width / (_LETTER * max(map(len, names)) + 0.6))))
    legend = _LINE * -(-len(names) // beside) + 0.12
    figure = Figure((width, _PANEL[1] * rows + legend), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    epochs = all(run.last("epoch") is not None for run in runs if run.records)
    colours = colormaps["tab10"]
    handles: list[Any] = []
    for i, (key, title, factor) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        lines = [
            axes.plot(
                *curve(run, key, "epoch" if epochs else "step", factor),
                color=colours(j % 10), linestyle=_DASHES[j // 10 % len(_DASHES)], linewidth=1.4,
                marker="" if key == "loss" else "o", markersize=3,
            )[0]
            for j, run in enumerate(runs)
        ]  # fmt: skip
        handles = handles or lines
        if key == "knn_top1":
            _raw_pixels(axes, runs)
        axes.set(xlabel="epoch" if epochs else "step")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    height = figure.get_size_inches()[1]
    figure.tight_layout(rect=(0, legend / height, 1, 1))
    figure.legend(
        handles, names, loc="lower center", ncols=beside, fontsize=8, frameon=False,
        handlelength=2.6, borderaxespad=0.3,
    )  # fmt: skip
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def curve(run: Run, key: str, against: str, factor: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """The values of a scalar: `(x, y)`, each `[n]` with n <= `POINTS`; the mean of nearby ones."""
    points = [(r.get(against), r[key]) for r in run.records if r.get(key) is not None]
    values = np.array([p for p in points if p[0] is not None], float).reshape(-1, 2)
    if len(values) > POINTS:
        values = np.array([part.mean(0) for part in np.array_split(values, POINTS)])
    return values[:, 0], factor * values[:, 1]


def _raw_pixels(axes: Any, runs: Sequence[Run]) -> None:
    """A line for each value: runs on one dataset share it, to within half a point."""
    known = [x for run in runs if (x := run.last("knn_top1_raw_pixels")) is not None]
    for value in {round(200 * x): 100 * x for x in known}.values():
        axes.axhline(value, color="0.45", linestyle=":", linewidth=1.2)
        axes.annotate(
            "raw pixels", (1, value), xycoords=("axes fraction", "data"), fontsize=7,
            color="0.35", ha="right", va="bottom",
        )  # fmt: skip
