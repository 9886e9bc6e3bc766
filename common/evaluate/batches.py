"""Training batches with labels: the run's crops and flips, and nothing else of its augmentation.

That is how linear classifiers and fine-tuning are trained in the papers (Chen et al. 2020, B.5).
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
    """The batch size wanted, or the largest that `n` examples and the devices allow.

    Raises:
        UserError: if there are fewer examples than devices, or less than one is wanted.
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


def crop_and_flip(config: ConfigDict, batch_size: int, seed: int) -> FeedRecipe:
    """A run's crops and flips alone, as large as in the test: `data.image_size`."""
    view = presets.crop_only(presets.resolve(config.augment, config.data.image_size))
    view = dataclasses.replace(view, size=config.data.image_size)
    return FeedRecipe(seed, batch_size, (view, view), config.data.augment_on)


def batches(
    source: Source,
    config: ConfigDict,
    mesh: Mesh,
    batch_size: int,
    seed: int,
    keep: np.ndarray | None = None,
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Batches without end, over epochs of `num_examples // batch_size` steps.

    The views of a run with `data.augment_on="device"` are made there and without TensorFlow,
    unless the source cannot be kept there, such as the files that `--eval.source` names.

    Args:
        source: of the training examples.
        config: of the run.
        mesh: the devices.
        batch_size: of the global batch, a multiple of the devices.
        seed: of orders, crops and flips.
        keep: bool `[num_examples]`; the labels of all others are hidden. None: all are kept.

    Yields:
        Global arrays: images uint8 `[b, h, w, 3]` and labels int32 `[b]`, -1 where there is none.
    """
    recipe = crop_and_flip(config, batch_size, seed)
    if recipe.augment_on == "device":
        if not resident.obstacle(source, mesh):
            yield from _from_device(source, recipe, mesh, keep)
            return
        recipe = dataclasses.replace(recipe, augment_on="host")
    for batch in _planned(source, recipe, mesh):
        labels = batch["labels"]
        if keep is not None:
            labels = np.where(keep[batch["ids"]], labels, -1)
        # The pipeline makes pairs; one view is what the protocol asks for.
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
    """The same batches in the same order, of features `[n, d]` instead of images."""
    n, rows = len(labels), local_rows(mesh, batch_size)
    for epoch in itertools.count():
        order = pipeline.order(seed, epoch, n)
        for start in range(0, n - batch_size + 1, batch_size):
            ids = order[start + rows]
            yield to_global(mesh, (features[ids], labels[ids].astype(np.int32)))
