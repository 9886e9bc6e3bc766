"""The first layers of an ImageNet ResNet in a form that is fast on a GPU; the same functions.

cuDNN pads three channels to eight, so most of what a 7x7 convolution of an image reads and
multiplies is zeros. With the pixels in blocks of 2x2, as 12 channels, it is a 4x4 convolution. The
gradient of XLA's max pooling searches for each maximum again and adds to memory atomically. Here
the position of each maximum is stored in one byte, and each pixel checks whether it was one. On an
H200 these layers took 15 % of the time of a ResNet-50's step (docs/benchmarks.md). CPUs and TPUs
use XLA's own.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from common.models import cpu_conv
from common.models.platform import on_gpu

CHANNELS = 8  # cuDNN's kernels read channels in multiples of this
Pair = tuple[int, int]


def conv_general_dilated(
    x: jax.Array, kernel: jax.Array, strides: Pair, padding: tuple[Pair, Pair], **options: Any
) -> jax.Array:
    """`cpu_conv.conv_general_dilated`, computed on a GPU from blocks of 2x2 pixels where they fit.

    They fit a square kernel of odd size k, a stride of 2, `k // 2` zeros on every side, and an even
    height and width: the first convolution of an ImageNet ResNet.
    """

    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return cpu_conv.conv_general_dilated(x, kernel, strides, padding, **options)

    size = kernel.shape[0]
    around = [(size // 2, size // 2)] * 2
    fits = kernel.shape[1] == size and size % 2 and [tuple(p) for p in padding] == around
    fits = fits and tuple(strides) == (2, 2) and not (x.shape[1] % 2 or x.shape[2] % 2)
    if not fits or not cpu_conv.is_ordinary(x, kernel, options):
        return plain(x, kernel)
    blocks = functools.partial(conv_of_blocks, precision=options.get("precision"))

    @jax.custom_vjp
    def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return on_gpu(blocks, plain, x, kernel)

    def backward(stored: tuple, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        def of(function: Callable) -> Callable:
            return lambda x, kernel, g: jax.vjp(function, x, kernel)[1](g)

        return on_gpu(of(blocks), of(plain), *stored, g)

    conv.defvjp(lambda x, kernel: (conv(x, kernel), (x, kernel)), backward)
    return conv(x, kernel)


def conv_of_blocks(x: jax.Array, kernel: jax.Array, precision: Any = None) -> jax.Array:
    """A convolution of stride 2 and odd size k, `k // 2` zeros on every side, of 2x2 blocks.

    Args:
        x: `[b, h, w, c]`, h and w even.
        kernel: `[k, k, c, d]`.
        precision: of the products.

    Returns:
        `[b, h / 2, w / 2, d]`.
    """
    b, h, w, c = x.shape
    half = kernel.shape[0] // 2
    before = half + half % 2  # the window begins with a block, at most one pixel earlier
    taps = (before + half) // 2 + 1  # its blocks
    # zeros before the kernel where it begins inside a block, and behind it where it ends inside one
    lead = before - half
    behind = 2 * taps - lead - kernel.shape[0]
    kernel = jnp.pad(kernel, [(lead, behind)] * 2 + [(0, 0)] * 2)
    after = 2 * (taps - 1) - before
    x = jnp.pad(x, [(0, 0), (before, after), (before, after), (0, 0)])
    rows, columns = h // 2 + taps - 1, w // 2 + taps - 1
    x = x.reshape(b, rows, 2, columns, 2, c).transpose(0, 1, 3, 2, 4, 5)
    kernel = kernel.reshape(taps, 2, taps, 2, c, -1).transpose(0, 2, 1, 3, 4, 5)
    more = -4 * c % CHANNELS
    x = jnp.pad(x.reshape(b, rows, columns, 4 * c), [(0, 0)] * 3 + [(0, more)])
    kernel = jnp.pad(kernel.reshape(taps, taps, 4 * c, -1), [(0, 0)] * 2 + [(0, more), (0, 0)])
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision
    )


def max_pool(x: jax.Array) -> jax.Array:
    """The largest of 3x3 windows of stride 2, one pixel of padding around `x [b, h, w, c]`.

    Has no forward-mode derivative where h and w are even.
    """
    if x.shape[1] % 2 or x.shape[2] % 2:
        return plain_pool(x)

    @jax.custom_vjp
    def pool(x: jax.Array) -> jax.Array:
        return on_gpu(lambda x: pool_with_places(x)[0], plain_pool, x)

    def forward(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        def other(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = plain_pool(x)
            return y, jnp.zeros_like(y, jnp.uint8)  # never read; like y it varies over devices

        y, places = on_gpu(pool_with_places, other, x)
        return y, (x, places)

    def backward(stored: tuple, g: jax.Array) -> tuple[jax.Array]:
        def other(x: jax.Array, places: jax.Array, g: jax.Array) -> jax.Array:
            return jax.vjp(plain_pool, x)[1](g)[0]

        return (on_gpu(lambda x, places, g: unpool(places, g), other, *stored, g),)

    pool.defvjp(forward, backward)
    return pool(x)


def plain_pool(x: jax.Array) -> jax.Array:
    """What `max_pool` computes, as Flax has it."""
    return nn.max_pool(x, (3, 3), (2, 2), padding=[(1, 1), (1, 1)])


def pool_with_places(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Maxima of `x [b, h, w, c]`, h and w even, and the first place of each, uint8 0 to 8."""
    low = jnp.array(-jnp.inf, x.dtype)
    x = jax.lax.pad(x, low, [(0, 0, 0), (1, 0, 0), (1, 0, 0), (0, 0, 0)])
    x = jax.lax.pad(x, low, [(0, 0, 0), (0, 1, 0), (0, 1, 0), (0, 0, 0)])
    h, w = x.shape[1] - 2, x.shape[2] - 2
    windows = [x[:, i : i + h : 2, j : j + w : 2] for i in range(3) for j in range(3)]
    best, places = windows[0], jnp.zeros(windows[0].shape, jnp.uint8)
    for place, here in enumerate(windows[1:], 1):
        places = jnp.where(here > best, jnp.uint8(place), places)
        best = jnp.maximum(best, here)  # NaN if one of them is
    return best, places


