"""Scores of a run in training, on the test split: kNN, the online probe, label-free figures."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from common.data.feed import pipeline
from common.data.feed.recipe import FeedRecipe
from common.data.sources.base import Source
from common.errors import UserError
from common.evaluate import accuracy, features, held_out_views, knn, label_free
from common.evaluate.features import Features
from common.evaluate.held_out_views import HeldOutViews
from common.method import Classification, Method
from common.models.probe import Probe
from common.run import console, pictures
from common.train.prepare import Prepared


class Evaluator:
    """One protocol for the trained encoder, the untrained one, and raw pixels.

    Cosine kNN on the pooled backbone features of un-augmented images, train split (or
    `data.bank_split`) against test split: k = min(200, n / 10), T = 0.1 unless `settings` says
    otherwise.

    Args:
        settings: the section `evaluate` of the config.
        mesh: the device mesh.
        method: provides `encode`.
        probe: of the run; with labels its test accuracy is reported too.
        bank: the source whose examples vote.
        test: the source that is scored; None or an unlabelled one leaves kNN out.
        batch_size: images encoded at a time where `settings.batch_size` is 0.
        image_size: side of the images, in pixels.
        recipe: how the run augments, for the label-free figures; None leaves them out.
    """

    def __init__(
        self,
        settings: ConfigDict,
        mesh: Mesh,
        method: Method,
        probe: Probe,
        bank: Source,
        test: Source | None,
        *,
        batch_size: int,
        image_size: int,
        recipe: FeedRecipe | None = None,
    ) -> None:
        self.settings, self.mesh, self.probe = settings, mesh, probe
        self.bank, self.test = bank, test
        self.batch_size, self.image_size = settings.batch_size or batch_size, image_size
        self.classification = _scorable(method, test)
        if self.classification is not None:
            self._teacher = features.jit_encoder(self.classification.teacher, mesh)
        self._encode = features.jit_encoder(method.encode, mesh)
        self._pixels = features.jit_encoder(features.flatten_pixels, mesh)
        self._views = None
        self._kept: tuple[Features, Features] | None = None
        most = settings.label_free_examples
        if recipe and test is not None and most > 1 and not held_out_views.obstacle(test):
            self._views = HeldOutViews(test, recipe, mesh, self.batch_size, most)

    @staticmethod
    def check(settings: ConfigDict, bank: Source, test: Source | None) -> None:
        """Warns of splits that overlap, and refuses settings that cannot work.

        Args:
            settings: the section `evaluate` of the config.
            bank: the source whose examples vote.
            test: the source that is scored, or None.

        Raises:
            UserError: if more neighbours are asked for than there are images.
        """
        if test is None:
            return
        accuracy.warn_of_overlap(bank.split, test.split)
        if not bank.num_classes:  # nobody votes
            return
        n = bank.num_examples
        n = min(n, settings.knn_examples or n)
        if settings.knn_k > n:
            raise UserError(
                f"evaluate.knn_k={settings.knn_k} is more than the {n:,} images of {bank.split} "
                f"that vote: expected at most {n}, or 0 for a tenth of them up to 200"
            )

    def __call__(self, state: Any, keep: bool = False) -> dict[str, float]:
        """Returns scores on the test split by name; {} without one.

        With labels `knn_top1`; `probe_test_top1` when there is a probe; of a network that learns to
        classify `student_top1`, and before its first step `teacher_top1`, which no step changes.
        With or without them those of `label_free.figures`.

        Args:
            state: of the encoder.
            keep: keeps the features for one `draw_neighbours` of the same state, which must follow.
        """
        encode = functools.partial(self._encode, state)
        return self._with_labels(state, encode, keep) | self._label_free(encode)

    def _with_labels(self, state: Any, encode: Callable, keep: bool) -> dict[str, float]:
        test = self._scored()
        if test is None:
            if self.classification is None:
                return {}
            assert self.test is not None
            return self._classified(state, self._features(encode, self.test))
        bank, queries = self._both(encode, test)
        self._kept = (bank, queries) if keep else None
        metrics = self._classified(state, queries)
        if not _labelled(bank, queries):
            return metrics
        metrics["knn_top1"] = self._knn(bank, queries)
        if getattr(state, "probe", None) is not None:
            logits = self.probe.predict(jax.device_get(state.probe), jnp.asarray(queries.features))
            right = np.asarray(logits).argmax(-1) == queries.labels
            metrics["probe_test_top1"] = float(right[queries.labels >= 0].mean())
        return metrics

    def raw_pixels(self) -> dict[str, float]:
        """The same scores of pixels, which every encoder should beat."""
        found = self._label_free(self._pixels)
        return {f"{n}_raw_pixels": x for n, x in found.items()} | self._knn_of_pixels()

    def _label_free(self, encode: Callable) -> dict[str, float]:
        return label_free.figures(*self._views.features(encode)) if self._views else {}

    def _knn_of_pixels(self) -> dict[str, float]:
        test = self._scored()
        if test is None:
            return {}
        bank, queries = self._both(self._pixels, test)
        if not _labelled(bank, queries):
            logging.warning(
                "no kNN: %s or %s has no labels, though its dataset has classes; name a labelled "
                "split in data.bank_split or data.test_split", self.bank.split, test.split,
            )  # fmt: skip
            return {}
        return {"knn_top1_raw_pixels": self._knn(bank, queries)}

    def draw_neighbours(
        self, state: Any, path: epath.Path, when: str = "", rows: int = 8, columns: int = 8
    ) -> bool:
        """Draws test images with their nearest in the bank.

        It takes the features that a call with `keep` has left, and lets go of them.

        Args:
            state: of the encoder.
            path: of the PNG.
            when: in the run, for the title.
            rows, columns: test images, and neighbours of each.

        Returns:
            False, and nothing is drawn, without a test split or where one of the two is streamed
            and has no random access.
        """
        test, kept = self.test, self._kept
        self._kept = None
        if test is None or "stream" in (self.bank.kind, test.kind):
            return False
        bank, queries = kept or self._both(functools.partial(self._encode, state), test)
        # evenly spaced, so that sorted test splits show several classes
        chosen = np.linspace(0, len(queries.ids) - 1, min(rows, len(queries.ids))).astype(int)
        k = min(columns, len(bank.ids))
        nearest, _ = knn.neighbours(
            bank.features, queries.features[chosen], k, center=self.settings.knn_center
        )
        shown = pipeline.images_of(test, queries.ids[chosen], self.image_size)
        found = pipeline.images_of(self.bank, bank.ids[nearest.reshape(-1)], self.image_size)
        if jax.process_index() == 0:
            labelled = self.bank.num_classes > 0
            pictures.nearest_neighbours(
                shown,
                found.reshape(len(chosen), k, *found.shape[1:]),
                queries.labels[chosen] if labelled else None,
                bank.labels[nearest] if labelled else None,
                self.bank.class_names or None,
                path,
                title=f"Nearest neighbours by the features{f' {when}' if when else ''}",
            )
        return True

    def _scored(self) -> Source | None:
        """The test split, where there are classes to score by."""
        return self.test if self.bank.num_classes else None

    def _knn(self, bank: Features, queries: Features) -> float:
        c = self.settings
        return knn.knn_top1(
            bank.features,
            bank.labels,
            queries.features,
            queries.labels,
            self.bank.num_classes,
            k=c.knn_k or None,
            temperature=c.knn_temperature,
            center=c.knn_center,
        )

    def _classified(self, state: Any, queries: Features) -> dict[str, float]:
        """Scores of the network's own classes, from its features of the test split."""
        c, known = self.classification, queries.labels >= 0
        if c is None or self.test is None or not known.any():
            return {}
        local = jax.device_get(state)

        def top1(logits: Any) -> float:
            right = accuracy.top_k(np.asarray(logits)[known], queries.labels[known])["top1"]
            return float(right)

        scores = {"student_top1": top1(c.student(local, jnp.asarray(queries.features)))}
        if int(local.step) == 0:
            encode = functools.partial(self._teacher, state)
            scores["teacher_top1"] = top1(self._features(encode, self.test).features)
        return scores

    def _features(self, encode: Callable, source: Source, limit: int = 0) -> Features:
        size = self.batch_size, self.image_size
        return features.of_source(encode, source, self.mesh, *size, limit)

    def _both(self, encode: Callable, test: Source) -> tuple[Features, Features]:
        """The features of the examples that vote, and of the test split."""
        bank = self._features(encode, self.bank, self.settings.knn_examples)
        return bank, self._features(encode, test)


