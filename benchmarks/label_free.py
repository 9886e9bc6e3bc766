"""How figures without labels go with kNN accuracy: over the steps of a run, and over runs.

    python -m benchmarks.label_free WORKDIR ...
    python -m benchmarks.label_free --train=ROOT --steps=400 -- --config=FILE ...

The first reads `metrics.jsonl` of finished runs that have labels and prints Spearman's rank
correlation of each figure with `knn_top1`, as Markdown. The second first trains a set of runs of
different quality in directories under ROOT, all from the options behind `--`; one that is finished
is not trained again.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from collections import Counter

import numpy as np
from etils import epath
from scipy import stats

from common.run import jsonl, saved_config
from common.train.verdict import LABEL_FREE, RAW_PIXELS

KNN = "knn_top1"


def variants(steps: int) -> dict[str, list[str]]:
    """Options of runs of different quality, by name."""
    no_colour = ["--config.augment.jitter=0.0", "--config.augment.grey=0.0"]
    no_crop = ["--config.augment.area_min=1.0"]
    return {
        "base": [],
        "temperature_0.05": ["--config.simclr.temperature=0.05"],
        "temperature_1": ["--config.simclr.temperature=1.0"],
        "rate_0.002": ["--config.optimizer.learning_rate=0.002"],
        "rate_4": ["--config.optimizer.learning_rate=4.0"],
        "eighth": [f"--config.duration={max(1, steps // 8)} steps"],
        "narrow": ["--config.model.width=16"],
        "no_crop": no_crop,
        "no_colour": no_colour,
        "same_views": [*no_crop, *no_colour, "--config.augment.flip=0.0"],
    }


def train(root: pathlib.Path, steps: int, options: list[str]) -> list[pathlib.Path]:
    """Trains those of `variants` that are not finished; returns their workdirs."""
    workdirs = []
    for name, changes in variants(steps).items():
        workdirs.append(root / name)
        if (workdirs[-1] / "summary.json").exists():
            continue
        command = [
            sys.executable, "main.py", f"--workdir={workdirs[-1]}", *options,
            f"--config.duration={steps} steps", "--config.optimizer.warmup=10 %",
            "--config.evaluate.every=0 steps", "--config.evaluate.pictures=False", *changes,
        ]  # fmt: skip
        subprocess.run(command, check=True)
    return workdirs


def scores(workdir: pathlib.Path) -> list[dict[str, float]]:
    """The evaluations of a run that have kNN and all figures, by step; [] where there is no run."""
    path = workdir / jsonl.FILE
    records = jsonl.read(path) if path.exists() else []
    return [r for r in records if all(r.get(name) is not None for name in (KNN, *LABEL_FREE))]


def spearman(records: list[dict[str, float]], name: str) -> float:
    """Rank correlation of a figure with kNN; NaN where one of them is the same in all."""
    if len(records) < 3:
        return float("nan")
    values, knn = (np.array([r[n] for r in records]) for n in (name, KNN))
    if not (np.ptp(values) and np.ptp(knn)):
        return float("nan")
    return float(stats.spearmanr(values, knn).statistic)


def over_steps(runs: dict[str, list[dict[str, float]]]) -> list[str]:
    """A row for each run that was evaluated three times or more."""
    rows = [
        [name, str(len(records)), *(f"{spearman(records, n):+.2f}" for n in LABEL_FREE)]
        for name, records in runs.items()
        if len(records) > 2
    ]
    return table(["run", "evaluations", *LABEL_FREE], rows) if rows else []


def over_runs(runs: dict[str, list[dict[str, float]]], augmentations: dict[str, str]) -> list[str]:
    """The last figures of each run, best first, and their correlations.

    Views of another augmentation are another question, so the runs that share the most frequent
    one are looked at by themselves too. The untrained encoder and the raw pixels of the first of
    them are shown, and not counted.
    """
    last = sorted(runs, key=lambda name: -runs[name][-1][KNN])
    usual = Counter(augmentations.values()).most_common(1)[0][0]
    start = next(runs[name][0] for name in runs if augmentations[name] == usual)
    rows = [_row(name, runs[name][-1]) for name in last]
    rows += [_row("*untrained*", start), _row("*raw pixels*", start, RAW_PIXELS)]
    for title, kept in (
        ("all runs", last),
        ("of one augmentation", [name for name in last if augmentations[name] == usual]),
    ):
        chosen = [runs[name][-1] for name in kept]
        rhos = (f"{spearman(chosen, n):+.2f}" for n in LABEL_FREE)
        rows.append([f"**Spearman, {title} ({len(kept)})**", "", *rhos])
    return table(["run", "kNN", *LABEL_FREE], rows)


def _row(title: str, record: dict[str, float], end: str = "") -> list[str]:
    figures = (f"{record[name + end]:.3f}" for name in LABEL_FREE)
    return [title, f"{100 * record[KNN + end]:.1f} %", *figures]


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of Markdown."""
    lines = [head, ["---", *("--:" for _ in head[1:])], *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def main() -> None:
    """Trains if asked to, and prints both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdirs", nargs="*", type=pathlib.Path, metavar="WORKDIR")
    parser.add_argument("--train", type=pathlib.Path, metavar="ROOT", help="train a set of runs")
    parser.add_argument("--steps", type=int, default=400, help="of each run of --train")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    arguments = parser.parse_args(sys.argv[1:split])
    workdirs = list(arguments.workdirs)
    if arguments.train:
        workdirs += train(arguments.train, arguments.steps, sys.argv[split + 1 :])
    runs = {workdir.name: scores(workdir) for workdir in workdirs}
    runs = {name: records for name, records in runs.items() if len(records) > 1}
    if not runs:
        parser.error("no WORKDIR has evaluations with kNN and figures without labels")
    augmentations = {
        w.name: json.dumps(saved_config.read(epath.Path(w))["augment"])
        for w in workdirs
        if w.name in runs
    }
    tables = [over_steps(runs), over_runs(runs, augmentations) if len(runs) > 2 else []]
    print("\n\n".join("\n".join(lines) for lines in tables if lines))


if __name__ == "__main__":
    main()
