"""A large batch on a small machine: the encoder sees it in parts, the loss sees it whole.

`config.microbatch` images (with all their views) go through the encoder at a time, and only the
features of each pass are kept; head and loss then see all of them at once. In the backward pass
each part is computed again with the cotangents of its features (as GradCache does by hand, Gao et
al. 2021). That is the gradient of the full contrast. Gradient accumulation is not: there every part
would have only its own, fewer negatives.

It is exact because a micro-batch is a set of whole BN groups, where the encoder has batch norm; the
head may have any, because it is not split. Every device contributes its own rows to every
micro-batch, and holds whole groups of them, so that a pass needs no communication: gradients and
running statistics are summed over the devices once a step, not once a micro-batch.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from common.errors import UserError
from common.sharding import AXIS, each_device


def count(batch_size: int, microbatch: int, bn_groups: int | None, devices: int) -> int:
    """Number of micro-batches M of a step; 1 where the batch is not split.

    Args:
        batch_size: images in the global batch.
        microbatch: images in a micro-batch; 0 = the batch.
        bn_groups: groups of the global batch that share batch statistics in the encoder; None for
            one without batch norm.
        devices: in the mesh.

    Raises:
        UserError: unless `microbatch` divides the batch and is a multiple of the devices, and
            `bn_groups` is a multiple of M x devices.
    """
    b, size, groups = batch_size, microbatch, bn_groups
    if size in (0, b):
        return 1
    if size < 0 or b % size or size % devices:
        fitting = [s for s in range(devices, b, devices) if b % s == 0]
        near = sorted(sorted(fitting, key=lambda s: abs(s - size))[:3])
        raise UserError(
            f"microbatch={size}: expected a divisor of batch_size={b} that can be split over "
            f"{devices} device(s), choose {_either([*near, '0 (the whole batch at once)'])}"
        )
    parts = b // size
    if groups is not None and groups % (parts * devices):
        fitting = [g for g in range(parts * devices, b + 1, parts * devices) if b % g == 0]
        raise UserError(
            f"model.bn_groups={groups} with {parts} micro-batches (batch_size={b}, microbatch="
            f"{size}) on {devices} device(s): batch statistics must not cross a micro-batch or a "
            f"device, so set model.bn_groups to a multiple of {parts * devices} ("
            f"{_either(fitting[:4])}), or microbatch=0"
        )
    return parts


def forward(
    apply: Callable[[Any, Any, Any], tuple],
    params: Any,
    batch_stats: Any,
    rows: Any,
    *,
    parts: int,
    mesh: Mesh,
) -> tuple[jax.Array, Any]:
    """Applies `apply` to a sharded batch in parts that are recomputed in the backward pass.

    Args:
        apply: `(params, batch_stats, rows) -> (features, new batch_stats)`, the training pass of
            one device's rows of a micro-batch. The new statistics must be linear in those of the
            groups, as a running mean is: then the mean over parts and devices is what one update
            with all groups gives.
        params: replicated.
        batch_stats: replicated.
        rows: a tree of arrays `[rows, ...]` (images, and keys of their draws), split over the
            devices, rows a multiple of `parts` x devices.
        parts: number of micro-batches.
        mesh: the device mesh.

    Returns:
        `features [rows, d]` in the order of the rows, and the statistics.
    """

    def local(params: Any, batch_stats: Any, rows: Any, axis: str | None) -> tuple:
        # They become one copy a device *before* the loop, so that the gradient is summed over the
        # devices after it.
        if axis is not None:
            params, batch_stats = jax.lax.pcast((params, batch_stats), axis, to="varying")

        # the loop itself keeps the two passes apart, which prevent_cse is for
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def encode(params: Any, block: Any) -> tuple:
            features, stats = apply(params, batch_stats, block)
            return features, jax.lax.stop_gradient(stats)

        blocks = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), rows)
        _, (features, stats) = jax.lax.scan(lambda _, b: (None, encode(params, b)), None, blocks)
        stats = jax.tree.map(lambda x: x.mean(0), stats)
        if axis is not None:
            stats = jax.lax.pmean(stats, axis)
        return features.reshape(-1, features.shape[-1]), stats

    split, whole = PartitionSpec(AXIS), PartitionSpec()
    return each_device(local, mesh, (whole, whole, split), (split, whole))(
        params, batch_stats, rows
    )


def _either(choices: list) -> str:
    *first, last = map(str, choices)
    return f"{', '.join(first)} or {last}" if first else last
