"""Which checkpoints of a run are kept."""

from collections.abc import Callable, Sequence
from typing import Any


class Keep:
    """Which checkpoints to keep: a `PreservationPolicy` of orbax.

    Args:
        score: step -> kNN accuracy, None if unknown.
        last: how many of the newest; None: all.
        every: the first checkpoint of each period of this many steps; 0: none.
        best: how many with the highest score.
    """

    def __init__(
        self, score: Callable[[int], float | None], last: int | None, every: int, best: int
    ) -> None:
        self._score, self._last, self._every, self._best = score, last, every, best
        self._scores: dict[int, float | None] = {}

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Whether to keep each of `checkpoints` (which have a `step`)."""
        steps = sorted(c.step for c in checkpoints)
        stay = set(steps if self._last is None else steps[-self._last :])
        if self._every:
            first: dict[int, int] = {}
            for step in steps:
                first.setdefault(step // self._every, step)
            stay |= {step for number, step in first.items() if number}
        if self._best:
            for step in steps[:-1]:  # the last is being written: it is kept anyway
                if self._scores.get(step) is None:
                    self._scores[step] = self._score(step)
            scores = {s: x for s in steps[:-1] if (x := self._scores[s]) is not None}
            # of equal scores the older one: the choice then stays the same
            stay |= set(sorted(scores, key=lambda s: (-scores[s], s))[: self._best])
        return [c.step in stay for c in checkpoints]
