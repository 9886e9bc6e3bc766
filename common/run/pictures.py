"""Pictures for the workdir: augmented pairs, nearest neighbours, training curves.

matplotlib is imported on the first picture only. Figures are drawn without pyplot: no window, no
state that outlives the call.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from common.run import jsonl

SAME, OTHER = "#1a9850", "#d73027"
_CELL = 1.1  # inches of one image
_PAIRS, _VIEWS = "Pairs that the encoder learns to match", "Images as training sees them"


def augmented_pairs(
    images: np.ndarray, originals: np.ndarray | None, path: str | epath.PathLike, columns: int = 4
) -> None:
    """Draws the augmented views of images, each beside its original when there is one.

    Args:
        images: uint8 `[n, v, h, w, 3]`, two views or one.
        originals: uint8 `[n, H, W, 3]` (or a list, sizes may differ), or None.
        path: PNG to write.
        columns: images side by side.
    """
    n, views = images.shape[:2]
    titles = [f"view {i + 1}" for i in range(views)] if views > 1 else ["view"]
    titles = titles if originals is None else ["original", *titles]
    width = len(titles)
    columns = min(columns, n)
    rows = -(-n // columns)
    # A narrow empty column separates the groups.
    ratios = ([1.0] * width + [0.18]) * columns
    figure = _figure(_CELL * sum(ratios[:-1]), _CELL * rows, top=0.52)
    grid = _grid(figure, rows, len(ratios) - 1, top=0.52, width_ratios=ratios[:-1])
    for i in range(n):
        row, column = divmod(i, columns)
        shown = list(images[i]) if originals is None else [originals[i], *images[i]]
        for j, view in enumerate(shown):
            axes = _show(figure, grid[row, column * (width + 1) + j], view)
            if row == 0:
                axes.set_title(titles[j], fontsize=8, pad=3)
    _title(figure, _PAIRS if views > 1 else _VIEWS)
    _save(figure, path)


def nearest_neighbours(
    queries: np.ndarray,
    neighbours: np.ndarray,
    query_labels: np.ndarray | None,
    neighbour_labels: np.ndarray | None,
    class_names: Sequence[str] | None,
    path: str | epath.PathLike,
    title: str = "Nearest neighbours by the learned features",
) -> None:
    """Draws queries, a row each, with their nearest neighbours, framed by class.

    Args:
        queries: uint8 `[n, h, w, 3]`.
        neighbours: uint8 `[n, k, h, w, 3]`, nearest first.
        query_labels: int `[n]`, -1 where unlabelled; None if nothing is labelled.
        neighbour_labels: int `[n, k]`, likewise.
        class_names: name of each class, or None to show its number.
        path: PNG to write.
        title: above the rows.
    """
    n, k = neighbours.shape[:2]
    if query_labels is None or neighbour_labels is None:
        query_labels, neighbour_labels = np.full(n, -1), np.full((n, k), -1)
    labelled = bool((np.asarray(query_labels) >= 0).any())
    ratios = [1.0, 0.25] + [1.0] * k
    under = 0.24 if labelled else 0.0  # room for the class name, in images
    top, bottom = 0.52, 0.45 if labelled else 0.1
    figure = _figure(_CELL * sum(ratios), _CELL * (1 + under) * n, top, bottom)
    grid = _grid(figure, n, len(ratios), top, bottom, hspace=under + 0.06, width_ratios=ratios)
    for i in range(n):
        for j, image in enumerate([queries[i], *neighbours[i]]):
            axes = _show(figure, grid[i, j + bool(j)], image)
            if i == 0 and j < 2:
                axes.set_title("query" if j == 0 else "nearest first", fontsize=8, pad=3)
            if not labelled:
                continue
            label = query_labels[i] if j == 0 else neighbour_labels[i, j - 1]
            _label(axes, _name(label, class_names))
            if j and label >= 0 and query_labels[i] >= 0:
                for spine in axes.spines.values():
                    spine.set(
                        visible=True,
                        color=SAME if label == query_labels[i] else OTHER,
                        linewidth=2.2,
                    )
    _title(figure, title)
    if labelled:
        from matplotlib.patches import Patch

        handles = [
            Patch(fill=False, edgecolor=SAME, linewidth=2.2, label="same class as the query"),
            Patch(fill=False, edgecolor=OTHER, linewidth=2.2, label="another class"),
        ]
        figure.legend(handles=handles, loc="lower center", ncols=2, fontsize=8, frameon=False)
    _save(figure, path)


def curves(
    runs: Mapping[str, Any] | str | epath.PathLike | Sequence[Mapping[str, Any]],
    path: str | epath.PathLike | io.BytesIO,
) -> None:
    """Draws loss and kNN accuracy against the epoch (the step where no epoch is recorded).

    Args:
        runs: a `metrics.jsonl` or its records, or a dict of these by the name of the run.
        path: PNG to write, or a buffer for its bytes.
    """
    runs = dict(runs) if isinstance(runs, Mapping) else {"": runs}
    runs = {n: r if isinstance(r, (list, tuple)) else jsonl.read(r) for n, r in runs.items()}
    scored = any(len(series(records, "knn_top1")[0]) for records in runs.values())
    figure = _figure(8.4 if scored else 4.2, 3.2, top=0.1, bottom=0.1)
    left, *right = figure.subplots(1, 1 + scored, squeeze=False)[0]
    for name, records in runs.items():
        left.plot(*series(records, "loss"), label=name or None, linewidth=1.3)
        x, y = series(records, "knn_top1")
        for axes in right:
            axes.plot(x, 100 * y, label=name or None, marker="o", markersize=3.5, linewidth=1.3)
    # Runs on one dataset share the value: one line, not one per run.
    raw = sorted({value for records in runs.values() for value in _raw_pixels(records)})
    for value in raw:
        label = "raw pixels" if len(raw) == 1 else f"raw pixels ({100 * value:.1f} %)"
        for axes in right:
            axes.axhline(100 * value, color="0.45", linestyle=":", linewidth=1.2, label=label)
    unit = "epoch" if any("epoch" in r for records in runs.values() for r in records) else "step"
    for axes, title in zip(figure.axes, ("training loss", "kNN top-1 (%)"), strict=False):
        axes.set(title=title, xlabel=unit)
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    _save(figure, path)


def _raw_pixels(records: Sequence[Mapping[str, Any]]) -> list[float]:
    return [r["knn_top1_raw_pixels"] for r in records if "knn_top1_raw_pixels" in r][-1:]


def series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """The values of `key` in `metrics.jsonl`, against the epoch (or the step): `(x, y)`."""
    points = [(r.get("epoch", r["step"]), r[key]) for r in records if r.get(key) is not None]
    return np.array([x for x, _ in points]), np.array([y for _, y in points], float)


def _name(label: int, class_names: Sequence[str] | None) -> str:
    if label < 0:
        return "unlabelled"
    return str(class_names[label]) if class_names else f"class {label}"


def _label(axes: Any, text: str) -> None:
    """Writes under an image, cut to its width."""
    label = axes.set_xlabel(text, fontsize=7, labelpad=2.5)
    renderer = axes.figure.canvas.get_renderer()
    while len(text) > 1 and label.get_window_extent(renderer).width > axes.bbox.width:
        text = text[:-1]
        label.set_text(text.rstrip() + "…")


def _figure(width: float, height: float, top: float, bottom: float = 0.1) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Titles and the legend need about 4 inches even above a single image.
    size = (max(width + 0.2, 4.2), height + top + bottom)
    figure = Figure(figsize=size, dpi=110, facecolor="white")
    FigureCanvasAgg(figure)  # becomes figure.canvas: draws in memory, and can measure text
    return figure


def _grid(
    figure: Any,
    rows: int,
    columns: int,
    top: float,
    bottom: float = 0.1,
    hspace: float = 0.06,
    **kw,
) -> Any:
    """A grid with margins in inches, so that titles never meet images whatever the size."""
    width, height = figure.get_size_inches()
    return figure.add_gridspec(
        rows,
        columns,
        left=0.1 / width,
        right=1 - 0.1 / width,
        top=1 - top / height,
        bottom=bottom / height,
        wspace=0.06,
        hspace=hspace,
        **kw,
    )


def _show(figure: Any, cell: Any, image: np.ndarray) -> Any:
    axes = figure.add_subplot(cell)
    # Small images keep their pixels; large ones are shrunk, which needs smoothing.
    axes.imshow(image, interpolation="nearest" if max(image.shape[:2]) <= 64 else "antialiased")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes


def _title(figure: Any, text: str) -> None:
    height = figure.get_size_inches()[1]
    figure.text(0.5, 1 - 0.12 / height, text, ha="center", va="top", fontsize=10)


def _save(figure: Any, path: str | epath.PathLike | io.BytesIO) -> None:
    """Through memory, because matplotlib cannot write to an object store."""
    buffer = path if isinstance(path, io.BytesIO) else io.BytesIO()
    figure.savefig(buffer, format="png")
    if isinstance(path, io.BytesIO):
        return
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
