"""What decides a batch, given a dataset and a step: resolved once from the config, then passed."""

import dataclasses
from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from common.data.augment.presets import Augmentation, resolve_views

Plan = Callable[[int], tuple[int, np.ndarray]]  # step -> (epoch, ids [b] of this process)


@dataclasses.dataclass(frozen=True)
class FeedRecipe:
    """How training batches are made.

    Attributes:
        seed: of orders and augmentations.
        batch_size: of the global batch, >= 1.
        views: the augmentations of view 1 and view 2, of one size.
        augment_on: "host", "both" or "device", see `data.augment_on`.
        steps_per_dispatch: most steps of one call of the compiled program, >= 1.
    """

    seed: int
    batch_size: int
    views: tuple[Augmentation, Augmentation]
    augment_on: str = "host"
    steps_per_dispatch: int = 1

    @classmethod
    def of(cls, config: ConfigDict) -> "FeedRecipe":
        """The recipe of a whole config.

        Raises:
            UserError: a bad augmentation, see `presets.resolve_views`.
        """
        size, other = config.data.image_size, config.get("augment_view2")
        return cls(
            seed=config.seed,
            batch_size=config.batch_size,
            views=resolve_views(config.augment, other, size),
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
