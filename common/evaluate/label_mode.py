"""`--mode=label`: labels for all images from those of a few."""

import collections
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from common.data.sources.base import Source
from common.data.sources.folder_source import shown
from common.errors import UserError
from common.evaluate import everything, few_labels, label_file, label_match, spreadsheet
from common.evaluate.everything import Images
from common.evaluate.few_labels import Estimate, Predictions
from common.evaluate.pretrained import Pretrained
from common.run import console
from common.sharding import of_first_process

_COLUMNS = (
    label_file.FILE, label_file.LABEL, label_file.GIVEN,
    "probability", "second", "second_probability", "knn",
)  # fmt: skip
_UNSURE, _CLASSES = 5, 12  # images and classes named in the sentence
_FLAG = "eval.label.csv"


def run(opened: Pretrained) -> tuple[dict[str, Any], str]:
    """Writes `labels.csv`, a row for each image, by classifiers trained on a table of labels.

    What is known of a labelled image is from the folds in which it was held out.
    """
    s = opened.settings
    if not s.label.csv:
        raise UserError(
            f"--mode=label needs labels: give --{_FLAG}=FILE, a table with the columns file,label; "
            "--mode=suggest writes one to fill in"
        )
    if s.label.l2 <= 0:
        raise UserError(f"eval.label.l2={s.label.l2:g}: expected a number above 0")
    table = of_first_process(label_file.read_all, s.label.csv, _FLAG)
    source = everything.open_all(opened, s.label.split, "eval.label.split")
    early = list(label_match.check(table, source).values())
    _check(early, shown(s.label.csv))
    _say_spellings(early)
    images = everything.features_of(opened, source)
    names = label_match.names_of(images)
    given, damaged = label_match.given(table, images)
    classes, labels = label_match.classes_of(given.values())
    _check(list(given.values()), shown(s.label.csv))
    rows = np.array(list(given), np.int64)
    trainer = few_labels.Trainer.of(images.features, len(classes), s)
    estimate = few_labels.cross_validate(trainer, rows, labels, s.seed)
    rest = np.setdiff1d(np.arange(len(images.ids)), rows)
    found = _together(estimate.predictions, rows, trainer.predict(rows, labels, rest), rest)
    lines = _lines(names[: len(images.names)], given, classes, found)
    first = _name(s.features)
    name, digest = of_first_process(_write, opened.workdir / first, lines, table, names)
    path = opened.workdir / name
    if name != first:
        console.say(
            f"{shown(opened.workdir / first)} was changed, or has labels that {s.label.csv} lacks: "
            f"it is kept, and {name} is new."
        )
    predicted = found.probabilities[rest].argmax(1)
    counts = collections.Counter({name: 0 for name in classes})
    counts.update(classes[i] for i in predicted)
    order = rest[np.argsort(few_labels.margins(found.probabilities[rest]), kind="stable")]
    unsure = [names[i] for i in order[:_UNSURE]]
    own = _by_folders(source, images, rest, [classes[i] for i in predicted], classes)
    metrics = {
        "protocol": "logistic regression on frozen features of un-augmented images",
        "images": len(images.ids),
        "given": len(rows),
        "sha256": digest,
        "classes": len(classes),
        **_recorded(estimate),
        "predicted": dict(counts),
        "folders_top1": own,
        "folders_images": int((images.labels[rest] >= 0).sum()) if own is not None else 0,
        "l2": s.label.l2,
        "left_out": len(images.left_out),
        "labelled_split": source.split,
        "files": [path.name],
    }
    text = _sentence(opened, source, metrics, estimate, classes, labels, path, unsure)
    return metrics, f"{text.removesuffix('.')}{damaged}{images.damage}."


def _name(features: str) -> str:
    """Of the table; what another encoder predicts, for comparison, must not replace it."""
    return "labels.csv" if features == "trained" else f"labels_{features}.csv"


def _check(given: Sequence[str], csv: str) -> None:
    if len(given) < 2:
        raise UserError(
            f"{csv} has labels for {len(given)} images: expected two or more, of two "
            "classes at least (a row without a label does not count)"
        )
    if len(set(given)) < 2:
        raise UserError(
            f"all {len(given):,} labels in {csv} are {given[0]!r}: expected two classes "
            "or more, also one for images that are none of these"
        )


def _say_spellings(given: Sequence[str]) -> None:
    """Names two classes whose names differ in upper and lower case alone."""
    spelt: dict[str, str] = {}
    for name in sorted(set(given)):
        other = spelt.setdefault(name.casefold(), name)
        if other != name:
            console.say(f"{other!r} and {name!r} are taken for two classes.")


def _together(
    held_out: Predictions, rows: np.ndarray, predicted: Predictions, rest: np.ndarray
) -> Predictions:
    """The predictions of `rows` and those of `rest` as one, in the order of the images."""
    n, c = len(rows) + len(rest), predicted.probabilities.shape[1]
    found = Predictions(np.zeros((n, c)), np.full(n, -1))
    for places, part in ((rows, held_out), (rest, predicted)):
        found.probabilities[places], found.knn[places] = part.probabilities, part.knn
    return found


