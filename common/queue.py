"""The queue of keys: `[slots, rows, d]`, one slot a step, split over devices along `rows`.

A slot holds the keys of one global batch, and every device holds the same rows of each slot as of
the batch. Writing a slot is therefore local, and means the same on any number of devices. A length
that is not a multiple of `rows` is handled by a mask: of the oldest slot, the next to be
overwritten, only the last rows count.

MoCo's negatives are the keys of a queue; SimCLR with a memory has one beside the keys of its batch.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from common import contrast
from common.errors import UserError
from common.sharding import sharded


@flax.struct.dataclass
class Queue:
    """Keys of past steps; `step`, an argument of every function, counts the slots written so far.

    Attributes:
        keys: `[slots, rows, d]`, unit norm. `rows` is the global batch (twice that when both views
            are queued, view by view for each image), `slots` is ceil(length / rows). A key of
            zeros is none yet, see `empty`.
    """

    keys: jax.Array = sharded(None, "data")


def slots(length: int, rows: int) -> int:
    """Number of slots that hold `length` keys, `rows` a slot.

    Raises:
        UserError: if `length` or `rows` is less than 1.
    """
    if length < 1 or rows < 1:
        raise UserError(
            f"queue of length {length} with {rows} keys a step: expected both >= 1, "
            "set the queue length to e.g. 65536 (ImageNet) or 4096 (CIFAR)"
        )
    return -(-length // rows)


def init(key: jax.Array, length: int, rows: int, dim: int) -> Queue:
    """Returns a queue of random unit vectors, as if that many keys had been pushed before.

    Args:
        key: a random key; the values depend on nothing else, in particular not on the devices.
        length: number of keys that count, >= 1. He et al. 2020: 65536.
        rows: keys pushed in each step, >= 1.
        dim: size of a key.

    Raises:
        UserError: if `length` or `rows` is less than 1.
    """
    return Queue(keys=contrast.normalize(jax.random.normal(key, (slots(length, rows), rows, dim))))


def empty(length: int, rows: int, dim: int) -> Queue:
    """Returns a queue without keys: zeros, which `filled` tells from keys, of unit length.

    Args:
        length: number of keys that will count, >= 1.
        rows: keys pushed in each step, >= 1.
        dim: size of a key.

    Raises:
        UserError: if `length` or `rows` is less than 1.
    """
    return Queue(keys=jnp.zeros((slots(length, rows), rows, dim)))


@jax.named_scope("update")
def push(queue: Queue, keys: jax.Array, step: jax.Array | int) -> Queue:
    """Writes the keys of one step over the oldest slot, `step % slots`. Nothing is communicated.

    Args:
        queue: the queue.
        keys: `[rows, d]`, unit norm, split like the batch; stored without gradient.
        step: int >= 0, number of pushes before this one.

    Raises:
        UserError: if the keys do not fill one slot exactly.
    """
    if keys.shape != queue.keys.shape[1:]:
        raise UserError(
            f"pushed keys are {list(keys.shape)}, a slot of the queue is "
            f"{list(queue.keys.shape[1:])}: build the queue for this batch size and dimension"
        )
    keys = jax.lax.stop_gradient(keys).astype(queue.keys.dtype)
    slot = jnp.asarray(step) % queue.keys.shape[0]
    return Queue(keys=jax.lax.dynamic_update_index_in_dim(queue.keys, keys, slot, 0))


def mask(length: int, rows: int, step: jax.Array | int) -> jax.Array:
    """Which entries of the queue count before push number `step` (counted from 0).

    Args:
        length: number of keys that count, >= 1.
        rows: keys a slot, >= 1.
        step: int >= 0, number of pushes so far.

    Returns:
        bool `[slots, rows]` with exactly `length` entries set: all but the oldest
        `slots * rows - length`, which are the first rows of slot `step % slots`.

    Raises:
        UserError: if `length` or `rows` is less than 1.
    """
    count = slots(length, rows)
    oldest = jnp.arange(count)[:, None] == jnp.asarray(step) % count
    return ~(oldest & (jnp.arange(rows)[None] < count * rows - length))


def filled(queue: Queue) -> jax.Array:
    """Which entries hold a key, bool `[slots, rows]`: all but those that are `empty` still."""
    return jnp.any(queue.keys != 0, axis=-1)


def every(queue: Queue, first: int, count: int) -> Queue:
    """The queue of one of `count` keys of each image: rows `first`, `first + count` ...

    Nothing is communicated, as all keys of an image are on its device. If `length` keys of a queue
    count, and every image has `count` keys, then `length / count` of this one count.
    """
    slots, rows, dim = queue.keys.shape
    return Queue(keys=queue.keys.reshape(slots, rows // count, count, dim)[:, :, first])


def scored(
    queries: jax.Array,
    threshold: jax.Array,
    keys: jax.Array,
    live: jax.Array,
    *,
    axis: str | None = None,
    block_size: int | None = None,
    precision: str = "highest",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scores each device's own queries against the keys of all devices, inside `each_device`.

    Each device scores the queries of *all* devices against its own share of the queue, and the
    log-sum-exps are combined: `[b, d]` is communicated, never the queue. No gradient reaches it.

    Args:
        queries: `[b_local, d]`, already divided by the temperature.
        threshold: `[b_local]`, see `common.contrast.rows_lse`.
        keys: `[slots, rows_local, d]`, of a queue.
        live: bool `[slots, rows_local]`, the keys that count.
        axis: mesh axis name, None on one device.
        block_size: as in `rows_lse`.
        precision: as in `rows_lse`.

    Returns:
        `lse [b_local]` over the keys that count, of all devices, -inf without any; `above [b]`,
        of the queries of *all* devices, as in `rows_lse`; and the sum `[d]` of the keys that count.
    """
    live = live.reshape(-1)
    keys = jax.lax.stop_gradient(keys).astype(queries.dtype).reshape(live.shape[0], -1)
    everyone = contrast.gather_rows(queries, axis)
    lse, above = contrast.rows_lse(
        everyone,
        keys,
        jnp.zeros(everyone.shape[0], jnp.int32),
        jnp.where(live, 1, -1).astype(jnp.int32),
        contrast.gather_rows(threshold, axis),
        block_size=block_size,
        precision=precision,
    )
    lse = contrast.scattered_lse(lse, axis)
    total = jnp.where(live[:, None], keys, 0).sum(axis=0)
    if axis is not None:
        above, total = jax.lax.psum((above, total), axis)
    return lse, above, total


