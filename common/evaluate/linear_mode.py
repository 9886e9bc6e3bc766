"""`--mode=linear_eval`: a linear classifier on the frozen encoder (Chen et al. 2020, B.6).

Two variants. "augmented" is the papers': every epoch encodes new crops and flips of the images.
"cached" encodes each image once, un-augmented, and trains on the features: minutes instead of
hours, and usually slightly less accurate. Settings are chosen on a held-out part of train, then
the classifier is trained again on all of train; the test split is read after that.
"""

import io
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from common.data.sources import subset
from common.data.sources.base import Source
from common.errors import UserError, one_of
from common.evaluate import accuracy, batches, linear, logistic
from common.evaluate.pretrained import Pretrained
from common.run import console

VARIANTS = ("auto", "cached", "augmented")


def run(opened: Pretrained) -> tuple[dict[str, Any], str]:
    """Trains, selects and scores a classifier, and saves that of a trained encoder."""
    c = opened.settings.linear
    variant = _variant(opened)
    train, test = opened.open_labelled("train"), opened.open_labelled("test")
    before = jax.device_get(_encoder_arrays(opened))
    bank = Bank(opened, train, variant)
    if c.optimizer == "lbfgs":
        classifier, how, words = _by_lbfgs(opened, bank)
    else:
        classifier, how, words = _by_sgd(opened, bank)
    check_unchanged(before, jax.device_get(_encoder_arrays(opened)))

    queries, wanted, _ = opened.extract(test)
    queries, wanted = accuracy.labelled("test", queries, wanted)
    metrics = accuracy.top_k(classifier.logits(queries), wanted) | {
        "protocol": f"linear classifier, {words}",
        "variant": variant,
        "optimizer": c.optimizer,
        "num_train": len(bank.labels),
        "num_test": len(wanted),
        **how,
    }
    if opened.settings.features == "trained":
        metrics["classifier"] = _save(opened, classifier, train)
    return metrics, (
        f"Linear classifier ({words}) on {opened.subject}: {accuracy.in_words(metrics, test)}."
    )


class Bank:
    """The labelled training rows: their features, and batches of them for either variant.

    Attributes:
        features: `[n, d]`, of un-augmented images.
        labels: int32 `[n]`, all >= 0.
        num_classes: c.
    """

    def __init__(self, opened: Pretrained, train: Source, variant: str) -> None:
        self._opened, self._train, self._variant = opened, train, variant
        features, labels, ids = opened.extract(train)
        self.features, self.labels = accuracy.labelled("training", features, labels)
        self._ids, self.num_classes = ids[labels >= 0], train.num_classes
        if not np.isfinite(self.features.sum(dtype=np.float64)):
            raise UserError(
                f"features of {opened.subject} are not finite: this run has diverged; "
                "choose an earlier checkpoint with --eval.step"
            )

    def fit(self, rows: np.ndarray, candidates: list[linear.Candidate]) -> list[linear.Classifier]:
        """One classifier for each candidate, trained on some of the rows, int `[m]`."""
        c, mesh = self._opened.settings.linear, self._opened.mesh
        mean, scale = np.zeros(self.features.shape[1]), np.ones(self.features.shape[1])
        if c.standardise:
            # rows of norm about 1, so that one range of learning rates serves all encoders
            mean, scale = linear.standardiser(self.features[rows])
            scale = scale * len(scale) ** -0.5
        size = batches.batch_size_for(c.batch_size, len(rows), mesh)
        per_epoch, pairs = self._batches(rows, size)
        return linear.fit(
            pairs, max(1, round(c.epochs * per_epoch)), candidates, size,
            self.num_classes, mean, scale, mesh, c.momentum, c.nesterov,
        )  # fmt: skip

    def _batches(self, rows: np.ndarray, size: int) -> tuple[int, Iterator]:
        """Steps in an epoch, and endless `(features, labels)`."""
        opened, train = self._opened, self._train
        if self._variant == "cached":
            features, labels, seed = self.features[rows], self.labels[rows], opened.settings.seed
            return len(rows) // size, batches.cached(features, labels, opened.mesh, size, seed)
        keep = None
        if train.kind == "stream":  # no random access: labels are hidden instead
            keep = np.isin(np.arange(train.num_examples), self._ids[rows])
        else:
            train = subset.select(train, self._ids[rows])
        pairs = opened.batches(train, size, keep)
        encoded = ((opened.encoder(images), labels) for images, labels in pairs)
        return train.num_examples // size, encoded


