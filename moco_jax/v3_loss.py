"""The loss of MoCo v3: each query against the keys of the whole batch, without a queue."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from common import contrast
from common.errors import UserError
from common.sharding import AXIS, each_device
from moco_jax.loss import check_rows, mean_of_rows


@jax.named_scope("loss")
def batch_info_nce(
    queries: jax.Array,
    keys: jax.Array,
    temperature: float | jax.Array = 0.2,
    *,
    mesh: Mesh | None = None,
    block_size: int | None = None,
    precision: str = "highest",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`2 T` times the cross-entropy of a query's own key among the keys of all images.

    Chen et al. 2021 (arXiv 2104.02057), algorithm 1, `ctr`; one direction, averaged over the batch.
    The factor keeps the gradient from growing with 1 / T. Of vectors without any relation the loss
    is about `2 T log b`.

    Args:
        queries: `[b, d]`, any float type; normalised here.
        keys: `[b, d]`, row by row the positives; normalised here, no gradient.
        temperature: T > 0.
        mesh: where the rows are split. Each device gathers all keys, and scores its own queries.
            None: one device.
        block_size: edge of the tiles of logits; memory is O(b d + block_size^2).
        precision: of the similarity products, see `common.contrast.rows_lse`.

    Returns:
        The loss, a scalar of at least float32, and metrics without gradient: `contrastive_top1`,
        `contrastive_top5` (fraction of queries whose key is the best, or among the best five, of
        b; ties are misses), `positive_similarity`, `negative_similarity` (mean cosines; 0 if
        b = 1).

    Raises:
        UserError: if the shapes are not two equal `[b, d]`, if b cannot be split over the mesh, or
            if the temperature is not positive.
    """
    contrast.check_temperature(temperature)
    check_rows("batch_info_nce", queries, keys)
    b = queries.shape[0]
    if mesh is not None and b % mesh.size:
        raise UserError(
            f"batch_info_nce: {b} queries cannot be split over {mesh.size} devices: use a multiple "
            f"of {mesh.size}"
        )
    dtype = jnp.result_type(queries, keys, jnp.float32)

    def local(queries, keys, temperature, axis):
        mean = functools.partial(mean_of_rows, axis=axis)
        queries = contrast.normalize(queries.astype(dtype))
        keys = contrast.normalize(jax.lax.stop_gradient(keys).astype(dtype))
        similarity = jnp.sum(queries * keys, axis=-1)
        positive = similarity / temperature
        first = 0 if axis is None else jax.lax.axis_index(axis) * keys.shape[0]
        everyone = contrast.gather_rows(keys, axis)
        lse, above = contrast.rows_lse(
            queries / temperature,
            everyone,
            first + jnp.arange(keys.shape[0], dtype=jnp.int32),
            jnp.arange(everyone.shape[0], dtype=jnp.int32),
            contrast.tie_threshold(positive, temperature),
            block_size=block_size,
            precision=precision,
        )
        loss = 2 * temperature * mean(contrast.cross_entropy(positive, lse))
        queries, similarity = jax.lax.stop_gradient((queries, similarity))
        positives = mean(similarity)
        negatives = b * jnp.sum(mean(queries) * mean(keys)) - positives
        return loss, {
            "contrastive_top1": mean((above < 1).astype(dtype)),
            "contrastive_top5": mean((above < 5).astype(dtype)),
            "positive_similarity": positives,
            "negative_similarity": negatives / (b - 1) if b > 1 else 0 * loss,
        }

    rows, whole = PartitionSpec(AXIS), PartitionSpec()
    run = each_device(local, mesh, (rows, rows, whole), whole)
    return run(queries, keys, jnp.asarray(temperature, dtype))
