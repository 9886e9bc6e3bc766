"""Convolutions whose kernel gradient a CPU computes in pieces of the batch.

XLA's CPU code contracts all images at once for the gradient of a kernel. Where they are larger than
its cache, that is the slowest part of a training step; a sum over pieces of the batch is the same
gradient up to rounding, and a step takes three quarters of the time (docs/benchmarks.md). TPUs and
GPUs, and several simulated devices, get XLA's own.
"""

from collections.abc import Callable
from typing import Any

import jax

PIECES = 8  # at most; with 16 a step is no faster and takes longer to compile
POSITIONS = 2048  # of a piece at least, images x height x width: smaller ones fit the cache


def conv_general_dilated(x: jax.Array, kernel: jax.Array, *args: Any, **options: Any) -> jax.Array:
    """`jax.lax.conv_general_dilated`, for `flax.linen.Conv`; has no forward-mode derivative.

    Args:
        x: `[b, h, w, c]`.
        kernel: `[h, w, c, d]`.
        *args: strides, padding and what else the original takes.
        **options: the same by name.

    Returns:
        `[b, h, w, d]`.
    """

    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, kernel, *args, **options)

    if jax.device_count() > 1:  # a slice of the global batch lies on some of the devices only
        return plain(x, kernel)

    @jax.custom_vjp
    def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return plain(x, kernel)

    def forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return plain(x, kernel), (x, kernel)

    def backward(stored: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, kernel = stored
        (dx,) = jax.vjp(lambda x: plain(x, kernel), x)[1](g)
        # the platform is known when the step is lowered: a plan for a TPU is made on a CPU
        dkernel = jax.lax.platform_dependent(
            x, kernel, g,
            cpu=lambda *a: kernel_gradient_in_pieces(plain, *a),
            default=lambda *a: kernel_gradient(plain, *a),
        )  # fmt: skip
        return dx, dkernel

    conv.defvjp(forward, backward)
    return conv(x, kernel)


def kernel_gradient(plain: Callable, x: jax.Array, kernel: jax.Array, g: jax.Array) -> jax.Array:
    """Gradient `[h, w, c, d]` of `(plain(x, kernel) * g).sum()` with respect to the kernel."""
    return jax.vjp(lambda kernel: plain(x, kernel), kernel)[1](g)[0]


def kernel_gradient_in_pieces(
    plain: Callable, x: jax.Array, kernel: jax.Array, g: jax.Array
) -> jax.Array:
    """`kernel_gradient` as the sum over at most `PIECES` parts of the batch."""
    b, h, w, _ = g.shape
    images = max(-(-b // PIECES), POSITIONS // (h * w), 1)
    total = kernel_gradient(plain, x[:images], kernel, g[:images])
    for i in range(images, b, images):
        total += kernel_gradient(plain, x[i : i + images], kernel, g[i : i + images])
    return total
