"""What the contrastive losses have in common: unit vectors, gathered rows, a streaming log-sum-exp.

A loss against n keys needs, for every query, only one number out of n logits: their log-sum-exp.
Here the logits are computed tile by tile, over rows *and* columns, folded into a running maximum
and sum, and discarded; the backward pass recomputes them. Memory is the embeddings plus a tile.

Temperatures are applied to the embeddings (`queries / temperature`, or `z / sqrt(temperature)` for
a set contrasted with itself), so nothing below needs to know them.
"""

import functools
import math

import jax
import jax.numpy as jnp

from common.errors import UserError

# Rows and columns of a tile. Larger tiles mean fewer loop steps, smaller ones stay in cache.
BLOCK_SIZE = 1024
# A negative this close to the positive (in units of eps) is a tie: their sums differ in order only.
_TIE_EPS = 32


def normalize(x: jax.Array, eps: float = 1e-12) -> jax.Array:
    """Scales vectors to unit length: `x * rsqrt(max(sum x^2, eps))`.

    Args:
        x: `[..., d]`, any float type; promoted to at least float32.
        eps: lower bound of the squared length. A zero vector stays zero, with a finite gradient.

    Returns:
        `[..., d]`, unit norm.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), eps))


def check_temperature(temperature: float | jax.Array, field: str = "temperature") -> None:
    """Raises a `UserError` that names `field` unless `temperature` is > 0 and finite.

    One that is traced cannot be checked.
    """
    if not isinstance(temperature, jax.core.Tracer) and not 0 < temperature < math.inf:
        raise UserError(
            f"{field}={temperature}: expected a finite number > 0, set e.g. {field}=0.1"
        )


def gather_rows(x: jax.Array, axis: str | None) -> jax.Array:
    """All rows of an array split over the mesh axis `axis`, inside `shard_map`.

    Its gradient is a reduce-scatter, which sums the cotangents of all devices.

    Args:
        x: `[n_local, ...]`.
        axis: mesh axis name, or None outside `shard_map` (returns `x`).

    Returns:
        `[n, ...]`, in the order of the global array.
    """
    return x if axis is None else jax.lax.all_gather(x, axis, tiled=True)


def rows_lse(
    queries: jax.Array,
    keys: jax.Array,
    query_ids: jax.Array | None = None,
    key_ids: jax.Array | None = None,
    threshold: jax.Array | None = None,
    *,
    block_size: int | None = None,
    precision: str = "highest",
) -> tuple[jax.Array, jax.Array]:
    """Log-sum-exp of `queries @ keys.T` along each row, without ever holding that matrix.

    Differentiable in `queries` and `keys`; under `jit` an unused gradient is not computed.

    Args:
        queries: `[n, d]`, already divided by the temperature.
        keys: `[m, d]`.
        query_ids: int32 `[n]`. A query is not contrasted with keys of its own id, nor with any
            when its id is negative. Default: all pairs count.
        key_ids: int32 `[m]`; a negative id leaves the key out. Needs `query_ids`.
        threshold: `[n]`, a logit per row, e.g. the positive's; carries no gradient.
        block_size: tile edge, default `BLOCK_SIZE`; n and m need not be multiples of it.
        precision: of the matrix products, as in `jnp.matmul`. "highest" is full float32; the
            cheaper settings matter on TPU and GPU and are not yet measured here.

    Returns:
        `lse [n]`, -inf for a row without any key; and `above [n]` int32, the number of keys whose
        logit reaches `threshold` (0 without one): less than k means the positive is in the top k.
    """
    query_ids = jnp.zeros(queries.shape[0], jnp.int32) if query_ids is None else query_ids
    key_ids = jnp.ones(keys.shape[0], jnp.int32) if key_ids is None else key_ids
    if threshold is None:
        threshold = jnp.full(queries.shape[0], jnp.inf, queries.dtype)
    args = _align(queries, keys, query_ids, key_ids, jax.lax.stop_gradient(threshold))
    return _rows_lse(*args, block_size or BLOCK_SIZE, precision)


def self_lse(
    z: jax.Array,
    ids: jax.Array,
    threshold: jax.Array,
    *,
    axis: str | None = None,
    block_size: int | None = None,
    precision: str = "highest",
) -> tuple[jax.Array, jax.Array]:
    """`rows_lse` of a set with itself: each device's own rows against the rows of all devices.

    Logits of a set with itself are symmetric, so the gradient of a row needs only the
    log-sum-exps (and cotangents) of the other rows: two numbers a row are gathered in the backward
    pass where the transpose of a gather would reduce `[n, d]`, and one matrix product is saved.

    Args:
        z: `[n_local, d]`, divided by the square root of the temperature.
        ids: int32 `[n_local]`, global; rows of equal id (a row itself, its positive) are left out.
        threshold: `[n_local]`, as in `rows_lse`.
        axis: mesh axis over which the rows are split, None outside `shard_map`.
        block_size: as in `rows_lse`.
        precision: as in `rows_lse`.

    Returns:
        `lse [n_local]` and `above [n_local]`, as in `rows_lse`.
    """
    args = _align(z, ids, jax.lax.stop_gradient(threshold))
    return _self_lse(*args, axis, block_size or BLOCK_SIZE, precision)


def scattered_lse(lse: jax.Array, axis: str | None) -> jax.Array:
    """Combines log-sum-exps over the keys of each device; returns this device's rows.

    Args:
        lse: `[n]`, of all rows over the local keys; -inf where there are none.
        axis: mesh axis name, or None (returns `lse`).

    Returns:
        `[n_local]`, over the keys of all devices.
    """
    if axis is None:
        return lse
    # pmax has no gradient, and the shift cancels: stop it. -inf everywhere would be inf - inf.
    shift = jax.lax.pmax(jax.lax.stop_gradient(lse), axis)
    shift = jnp.where(shift == -jnp.inf, 0, shift)
    total = jax.lax.psum_scatter(jnp.exp(lse - shift), axis, tiled=True)
    start = jax.lax.axis_index(axis) * total.shape[0]
    return _log(total) + jax.lax.dynamic_slice_in_dim(shift, start, total.shape[0])


def joint_lse(a: jax.Array, b: jax.Array) -> jax.Array:
    """The log-sum-exp over two sets of keys, from that over each; -inf: it has no keys.

    `jnp.logaddexp` has no gradient where both are -inf.
    """
    shift = jax.lax.stop_gradient(jnp.maximum(a, b))
    shift = jnp.where(shift == -jnp.inf, 0, shift)
    return _log(jnp.exp(a - shift) + jnp.exp(b - shift)) + shift


def _log(total: jax.Array) -> jax.Array:
    """`log`, whose gradient at 0, a sum over no keys, is 0 times infinity otherwise."""
    return jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1)), -jnp.inf)


def cross_entropy(positive: jax.Array, negatives_lse: jax.Array) -> jax.Array:
    """`-log(exp(positive) / (exp(positive) + sum of exp(negatives)))`, elementwise.

    As a softplus: a small loss keeps its digits, where a difference of two large logits would not.
    """
    return jax.nn.softplus(negatives_lse - positive)


def tie_threshold(positive: jax.Array, temperature: float | jax.Array) -> jax.Array:
    """The logit a negative must reach to count as no worse than `positive` (a logit, any shape).

    Slightly lower than `positive`, so that ties count as misses whatever the rounding: a collapsed
    encoder, all of whose logits are equal, shows an accuracy of 0 and not of 1.
    """
    return jax.lax.stop_gradient(positive - _TIE_EPS * jnp.finfo(positive.dtype).eps / temperature)


def _align(*arrays: jax.Array) -> list[jax.Array]:
    """Makes all arrays vary over every mesh axis that any of them varies over.

    `shard_map` tracks that, and loops and `custom_vjp` require it to be consistent. Adding a zero
    computed from each array is enough (`lax.pcast` would need the missing axes, and how to query an
    array for its axes changes between versions of jax).
    """
    marks = (jnp.ravel(jax.lax.stop_gradient(x))[0] > 0 for x in arrays)
    mark = functools.reduce(jnp.logical_or, marks)
    return [x + jnp.where(mark, 0, 0).astype(x.dtype) for x in arrays]


def _blocks(x: jax.Array, block: int, fill: float = 0) -> jax.Array:
    """`[n, ...]` as `[count, size, ...]`, size <= block, balanced for the least padding."""
    count = -(-x.shape[0] // block)
    size = -(-x.shape[0] // count)
    pad = [(0, count * size - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, pad, constant_values=fill).reshape(count, size, *x.shape[1:])


def _tile(rows, row_ids, cols, col_ids, precision):
    """Logits of a tile, and which of them count. Padding has id -1."""
    logits = jnp.matmul(rows, cols.T, precision=precision)
    live = (row_ids[:, None] != col_ids[None]) & (row_ids >= 0)[:, None] & (col_ids >= 0)[None]
    return logits, live


def _forward(queries, keys, query_ids, key_ids, threshold, block, precision):
    columns = _blocks(keys, block), _blocks(key_ids, block, -1)

    def row_block(row):
        q, q_ids, limit = row

        def fold(carry, column):
            top, total, above = carry
            k, k_ids = column
            logits, live = _tile(q, q_ids, k, k_ids, precision)
            logits = jnp.where(live, logits, -jnp.inf)
            new_top = jnp.maximum(top, logits.max(axis=1))
            shift = jnp.where(new_top == -jnp.inf, 0, new_top)  # nothing seen yet: not inf - inf
            total = total * jnp.exp(top - shift) + jnp.exp(logits - shift[:, None]).sum(axis=1)
            above += jnp.sum(live & (logits >= limit[:, None]), axis=1, dtype=jnp.int32)
            return (new_top, total, above), None

        empty = jnp.full_like(limit, -jnp.inf), jnp.zeros_like(limit), jnp.zeros_like(q_ids)
        start = tuple(_align(*empty, limit)[:3])
        (top, total, above), _ = jax.lax.scan(fold, start, columns)
        return jnp.where(top == -jnp.inf, 0, top) + jnp.log(total), above

    rows = _blocks(queries, block), _blocks(query_ids, block, -1), _blocks(threshold, block)
    lse, above = jax.lax.map(row_block, rows)
    return lse.reshape(-1)[: queries.shape[0]], above.reshape(-1)[: queries.shape[0]]


def _weighted_keys(rows, cols, row_ids, col_ids, row_side, col_side, block, precision):
    """`sum_j w_ij cols_j`, where w is the derivative of the summed cotangents by logit ij.

    `row_side` (`col_side`) is `(lse, cotangent)` of the rows (columns), or None if only the other
    is differentiated: w_ij = g_i exp(logit_ij - lse_i) + g_j exp(logit_ij - lse_j).
    """

    def sides(side):
        if side is None:
            return ()
        lse, cotangent = side
        lse = jnp.where(
            lse == -jnp.inf, 0, lse
        )  # such a row has no live pair: any finite number will do
        return _blocks(lse, block), _blocks(cotangent, block)

    columns = _blocks(cols, block), _blocks(col_ids, block, -1), sides(col_side)

    def row_block(row):
        r, r_ids, r_side = row

        def fold(total, column):
            c, c_ids, c_side = column
            logits, live = _tile(r, r_ids, c, c_ids, precision)
            weights: jax.Array | int = 0
            if r_side:
                weights += jnp.exp(logits - r_side[0][:, None]) * r_side[1][:, None]
            if c_side:
                weights += jnp.exp(logits - c_side[0][None]) * c_side[1][None]
            weights = jnp.where(live, weights, 0)
            return total + jnp.matmul(weights, c, precision=precision), None

        empty = _align(jnp.zeros_like(r), r)[0]
        return jax.lax.scan(fold, empty, columns)[0]

    blocks = _blocks(rows, block), _blocks(row_ids, block, -1), sides(row_side)
    out = jax.lax.map(row_block, blocks)
    return out.reshape(-1, rows.shape[1])[: rows.shape[0]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _rows_lse(queries, keys, query_ids, key_ids, threshold, block, precision):
    return _forward(queries, keys, query_ids, key_ids, threshold, block, precision)


def _rows_lse_fwd(queries, keys, query_ids, key_ids, threshold, block, precision):
    lse, above = _forward(queries, keys, query_ids, key_ids, threshold, block, precision)
    return (lse, above), (queries, keys, query_ids, key_ids, lse)


def _rows_lse_bwd(block, precision, saved, cotangents):
    queries, keys, query_ids, key_ids, lse = saved
    side = lse, cotangents[0]
    tiles = block, precision
    d_queries = _weighted_keys(queries, keys, query_ids, key_ids, side, None, *tiles)
    d_keys = _weighted_keys(keys, queries, key_ids, query_ids, None, side, *tiles)
    return d_queries, d_keys, None, None, None


_rows_lse.defvjp(_rows_lse_fwd, _rows_lse_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _self_lse(z, ids, threshold, axis, block, precision):
    return _self_lse_fwd(z, ids, threshold, axis, block, precision)[0]


def _self_lse_fwd(z, ids, threshold, axis, block, precision):
    everyone, all_ids = gather_rows(z, axis), gather_rows(ids, axis)
    lse, above = _forward(z, everyone, ids, all_ids, threshold, block, precision)
    return (lse, above), (z, everyone, ids, all_ids, lse)


def _self_lse_bwd(axis, block, precision, saved, cotangents):
    z, everyone, ids, all_ids, lse = saved
    pair = jnp.stack([lse, cotangents[0]], axis=1)
    pairs = gather_rows(pair, axis)
    own, other = (pair[:, 0], pair[:, 1]), (pairs[:, 0], pairs[:, 1])
    return _weighted_keys(z, everyone, ids, all_ids, own, other, block, precision), None, None


_self_lse.defvjp(_self_lse_fwd, _self_lse_bwd)
