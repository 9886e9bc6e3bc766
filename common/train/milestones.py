"""What is done after some steps of a run: scores, checkpoints, and the last one before a stop."""

import dataclasses
import time
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from common.data.feed.batches import Batches
from common.optim import steps_of
from common.run.checkpoint import Checkpoints
from common.run.lock import Lock
from common.run.writer import MetricsWriter
from common.train import summary, verdict
from common.train.divergence import Watch
from common.train.evaluator import Evaluator
from common.train.position import Position
from common.train.preemption import PreemptedError, Preemption
from common.train.prepare import Extent, Prepared


@dataclasses.dataclass(frozen=True)
class Due:
    """After which steps there are scores and checkpoints: after the last, and each so many.

    Attributes:
        total: the last step.
        checkpoint: steps between checkpoints; 0: only the last.
        evaluate: steps between scores; 0: only the last.
        keep_every: of each so many steps the first checkpoint stays; 0: none does.
    """

    total: int
    checkpoint: int
    evaluate: int
    keep_every: int = 0

    @classmethod
    def of(cls, config: ConfigDict, extent: Extent) -> "Due":
        """From the durations in a config."""

        def steps(name: str, duration: str) -> int:
            return steps_of(duration, extent.steps_per_epoch, extent.total_steps, name=name)

        return cls(
            extent.total_steps,
            checkpoint=steps("checkpoint.every", config.checkpoint.every),
            evaluate=steps("evaluate.every", config.evaluate.every),
            keep_every=steps("checkpoint.keep_every", config.checkpoint.keep_every),
        )

    def saves(self, step: int) -> bool:
        """Whether a checkpoint follows this step."""
        return step == self.total or bool(self.checkpoint and step % self.checkpoint == 0)

    def scores(self, step: int) -> bool:
        """Whether scores follow this step."""
        return step == self.total or bool(self.evaluate and step % self.evaluate == 0)

    def anything(self, step: int) -> bool:
        """Whether either does."""
        return self.saves(step) or self.scores(step)


class Milestones:
    """Scores and saves a run that is under way.

    Args:
        run: what is trained.
        workdir: of the run.
        due: when.
        evaluator: makes the scores.
        checkpoints: of the workdir.
        lock: of the workdir, on process 0.
        writer: gets the scores.
        watch: looks at every step before anything of it is saved.
        batches: whose position is saved.
        start: step at which this start began.
        position: of the checkpoint it began from.
        begin: `time.perf_counter()` when the process began.
        scored: `listing_of` the images of the scores.

    Attributes:
        position: of the newest checkpoint, with the newest scores.
    """

    def __init__(
        self,
        run: Prepared,
        workdir: epath.Path,
        due: Due,
        evaluator: Evaluator,
        checkpoints: Checkpoints,
        lock: Lock | None,
        writer: MetricsWriter,
        watch: Watch,
        batches: Batches,
        start: int,
        position: Position,
        begin: float,
        scored: str,
    ) -> None:
        self._run, self._workdir, self._due, self._evaluator = run, workdir, due, evaluator
        self._checkpoints, self._lock = checkpoints, lock
        self._writer, self._watch, self._batches = writer, watch, batches
        self._start, self._before, self._begin = start, position, begin
        self._first, self._scored = time.perf_counter(), scored
        self._results = dict(position.results)
        self.position = position

    def before(self, state: Any) -> None:
        """What comes before the first step of this start.

        A new run gets its baselines and a picture of its views; one that was told to stop when
        scores were due gets those.
        """
        if not self._start:
            pictures = self._run.config.evaluate.pictures
            with self._writer.pause():
                self._results = results = summary.baselines(self._evaluator, state, keep=pictures)
                if results:
                    at_init = {
                        name.removesuffix(verdict.AT_INIT): value
                        for name, value in results.items()
                        if name.endswith(verdict.AT_INIT)
                    }
                    self._writer.write_now(0, at_init | results)
                if pictures:
                    summary.draw_pairs(self._run.recipe, self._run.source, self._workdir)
                    self._evaluator.draw_neighbours(
                        state, self._workdir / summary.BEFORE, "before training"
                    )
        elif self._before.scores_due:
            with self._writer.pause():
                self._score(self._start, state)
            # of a run that was told to stop at its last step no other checkpoint follows
            self.position = dataclasses.replace(self.position, results=dict(self._results))
        self._first = time.perf_counter()

    def after(self, step: int, state: Any, ids: np.ndarray, preemption: Preemption) -> None:
        """What follows a step: nothing, scores, a checkpoint, or both.

        Args:
            step: updates done.
            state: after it.
            ids: `[b]`, examples of the step, for the reproduction of one that went wrong.
            preemption: says whether the run is to stop. It then saves now, and the next start
                makes the scores that are due, for which there is no time.

        Raises:
            PreemptedError: when a run that is to stop has saved this step.
        """
        stopping = preemption.after()
        save, score = stopping or self._due.saves(step), self._due.scores(step)
        if not (save or score):
            return
        self._watch.check_all(state)  # never save what came out of a bad step
        with self._writer.pause(wait_for=state):
            if save:
                self._watch.check_state(step, state, ids)
            # Scores first: a kill in between must not lose the line that belongs here.
            if score and not stopping:
                self._score(step, state)
            if save:
                self._save(step, state, scores_due=score and stopping)
            if stopping:
                self._checkpoints.wait()
                raise PreemptedError(
                    f"told to stop: step {step:,} of {self._due.total:,} is saved in "
                    f"{self._workdir}, and the same command carries on",
                    preemption.number,
                )

    def _score(self, step: int, state: Any) -> None:
        if scores := self._evaluator(state):
            self._writer.write_now(step, scores)
            self._results |= verdict.earlier(self._results) | scores

    def _save(self, step: int, state: Any, scores_due: bool) -> None:
        if self._lock:
            self._lock.check()
        now, source, before = time.perf_counter(), self._run.source, self._before
        # one step alone cannot be told from its compilation, so there all of it counts
        alone = self._run.config.batch_size * (step - self._start) / (now - self._first)
        self.position = Position(
            position=self._batches.position,
            readers=self._batches.readers,
            num_examples=source.num_examples,
            listing=source.listing,
            scored=self._scored,
            results=dict(self._results),
            skipped=self._watch.skipped,
            images_per_second=self._writer.images_per_second or before.images_per_second or alone,
            seconds=before.seconds + now - self._begin,
            scores_due=scores_due,
        )
        self._checkpoints.save(step, state, self.position.as_record())
        self._watch.saved = step
