"""InfoNCE against a queue of keys that is split over the devices."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from common import contrast
from common import queue as queue_lib
from common.errors import UserError
from common.sharding import AXIS, each_device


@jax.named_scope("loss")
def info_nce(
    queries: jax.Array,
    keys: jax.Array,
    queue: queue_lib.Queue,
    *,
    length: int,
    step: jax.Array | int,
    temperature: float | jax.Array = 0.2,
    mesh: Mesh | None = None,
    block_size: int | None = None,
    precision: str = "highest",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """InfoNCE loss of queries with their keys as positives and the queue as negatives.

    He et al. 2020 (arXiv 1911.05722), eq. 1, averaged over the batch: minus the log-softmax of
    `query . key / temperature` over itself and the similarities with the queue's `length` keys.
    Push the new keys after this, not before.

    Each device scores the queries of *all* devices against its own part of the queue, and the
    log-sum-exps are combined: `[b, d]` is communicated, never the queue.

    Args:
        queries: `[b, d]`, any float type; normalised here.
        keys: `[b, d]`, row by row the positives; normalised here, no gradient.
        queue: negatives, unit norm, no gradient.
        length: number of keys of the queue that count, >= 1.
        step: int >= 0, number of pushes so far.
        temperature: > 0.
        mesh: where `queries`, `keys` and the rows of the queue are split. None: one device.
        block_size: edge of the tiles of logits; memory is O(b d + block_size^2) beside the queue.
        precision: of the similarity products, see `common.contrast.rows_lse`.

    Returns:
        The loss, a scalar of at least float32, and metrics without gradient: `contrastive_top1`,
        `contrastive_top5` (fraction of queries whose key is the best, or among the best five, of
        1 + length; ties are misses), `positive_similarity`, `negative_similarity` (mean cosines).

    Raises:
        UserError: if shapes do not fit together, the batch or the queue cannot be split over the
            mesh, or length or temperature are not positive.
    """
    contrast.check_temperature(temperature)
    check_rows("info_nce", queries, keys)
    queue_lib.check("info_nce", queue, length, queries.shape, mesh)
    dtype = jnp.result_type(queries, keys, queue.keys, jnp.float32)
    live = queue_lib.mask(length, queue.keys.shape[1], step)

    def local(queries, keys, negatives, live, temperature, axis):
        mean = functools.partial(mean_of_rows, axis=axis)
        keys = jax.lax.stop_gradient(keys)
        queries = contrast.normalize(queries.astype(dtype))
        similarity = jnp.sum(queries * contrast.normalize(keys.astype(dtype)), axis=-1)
        positive = similarity / temperature
        lse, above, total = queue_lib.scored(
            queries / temperature,
            contrast.tie_threshold(positive, temperature),
            negatives,
            live,
            axis=axis,
            block_size=block_size,
            precision=precision,
        )
        loss = mean(contrast.cross_entropy(positive, lse))
        queries, similarity = jax.lax.stop_gradient((queries, similarity))
        return loss, {
            "contrastive_top1": jnp.mean(above < 1, dtype=dtype),
            "contrastive_top5": jnp.mean(above < 5, dtype=dtype),
            "positive_similarity": mean(similarity),
            "negative_similarity": jnp.sum(mean(queries) * total) / length,
        }

    args = queries, keys, queue.keys, live, jnp.asarray(temperature, dtype)
    rows, slots = PartitionSpec(AXIS), PartitionSpec(None, AXIS)
    specs = rows, rows, slots, slots, PartitionSpec()
    return each_device(local, mesh, specs, PartitionSpec())(*args)


def mean_of_rows(x: jax.Array, axis: str | None) -> jax.Array:
    """Mean over the first axis, of all devices' rows if `axis` names a mesh axis."""
    return x.mean(axis=0) if axis is None else jax.lax.pmean(x.mean(axis=0), axis)


def check_rows(loss: str, queries: jax.Array, keys: jax.Array) -> None:
    """Raises a `UserError` unless queries and keys are two equal `[b, d]`; `loss` is its name."""
    if queries.ndim != 2 or queries.shape != keys.shape or queries.shape[0] < 1:
        raise UserError(
            f"{loss}: queries are {list(queries.shape)} and keys {list(keys.shape)}: expected "
            "two equal shapes [b, d] with b >= 1"
        )
