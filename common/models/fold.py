"""A 1x1 convolution and the batch norm behind it as one matrix product.

Batch norm needs the mean and variance of the convolution's output z = x W over a batch. Both follow
from the mean m and the covariance C of its *input*: m W, and the diagonal of W' C W. Where W widens
(c to 4 c channels, as at the end of a bottleneck) C costs a quarter of the convolution's work, and
the scale of the norm is then multiplied into the kernel: z itself is never written to memory, nor
read again for its statistics, for its normalisation and in the backward pass. A ResNet step on a
TPU is bound by memory bandwidth, so this saves time (docs/tpu.md has the figures). The result is
the same function of x and W; in float64 it agrees to rounding, in bfloat16 the statistics have one
rounding less, that of z.
"""

import functools

import jax
import jax.numpy as jnp

from common.models.platform import on_gpu

_EXACT = jax.lax.Precision.HIGHEST


def _kind(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def _precision(x: jax.Array) -> jax.lax.Precision | None:
    """A covariance is a small difference of large sums: float32 inputs must not be rounded."""
    return None if x.dtype == jnp.bfloat16 else _EXACT


@jax.custom_vjp
def moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First and second moments over positions.

    Args:
        x: `[g, b, h, w, c]`, g blocks.

    Returns:
        mean of x `[g, c]` and of the products x x' `[g, c, c]`, at least float32.
    """
    n = x[0, ..., 0].size
    products = jnp.einsum(
        "gbhwc,gbhwd->gcd", x, x, preferred_element_type=_kind(x), precision=_precision(x)
    )
    return x.astype(_kind(x)).sum((1, 2, 3)) / n, products / n


def _moments_forward(x):
    return moments(x), x


def _moments_backward(x, cotangents):
    mean, products = cotangents
    n = x[0, ..., 0].size
    both = (products + products.swapaxes(1, 2)).astype(x.dtype)  # x stands on both sides
    dx = jnp.einsum("gbhwc,gcd->gbhwd", x, both, preferred_element_type=_kind(x))
    return (((dx + mean[:, None, None, None]) / n).astype(x.dtype),)


moments.defvjp(_moments_forward, _moments_backward)


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x [g, b, h, w, c]` times `kernel [g, c, d]`, at least float32.

    The kernel is rounded to the type of x, its gradient is not. A GPU writes a product to memory
    before it is used, so there the product is rounded too: half the bytes.
    """

    def rounded_to(kind: jnp.dtype, x: jax.Array, kernel: jax.Array) -> jax.Array:
        y = jnp.einsum("gbhwc,gcd->gbhwd", x, kernel, preferred_element_type=kind)
        return y.astype(_kind(x))

    gpu, other = (functools.partial(rounded_to, kind) for kind in (x.dtype, _kind(x)))
    return on_gpu(gpu, other, x, kernel.astype(x.dtype))


def _product_forward(x, kernel):
    return product(x, kernel), (x, kernel)


def _product_backward(saved, dy):
    x, kernel = saved
    dy = dy.astype(x.dtype)  # its values have that type: the sum was rounded to it
    dx = jnp.einsum("gbhwd,gcd->gbhwc", dy, kernel.astype(x.dtype))
    return dx, jnp.einsum("gbhwc,gbhwd->gcd", x, dy, preferred_element_type=_kind(x))


product.defvjp(_product_forward, _product_backward)


def output_moments(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and (biased) variance, each `[g, d]`, of `product(x, kernel)` over positions.

    Args:
        x: `[g, b, h, w, c]`.
        kernel: `[c, d]`, at least float32.
    """
    mean, products = moments(x)
    covariance = products - mean[:, :, None] * mean[:, None, :]
    spread = jnp.einsum("gce,ed->gcd", covariance, kernel, precision=_EXACT)
    variance = jnp.maximum((spread * kernel[None]).sum(1), 0.0)  # rounding may go below zero
    return jnp.einsum("gc,cd->gd", mean, kernel, precision=_EXACT), variance
