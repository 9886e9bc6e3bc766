"""Accuracy of CIFAR-10 encoders, and the seconds of training that it takes.

Each run is the recipe of `configs/` with its data in device memory, many steps a dispatch and
bfloat16. Its figures are those of the last epoch. The seconds are summed over all its starts.
"""

import dataclasses
import json
import pathlib
from typing import Any

from ml_collections import ConfigDict

from benchmarks.record.ledger import Found
from benchmarks.record.setting import ROOT, Setting, hardware
from benchmarks.record.steps import Sizes
from common import config as configs
from common.cli import modes
from common.run import jsonl
from configs import moco_cifar10, simclr_cifar10
from main import METHODS

CONFIGS = {"simclr": simclr_cifar10, "moco": moco_cifar10}
TARGET = 0.9  # kNN (k = 10): the time until a run reaches it


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        method: "simclr" or "moco".
        epochs: of the whole run.
        every: epochs between two scores.
        knn_k: neighbours of these scores; 0: 200.
    """

    method: str
    epochs: int
    every: int = 50
    knn_k: int = 0


RUNS = {
    "simclr_200_epochs": Run("simclr", 200),
    "moco_200_epochs": Run("moco", 200),
    "simclr_500_epochs": Run("simclr", 500, knn_k=10),
}


def changes(run: Run, sizes: Sizes) -> dict[str, Any]:
    """What differs from the config file, by dotted names."""
    found = {
        "data.augment_on": "device",
        "steps_per_dispatch": sizes.steps,
        "model.dtype": "bfloat16",
        "duration": sizes.duration or f"{run.epochs} epochs",
        "evaluate.every": f"{run.every} epochs",
        "evaluate.knn_k": run.knn_k,
        "evaluate.pictures": False,
        "checkpoint.every": "10 %",
        "checkpoint.keep": 1,  # keeps the results small to copy
    }
    if sizes.name == "tiny":
        found |= {
            "data.source": "embedded", "data.train_split": "test", "data.image_size": 28,
            "batch_size": 64, "model.stages": "(1,)", "model.width": sizes.width,
            "evaluate.every": "50 %", "evaluate.knn_examples": 1000, "checkpoint.every": "50 %",
            "head.hidden": 16, "head.dim": 16, "log_every": 10,
        }  # fmt: skip
        if run.method == "moco":
            found["moco.queue_length"] = 256
    return found


def config(run: Run, sizes: Sizes) -> ConfigDict:
    """The config of a run, on random images of the same number and shape."""
    c = CONFIGS[run.method].get_config()
    flat = {name: (1,) if value == "(1,)" else value for name, value in changes(run, sizes).items()}
    # all fields: `update` gives missing ones the values of old runs
    configs.update(c, configs.flatten(configs.as_dict(c)) | flat, "the run")
    c.data.source, c.data.fake_examples = "fake", sizes.images
    return c


def train(setting: Setting, name: str) -> list[str]:
    """The command of a run; the same one continues it."""
    run, sizes = RUNS[name], setting.sizes
    given = changes(run, sizes)
    if setting.data:
        data = pathlib.Path(setting.data)
        if data.is_relative_to(ROOT):  # the run can be continued elsewhere
            data = data.relative_to(ROOT)
        given |= {"data.source": f"shards:{data}", "data.image_size": 32}
    return setting.main_py(
        f"--config={ROOT}/configs/{run.method}_cifar10.py", f"--workdir={workdir(setting, name)}",
        *(f"--config.{field}={value}" for field, value in given.items()),
    )  # fmt: skip


def workdir(setting: Setting, name: str) -> pathlib.Path:
    """The workdir of a run."""
    return setting.out / "runs" / name


def kept(setting: Setting, name: str) -> bool:
    """Whether the results of a finished run are still there."""
    return (workdir(setting, name) / "summary.json").exists()


def trained(setting: Setting, name: str) -> Found:
    """The result of a finished run: last kNN, seconds, and when it reached the target."""
    path = workdir(setting, name)
    summary = json.loads((path / "summary.json").read_text())
    records = jsonl.read(path / jsonl.FILE)
    k, voting = RUNS[name].knn_k or 200, 1000 if setting.sizes.name == "tiny" else "all"
    reached = seconds_to(records, TARGET) if k == 10 else None
    rate = summary["images_per_second"]
    words = (
        f"kNN in training (k = {k}, {voting} images vote) {summary['knn_top1']:.2%} after the last "
        f"of {summary['steps']:,} steps (untrained {summary['knn_top1_at_init']:.2%}); "
        f"{summary['seconds']:,.0f} s in all, "
        f"{summary['steps'] * summary['batch_size'] / rate:,.0f} s of them in steps, "
        f"{rate:,.0f} images/s"
    )
    if k == 10:
        words += f"; {TARGET:.0%} " + (
            f"after {reached[0]:,.0f} s of steps (step {reached[1]:,})"
            if reached
            else "not reached"
        )
    loss = [r["loss"] for r in records if "loss" in r][-1]
    return Found(
        f"{words}; loss {loss:.3f}",
        {"summary": summary, "loss": loss, "seconds_to_target": reached and reached[0]},
        hardware=hardware(summary["device"], summary["jax"]),
    )


def seconds_to(records: list[dict[str, Any]], target: float) -> tuple[float, int] | None:
    """Seconds of training steps until the first score that reaches a target, and its step.

    Compiling, evaluations and checkpoints are left out, as in images/s. A line after a restart has
    no time of its own: its steps count as the average of the others.

    Args:
        records: of `metrics.jsonl`.
        target: of `knn_top1`, in [0, 1].
    """
    scored = [r["step"] for r in records if r.get("knn_top1", 0) >= target and r["step"] > 0]
    if not scored:
        return None
    timed = [r for r in records if "seconds_step" in r and r["step"] <= scored[0]]
    before = [0, *(r["step"] for r in records if "loss" in r)]
    weights = [r["step"] - max(s for s in before if s < r["step"]) for r in timed]
    seconds = sum(w * r["seconds_step"] for w, r in zip(weights, timed, strict=True))
    return (seconds / sum(weights) * scored[0], scored[0]) if timed else None


# How each trained run is evaluated: the mode, and its settings as in `--eval`.
PROTOCOLS: dict[str, tuple[str, dict[str, Any]]] = {
    # as in MoCo's notebook, lightly and elsewhere
    "knn200": ("knn", {"knn.k": 200, "knn.temperature": 0.1}),
    # equal votes of the 10 nearest by cosine, as in github.com/dkobak/simclr-cifar10; at this
    # temperature the similarity only decides ties
    "knn10": ("knn", {"knn.k": 10, "knn.temperature": 1000.0}),
    "linear_cached": ("linear_eval", {"linear.variant": "cached"}),
    "linear_augmented": ("linear_eval", {"linear.variant": "augmented"}),
}


def evaluate(setting: Setting, name: str, protocol: str) -> Found:
    """Scores a trained run, as `main.py --mode=...` does."""
    mode, given = PROTOCOLS[protocol]
    c = configs.eval_config()
    tiny = {"linear.epochs": 1, "linear.learning_rate": (1.0,), "linear.weight_decay": (0.0,)}
    c.update_from_flattened_dict(given | (tiny if setting.sizes.name == "tiny" else {}))
    record = modes.run(mode, str(workdir(setting, name)), c, METHODS)
    words = f"{record['top1']:.2%} of {record['num_test']:,} test images"
    if mode == "knn":
        votes = "equal votes" if protocol == "knn10" else f"T = {record['temperature']:g}"
        return Found(f"{words}, k = {record['k']}, {votes}", record)
    return Found(f"{words}, {record['protocol']}", record)
