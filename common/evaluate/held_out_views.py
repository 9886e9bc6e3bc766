"""Two augmented views of held-out images, made once in a run, and what an encoder makes of them."""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from common.data.feed import pipeline, resident
from common.data.feed.recipe import FeedRecipe
from common.data.sources.base import Source
from common.evaluate import features
from common.sharding import local_rows
from common.train import dispatch

_SEED = 0  # of the draws: runs of every seed are measured on the same views


def obstacle(test: Source | None) -> str:
    """Why no views of held-out images can be compared, in words; "" if they can."""
    if test is None:
        return (
            "no images are held out from training; --config.data.test_split=auto holds out a tenth "
            "of a folder, or 100 images if that is more, but at most a quarter"
        )
    if test.kind == "stream":
        return f"{test.name} ({test.split}) is streamed, and its images cannot be read again"
    return "" if test.num_examples > 1 else f"{test.name} ({test.split}) has a single image"


class HeldOutViews:
    """The views of up to `limit` test images, evenly spaced, by a run's own augmentation.

    The draws depend on the image alone, not on step or seed of the run, so that figures of
    different steps, seeds and methods are comparable. They are made at the first use and kept as
    uint8, each process those of its own devices.

    Args:
        source: the test split, without an `obstacle`.
        recipe: of the run. Where it makes one view, a second is drawn from the same augmentation.
        mesh: the device mesh.
        batch_size: views encoded at a time, at most.
        limit: most images, >= 2.
    """

    def __init__(
        self, source: Source, recipe: FeedRecipe, mesh: Mesh, batch_size: int, limit: int
    ) -> None:
        n = min(limit, source.num_examples)
        size = -(-min(batch_size, n) // mesh.size) * mesh.size  # padding fills the rest
        self.ids = np.arange(n) * source.num_examples // n
        self._source, self._mesh = source, mesh
        self._places = [start + local_rows(mesh, size) for start in range(0, n, size)]
        views = recipe.views if len(recipe.views) > 1 else recipe.views * 2
        on = recipe.augment_on
        if on == "device" and not resident.has_one_shape(source):
            on = "host"
        self._recipe = dataclasses.replace(
            recipe, seed=_SEED, batch_size=size, views=views, augment_on=on, steps_per_dispatch=1
        )
        self._views: list[np.ndarray] = []

    def features(self, encode: Callable[[jax.Array], jax.Array]) -> tuple[np.ndarray, np.ndarray]:
        """Features `[n, d]` of view 1 and of view 2, in the order of the images.

        Every process must call it, and gets the same.

        Args:
            encode: global uint8 images `[b, h, w, 3]` -> features `[b, d]`.
        """
        self._views = self._views or self._made()
        first, second = (
            features.extract(encode, self._batches(view), self._mesh).features for view in (0, 1)
        )
        return first, second

    def _made(self) -> list[np.ndarray]:
        """This process's views uint8 `[b_local, 2, h, w, 3]` of each batch."""
        plan = [self.ids[np.minimum(places, len(self.ids) - 1)] for places in self._places]
        batches = pipeline.planned_batches(self._source, self._recipe, plan)
        return [dispatch.first_views(self._recipe, self._source, batches)[1] for _ in plan]

    def _batches(self, view: int) -> Iterator[dict[str, np.ndarray]]:
        for places, views in zip(self._places, self._views, strict=True):
            yield {
                "images": np.ascontiguousarray(views[:, view]),
                "labels": np.full(len(places), -1, np.int32),
                "ids": places,
                "mask": places < len(self.ids),
            }
