"""What one call of the compiled program does: which views it makes, and how many steps it takes.

A method sees uint8 views and knows nothing of this. `data.augment_on` says what the batch holds:

    host    images [b, v, s, s, 3] and labels [b]: the views, made by TensorFlow
    both    the same, cropped only, and parameters [b, v, draws.PARAMETERS] for the rest
    device  ids [b, K] and parameters [b, K, v, ...] of K steps, how many of them to take, and the
            dataset itself; K is `steps_per_dispatch`
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from common.data.augment import draws, on_device
from common.data.augment.presets import Augmentation
from common.data.feed import resident
from common.data.feed.batches import Batches
from common.data.feed.recipe import FeedRecipe
from common.data.sources.base import Source
from common.method import Step
from common.sharding import batch_sharding, replicated
from common.train.divergence import WATCHED


def spans(
    start: int, total: int, most: int, *due: Callable[[int], bool]
) -> Iterator[tuple[int, int]]:
    """First and last step of each dispatch.

    Args:
        start: steps that are done.
        total: of the run.
        most: steps of a dispatch, >= 1.
        due: whether something is to be done after a step; one that says so ends the dispatch.
    """
    first = start + 1
    while first <= total:
        steps = range(first, min(first + most, total + 1))
        last = next((step for step in steps if any(ends(step) for ends in due)), steps[-1])
        yield first, last
        first = last + 1


def batch_shapes(recipe: FeedRecipe, mesh: Mesh, data: dict | None = None) -> dict:
    """Shapes and shardings of the batch, a global one.

    Args:
        recipe: of the run.
        mesh: the device mesh.
        data: as in `compile_step`.
    """

    def rows(kind: Any, *shape: int) -> jax.ShapeDtypeStruct:
        shape = (recipe.batch_size, *shape)
        return jax.ShapeDtypeStruct(shape, kind, sharding=batch_sharding(mesh))

    size, most, n = recipe.size, recipe.steps_per_dispatch, len(recipe.views)
    if recipe.augment_on == "device":
        return {
            "ids": rows(np.int32, most),
            "parameters": rows(np.float32, most, n, draws.PARAMETERS),
            "steps": jax.ShapeDtypeStruct((), np.int32, sharding=replicated(mesh)),
        } | jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), data
        )
    batch = {"images": rows(np.uint8, n, size, size, 3), "labels": rows(np.int32)}
    if recipe.augment_on == "both":
        batch["parameters"] = rows(np.float32, n, draws.PARAMETERS)
    return batch


def program(train_step: Step, recipe: FeedRecipe, mesh: Mesh) -> Step:
    """`train_step` with what comes before it on the device, for as many steps as the batch has."""
    augmentations, most = recipe.views, recipe.steps_per_dispatch

    def coloured(state: Any, batch: dict, key: jax.Array) -> tuple[Any, dict]:
        with jax.named_scope("augmentation"):
            images = on_device.views(
                on_device.augment_colour, batch["images"], batch["parameters"],
                augmentations=augmentations, mesh=mesh,
            )  # fmt: skip
        return train_step(state, {"images": images, "labels": batch["labels"]}, key)

    def one(state: Any, batch: dict, key: jax.Array, i: jax.Array | int) -> tuple[Any, dict]:
        with jax.named_scope("augmentation"):
            images, labels = resident.views(batch, i, augmentations, mesh)
        return train_step(state, {"images": images, "labels": labels}, key)

    def dispatch(state: Any, batch: dict, key: jax.Array) -> tuple[Any, dict]:
        if most == 1:
            return one(state, batch, key, 0)
        shapes = jax.eval_shape(one, state, batch, key, 0)[1]
        metrics = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        each = {n: jnp.zeros((most, *shapes[n].shape), shapes[n].dtype) for n in shapes}
        each = {name: each[name] for name in WATCHED if name in each}

        # Not a scan: with a number of steps that is known late, a dispatch can end anywhere, and
        # every step of the run is the same code, so that results do not depend on where.
        def body(i: jax.Array, carry: tuple) -> tuple:
            state, metrics = one(carry[0], batch, key, i)
            return state, metrics, {n: x.at[i].set(metrics[n]) for n, x in carry[2].items()}

        state, metrics, each = jax.lax.fori_loop(0, batch["steps"], body, (state, metrics, each))
        return state, metrics | {"each": each}

    return {"host": train_step, "both": coloured, "device": dispatch}[recipe.augment_on]


def first_views(
    recipe: FeedRecipe, source: Source, batches: Batches
) -> tuple[np.ndarray, np.ndarray]:
    """Ids [b] and views uint8 [b, v, s, s, 3] of the next batch, to look at."""
    ids, batch = batches.take(1)
    if recipe.augment_on == "host":
        return ids[0], batch["images"]
    function: Callable = on_device.augment_colour
    if recipe.augment_on == "device":
        batch = {"images": source.fetch(ids[0]), "parameters": batch["parameters"][:, 0]}
        function = on_device.augment_pixels
    made = _to_look_at(function, recipe.views)
    return ids[0], np.asarray(made(batch["images"], batch["parameters"]))


@functools.lru_cache(maxsize=8)
def _to_look_at(function: Callable, views: tuple[Augmentation, ...]) -> Callable:
    return jax.jit(lambda x, p: on_device.to_bytes(function(x, p, views)))
