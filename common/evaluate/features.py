"""Features of a whole split, as NumPy arrays on every process."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from common.sharding import replicated, to_global
from common.train.xla_options import compiler_options

Batch = Mapping[str, np.ndarray]


@functools.lru_cache(maxsize=8)
def _gather(mesh: Mesh) -> Callable[[Any], Any]:
    """The identity, with every row on every device: so a process sees the others' rows."""
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


def jit_encoder(encode: Callable[..., jax.Array], mesh: Mesh) -> Callable[..., jax.Array]:
    """Compiles `encode(state, images)` once for all later evaluations.

    The state stays an argument: closed over, it would be baked into the program, which then
    compiles anew at each evaluation and is refused when processes share the arrays.

    Args:
        encode: a method's `encode`.
        mesh: the device mesh.

    Returns:
        The compiled function. Give `functools.partial(it, state)` to `extract`.
    """
    options = compiler_options(mesh.devices.flat[0].platform, tpu=False)
    return jax.jit(encode, out_shardings=replicated(mesh), compiler_options=options)


def extract(
    encode: Callable[[jax.Array], jax.Array], batches: Iterable[Batch], mesh: Mesh
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Encodes every image of a split.

    Every process must call it, with the same number of batches.

    Args:
        encode: global uint8 images `[b, h, w, 3]` -> features `[b, d]`.
        batches: this process's rows: `images` uint8 `[b_local, h, w, 3]`, `labels` int
            `[b_local]`, `ids` int `[b_local]`, `mask` bool `[b_local]` (False: padding).
        mesh: the device mesh.

    Returns:
        features `[n, d]`, labels int32 `[n]` and ids int64 `[n]`, the same on every process,
        without the padding, in the order of the ids.
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
    return out["features"][order], out["labels"][order], ids


def _keep(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    mask = batch["mask"].astype(bool)
    return {name: array[mask] for name, array in batch.items() if name != "mask"}