def make_evaluator(run: Prepared, bank: Source, test: Source | None) -> Evaluator:
    """The evaluator of a run, for `common.train.loop.train`.

    Raises:
        UserError: for settings that cannot work.
    """
    Evaluator.check(run.config.evaluate, bank, test)
    if test is not None and run.data is not None and bank.split != run.data.split:
        accuracy.warn_of_overlap(run.data.split, test.split)
    if run.config.evaluate.label_free_examples and (reason := held_out_views.obstacle(test)):
        console.say(f"no figures without labels (docs/evaluation.md): {reason}")
    return Evaluator(
        run.config.evaluate, run.mesh, run.method, run.setup.probe, bank, test,
        batch_size=run.config.batch_size, image_size=run.config.data.image_size,
        recipe=run.recipe,
    )  # fmt: skip


def _scorable(method: Method, test: Source | None) -> Classification | None:
    """What the method classifies by, if that can be scored on the test split; says why not."""
    classification = getattr(method, "classification", None)
    if classification is None or test is None or not test.num_classes:
        return None
    if difference := accuracy.unlike(classification.classes, test):
        console.say(
            f"the student is not scored as a classifier: {test.name} ({test.split}) has "
            f"{difference}"
        )
        return None
    return classification


def _labelled(*splits: Features) -> bool:
    """Whether each of them has a label."""
    return all((split.labels >= 0).any() for split in splits)
