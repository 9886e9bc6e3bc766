"""Digests of arrays that do not depend on how these are split over devices and processes.

Storage below a checkpoint may hand back other bits than it was given, and nothing above notices:
a flipped bit of a weight is a weight. The digest of an array is a sum modulo 2^32 over its
elements of a hash of (place in the whole array, bits). A sum has no order, so each device adds up
what it holds. One changed element always changes it, other damage all but once in 2^32.
"""

import functools
import hashlib
import json
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


class Damage(ValueError):
    """A checkpoint can be read and is not what was written; the text is a reason in words."""


def names(tree: Any) -> list[str]:
    """The path of each leaf, e.g. "params/backbone/stem/kernel".

    It is the same for a dictionary and for a dataclass with the same fields.
    """
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]


def of_state(state: Any) -> dict[str, int]:
    """Digests of a tree of arrays on devices, by the names of its leaves.

    Args:
        state: arrays under any sharding. All processes call this; all get the whole answer.

    Returns:
        {name: 32-bit digest}.
    """
    found = np.asarray(_compiled(everywhere(state))(jax.tree.leaves(state)))
    return dict(zip(names(state), found.tolist(), strict=True))


def of_array(array: np.ndarray) -> int:
    """The digest of one whole array on the host."""
    width = array.dtype.itemsize
    bits = np.ascontiguousarray(array).reshape(-1).view(f"u{min(width, 4)}").astype(np.uint32)
    return int(_mix(bits, np.arange(bits.size, dtype=np.uint32)).sum(dtype=np.uint32))


def of_json(value: Any) -> str:
    """SHA-256 of a JSON value."""
    text = json.dumps(value, sort_keys=True, allow_nan=True)
    return hashlib.sha256(text.encode()).hexdigest()


def compare(step: int, found: dict[str, int], record: dict[str, Any]) -> None:
    """Compares the digests of a checkpoint with those saved in it.

    Args:
        step: of the checkpoint.
        found: {name: digest} of all its arrays, or of some.
        record: what was saved beside the state.

    Raises:
        Damage: naming an array.
    """
    if "digests" not in record:
        logging.warning("the checkpoint of step %d was saved without digests: not checked", step)
        return
    if of_json(record["progress"]) != record["sha256"]:
        raise Damage("what is noted beside the state has changed")
    bad = [name for name, x in found.items() if record["digests"].get(name) != x]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise Damage(f"{bad[0]}{more} is not what was saved")


def everywhere(tree: Any) -> NamedSharding | None:
    """The sharding under which each process has the whole of a result about `tree`."""
    sharding = next((x.sharding for x in jax.tree.leaves(tree)), None)
    if not isinstance(sharding, NamedSharding):
        return None
    return NamedSharding(sharding.mesh, PartitionSpec())


@functools.cache
def _compiled(where: NamedSharding | None) -> Any:
    return jax.jit(_digests, out_shardings=where)


def _digests(leaves: list[jax.Array]) -> jax.Array:
    return jnp.array([_digest(x) for x in leaves], jnp.uint32)


def _digest(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    # a type of 8 bytes becomes two words, along a new last axis
    bits = lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
    place, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):  # no reshape, which would move sharded arrays about
        iota = lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        place += iota * np.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    return jnp.sum(_mix(bits, place), dtype=jnp.uint32)


def _mix(bits: Any, place: Any) -> Any:
    """The finaliser of MurmurHash3 (Appleby 2011): for one place, different bits stay different."""
    h = bits ^ ((place + np.uint32(1)) * np.uint32(0x9E3779B1))
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))
