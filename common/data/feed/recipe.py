"""What decides a batch, given a dataset and a step: resolved once from the config, then passed."""

import dataclasses
from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from common.data.augment.presets import Augmentation, resolve_views
from common.errors import UserError

Plan = Callable[[int], tuple[int, np.ndarray]]  # step -> (epoch, ids [b] of this process)


@dataclasses.dataclass(frozen=True)
class FeedRecipe:
    """How training batches are made.

    Attributes:
        seed: of orders and augmentations.
        batch_size: of the global batch, >= 1.
        views: the augmentation of each view of an image, of one size; one view or two.
        augment_on: "host", "both" or "device", see `data.augment_on`.
        steps_per_dispatch: most steps of one call of the compiled program, >= 1.
    """

    seed: int
    batch_size: int
    views: tuple[Augmentation, ...]
    augment_on: str = "host"
    steps_per_dispatch: int = 1

    @classmethod
    def of(cls, config: ConfigDict) -> "FeedRecipe":
        """The recipe of a whole config.

        Raises:
            UserError: a bad augmentation, see `presets.resolve_views`, or one of a view that is not
                there.
        """
        size, other = config.data.image_size, config.get("augment_view2")
        views = config.get("views", 2)
        given = [name for name, value in (other or {}).items() if value is not None]
        if views == 1 and given:
            raise UserError(
                f"augment_view2.{given[0]}={other[given[0]]} is of a second view, and views=1 "
                "makes none: leave it out, or set views=2"
            )
        return cls(
            seed=config.seed,
            batch_size=config.batch_size,
            views=resolve_views(config.augment, other, size)[:views],
            augment_on=config.data.augment_on,
            steps_per_dispatch=config.get("steps_per_dispatch", 1),
        )

    @property
    def size(self) -> int:
        """Side of the views in pixels."""
        return self.views[0].size

    @property
    def colour(self) -> bool:
        """Whether the host makes whole views; otherwise the device does what follows the flip."""
        return self.augment_on == "host"