def _lines(
    names: Sequence[str], given: dict[int, str], classes: Sequence[str], found: Predictions
) -> list[tuple[str, ...]]:
    """The rows of `labels.csv`, in the order of the source, `names` being those of its images."""
    lines: list[tuple[str, ...]] = []
    for i, name in enumerate(names):
        p = found.probabilities[i]
        label = classes.index(given[i]) if i in given else int(p.argmax())
        others = [int(j) for j in np.argsort(-p, kind="stable") if j != label]
        told = (f"{p[label]:.3f}", classes[others[0]], f"{p[others[0]]:.3f}", classes[found.knn[i]])
        if found.knn[i] < 0:  # the only one of its class
            told = ("", "", "", "")
        lines.append((name, classes[label], "yes" if i in given else "no", *told))
    return lines


def _write(
    first: epath.Path,
    lines: Sequence[tuple[str, ...]],
    table: Sequence[label_file.Row],
    names: Sequence[str],
) -> tuple[str, str]:
    """Writes the table, under another name where one must be kept; its name and digest."""
    path = label_file.free(
        first, lambda old: label_file.as_written(old) and _covered(old, table, names)
    )
    spreadsheet.write(path, _COLUMNS, lines)
    return path.name, label_file.digest(path)


def _covered(old: epath.Path, table: Sequence[label_file.Row], names: Sequence[str]) -> bool:
    """Whether the table labels all images that had labels given in an older `labels.csv`.

    A label may be another now: somebody has put right a mistake. Not if the older one cannot be
    read, or names images that are not there any more.
    """
    try:
        before = label_match.match(label_file.read(old, _FLAG), names)
    except UserError:
        return False
    return before.keys() <= label_match.match(table, names).keys()


def _by_folders(
    source: Source, images: Images, rest: np.ndarray, predicted: Sequence[str],
    classes: Sequence[str],
) -> float | None:  # fmt: skip
    """Share of the predictions that are the name of the image's own class; None: no such names."""
    names = [unicodedata.normalize("NFC", str(name)) for name in source.class_names]
    own = images.labels[rest]
    if not set(classes) <= set(names) or not (own >= 0).any():
        return None
    right = [names[i] == name for i, name in zip(own, predicted, strict=True) if i >= 0]
    return float(np.mean(right))


def _recorded(estimate: Estimate) -> dict[str, Any]:
    known = estimate.scored > 0
    return {
        "cv_accuracy": estimate.accuracy if known else None,
        "cv_standard_error": estimate.error if known else None,
        "cv_knn_accuracy": estimate.knn if known else None,
        "cv_majority_accuracy": estimate.majority if known else None,
        "cv_images": estimate.scored,
        "cv_folds": estimate.folds,
        "cv_repeats": estimate.repeats,
    }


def _sentence(
    opened: Pretrained,
    source: Source,
    metrics: dict[str, Any],
    estimate: Estimate,
    classes: Sequence[str],
    labels: np.ndarray,
    path: epath.Path,
    unsure: Sequence[str],
) -> str:
    """All that was found, for the terminal."""
    predicted = collections.Counter(metrics["predicted"]).most_common()
    counts = ", ".join(f"{shown(name)} {count:,}" for name, count in predicted[:_CLASSES])
    if len(predicted) > _CLASSES:
        counts += f", {len(predicted) - _CLASSES:,} more classes in results.jsonl"
    text = (
        f"{metrics['images']:,} images of {source.name} ({source.split}) labelled by "
        f"{opened.subject} from {metrics['given']:,} labels of {len(classes)} classes: {path}. "
        + _accuracy(estimate, classes, labels)
    )
    if metrics["folders_top1"] is not None:
        text += (
            f" By the folders' own labels: {100 * metrics['folders_top1']:.2f} % right of the "
            f"{metrics['folders_images']:,} images not in the table."
        )
    if unsure:
        text += f" Predicted: {counts}. Least sure of: {', '.join(map(shown, unsure))}."
    return text


def _accuracy(estimate: Estimate, classes: Sequence[str], labels: np.ndarray) -> str:
    """The cross-validated accuracy, what it is compared with, and how far it can be trusted."""
    counts = np.bincount(labels, minlength=len(classes))
    alone = [shown(name) for name, count in zip(classes, counts, strict=True) if count == 1]
    if not estimate.scored:
        return (
            "Its accuracy is unknown: no class has two labels, of which one could be predicted "
            "from the other."
        )
    largest = classes[int(counts.argmax())]
    times = f", drawn {estimate.repeats} times" if estimate.repeats > 1 else ""
    text = (
        f"Accuracy by cross-validation on {estimate.scored:,} labelled images ({estimate.folds} "
        f"folds{times}): {100 * estimate.accuracy:.1f} %, give or take {100 * estimate.error:.1f} "
        f"(standard error, for {estimate.scored:,} images); kNN {100 * estimate.knn:.1f} %; "
        f"always {shown(largest)!r} {100 * estimate.majority:.1f} %."
    )
    if alone:
        text += (
            f" Not scored, since they have one label each: {', '.join(alone)}."
            if len(alone) > 1
            else f" Not scored, since it has one label: {alone[0]}."
        )
    return text