def check(
    loss: str, queue: Queue, length: int, queries: tuple[int, ...], mesh: Mesh | None
) -> None:
    """Raises a `UserError` unless a queue of `length` fits the queries of a loss, and the mesh.

    Args:
        loss: its name, for the message.
        queue: the queue.
        length: number of keys that count.
        queries: their shape, `[b, d]`.
        mesh: over which both are split; None: one device.
    """
    found = queue.keys.shape
    rows = found[1]
    expected = slots(length, rows), rows, queries[1]
    if found != expected:
        raise UserError(
            f"{loss}: the queue is {list(found)}: expected {list(expected)} for length {length} "
            f"and queries {list(queries)}, make it with queue.init of that length"
        )
    devices = 1 if mesh is None else mesh.size
    if queries[0] % devices or rows % devices:
        raise UserError(
            f"{loss}: {queries[0]} queries and {rows} queue rows cannot be split over {devices} "
            f"devices: use multiples of {devices}"
        )


def contents(queue: Queue, length: int, step: int) -> np.ndarray:
    """The keys that count, oldest first, on the host (of one process): to inspect and to test.

    Args:
        queue: the queue.
        length: number of keys that count.
        step: number of pushes so far.

    Returns:
        NumPy `[length, d]`.
    """
    keys = np.asarray(queue.keys)
    oldest_first = np.roll(keys, -(int(step) % keys.shape[0]), axis=0)
    return oldest_first.reshape(-1, keys.shape[2])[-length:]
