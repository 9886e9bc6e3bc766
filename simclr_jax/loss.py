"""NT-Xent and DCL: every embedding against all other embeddings of the global batch."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from common import contrast
from common.errors import UserError
from common.sharding import AXIS, each_device


def nt_xent(
    z1: jax.Array,
    z2: jax.Array,
    temperature: float | jax.Array = 0.1,
    *,
    decoupled: bool = False,
    mesh: Mesh | None = None,
    block_size: int | None = None,
    precision: str = "highest",
) -> jax.Array:
    """NT-Xent loss of two views, averaged over all 2N embeddings.

    For each of the 2N rows: minus the log-softmax of the cosine similarity with its other view,
    over the similarities with the 2N - 1 other rows, all divided by `temperature`.
    Chen et al. 2020 (arXiv 2002.05709), eq. 1. The authors' code averages over N and adds the two
    halves, which is twice this value; `simclr.loss_scale=2` gives their gradient.

    Decoupled, the other view is left out of the sum in the softmax's denominator, which then holds
    the 2N - 2 embeddings of other images only: DCL, Yeh et al. 2021 (arXiv 2110.06848), eq. 6.
    It is below 0 once the other view outweighs all of those together, which is no fault.

    Args:
        z1: `[n, d]`, first view; any float type, any length of the vectors.
        z2: `[n, d]`, second view of the same images in the same order.
        temperature: > 0.
        decoupled: DCL instead of NT-Xent.
        mesh: where `z1` and `z2` are split along their rows; each device then holds the
            embeddings of all but computes its own rows only. None: one device.
        block_size: edge of the tiles of logits; memory is O(n d + block_size^2).
        precision: of the similarity products, see `common.contrast.rows_lse`.

    Returns:
        Scalar, at least float32.

    Raises:
        UserError: if the shapes differ or are not `[n, d]` with n >= 1 (decoupled: 2), if n cannot
            be split over the mesh, or if the temperature is not positive.
    """
    if z1.shape != z2.shape:
        raise UserError(
            f"nt_xent: z1 is {list(z1.shape)} and z2 is {list(z2.shape)}: expected two equal "
            "shapes [n, d], the two views of the same n images"
        )
    if z1.ndim != 2:
        raise UserError(f"nt_xent: z1 and z2 are {list(z1.shape)}: expected [n, d], flatten them")
    z = jnp.stack([z1, z2], axis=1)  # on an unsplit axis: nothing is communicated
    return nt_xent_with_metrics(
        z,
        temperature,
        decoupled=decoupled,
        mesh=mesh,
        block_size=block_size,
        precision=precision,
    )[0]


@jax.named_scope("loss")
def nt_xent_with_metrics(
    z: jax.Array,
    temperature: float | jax.Array = 0.1,
    *,
    decoupled: bool = False,
    mesh: Mesh | None = None,
    block_size: int | None = None,
    precision: str = "highest",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`nt_xent` of views that travel together, and what to watch while training.

    Args:
        z: `[n, 2, d]`, the two views of each image side by side, split along axis 0.
        temperature: > 0.
        decoupled: as in `nt_xent`.
        mesh: as in `nt_xent`.
        block_size: as in `nt_xent`.
        precision: as in `nt_xent`.

    Returns:
        The loss, and metrics without gradient: `contrastive_top1` and `contrastive_top5` (fraction
        of rows whose positive is the best, or among the best five, of the 2n - 1; ties are misses),
        `positive_similarity` and `negative_similarity` (mean cosines; 0 without negatives).

    Raises:
        UserError: as `nt_xent`.
    """
    contrast.check_temperature(temperature)
    if z.ndim != 3 or z.shape[1] != 2 or z.shape[0] < 1 or z.shape[2] < 1:
        raise UserError(
            f"nt_xent: the views are {list(z.shape)}: expected [n, 2, d] with n >= 1 and d >= 1"
        )
    if mesh is not None and z.shape[0] % mesh.size:
        raise UserError(
            f"nt_xent: n={z.shape[0]} images cannot be split over {mesh.size} devices: "
            f"use a multiple of {mesh.size}"
        )
    n = z.shape[0]
    if decoupled and n == 1:
        raise UserError(
            "dcl: a batch of 1 image has no negatives, and the positive is not in the denominator: "
            "expected at least 2 images"
        )

    def local(z, temperature, axis):
        def total(x):  # sum over rows, of all devices
            return x.sum(axis=0) if axis is None else jax.lax.psum(x.sum(axis=0), axis)

        z = contrast.normalize(z)
        temperature = temperature.astype(z.dtype)
        first = 0 if axis is None else jax.lax.axis_index(axis) * z.shape[0]
        # Flattened image by image: the two rows of an image, a positive pair, get the same id.
        ids = jnp.repeat(first + jnp.arange(z.shape[0], dtype=jnp.int32), 2)
        similarity = jnp.sum(z[:, 0] * z[:, 1], axis=-1)
        positive = jnp.repeat(similarity / temperature, 2)
        rows = z.reshape(-1, z.shape[2])
        threshold = contrast.tie_threshold(positive, temperature)
        tiles = {"axis": axis, "block_size": block_size, "precision": precision}
        lse, above = contrast.self_lse(rows / jnp.sqrt(temperature), ids, threshold, **tiles)
        each = lse - positive if decoupled else contrast.cross_entropy(positive, lse)
        loss = total(each) / (2 * n)
        rows, similarity = jax.lax.stop_gradient((rows, similarity))
        # The sum over all ordered pairs, less each row with itself and with its positive.
        positives, mean = 2 * total(similarity), total(rows)
        negatives = jnp.sum(mean * mean) - jnp.sum(total(rows * rows)) - positives
        # as an integer it has more than 32 bits at 2n = 65,536
        pairs: Any = float(2 * n * (2 * n - 2))
        if n == 1:  # there is none: what the difference leaves is rounding
            negatives, pairs = 0 * loss, 1.0
        return loss, {
            "contrastive_top1": total((above < 1).astype(loss.dtype)) / (2 * n),
            "contrastive_top5": total((above < 5).astype(loss.dtype)) / (2 * n),
            "positive_similarity": positives / (2 * n),
            "negative_similarity": negatives / pairs,
        }

    temperature = jnp.asarray(temperature)
    specs = PartitionSpec(AXIS), PartitionSpec()
    return each_device(local, mesh, specs, PartitionSpec())(z, temperature)
