"""Selective kernels: a convolution with two branches, weighed by what the whole map holds."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from common.models.convolution import conv
from common.models.encoder import at_least_float32

LEAST = 32  # channels of the squeeze


class SelectiveKernels(nn.Module):
    """The unit that replaces the 3x3 convolution of a bottleneck, its norm and its ReLU.

    Li et al. 2019 (arXiv:1903.06586, section 3.1), as in SimCLR v2: the kernels of both branches
    are 3x3. Their outputs are added and averaged over positions, two 1x1 convolutions make a logit
    for each branch and channel, and a softmax over the branches says how much of each is taken.

    Attributes:
        features: channels of the output.
        stride: of the 3x3 convolution.
        ratio: channels of the squeeze / `features`, but at least `LEAST`.
        norm: makes a `BatchNorm`. That of the squeeze sees one value an image and channel.
        dtype: of the convolutions; the mean and the softmax are at least float32.
        conv_init: see `initial.KERNELS`.
    """

    features: int
    stride: int
    ratio: float
    norm: Any
    dtype: Any
    conv_init: str = "he"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """`[b, h, w, c]` to `[b, h / stride, w / stride, features]`."""
        kind = at_least_float32(self.dtype)
        squeezed_to = max(int(self.features * self.ratio), LEAST)
        both = self._conv(x, 2 * self.features, 3, self.stride, "conv")
        both = nn.relu(self.norm(name="bn")(both, train))
        mean, other = jnp.split(both.astype(kind).mean((1, 2), keepdims=True), 2, axis=-1)
        squeezed = self._conv((mean + other).astype(self.dtype), squeezed_to, 1, 1, "squeeze")
        squeezed = nn.relu(self.norm(name="squeeze_bn")(squeezed, train))
        logits = self._conv(squeezed, 2 * self.features, 1, 1, "select").astype(kind)
        weights = jax.nn.softmax(jnp.stack(jnp.split(logits, 2, axis=-1)), axis=0)
        first, second = jnp.split(both, 2, axis=-1)
        return (weights[0] * first + weights[1] * second).astype(self.dtype)

    def _conv(self, x: jax.Array, features: int, size: int, stride: int, name: str) -> jax.Array:
        y = conv(features, size, stride, self.dtype, name, self.conv_init)(x)
        return checkpoint_name(y, "conv")
