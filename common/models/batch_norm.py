"""Batch normalisation whose statistics do not depend on the number of devices."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from common.errors import UserError
from common.models import fold
from common.models.encoder import at_least_float32


class BatchNorm(nn.Module):
    """Batch normalisation whose statistics see `groups` contiguous blocks of the global batch.

    Under `jit` over a sharded batch, `groups=1` is the global batch (SimCLR's "global BN"), and
    `groups=G` means the same on any number of devices: block g is rows `[g*B/G, (g+1)*B/G)`. The
    running statistics are updated once, with the mean over the groups (Ioffe & Szegedy 2015,
    algorithm 1). The variance is the biased one, as in TensorFlow and Flax; PyTorch records
    n / (n - 1) of it, and its DistributedDataParallel the statistics of the first process only.

    Attributes:
        groups: number of blocks G; must divide the batch.
        momentum: decay of the running statistics. 0.9 in every peer; Flax's own default is 0.99.
        epsilon: added to the variance.
        dtype: of the output; statistics are at least float32.
        zero_scale: start the scale at 0, so that a residual block starts as the identity.
    """

    groups: int = 1
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    zero_scale: bool = False
    use_scale: bool = True
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, kernel: jax.Array | None = None) -> jax.Array:
        """Normalises per channel.

        Args:
            x: `[b, ..., c]`.
            train: use and record batch statistics.
            kernel: `[c, d]`: normalise `x [b, h, w, c]` times that, without computing it first
                (`common/models/fold.py`).

        Returns:
            `[b, ..., c]`, with a kernel `[b, h, w, d]`.
        """
        channels = x.shape[-1] if kernel is None else kernel.shape[-1]
        kind = at_least_float32(self.dtype)
        mean_ref = self.variable("batch_stats", "mean", jnp.zeros, (channels,), kind)
        var_ref = self.variable("batch_stats", "var", jnp.ones, (channels,), kind)
        if train and not self.is_initializing():
            if x.shape[0] % self.groups:
                divisors = [g for g in range(1, x.shape[0] + 1) if x.shape[0] % g == 0]
                raise UserError(
                    f"model.bn_groups={self.groups} does not divide the {x.shape[0]} images of a "
                    f"forward pass: choose one of {', '.join(map(str, divisors[:12]))}"
                )
            blocks = x.reshape((self.groups, x.shape[0] // self.groups) + x.shape[1:])
            if math.prod(blocks.shape[1:-1]) == 1:
                raise UserError(
                    "batch norm: a group of one image whose map is 1 x 1 here has statistics of "
                    "one value, and every feature would become the same: set model.bn_groups to "
                    "half or less, or take larger batches or images"
                )
            if kernel is None:
                axes = tuple(range(1, blocks.ndim - 1))
                wide = blocks.astype(kind)
                # One pass over x: XLA fuses both sums. Clipped, because E[x^2] - E[x]^2 may round
                # below zero.
                mean = wide.mean(axes)
                var = jnp.maximum((wide * wide).mean(axes) - mean * mean, 0.0)
            else:
                mean, var = fold.output_moments(blocks, kernel)
            for ref, new in ((mean_ref, mean), (var_ref, var)):
                ref.value = self.momentum * ref.value + (1 - self.momentum) * new.mean(0)
        else:
            blocks, mean, var = x[None], mean_ref.value[None], var_ref.value[None]
        scale = jax.lax.rsqrt(var + self.epsilon)  # like mean and var [g, channels]
        if self.use_scale:
            init = nn.initializers.zeros if self.zero_scale else nn.initializers.ones
            scale = scale * self.param("scale", init, (channels,), kind)[None]
        shift = -mean * scale
        if self.use_bias:
            shift = shift + self.param("bias", nn.initializers.zeros, (channels,), kind)[None]

        def spread(v: jax.Array) -> jax.Array:  # to the rank of `blocks`
            return v.reshape(v.shape[:1] + (1,) * (blocks.ndim - 2) + v.shape[1:])

        if kernel is None:
            y = blocks.astype(kind) * spread(scale)
        else:
            y = fold.product(blocks, kernel[None] * scale[:, None])
        return (y + spread(shift)).astype(self.dtype).reshape(x.shape[:-1] + (channels,))
