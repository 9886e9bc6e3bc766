"""Convolutions with gradients in the one form that XLA's CPU backend computes fast.

XLA has a fast convolution of `[b, h, w, c]` with `[h, w, c, d]`. It transposes the gradients, which
are convolutions over other axes, into that form, but not inside loops (micro-batches, more than one
step a dispatch), where the gradient of a kernel then takes 50 times as long: here they are written
in that form. For the gradient of a kernel XLA also contracts all images at once; here it is a sum
over pieces of the batch that fit the cache, equal up to rounding. docs/benchmarks.md says how much
time both save. TPUs, GPUs and simulated devices use XLA's own gradients.
"""

from typing import Any

import jax

PIECES = 8  # at most: 16 are no faster and take longer to compile
POSITIONS = 2048  # at least in a piece, images x height x width: smaller batches fit the cache
FORM = ("NHWC", "HWIO", "NHWC")
Pair = tuple[int, int]


def conv_general_dilated(
    x: jax.Array, kernel: jax.Array, strides: Pair, padding: tuple[Pair, Pair], **options: Any
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, for `flax.linen.Conv`; has no forward-mode derivative.

    Args:
        x: `[b, h, w, c]`.
        kernel: `[h, w, c, d]`.
        strides: of height and width.
        padding: before and after, of height and width.
        **options: as of the original; with groups or dilation its own gradients are used.

    Returns:
        `[b, h, w, d]`.
    """

    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)

    # each of many devices holds a part of the batch: a slice of it would use only a few of them
    if jax.device_count() > 1 or not is_ordinary(x, kernel, options):
        return plain(x, kernel)

    @jax.custom_vjp
    def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return plain(x, kernel)

    def forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return plain(x, kernel), (x, kernel)

    def written_out(x: jax.Array, kernel: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        dx = input_gradient(x.shape, kernel, g, strides, padding)
        return dx, kernel_gradient_in_pieces(x, kernel.shape, g, strides, padding)

    def backward(stored: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
        # the platform is known when the step is lowered: a plan for a TPU is made on a CPU
        return jax.lax.platform_dependent(
            *stored,
            g,
            cpu=written_out,
            default=lambda x, kernel, g: jax.vjp(plain, x, kernel)[1](g),
        )

    conv.defvjp(forward, backward)
    return conv(x, kernel)


def is_ordinary(x: jax.Array, kernel: jax.Array, options: dict[str, Any]) -> bool:
    """Whether a convolution has neither groups nor dilation."""
    dilations = [options.get(name) or () for name in ("lhs_dilation", "rhs_dilation")]
    return x.shape[-1] == kernel.shape[2] and all(d == 1 for both in dilations for d in both)


def input_gradient(
    shape: tuple[int, ...],
    kernel: jax.Array,
    g: jax.Array,
    strides: Pair,
    padding: tuple[Pair, Pair],
) -> jax.Array:
    """Gradient of `(conv(x, kernel) * g).sum()` with respect to x of this shape."""
    around = []
    for n, k, out, stride, (before, _) in zip(
        shape[1:3], kernel.shape, g.shape[1:3], strides, padding, strict=False
    ):
        first = k - 1 - before
        around.append((first, n + k - 2 - (out - 1) * stride - first))
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    return jax.lax.conv_general_dilated(
        g, turned, (1, 1), around, lhs_dilation=strides, dimension_numbers=FORM
    )


def kernel_gradient(
    x: jax.Array,
    shape: tuple[int, ...],
    g: jax.Array,
    strides: Pair,
    padding: tuple[Pair, Pair],
) -> jax.Array:
    """Gradient of `(conv(x, kernel) * g).sum()` with respect to a kernel of this shape.

    A convolution of x with g in which images and channels change roles.
    """
    around = [
        (before, k + (out - 1) * stride - n - before)
        for n, k, out, stride, (before, _) in zip(
            x.shape[1:3], shape, g.shape[1:3], strides, padding, strict=False
        )
    ]
    gradient = jax.lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3), (1, 1), around,
        rhs_dilation=strides, dimension_numbers=FORM,
    )  # fmt: skip
    return gradient.transpose(1, 2, 0, 3)


def kernel_gradient_in_pieces(
    x: jax.Array, shape: tuple[int, ...], g: jax.Array, *rest: Any
) -> jax.Array:
    """`kernel_gradient` as the sum over at most `PIECES` parts of the batch."""
    b, h, w, _ = g.shape
    images = max(-(-b // PIECES), POSITIONS // (h * w), 1)
    total = kernel_gradient(x[:images], shape, g[:images], *rest)
    for i in range(images, b, images):
        total += kernel_gradient(x[i : i + images], shape, g[i : i + images], *rest)
    return total
