"""The queue of keys: `[slots, rows, d]`, one slot a step, split over devices along `rows`.

A slot holds the keys of one global batch, and every device holds the same rows of each slot as of
the batch. Writing a slot is therefore local, and means the same on any number of devices. A length
that is not a multiple of `rows` is handled by a mask: of the oldest slot, the next to be
overwritten, only the last rows count.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from common.contrast import normalize
from common.errors import UserError
from common.sharding import sharded


@flax.struct.dataclass
class Queue:
    """Keys of past steps; `step`, an argument of every function, counts the slots written so far.

    Attributes:
        keys: `[slots, rows, d]`, unit norm. `rows` is the global batch (twice that when both views
            are queued, view by view for each image), `slots` is ceil(length / rows).
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
    return Queue(keys=normalize(jax.random.normal(key, (slots(length, rows), rows, dim))))


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
