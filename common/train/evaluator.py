"""What the loop asks of the evaluator that it is given; it makes none itself."""

from collections.abc import Callable
from typing import Any, Protocol

from etils import epath

from common.data.sources.base import Source
from common.train.prepare import Prepared


class Evaluator(Protocol):
    """What scores a run while it trains, e.g. `common.evaluate.online.Evaluator`."""

    def __call__(self, state: Any, keep: bool = False) -> dict[str, float]:
        """Scores of a state by name, "knn_top1" among them; {} without labels.

        Args:
            state: of the encoder.
            keep: whether `draw_neighbours` of the same state follows, and can use its features.
        """
        ...

    def raw_pixels(self) -> dict[str, float]:
        """Scores that take no encoder; {} without labels."""
        ...

    def draw_neighbours(self, state: Any, path: epath.Path, when: str = "") -> bool:
        """Draws test images with their nearest; False where there are none to draw.

        Args:
            state: of the encoder.
            path: of the PNG.
            when: in the run, for the title.
        """
        ...


# Of the run, the source whose images vote, and the one that is scored.
MakeEvaluator = Callable[[Prepared, Source, Source | None], Evaluator]
