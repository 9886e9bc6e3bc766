"""Shuffling BN (He et al. 2020, section 3.3): rows change BN group, and mostly device.

The TPU compiler on its own gathers the images of many chips in float32 where groups and chips do
not match. So the exchange is explicit: an all-to-all within sets of devices, and a permutation of
all devices where that is not enough.
"""

import jax
from jax.sharding import Mesh, PartitionSpec

from common.sharding import AXIS


def shuffle(x: jax.Array, groups: int, mesh: Mesh | None = None) -> jax.Array:
    """Deals the rows of `x [b, ...]` over the BN groups, so that no group keeps its own images.

    Row j of group g goes to row `j * groups + g`. The new group g shares at most
    `ceil(b / groups^2)` images with the old one. (The authors' code draws a permutation each step.)

    Args:
        x: `[b, ...]`, on a mesh split along its rows.
        groups: G; must divide b.
        mesh: over which x is split. The result does not depend on it. A device sends and receives
            its rows at most twice if the numbers of rows, groups and devices divide each other;
            otherwise the compiler decides.

    Returns:
        `[b, ...]`, split like x.
    """
    devices = 1 if mesh is None else mesh.size
    size = x.shape[0] // groups
    plan = _plan(devices, groups, size)
    if devices == 1 or plan is None:
        blocks = x.reshape((groups, size) + x.shape[1:])
        return blocks.swapaxes(0, 1).reshape(x.shape)
    own, inner, members, moves = plan

    def exchange(rows: jax.Array) -> jax.Array:
        rest = rows.shape[1:]
        if own > 1:
            rows = rows.reshape((own, size) + rest).swapaxes(0, 1).reshape(rows.shape)
        rows = jax.lax.all_to_all(rows, AXIS, 0, 0, axis_index_groups=members, tiled=True)
        if inner > 1:
            split = (len(members[0]), inner, -1)
            rows = rows.reshape(split + rest).swapaxes(0, 1).reshape(rows.shape)
        if any(a != b for a, b in moves):
            rows = jax.lax.ppermute(rows, AXIS, moves)
        return rows

    spec = PartitionSpec(AXIS)
    return jax.shard_map(exchange, mesh=mesh, in_specs=spec, out_specs=spec)(x)


def unshuffle(x: jax.Array, groups: int, mesh: Mesh | None = None) -> jax.Array:
    """The inverse of `shuffle`."""
    return shuffle(x, x.shape[0] // groups, mesh)


def sends(devices: int, groups: int, size: int) -> int:
    """How often `shuffle` sends a device's rows over the links; 2 where XLA decides."""
    plan = _plan(devices, groups, size)
    return 2 if plan is None or any(a != b for a, b in plan[-1]) else 1


def _plan(
    n: int, groups: int, size: int
) -> tuple[int, int, list[list[int]], list[tuple[int, int]]] | None:
    """How n devices transpose the matrix `[groups, size]` that they hold row by row.

    Returns:
        Whole groups on a device; consecutive rows of a group that go to the same device; sets of
        devices for the all-to-all; pairs (from, to) for the permutation after it. None: the numbers
        do not divide each other.
    """
    if groups % n == 0:  # whole groups on a device
        own = groups // n
        if size % n == 0:
            return own, size // n, [list(range(n))], [(d, d) for d in range(n)]
        if n % size == 0:
            sets = n // size
            members = [[i * size + j for j in range(size)] for i in range(sets)]
            return own, 1, members, [
                (i * size + j, j * sets + i) for i in range(sets) for j in range(size)
            ]  # fmt: skip
    elif n % groups == 0 and size % (n // groups) == 0:  # a group on `span` devices
        span = n // groups
        rows = size // span
        if rows % groups == 0:
            members = [[g * span + p for g in range(groups)] for p in range(span)]
            return 1, rows // groups, members, [
                (g * span + p, p * groups + g) for g in range(groups) for p in range(span)
            ]  # fmt: skip
        if groups % rows == 0:
            sets = groups // rows
            places = [(i, j, p) for i in range(sets) for p in range(span) for j in range(rows)]
            members = [
                [(rows * i + j) * span + p for j in range(rows)]
                for i in range(sets)
                for p in range(span)
            ]
            return 1, 1, members, [
                ((rows * i + j) * span + p, (p * rows + j) * sets + i) for i, j, p in places
            ]  # fmt: skip
    return None
