"""What a run measures of itself: weighted kNN and the online probe, on the test split."""

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from common.data.feed import pipeline
from common.data.sources import slices
from common.data.sources.base import Source
from common.errors import UserError
from common.evaluate import features, knn
from common.method import Method
from common.models.probe import Probe
from common.run import pictures
from common.sharding import local_rows
from common.train.prepare import Prepared


class Evaluator:
    """One protocol for the trained encoder, the untrained one, and raw pixels.

    Cosine kNN on the pooled backbone features of un-augmented images, train split (or
    `data.bank_split`) against test split: k = min(200, n / 10), T = 0.1 unless `config.evaluate`
    says otherwise.

    Args:
        method: gives `encode`.
        probe: of the run; with labels its test accuracy is reported too.
        bank, test: the source whose examples vote, and the one that is scored; `test=None` or an
            unlabelled set leaves kNN out.
    """

    def __init__(
        self,
        config: ConfigDict,
        mesh: Mesh,
        method: Method,
        probe: Probe,
        bank: Source,
        test: Source | None,
    ) -> None:
        self.config, self.mesh, self.probe = config, mesh, probe
        self.bank, self.test = bank, test
        self._encode = features.jit_encoder(method.encode, mesh)
        self._pixels = features.jit_encoder(lambda _, x: x.reshape(x.shape[0], -1), mesh)

    @property
    def enabled(self) -> bool:
        """Whether there are labels to score by."""
        return self.test is not None and self.bank.num_classes > 0

    @staticmethod
    def check(config: ConfigDict, bank: Source, test: Source | None) -> None:
        """Says of settings that work and say nothing so, and refuses those that cannot work.

        Raises:
            UserError: if more neighbours are asked for than there are images.
        """
        if test is not None and bank.num_classes:
            warn_of_overlap(config.data)
        c, n = config.evaluate, bank.num_examples
        n = min(n, c.knn_examples or n)
        if c.knn_k > n and bank.num_classes and test is not None:  # else nobody votes
            raise UserError(
                f"evaluate.knn_k={c.knn_k} is more than the {n:,} images of {bank.split} that "
                f"vote: expected at most {n}, or 0 for a tenth of them up to 200"
            )

    def __call__(self, state: Any) -> dict[str, float]:
        """Returns `knn_top1`, and `probe_test_top1` when there is a probe; {} without labels."""
        if not self.enabled:
            return {}
        bank, queries = self._both(functools.partial(self._encode, state))
        if not _labelled(bank, queries):
            return {}
        metrics = {"knn_top1": self._knn(bank, queries)}
        if getattr(state, "probe", None) is not None:
            logits = np.asarray(self.probe.predict(jax.device_get(state.probe), queries[0]))
            labelled = queries[1] >= 0
            metrics["probe_test_top1"] = float((logits.argmax(-1) == queries[1])[labelled].mean())
        return metrics

    def raw_pixels(self) -> dict[str, float]:
        """The same kNN on pixels, which no encoder should lose against."""
        if not self.enabled:
            return {}
        bank, queries = self._both(functools.partial(self._pixels, None))
        if not _labelled(bank, queries):
            logging.warning(
                "no kNN: %s or %s has no labels, though its data set has classes; name a labelled "
                "split in data.bank_split or data.test_split", self.bank.split, self.test.split,
            )  # fmt: skip
            return {}
        return {"knn_top1_raw_pixels": self._knn(bank, queries)}

    def draw_neighbours(
        self, state: Any, path: epath.Path, rows: int = 8, columns: int = 8
    ) -> bool:
        """Draws test images with their nearest in the bank; False where neither is at hand."""
        sources = (self.bank, self.test)
        if self.test is None or any(source.kind == "stream" for source in sources):
            return False
        bank, queries = self._both(functools.partial(self._encode, state))
        # evenly spread, so that sorted test sets show several classes
        chosen = np.linspace(0, len(queries[0]) - 1, min(rows, len(queries[0]))).astype(int)
        k = min(columns, len(bank[0]))
        indices, _ = knn.neighbours(
            bank[0], queries[0][chosen], k, center=self.config.evaluate.knn_center
        )
        size = self.config.data.image_size
        shown = pipeline.images_of(self.test, queries[2][chosen], size)
        found = pipeline.images_of(self.bank, bank[2][np.asarray(indices).reshape(-1)], size)
        if jax.process_index() == 0:
            pictures.nearest_neighbours(
                shown,
                found.reshape(len(chosen), k, *found.shape[1:]),
                queries[1][chosen] if self.enabled else None,
                bank[1][np.asarray(indices)] if self.enabled else None,
                self.bank.class_names or None,
                path,
            )
        return True

    def _knn(self, bank: tuple, queries: tuple) -> float:
        c = self.config.evaluate
        return knn.knn_top1(
            bank[0],
            bank[1],
            queries[0],
            queries[1],
            self.bank.num_classes,
            k=c.knn_k or None,
            temperature=c.knn_temperature,
            center=c.knn_center,
        )

    def _both(self, encode: Callable) -> tuple[tuple, tuple]:
        """`(features, labels, ids)` of the bank and of the test split."""
        limit = self.config.evaluate.knn_examples
        bank, queries = (
            features.extract(encode, self._batches(source, n), self.mesh)
            for source, n in ((self.bank, limit), (self.test, 0))
        )
        # of a streamed set whole batches were read
        return tuple(x[: limit or None] for x in bank), queries

    def _batches(self, source: Source, limit: int) -> Iterator[dict[str, np.ndarray]]:
        size = self.config.evaluate.batch_size or self.config.batch_size
        size = -(-size // self.mesh.size) * self.mesh.size  # padding makes up the rest
        return pipeline.eval_batches(
            source,
            size,
            self.config.data.image_size,
            local_rows(self.mesh, size),
            limit=limit,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )


def make_evaluator(run: Prepared, bank: Source, test: Source | None) -> Evaluator:
    """The evaluator of a run, for `common.train.loop.train`.

    Raises:
        UserError: for settings that cannot work.
    """
    Evaluator.check(run.config, bank, test)
    return Evaluator(run.config, run.mesh, run.method, run.setup.probe, bank, test)


def warn_of_overlap(data: ConfigDict) -> None:
    """Warns where the split that votes has images of the one that is scored."""
    votes = data.bank_split or data.train_split
    if slices.overlap(votes, data.test_split):
        logging.warning(
            "the splits %s and %s share images: what is scored was seen, so accuracies are too "
            "high; name other splits, e.g. train[:80%%] and train[80%%:]", votes, data.test_split,
        )  # fmt: skip


def _labelled(*sets: tuple) -> bool:
    """Whether each of the `(features, labels, ids)` has a label."""
    return all((labels >= 0).any() for _, labels, _ in sets)
