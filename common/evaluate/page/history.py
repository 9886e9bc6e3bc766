"""What a workdir holds about a run, for the page: curves, results, settings."""

import io
import json
from typing import Any

from etils import epath

from common import config as configs
from common.evaluate.feature_files import printable, shortened
from common.evaluate.page import inline
from common.run import jsonl, pictures, saved_config
from common.train import verdict

# Fields of results.jsonl that say how a result was measured: shown in other columns, or not at all.
_PROTOCOL = {
    "mode", "features", "layer", "checkpoint_step", "method", "supervised", "source",
    "train_split", "test_split", "seed", "run_seed", "device", "jax", "command", "time",
    "sha256", "files", "l2", "cv_folds", "cv_repeats", "folders_images",
}  # fmt: skip


def curves(workdir: epath.Path) -> dict[str, Any]:
    """The curves of `metrics.jsonl`, and where they begin and end, for the words above them."""
    path = workdir / jsonl.FILE
    records = jsonl.read(path) if path.exists() else []
    loss, knn, raw = (
        pictures.series(records, name)[1] for name in ("loss", "knn_top1", "knn_top1_raw_pixels")
    )
    drawn = io.BytesIO()
    if max(len(loss), len(knn)) > 1:
        pictures.curves(records, drawn)
    return {
        "curves": inline.data_uri(drawn.getvalue(), "png") if drawn.getvalue() else "",
        "loss": (loss[0], loss[-1]) if len(loss) else None,
        "knn": (100 * knn[0], 100 * knn[-1]) if len(knn) else None,
        "raw": 100 * raw[-1] if len(raw) else None,
    }


def label_free(workdir: epath.Path) -> list[dict[str, str]]:
    """The last figures without labels, beside those of raw pixels and before training.

    Returns:
        A row each: `name`, `trained`, `at_init`, `raw_pixels`, as text ("-": not known), and
        which values are `better`; [] where the run has none.
    """
    path = workdir / jsonl.FILE
    records = jsonl.read(path) if path.exists() else []
    rows = []
    for name in verdict.LABEL_FREE:
        found = {
            side: pictures.series(records, name + end)[1]
            for side, end in (
                ("trained", ""), ("at_init", verdict.AT_INIT), ("raw_pixels", verdict.RAW_PIXELS),
            )
        }  # fmt: skip
        if len(found["trained"]):
            texts = {k: verdict.text(name, x[-1]) if len(x) else "-" for k, x in found.items()}
            better = verdict.BETTER[name]
            rows.append({"name": verdict.TITLES[name], **texts, "better": better})
    return rows


def results(workdir: epath.Path) -> list[dict[str, Any]]:
    """The lines of `results.jsonl` with scores, which `embed` and `suggest` do not have."""
    rows = []
    for record in jsonl.results(workdir):
        if record.get("mode") in ("embed", "suggest"):
            continue
        measured = {k: v for k, v in record.items() if k not in _PROTOCOL and v is not None}
        rows.append(
            {name: shortened(_text(record.get(name, ""))) for name in _PROTOCOL}
            | {"measured": [(name, _score(name, value)) for name, value in measured.items()]}
        )
    return rows


def _score(name: str, value: Any) -> str:
    """Accuracies in per cent, paths without their directories, anything else as it is."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_score(key, x)}" for key, x in value.items() if x is not None)
    if isinstance(value, list):
        return "; ".join(_score(name, x) for x in value)
    fraction = isinstance(value, float) and 0 <= value <= 1
    if fraction and any(part in name for part in ("top1", "top5", "accuracy")):
        return f"{100 * value:.2f} %"
    return shortened(_text(value))


def _text(value: Any) -> str:
    if isinstance(value, str):
        return printable(value)
    return f"{value:.5g}" if isinstance(value, float) else json.dumps(value)


def settings(workdir: epath.Path) -> dict[str, str]:
    """The fields of `config.json` and their values, as text."""
    saved = saved_config.read(workdir)
    return {name: shortened(_text(value)) for name, value in configs.flatten(saved).items()}
