"""`--mode=transfer`: how well the features transfer to other datasets (Chen et al. 2020, B.8)."""

import dataclasses
import re
from typing import Any

from common.data.sources.base import Source
from common.data.sources.opening import KINDS
from common.errors import UserError
from common.evaluate import accuracy, logistic
from common.evaluate.pretrained import Pretrained, set_source
from common.run import console, files

# A split may be a TFDS slice, with a colon of its own: train[:80%]
_SPLIT = r"[^@/:\[\],]+(?:\[[^\]]*\])?"
# A path may contain commas: datasets are separated by one that a kind of source follows.
_BETWEEN = re.compile(rf",(?=\s*(?:{'|'.join(KINDS)})\b)")
_SPLITS = re.compile(rf"(?P<source>.+)@(?P<train>{_SPLIT}):(?P<test>{_SPLIT})")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Where images come from, in the terms of `config.data`."""

    source: str
    train_split: str
    test_split: str


def parse(text: str, default: Dataset) -> list[Dataset]:
    """Reads `eval.transfer.sources`, e.g. "embedded,tfds:cifar10,folder:PATH@train:val".

    Args:
        text: datasets separated by commas, each followed by @ and its splits where they are not
            train and test.
        default: what "" means.

    Raises:
        UserError: for splits that are not TRAIN:TEST.
    """
    if not text.strip():
        return [default]
    found = []
    if re.search(r"^\s*,|,\s*(,|$)", text):
        raise UserError(f"eval.transfer.sources={text!r} has a comma too many: remove it")
    for part in (part.strip() for part in _BETWEEN.split(text)):
        match = None if _is_folder(part) else _SPLITS.fullmatch(part)
        if not match and "@" in part.rsplit("/", 1)[-1] and not _is_folder(part):
            raise UserError(
                f"eval.transfer.sources has {part!r}: expected SOURCE@TRAIN:TEST, such as "
                "folder:PATH@train:val"
            )
        found.append(Dataset(*match.groups()) if match else Dataset(part, "train", "test"))
    return found


def _is_folder(source: str) -> bool:
    """Whether a folder of exactly this name exists: an @ is then part of its name."""
    kind, _, path = source.partition(":")
    return kind in ("folder", "shards") and files.path(path).is_dir()


def run(opened: Pretrained) -> tuple[dict[str, Any], str]:
    """Logistic regression on the features of each dataset, and the mean accuracy."""
    d = opened.config.data
    own = Dataset(d.source, d.train_split, d.test_split)
    wanted = parse(opened.settings.transfer.sources, own)
    sources = [_open(opened, dataset) for dataset in wanted]  # mistakes show at once
    results, sentences = [], []
    for dataset, (train, test) in zip(wanted, sources, strict=True):
        console.say(f"{train.name}: extracting features.")
        features, labels, _ = opened.extract(train)
        features, labels = accuracy.labelled("training", features, labels)
        found = logistic.choose(
            features, labels, train.num_classes, opened.settings.logistic, opened.settings.seed
        )
        queries, wanted_labels, _ = opened.extract(test)
        queries, wanted_labels = accuracy.labelled("test", queries, wanted_labels)
        scores = accuracy.top_k(found.classifier.logits(queries), wanted_labels)
        result = dataclasses.asdict(dataset) | scores | {"num_test": len(wanted_labels)}
        results.append(result | found.record)
        sentences.append(f"{accuracy.in_words(result, test)} ({found.words})")
    metrics = {
        "protocol": "logistic regression (L-BFGS) on features of un-augmented images",
        "top1": sum(r["top1"] for r in results) / len(results),
        "data_sets": results,
        "source": ",".join(r["source"] for r in results),
        "train_split": ",".join(r["train_split"] for r in results),
        "test_split": ",".join(r["test_split"] for r in results),
        "num_train": sum(r["num_train"] for r in results),
        "num_test": sum(r["num_test"] for r in results),
    }
    return metrics, f"Logistic regression on {opened.subject}: " + "; ".join(sentences) + "."


def _open(opened: Pretrained, dataset: Dataset) -> tuple[Source, Source]:
    """Its train and its test split."""
    config = opened.config.copy_and_resolve_references()
    with config.unlocked():
        set_source(opened.settings, config.data, dataset.source)
        config.data.update(dataclasses.asdict(dataset))
    there = dataclasses.replace(opened, config=config)
    return there.open_labelled("train"), there.open_labelled("test")
