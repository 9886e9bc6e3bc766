"""NT-Xent and DCL with a memory: embeddings against those of a momentum encoder, new and old."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from common import contrast
from common import queue as queues
from common.errors import UserError
from common.sharding import AXIS, each_device


@jax.named_scope("loss")
def memory_nt_xent_with_metrics(
    z: jax.Array,
    keys: jax.Array,
    memory: queues.Queue,
    temperature: float | jax.Array = 0.1,
    *,
    length: int,
    step: jax.Array | int = 0,
    decoupled: bool = False,
    mesh: Mesh | None = None,
    block_size: int | None = None,
    precision: str = "highest",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`nt_xent` where all that an embedding is compared with comes from a momentum encoder.

    For each of the 2n rows: minus the log-softmax of the cosine similarity with the key of its
    image's other view, over that, the keys of both views of the n - 1 other images, and the keys in
    the memory, all divided by `temperature`. Chen et al. 2020b (arXiv 2006.10029), section 2, and
    one of its authors in issue 115 of github.com/google-research/simclr. Push the keys of the batch
    into the memory after this, not before.

    The positive is a key too: one by the encoder itself would let all embeddings move away from
    where the keys are, together and for ever, for it would move with them.

    Args:
        z: `[n, 2, d]`, embeddings of the two views of each image, split along axis 0.
        keys: `[n, 2, d]`, those of the momentum encoder of the same views; no gradient.
        memory: keys of past steps, unit norm, no gradient. Empty entries do not count.
        temperature: > 0.
        length: number of the memory's keys that count, >= 1.
        step: int >= 0, number of pushes into the memory so far.
        decoupled: the positive is not in the softmax's denominator, as in `nt_xent`.
        mesh: where the rows of `z`, `keys` and the memory are split. Each device gathers the keys
            of the batch and the rows, never the memory. None: one device.
        block_size: edge of the tiles of logits; memory is O(n d + block_size^2) beside the queue.
        precision: of the similarity products, see `common.contrast.rows_lse`.

    Returns:
        The loss, a scalar of at least float32, and metrics without gradient: `contrastive_top1`
        and `contrastive_top5` (fraction of rows whose positive is the best, or among the best five,
        of 2n - 1 and the keys of the memory; ties are misses), `positive_similarity` and
        `negative_similarity` (mean cosines; 0 without negatives).

    Raises:
        UserError: if the shapes do not fit together, n or the memory cannot be split over the mesh,
            or the temperature is not positive.
    """
    contrast.check_temperature(temperature)
    if z.ndim != 3 or z.shape[1] != 2 or z.shape != keys.shape:
        raise UserError(
            f"memory_nt_xent: the views are {list(z.shape)} and their keys {list(keys.shape)}: "
            "expected two equal shapes [n, 2, d]"
        )
    n, _, dim = z.shape
    queues.check("memory_nt_xent", memory, length, (2 * n, dim), mesh)
    if decoupled and n == 1:
        raise UserError(
            "memory_nt_xent: a single image has no negatives while the memory is empty, and DCL's "
            "denominator leaves the positive out: expected at least 2 images"
        )
    live = queues.mask(length, memory.keys.shape[1], step) & queues.filled(memory)

    def local(z, keys, slots, live, temperature, axis):
        def total(x):  # sum over rows, of all devices
            return x.sum(axis=0) if axis is None else jax.lax.psum(x.sum(axis=0), axis)

        z = contrast.normalize(z)
        keys = contrast.normalize(jax.lax.stop_gradient(keys)).astype(z.dtype)
        temperature = temperature.astype(z.dtype)
        # Flattened image by image: the two rows of an image and their keys get the same id.
        rows, own, others = (x.reshape(-1, dim) for x in (z, keys, keys[:, ::-1]))
        first = 0 if axis is None else jax.lax.axis_index(axis) * len(rows)
        ids = (first + jnp.arange(len(rows), dtype=jnp.int32)) // 2
        similarity = jnp.sum(rows * others, axis=-1)
        positive = similarity / temperature
        threshold = contrast.tie_threshold(positive, temperature)
        tiles: dict[str, Any] = {"block_size": block_size, "precision": precision}
        everyone = contrast.gather_rows(own, axis)
        every_id = jnp.arange(len(everyone), dtype=jnp.int32) // 2
        lse, above = contrast.rows_lse(
            rows / temperature, everyone, ids, every_id, threshold, **tiles
        )
        past, ranks, past_keys = queues.scored(
            rows / temperature, threshold, slots, live, axis=axis, **tiles
        )
        lse = contrast.joint_lse(lse, past)
        above += jax.lax.dynamic_slice_in_dim(ranks, first, len(rows))
        each = lse - positive if decoupled else contrast.cross_entropy(positive, lse)
        loss = total(each) / (2 * n)

        rows, similarity = jax.lax.stop_gradient((rows, similarity))
        positives, mean = total(similarity), total(rows)
        negatives = jnp.sum(mean * past_keys)
        pairs = 2 * n * total(live.reshape(-1).astype(loss.dtype))
        if n > 1:  # all pairs of the batch, less each row with the two keys of its own image
            negatives += jnp.sum(mean * total(own)) - total(jnp.sum(rows * own, axis=-1))
            negatives -= positives
            pairs += 2.0 * n * (2 * n - 2)
        return loss, {
            "contrastive_top1": total((above < 1).astype(loss.dtype)) / (2 * n),
            "contrastive_top5": total((above < 5).astype(loss.dtype)) / (2 * n),
            "positive_similarity": positives / (2 * n),
            "negative_similarity": negatives / jnp.maximum(pairs, 1),
        }

    split, slots, whole = PartitionSpec(AXIS), PartitionSpec(None, AXIS), PartitionSpec()
    run = each_device(local, mesh, (split, split, slots, slots, whole), whole)
    return run(z, keys, memory.keys, live, jnp.asarray(temperature))
