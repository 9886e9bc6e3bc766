"""SupCon, L_out: every embedding attracts all others of its class. Supervised: it reads labels."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from common import contrast
from common.errors import UserError
from common.sharding import AXIS, each_device
from simclr_jax.loss import nt_xent_with_metrics


@jax.named_scope("loss")
def supcon_with_metrics(
    z: jax.Array,
    labels: jax.Array,
    temperature: float | jax.Array = 0.1,
    *,
    mesh: Mesh | None = None,
    block_size: int | None = None,
    precision: str = "highest",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The supervised contrastive loss L_out, averaged over all 2N embeddings, and its metrics.

    For each of the 2N rows: minus the log-softmax, over the similarities with the 2N - 1 other
    rows, of the similarity with a positive, averaged over its positives. Positives are all other
    rows of its class, both views; they stay in the softmax's denominator. Khosla et al. 2020
    (arXiv 2004.11362), eq. 2: the mean is outside the logarithm, where L_in (eq. 3) has it inside.

    An image without a label (-1) has one positive, its other view, as in NT-Xent, and is a negative
    of all other images. With all labels unknown or different this is NT-Xent.

    Args:
        z: `[n, 2, d]`, the two views of each image side by side, split along axis 0.
        labels: integers `[n]`, split likewise; any number of classes, negative: unknown.
        temperature: > 0. The loss is not multiplied by it, as it is in the authors' code.
        mesh: as in `nt_xent`; the positives too are those on all devices.
        block_size: as in `nt_xent`.
        precision: as in `nt_xent`.

    Returns:
        The loss, and metrics without gradient: `contrastive_top1` and `contrastive_top5` (fraction
        of rows whose own other view is the best, or among the best five, of itself and the rows of
        other classes; ties are misses), `positive_similarity` and `negative_similarity` (mean
        cosines of the pairs of rows that are positives, and of those that are not; 0 if there are
        none).

    Raises:
        UserError: as `nt_xent`, and if the labels are not one integer for each image.
    """
    if labels.shape != z.shape[:1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise UserError(
            f"supcon: labels are {labels.dtype} {list(labels.shape)}: expected one integer for "
            f"each of the n={z.shape[0]} images, -1 where there is no label"
        )
    # A row's positives have one denominator, so L_out is NT-Xent of the own other view, plus its
    # logit, less the mean logit of all positives.
    self_supervised, _ = nt_xent_with_metrics(
        z, temperature, mesh=mesh, block_size=block_size, precision=precision
    )
    n = z.shape[0]

    def local(z, labels, temperature, axis):
        def total(x):  # sum over images or rows, of all devices
            return x.sum(axis=0) if axis is None else jax.lax.psum(x.sum(axis=0), axis)

        z = contrast.normalize(z)
        temperature = temperature.astype(z.dtype)
        z = z / jnp.sqrt(temperature)  # products are logits
        images = z.sum(axis=1)  # what an image adds to the sum of its class
        everyone = contrast.gather_rows(jax.lax.stop_gradient(z), axis)
        (classes, index), all_classes = _classes(labels, axis)
        others, count = _others_of_class(
            classes, index, all_classes, everyone.sum(axis=1), block_size, precision
        )
        # Sums of logits over both rows of an image: with the own other view, with the other images
        # of the class. Of the latter, `others` has each pair from its other side without gradient,
        # which is half of it.
        own = 2 * jnp.sum(z[:, 0] * z[:, 1], axis=-1)
        half = jnp.sum(images * others, axis=-1)
        rest = 2 * half - jax.lax.stop_gradient(half)
        positives = 2 * count + 1  # of each row
        loss = total(own - (own + rest) / positives) / (2 * n)

        z, own, rest, images = jax.lax.stop_gradient((z, own, rest, images))
        rows, own_logit = z.reshape(-1, z.shape[2]), jnp.repeat(own / 2, 2)
        _, above = contrast.rows_lse(
            rows,
            everyone.reshape(-1, z.shape[2]),
            jnp.repeat(classes, 2),
            jnp.repeat(all_classes, 2),
            contrast.tie_threshold(own_logit, temperature),
            block_size=block_size,
            precision=precision,
        )
        # The sum over all ordered pairs, less each row with itself and with its positives.
        alike, mean = total(own + rest), total(images)
        unlike = jnp.sum(mean * mean) - jnp.sum(total(rows * rows)) - alike
        unlike_pairs = total(4 * (n - 1 - count))
        return loss, {
            "contrastive_top1": total((above < 1).astype(loss.dtype)) / (2 * n),
            "contrastive_top5": total((above < 5).astype(loss.dtype)) / (2 * n),
            "positive_similarity": temperature * alike / total(2 * positives),
            "negative_similarity": jnp.where(
                unlike_pairs > 0, temperature * unlike / jnp.maximum(unlike_pairs, 1), 0
            ),
        }

    specs = PartitionSpec(AXIS), PartitionSpec(AXIS), PartitionSpec()
    more, metrics = each_device(local, mesh, specs, PartitionSpec())(
        z, labels, jnp.asarray(temperature)
    )
    return self_supervised + more, metrics


def _classes(labels, axis):
    """`(ids, indices)` of this device's images, and the ids of all: equal ids are one class.

    An image without a label has an id of its own.
    """
    everyone = contrast.gather_rows(labels, axis)
    n, order = everyone.shape[0], jnp.sort(everyone)
    first = 0 if axis is None else jax.lax.axis_index(axis) * labels.shape[0]
    index = first + jnp.arange(labels.shape[0], dtype=jnp.int32)

    def ids(labels, index):  # a label's place in order is below n
        return jnp.where(labels < 0, n + index, jnp.searchsorted(order, labels).astype(jnp.int32))

    return (ids(labels, index), index), ids(everyone, jnp.arange(n, dtype=jnp.int32))


def _others_of_class(classes, index, all_classes, images, block_size, precision):
    """The sum of `images [n, d]` over each image's class without itself, and how many these are.

    By products with rows of 0 and 1: the order in which a scatter-add sums, and so its rounding,
    may change from run to run on a GPU.
    """
    n, block = len(images), block_size or contrast.BLOCK_SIZE

    def of_one(row):
        same = (all_classes == row[0]) & (jnp.arange(n) != row[1])
        same = same.astype(images.dtype)
        return jnp.matmul(same, images, precision=precision), same.sum()

    # as many at a time as have one tile of 0 and 1
    return jax.lax.map(of_one, (classes, index), batch_size=max(1, block * block // n))
