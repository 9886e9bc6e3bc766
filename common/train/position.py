"""Where a run stands, as a checkpoint says it beside the state."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from common.data.sources.base import Source
from common.errors import UserError


@dataclasses.dataclass(frozen=True)
class Position:
    """What a run needs, beside its state, to go on.

    Attributes:
        position: steps whose data has been read.
        readers: of a streamed dataset, how many files at a time; None of any other.
        num_examples: of the training split; None before the first checkpoint.
        listing: of the training split, see `Source.listing`; None in old checkpoints of shards.
        scored: `listing_of` the images that score the run; None in old checkpoints.
        results: the newest scores by name.
        skipped: updates that were dropped since the run began.
        images_per_second: training rate, without evaluation and checkpoints.
        seconds: that the run has taken, over all its starts.
        scores_due: the run was told to stop at a step whose scores the next start has to make.
    """

    position: int = 0
    readers: int | None = None
    num_examples: int | None = None
    listing: str | None = None
    scored: str | None = None
    results: Mapping[str, float] = dataclasses.field(default_factory=dict)
    skipped: int = 0
    images_per_second: float | None = None
    seconds: float = 0.0
    scores_due: bool = False

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Position":
        """From what `as_record` gave, now or in an older version, which had fewer fields."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in record.items() if name in names})

    def as_record(self) -> dict[str, Any]:
        """For JSON; a copy, since orbax writes it later."""
        return dataclasses.asdict(self)

    def check_same_data(self, source: Source, moved: str = "") -> None:
        """Refuses a dataset that has changed: orders and schedules follow its examples.

        Args:
            source: of the training split.
            moved: where the data was, if that is another place than now.

        Raises:
            UserError: saying both sizes, or that files have other names.
        """
        n = self.num_examples
        if n != source.num_examples:
            raise UserError(
                f"{source.name} ({source.split}) has {source.num_examples} images, and had {n} "
                "when this run began: restore the data, or give another --workdir"
            )
        if moved and not self.listing:
            raise UserError(
                f"the data of this run was {moved}, and its checkpoints do not list its files, so "
                "whether these are the same cannot be checked: give data.source as it was, or "
                "another --workdir"
            )
        if self.listing and source.listing != self.listing:
            raise UserError(
                f"{source.name} ({source.split}) has {n} images as before, but files were renamed, "
                "or added and removed, since this run began: restore the data, or give another "
                "--workdir"
            )

    def check_same_scored(self, scored: str) -> None:
        """Refuses other images to score the run by: scores of both would stand in one table.

        Args:
            scored: `listing_of` them now.

        Raises:
            UserError: they have changed.
        """
        if self.scored is not None and self.scored != scored:
            raise UserError(
                f"the images that score this run have changed (now {_in_words(scored)}; when it "
                f"began {_in_words(self.scored)}): restore them, or give another --workdir"
            )


def listing_of(bank: Source, test: Source | None) -> str:
    """What changes when images that vote or are scored are added, removed or renamed."""
    sources = [bank] if test is None else [bank, test]
    return " ".join(f"{source.num_examples}:{source.listing}" for source in sources)


def _in_words(scored: str) -> str:
    counts = [f"{int(part.partition(':')[0]):,}" for part in scored.split()]
    verbs = ("vote", "are scored")[: len(counts)]
    return " and ".join(f"{n} {verb}" for n, verb in zip(counts, verbs, strict=True))