def check_unchanged(before: Any, after: Any) -> None:
    """Raises if an array of the encoder differs in any bit (MoCo's `sanity_check`)."""
    a, b = jax.tree.leaves_with_path(before), jax.tree.leaves(after)
    for (path, x), y in zip(a, b, strict=True):
        if np.asarray(x).tobytes() != np.asarray(y).tobytes():
            raise RuntimeError(f"the frozen encoder changed: {jax.tree_util.keystr(path)}")


def _variant(opened: Pretrained) -> str:
    c, pixels = opened.settings.linear, opened.settings.features == "pixels"
    one_of("eval.linear.variant", c.variant, VARIANTS)
    one_of("eval.linear.optimizer", c.optimizer, ("sgd", "lbfgs"))
    if c.variant == "augmented" and (pixels or c.optimizer == "lbfgs"):
        what = "raw pixels" if pixels else "lbfgs"
        raise UserError(f"eval.linear.variant=augmented does not work with {what}: use cached")
    if c.variant != "auto":
        return c.variant
    small = pixels or c.optimizer == "lbfgs" or jax.default_backend() == "cpu"
    return "cached" if small else "augmented"


def _by_sgd(opened: Pretrained, bank: Bank) -> tuple[linear.Classifier, dict, str]:
    c, n = opened.settings.linear, len(bank.labels)
    grid = [
        linear.Candidate(float(rate), float(decay))
        for rate, decay in itertools.product(c.learning_rate, c.weight_decay)
    ]
    if not grid or c.epochs <= 0:
        raise UserError(
            "eval.linear needs a learning_rate, a weight_decay and epochs above 0, found "
            f"{c.learning_rate}, {c.weight_decay} and {c.epochs}"
        )
    chosen, held = grid[0], np.zeros(0, np.int64)
    if len(grid) > 1:
        held = subset.held_out(bank.labels, c.held_out, opened.settings.seed)
        console.say(f"Choosing among {len(grid)} settings by {len(held):,} training images.")
        rest = np.setdiff1d(np.arange(n), held)
        fits = bank.fit(rest, grid)
        chosen = grid[linear.best(fits, bank.features[held], bank.labels[held])]
    console.say(f"Training on all {n:,} images.")
    (classifier,) = bank.fit(np.arange(n), [chosen])
    how = {
        "learning_rate": chosen.learning_rate,
        "weight_decay": chosen.weight_decay,
        "settings_tried": len(grid),
        "num_held_out": len(held),
        "momentum": c.momentum,
        "nesterov": c.nesterov,
        "standardise": c.standardise,
        "epochs": c.epochs,
        "batch_size": batches.batch_size_for(c.batch_size, n, opened.mesh),
    }
    which = "cached features" if _variant(opened) == "cached" else "crops and flips"
    words = (
        f"{which}, SGD, {c.epochs} epochs, learning rate {chosen.learning_rate:g} x batch / 256, "
        f"weight decay {chosen.weight_decay:g}"
    )
    if len(held):
        words += f", chosen by {len(held):,} held-out training images"
    return classifier, how, words


def _by_lbfgs(opened: Pretrained, bank: Bank) -> tuple[linear.Classifier, dict, str]:
    found = logistic.choose(
        bank.features, bank.labels, bank.num_classes, opened.settings.logistic, opened.settings.seed
    )
    return found.classifier, found.record, f"cached features, L-BFGS, {found.words}"


def _encoder_arrays(opened: Pretrained) -> Any:
    return None if opened.state is None else (opened.state.params, opened.state.batch_stats)


def _save(opened: Pretrained, classifier: linear.Classifier, train: Source) -> str:
    """Writes the classifier beside the run; returns the file's name."""
    layer = opened.settings.layer
    name = "linear_eval.npz" if layer == "backbone" else f"linear_eval_{layer}.npz"
    if jax.process_index() == 0:
        buffer = io.BytesIO()
        np.savez(
            buffer,
            kernel=classifier.kernel,
            bias=classifier.bias,
            class_names=np.array(train.class_names, str),
            step=opened.step,
            layer=layer,
            source=opened.config.data.source,
            split=train.split,
            image_size=opened.settings.image_size or opened.config.data.image_size,
        )
        (opened.workdir / name).write_bytes(buffer.getvalue())
    return name
