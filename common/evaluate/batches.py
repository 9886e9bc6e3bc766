"""Labelled training batches: of the run's augmentation, only crops and flips.

This is how the papers train linear classifiers and fine-tune (Chen et al. 2020, B.5).
"""

import dataclasses
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from common.data.augment import presets
from common.data.feed import pipeline, resident
from common.data.feed.batches import Batches
from common.data.feed.recipe import FeedRecipe
from common.data.sources.base import Source
from common.errors import UserError
from common.sharding import batch_sharding, local_rows, to_global


def batch_size_for(wanted: int, n: int, mesh: Mesh) -> int:
    """Returns the batch size wanted, or the largest that `n` examples and the devices allow.

    Raises:
        UserError: if there are fewer examples than devices, or the size wanted is below 1.
    """
    if wanted < 1:
        raise UserError(f"the mode's own batch_size is {wanted}: expected at least 1 image")
    size = min(wanted, n) // mesh.size * mesh.size or mesh.size
    if size > n:
        raise UserError(
            f"{n} training examples on {mesh.size} devices: expected at least one for each; give "
            "more data, or use fewer devices"
        )
    return size


def crop_and_flip(
    config: ConfigDict, batch_size: int, seed: int, image_size: int = 0, area_min: float = 0.0
) -> FeedRecipe:
    """A run's crops and flips without its colours, at the size of evaluation.

    Args:
        config: of the run.
        batch_size: global.
        seed: of orders, crops and flips.
        image_size: side of the crops; 0 = that of the run's evaluation images.
        area_min: smallest share of the image's area in a crop; 0 = the run's.

    Raises:
        UserError: if no crop can be so large.
    """
    size = image_size or config.data.image_size
    view = presets.crop_only(presets.resolve(config.augment, size))
    if not 0 <= area_min <= view.area_max:
        raise UserError(
            f"eval.area_min={area_min} is no share of an image: expected more than 0 and at most "
            f"{view.area_max:g}, the run's augment.area_max, or 0 for the run's"
        )
    view = dataclasses.replace(view, size=size, area_min=area_min or view.area_min)
    return FeedRecipe(seed, batch_size, (view, view), config.data.augment_on)


def batches(
    source: Source,
    config: ConfigDict,
    mesh: Mesh,
    batch_size: int,
    seed: int,
    keep: np.ndarray | None = None,
    *,
    image_size: int = 0,
    area_min: float = 0.0,
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Endless batches, over epochs of `num_examples // batch_size` steps.

    A run with `data.augment_on="device"` gets its views from the device, without TensorFlow, unless
    the source does not fit there, such as image files that `--eval.source` names.

    Args:
        source: the training examples.
        config: of the run.
        mesh: the device mesh.
        batch_size: global, a multiple of the number of devices.
        seed: of orders, crops and flips.
        keep: bool `[num_examples]`; labels are hidden where it is False. None keeps all.
        image_size: see `crop_and_flip`.
        area_min: likewise.

    Yields:
        Global arrays: images uint8 `[b, h, w, 3]` and labels int32 `[b]`, -1 where there is none.
    """
    recipe = crop_and_flip(config, batch_size, seed, image_size, area_min)
    if recipe.augment_on == "device":
        if not resident.obstacle(source, mesh):
            yield from _from_device(source, recipe, mesh, keep)
            return
        recipe = dataclasses.replace(recipe, augment_on="host")
    planned = _planned(source, recipe, mesh)
    while True:
        ids, batch = planned.take(1)
        labels = batch["labels"]
        if keep is not None:
            labels = np.where(keep[ids[0]], labels, -1)
        # The pipeline makes pairs, and the protocol asks for one view.
        images = np.ascontiguousarray(batch["images"][:, 0])
        yield to_global(mesh, (images, labels.astype(np.int32)))


def _from_device(
    source: Source, recipe: FeedRecipe, mesh: Mesh, keep: np.ndarray | None
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """`batches` of a dataset in device memory."""

    def made(batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        images, labels = resident.views(batch, 0, recipe.views, mesh)
        return images[:, 0], labels

    data = resident.load(source, mesh)
    if keep is not None:
        data["data_labels"] = jax.jit(lambda x: jnp.where(keep, x, -1))(data["data_labels"])
    planned = _planned(source, recipe, mesh)
    made = jax.jit(made, out_shardings=batch_sharding(mesh))
    while True:
        _, batch = planned.take(1)
        yield made(to_global(mesh, batch) | data)


def _planned(source: Source, recipe: FeedRecipe, mesh: Mesh) -> Batches:
    return pipeline.train_batches(
        source, recipe, rows=local_rows(mesh, recipe.batch_size),
        process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip


def cached(
    features: np.ndarray, labels: np.ndarray, mesh: Mesh, batch_size: int, seed: int
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Yields the same batches in the same order, of features `[n, d]` instead of images."""
    n, rows = len(labels), local_rows(mesh, batch_size)
    for epoch in itertools.count():
        order = pipeline.order(seed, epoch, n)
        for start in range(0, n - batch_size + 1, batch_size):
            ids = order[start + rows]
            yield to_global(mesh, (features[ids], labels[ids].astype(np.int32)))
