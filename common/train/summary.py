"""What a person reads: the summary at the start, the last lines at the end, and the pictures."""

import dataclasses
import json
import math
import shlex
from typing import Any

import jax
import numpy as np
from etils import epath

from common import optim, version
from common.data.feed import pipeline, resident
from common.data.feed.recipe import FeedRecipe
from common.data.sources.base import Source
from common.run import console, files, pictures
from common.train import dispatch, verdict
from common.train.evaluator import Evaluator
from common.train.position import Position
from common.train.prepare import Prepared
from common.train.step import cost

PAIRS = 16  # augmented pairs in the picture
BEFORE = "nearest_neighbours_before.png"
PICTURES = {
    "augmented_pairs.png": "images as training sees them",
    "nearest_neighbours.png": "test images, each with those nearest to it by the features",
    BEFORE: "the same before training",
}
TOO_FEW = 100  # steps of a run that says nothing about learning
_MADE = {
    "host": "on the host",
    "both": "crop and flip on the host, the rest on the device",
    "device": "on the device, which holds the dataset",
}


def start_up(
    run: Prepared,
    workdir: epath.Path,
    state: Any,
    step_fn: jax.stages.Compiled,
    test: Source | None,
    start: int,
) -> None:
    """Says on which devices what is about to be trained, and where it goes."""
    config, mesh, total = run.config, run.mesh, run.extent.total_steps
    device = mesh.devices.flat[0]
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
    backbone = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params["backbone"]))
    flops = cost(step_fn, run.setup.microbatches).get("flops", float("nan")) * mesh.size
    model, frozen = run.setup.network.backbone, run.setup.network.frozen
    heads = "head and predictor" if "predictor" in state.params else "the head"
    views = len(run.recipe.views)
    still = f", {' and '.join(name for _, name in frozen)} not trained" if frozen else ""
    lines = {
        "method": config.method
        + (", supervised: its loss reads the labels" if run.method.supervised else ""),
        **run.method.notes,
        "data": "\n            ".join(run.source.summary()),
        "devices": f"{mesh.size} x {device.device_kind} in {jax.process_count()} process(es), "
        f"mesh {dict(mesh.shape)}",
        "network": f"{model.in_words()}, {backbone / 1e6:.2f} M parameters, "
        f"{parameters / 1e6:.2f} M with {heads}, {model.dtype}{still}",
        "batch": f"{config.batch_size} images, {config.batch_size // mesh.size} a device, "
        f"{views} view{'s' if views > 1 else ''} each, {run.recipe.size} px",
        "augment": _MADE[config.data.augment_on],
        "steps": f"{total:,} of {flops / 1e9:,.1f} GFLOP ({run.extent.steps_per_epoch:,} an epoch)",
        "optimiser": f"{config.optimizer.name}, peak learning rate "
        f"{optim.peak_learning_rate(config.optimizer, config.batch_size):.4g}",
        "workdir": str(workdir),
        "code": f"version {version.in_words()}",
    }
    if test is not None and "[" in test.split:
        # a slice of what is not TFDS's is of a random order: "[-100:]" are not the last files
        drawn = "" if config.data.source.startswith("tfds:") else ", drawn at random,"
        lines["held out"] = f"{test.num_examples:,} images{drawn} to score by: {test.split}"
    elif test is not None and test.account:
        lines["test data"] = "\n            ".join(test.summary())
    if start:
        lines["resuming"] = f"after step {start:,} of {total:,}"
    console.say("\n".join(f"{name:>10}  {text}" for name, text in lines.items()), indent=12)


def baselines(evaluator: Evaluator, state: Any, keep: bool = False) -> dict[str, float]:
    """What training has to beat: the scores of raw pixels and of the untrained network.

    Args:
        evaluator: makes the scores.
        state: before the first step.
        keep: whether `evaluator.draw_neighbours` of that state follows.
    """
    results, scores = evaluator.raw_pixels(), evaluator(state, keep)
    if "teacher_top1" in scores:
        results["teacher_top1"] = scores["teacher_top1"]
    of_encoder = ("knn_top1", *verdict.LABEL_FREE)
    return results | {f"{n}{verdict.AT_INIT}": scores[n] for n in of_encoder if n in scores}


