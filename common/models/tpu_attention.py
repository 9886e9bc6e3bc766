"""Self-attention on a TPU with logits that never leave the chip's fast memory: a Pallas kernel.

XLA writes logits and probabilities of a block to memory, and keeps the probabilities for the
backward pass: `[b, heads, n, n]`, more than all else of the block. For the few hundred tokens of an
image those of one image fit into fast memory, so one program of the grid does an image, head by
head, and the backward pass computes them again. Queries, keys and values stay in the layout
`[b, n, heads d]` in which the matrix products around them read and write: heads are columns, and
nothing is transposed or padded in memory. (The flash attention kernels that ship with JAX take
`[b, heads, n, d]`, n a multiple of 128; docs/tpu.md has what that costs.)
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from common.sharding import AXIS

FAST_MEMORY = 16 * 2**20  # bytes for a program: what XLA gives one by default
# Their kernels cannot multiply bfloat16: "Unsupported matmul RHS type on target".
_TOO_OLD = ("TPU v2", "TPU v3")


def runs_on(x: jax.Array) -> bool:
    """Whether the devices of an array, if they are TPUs, have what the kernel needs."""
    device: Any = getattr(jax.typeof(x).sharding.mesh, "abstract_device", None)  # None: no mesh
    kind = device.device_kind if device else jax.devices()[0].device_kind
    return kind not in _TOO_OLD


def fits(x: jax.Array) -> bool:
    """Whether the arrays of an image, in the backward pass, fit into fast memory.

    Args:
        x: queries `[b, n, heads, d]`.
    """
    _, n, heads, d = x.shape
    rows, columns, width = (-(-n // 16) * 16, -(-n // 128) * 128, -(-heads * d // 128) * 128)
    blocks = 2 * 7 * rows * width * x.dtype.itemsize  # the next image's are fetched meanwhile
    return blocks + 6 * rows * columns * 4 < FAST_MEMORY


def forward(
    query: jax.Array, key: jax.Array, value: jax.Array, interpret: bool = False
) -> jax.Array:
    """`attention.dense`; logits and softmax are float32.

    Args:
        query: `[b, n, heads, d]`.
        key: likewise.
        value: likewise.
        interpret: run the kernel as XLA operations, to test it without a TPU.

    Returns:
        `[b, n, heads, d]` of the type of the queries.
    """
    return _each_image(_forward, 4, 1, (query, key, value), interpret)[0]


def backward(
    query: jax.Array, key: jax.Array, value: jax.Array, g: jax.Array, interpret: bool = False
) -> tuple[jax.Array, ...]:
    """Gradients of `forward` by queries, keys and values, for the cotangent `g` of its result."""
    return _each_image(_backward, 10, 3, (query, key, value, g), interpret)


def on_own_images(local: Callable, *arrays: jax.Array) -> Any:
    """Calls `local` on each device with its own images.

    The compiler cannot split a kernel, nor always an order in memory, over devices: on a mesh it is
    told here that the images are independent. (Inside a `shard_map` they are a device's own
    already.)

    Args:
        local: of arrays to arrays, with the images first.
        arrays: `[b, ...]`.
    """
    mesh = jax.typeof(arrays[0]).sharding.mesh
    if mesh.size > 1 and AXIS not in mesh.manual_axes:
        even = len(arrays[0]) % mesh.shape[AXIS] == 0
        rows = PartitionSpec(AXIS) if even else PartitionSpec()
        local = jax.shard_map(local, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    return local(*arrays)


def _each_image(
    kernel: Any, flops: int, results: int, arrays: tuple[jax.Array, ...], interpret: bool
) -> tuple[jax.Array, ...]:
    """Runs a kernel for each image, on the device that holds it.

    Args:
        kernel: of references to the arrays and the results.
        flops: for a logit and column of a head.
        results: how many, each like the queries.
        arrays: `[b, n, heads, d]`.
        interpret: see `forward`.
    """
    b, n, heads, d = arrays[0].shape

    def local(*arrays: jax.Array) -> list[jax.Array]:
        first = arrays[0]
        block = pl.BlockSpec((1, n, heads * d), lambda i: (i, 0, 0))
        shape = jax.ShapeDtypeStruct(
            first.shape, first.dtype, manual_axis_type=jax.typeof(first).manual_axis_type
        )
        logits = len(first) * heads * n * n
        return pl.pallas_call(
            functools.partial(kernel, d=d),
            grid=(len(first),),
            in_specs=[block] * len(arrays),
            out_specs=[block] * results,
            out_shape=[shape] * results,
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
            cost_estimate=pl.CostEstimate(
                flops=flops * logits * d,
                transcendentals=logits,
                bytes_accessed=(len(arrays) + results) * first.nbytes,
            ),
            interpret=interpret,
        )(*arrays)

    found = on_own_images(local, *(x.reshape(b, n, heads * d) for x in arrays))
    return tuple(x.reshape(b, n, heads, d) for x in found)


def _forward(query: Any, key: Any, value: Any, out: Any, *, d: int) -> None:
    for head in _heads(query, d):
        p = _probabilities(query[head], key[head])
        out[head] = _product(p.astype(value.dtype), value[head], 1, 0).astype(out.dtype)


def _backward(
    query: Any, key: Any, value: Any, g: Any, d_query: Any, d_key: Any, d_value: Any, *, d: int
) -> None:
    for head in _heads(query, d):
        q, k, cotangent = query[head], key[head], g[head]
        p = _probabilities(q, k)
        dp = _product(cotangent, value[head], 1, 1)
        d_logits = p * (dp - jnp.sum(p * dp, axis=1, keepdims=True)) * d**-0.5
        d_logits = d_logits.astype(q.dtype)
        d_query[head] = _product(d_logits, k, 1, 0).astype(d_query.dtype)
        d_key[head] = _product(d_logits, q, 0, 0).astype(d_key.dtype)
        d_value[head] = _product(p.astype(q.dtype), cotangent, 0, 0).astype(d_value.dtype)


def _heads(x: Any, d: int) -> Iterator[tuple]:
    """The place of each head in a block `[1, n, heads d]`."""
    for start in range(0, x.shape[-1], d):
        yield 0, slice(None), slice(start, start + d)


def _probabilities(q: jax.Array, k: jax.Array) -> jax.Array:
    """float32 `[n, n]`, a row for each query."""
    logits = _product(q, k, 1, 1) * q.shape[-1] ** -0.5
    p = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
    return p / jnp.sum(p, axis=1, keepdims=True)


def _product(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """Sum over an axis of each, in float32."""
    dimensions = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