def unpool(places: jax.Array, g: jax.Array) -> jax.Array:
    """Gradient `[b, h, w, c]` of the input of `pool_with_places`.

    Args:
        places: `[b, h / 2, w / 2, c]`, as that function returns them.
        g: gradient of the maxima, of the same shape. Sums are formed in float32 at least.
    """
    b, h, w, c = g.shape
    kind = jnp.promote_types(g.dtype, jnp.float32)
    none = jnp.uint8(9)
    # pixel 2 i is in the middle of window i; pixel 2 i + 1 at the end of it, and at the beginning
    # of window i + 1
    along: list[list[int | None]] = [[1, 2], [None, 0]]

    def part(shift_h: int, shift_w: int) -> jax.Array:
        """The gradient that one window gives the pixels of each 2x2 block."""
        wanted = jnp.array(
            [
                [none if m is None or n is None else 3 * m + n for n in along[shift_w]]
                for m in along[shift_h]
            ],
            jnp.uint8,
        )

        def shifted(a: jax.Array) -> jax.Array:
            pad = [(0, 0), (0, shift_h), (0, shift_w), (0, 0)]
            return jnp.pad(a, pad)[:, shift_h:, shift_w:][:, :, None, :, None]

        hit = shifted(places) == wanted[None, None, :, None, :, None]
        return jnp.where(hit, shifted(g).astype(kind), 0)

    total = part(0, 0) + part(0, 1) + part(1, 0) + part(1, 1)
    return total.astype(g.dtype).reshape(b, 2 * h, 2 * w, c)
