"""Features of a whole split, as NumPy arrays on every process."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from common.data.feed import pipeline
from common.data.sources.base import Source
from common.sharding import local_rows, replicated, to_global
from common.train.xla_options import compiler_options

Batch = Mapping[str, np.ndarray]


class Features(NamedTuple):
    """What an encoder makes of the images of a split, in the order of their ids.

    Attributes:
        features: `[n, d]`; float32, or uint8 for raw pixels.
        labels: int32 `[n]`, -1 where unlabelled.
        ids: int64 `[n]`, indices into the split.
    """

    features: np.ndarray
    labels: np.ndarray
    ids: np.ndarray


@functools.lru_cache(maxsize=8)
def _gather(mesh: Mesh) -> Callable[[Any], Any]:
    """The identity, with every row on every device, so that a process sees the rows of others."""
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


def jit_encoder(encode: Callable[..., jax.Array], mesh: Mesh) -> Callable[..., jax.Array]:
    """Compiles `encode(state, images)` once for all later evaluations.

    The state stays an argument: closed over, it would be baked into the program, which then
    compiles again for each evaluation and is refused when processes share the arrays.

    Args:
        encode: a method's `encode`.
        mesh: the device mesh.

    Returns:
        The compiled function. Pass `functools.partial(it, state)` to `extract`.
    """
    options = compiler_options(mesh.devices.flat[0].platform)
    return jax.jit(encode, out_shardings=replicated(mesh), compiler_options=options)


def flatten_pixels(images: jax.Array) -> jax.Array:
    """Raw pixels as features: images `[b, h, w, c]` to `[b, h * w * c]`, still uint8."""
    return images.reshape(images.shape[0], -1)


def of_source(
    encode: Callable[[jax.Array], jax.Array],
    source: Source,
    mesh: Mesh,
    batch_size: int,
    image_size: int,
    limit: int = 0,
) -> Features:
    """Encodes the un-augmented images of a split.

    Every process must call it.

    Args:
        encode: global uint8 images `[b, h, w, 3]` -> features `[b, d]`.
        source: the split.
        mesh: the device mesh.
        batch_size: global number of images encoded at a time, >= 1; rounded up to a multiple of
            the devices.
        image_size: side of the images, in pixels.
        limit: at most this many examples, evenly spaced; 0 for all.
    """
    batch_size = -(-batch_size // mesh.size) * mesh.size  # padding fills the rest
    batches = pipeline.eval_batches(
        source,
        batch_size,
        image_size,
        local_rows(mesh, batch_size),
        limit=limit,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    found = extract(encode, batches, mesh)
    # of a streamed split whole batches were read
    return Features(*(array[: limit or None] for array in found))


def extract(
    encode: Callable[[jax.Array], jax.Array], batches: Iterable[Batch], mesh: Mesh
) -> Features:
    """Encodes every image of some batches.

    Every process must call it, with the same number of batches.

    Args:
        encode: global uint8 images `[b, h, w, 3]` -> features `[b, d]`.
        batches: this process's rows: `images` uint8 `[b_local, h, w, 3]`, `labels` int
            `[b_local]`, `ids` int `[b_local]`, `mask` bool `[b_local]` (False: padding).
        mesh: the device mesh.

    Returns:
        The same arrays on every process, without the padding.
    """
    gather = _gather(mesh)
    rows: list[dict[str, np.ndarray]] = []
    pending = None
    for batch in batches:
        arrays = {name: batch[name] for name in ("images", "labels", "ids", "mask")}
        arrays["labels"] = np.asarray(arrays["labels"], np.int32)
        arrays = to_global(mesh, arrays)
        images = arrays.pop("images")
        running = gather({"features": encode(images), **arrays})
        # Fetch the batch before this one: the device already has its next work.
        if pending is not None:
            rows.append(_keep(jax.device_get(pending)))
        pending = running
    if pending is None:
        raise ValueError("no batches to extract features from: is the split empty?")
    rows.append(_keep(jax.device_get(pending)))
    out = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    order = np.argsort(out["ids"], kind="stable")
    ids = out["ids"][order].astype(np.int64)  # JAX has made them int32
    return Features(out["features"][order], out["labels"][order], ids)


def _keep(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    mask = batch["mask"].astype(bool)
    return {name: array[mask] for name, array in batch.items() if name != "mask"}