def draw_pairs(recipe: FeedRecipe, source: Source, workdir: epath.Path) -> None:
    """Draws the views of a few images, to see by eye what the augmentation does."""
    if jax.process_count() > 1:
        return
    ids, views = some_pairs(recipe, source, min(PAIRS, recipe.batch_size))
    originals = source.fetch(ids) if source.kind == "pixels" else None
    pictures.augmented_pairs(views, originals, workdir / "augmented_pairs.png")


def some_pairs(recipe: FeedRecipe, source: Source, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids `[n]` and views uint8 `[n, v, h, w, 3]` of the first batch, of that size."""
    small = dataclasses.replace(recipe, batch_size=n)
    if small.augment_on == "device" and not resident.has_one_shape(source):
        # --eval.source names other images than the run's
        small = dataclasses.replace(small, augment_on="host")
    if source.kind == "stream":  # a picture needs no shuffling among thousands
        fewer: dict[str, Any] = {"shuffle_buffer": n}
        source = dataclasses.replace(source, **fewer)
    batches = pipeline.train_batches(source, small, rows=np.arange(n))
    return dispatch.first_views(small, source, batches)


def finished(workdir: epath.Path) -> dict[str, Any] | None:
    """Prints and returns the summary of a run that has ended; None if there is none yet."""
    path = workdir / "summary.json"
    if not path.exists():
        return None
    try:
        summary = json.loads(path.read_text())
    except ValueError:  # torn by a full disk: it is written again
        return None
    console.say(
        f"This run is finished: {path} has the result. For another run give another --workdir."
    )
    console.say("\n".join(in_words(summary, workdir)), indent=2)
    return summary


def finish(
    run: Prepared,
    workdir: epath.Path,
    evaluator: Evaluator,
    state: Any,
    position: Position,
) -> dict[str, Any]:
    """Writes `summary.json` and the neighbours' picture, and says in words how it went.

    Args:
        run: what was trained.
        workdir: of the run.
        evaluator: draws the neighbours.
        state: after the last step.
        position: of the last checkpoint.
    """
    config, source, results = run.config, run.source, position.results
    if config.evaluate.pictures:
        evaluator.draw_neighbours(state, workdir / "nearest_neighbours.png", "after training")
    summary = {
        "method": config.method,
        "supervised": run.method.supervised,
        "dataset": f"{source.name} ({source.split})",
        "seed": config.seed,
        "started_from": config.init_from or config.resume_from or None,
        "steps": run.extent.total_steps,
        "batch_size": config.batch_size,
        "knn_top1": results.get("knn_top1"),
        "knn_top1_at_init": results.get("knn_top1_at_init"),
        "knn_top1_raw_pixels": results.get("knn_top1_raw_pixels"),
        "probe_top1": results.get("probe_test_top1"),
        "label_free": verdict.of_results(results),
        "images_per_second": position.images_per_second,
        "seconds": round(position.seconds, 1),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        **version.fields(),
    }
    if run.method.classification:
        names = ("student_top1", "teacher_top1")
        summary |= {name: " ".join(text.split()) for name, text in run.method.notes.items()}
        summary |= {name: results.get(name) for name in names}
        info = {
            "run": str(workdir), "top1": results.get("student_top1"), "method": config.method,
            "steps": summary["steps"], "dataset": summary["dataset"], "run_seed": config.seed,
            "started_from": summary["started_from"], **version.fields(),
        }  # fmt: skip
        run.method.finish(config, state, workdir, info)
    if jax.process_index() == 0:
        files.write_text(workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
    console.say("\n".join(in_words(summary, workdir)), indent=2)
    return summary


def in_words(summary: dict[str, Any], workdir: epath.Path) -> list[str]:
    """The last lines of a run."""
    supervised = ", supervised," if summary.get("supervised") else ""  # not in older summaries
    lines = ["", f"Trained {summary['method']}{supervised} for {summary['steps']:,} steps."]
    drawn = {
        str(workdir / name): text for name, text in PICTURES.items() if (workdir / name).exists()
    }
    lines += _of_the_classifier(summary)
    if summary["knn_top1"] is not None:
        knn, init, raw = (
            100 * summary[name] for name in ("knn_top1", "knn_top1_at_init", "knn_top1_raw_pixels")
        )
        # Weights of another run are no untrained state: the gain is then only that of this run, and
        # whether those weights have seen labels is not known here. (Absent in older summaries.)
        given = summary.get("started_from")
        lines += [
            f"A kNN classifier on its features is right on {knn:.1f} % of the test images.",
            f"The same network at its start, from {given}: {init:.1f} %, raw pixels: {raw:.1f} %."
            if given
            else f"The same network before training: {init:.1f} %, raw pixels: {raw:.1f} %.",
            _conclusion(summary, knn, init, raw),
        ]
    if summary["probe_top1"] is not None:
        lines.append(f"Linear probe, trained alongside: {100 * summary['probe_top1']:.1f} %.")
    scores = ("knn_top1", "probe_top1", "student_top1")
    lines += [] if all(summary.get(n) is None for n in scores) else verdict.in_brief(summary)
    if all(summary.get(name) is None for name in scores):
        lines += _without_labels(summary)
        lines += [f"  {path}: {text}" for path, text in drawn.items()]
        here = f"--workdir={shlex.quote(str(workdir))}"
        lines.append(
            f"  python main.py --mode=embed {here}: features, and a report with a map of them"
        )
        lines.append(
            f"  python main.py --mode=suggest {here}: which few images to label, for a real score"
        )
    elif drawn:
        lines.append(f"Pictures to look at: {', '.join(drawn)}")
    return lines


def _without_labels(summary: dict[str, Any]) -> list[str]:
    """What figures without labels say; absent in older summaries, None without a test split."""
    if not summary.get("label_free"):
        return ["No test images with labels, so no score. What can be looked at next:"]
    return [
        "No test images with labels, so no accuracy. Without labels, on held-out images:",
        *verdict.table(summary["label_free"], bool(summary.get("started_from"))),
        *verdict.words(summary, TOO_FEW),
        "What can be looked at next:",
    ]


def _of_the_classifier(summary: dict[str, Any]) -> list[str]:
    """How good a student is, beside its teacher; [] without one, or without test labels."""
    student, teacher = summary.get("student_top1"), summary.get("teacher_top1")
    if student is None:
        return []
    beside = ""
    if teacher is not None:
        beside = f", its teacher on {100 * teacher:.1f} % ({100 * (student - teacher):+.1f} points)"
    return [
        f"As a classifier the student is right on {100 * student:.1f} % of the test images{beside}."
    ]


def _conclusion(summary: dict[str, Any], knn: float, init: float, raw: float) -> str:
    """Whether it learned: only an encoder that beats its start and raw pixels did; all in %."""
    if summary.get("dataset", "").startswith("fake "):
        return "The images are random: these figures only show that all of it runs."
    if summary["steps"] < TOO_FEW:
        return f"{summary['steps']} steps are too few to say whether it learns."
    if min(knn, max(init, raw)) > 99.95:
        return "Nothing was left to gain: this task is too easy to say whether it learned."
    given = summary.get("started_from")
    start = "start" if given else "untrained state"
    gain, lead = f"{knn - init:+.1f} points over its {start}", f"{knn - raw:+.1f} points"
    if init < knn <= raw:
        return (
            f"It gained {gain}, but does not beat raw pixels ({lead}): too little to say that it "
            "learned."
        )
    verb = "learned" if knn > init else "did NOT learn"
    seen = (
        "with the labels of its training images"
        if summary.get("supervised")
        else "by what its teacher says of the images"
        if "teacher" in summary
        else f"without seeing a label{' in this run' if given else ''}"
    )
    return f"So it {verb}{' more' if given else ''}: {gain}, {lead} over raw pixels, {seen}."
