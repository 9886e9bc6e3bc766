"""What ResNets and patches are built from: convolutions without bias, pooling, patches."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from common.errors import UserError
from common.models import cpu_conv, initial
from common.models.encoder import at_least_float32


class Kernel(nn.Module):
    """The kernel `[1, 1, c, d]` of a 1x1 convolution that the caller applies, as `[c, d]`."""

    features: int
    dtype: Any
    init_as: str = "he"

    @nn.compact
    def __call__(self, channels: int) -> jax.Array:
        """The kernel for an input of `channels` channels."""
        shape, kind = (1, 1, channels, self.features), at_least_float32(self.dtype)
        return self.param("kernel", initial.KERNELS[self.init_as], shape, kind)[0, 0]


def conv(
    features: int,
    size: int,
    stride: int = 1,
    dtype: Any = jnp.float32,
    name: str | None = None,
    init_as: str = "he",
    function: Any = cpu_conv.conv_general_dilated,
) -> nn.Conv:
    """A convolution without bias, `size // 2` zeros on every side; `function` computes it."""
    return nn.Conv(
        features,
        (size, size),
        (stride, stride),
        padding=[(size // 2, size // 2)] * 2,
        use_bias=False,
        dtype=dtype,
        param_dtype=at_least_float32(dtype),
        kernel_init=initial.KERNELS[init_as],
        conv_general_dilated=function,
        name=name,
    )


def average_pool(x: jax.Array, stride: int) -> jax.Array:
    """The mean of 2x2 windows, as on the shortcuts of SimCLR v2's networks.

    A window at the lower or right edge reaches one row or column over it. At stride 1 that is not
    counted; at stride 2, where only odd sizes have such windows, it counts as zeros.

    Args:
        x: `[b, h, w, c]`.
        stride: 1 or 2.

    Returns:
        `[b, ceil(h / stride), ceil(w / stride), c]`.
    """
    around = ((0, 1), (0, 1))
    return nn.avg_pool(x, (2, 2), (stride, stride), around, count_include_pad=stride > 1)


def space_to_depth(x: jax.Array, block: int) -> jax.Array:
    """`[b, h, w, c]` to `[b, h/block, w/block, block*block*c]`; a patch by row, column, colour."""
    b, h, w, c = x.shape
    if h % block or w % block:
        raise UserError(
            f"patches of {block} pixels need an image size that is a multiple of {block}, found "
            f"{h}x{w}: set data.image_size, and augment.size if views have one of their own"
        )
    x = x.reshape(b, h // block, block, w // block, block, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h // block, w // block, block * block * c)
