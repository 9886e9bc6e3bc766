"""ResNet v1.5 encoders (He et al. 2016; stride in the 3x3 convolution, as torchvision has it).

Padding is explicit and symmetric, as in PyTorch, so that weights can be exchanged: "SAME" pads a
stride-2 convolution on one side only. Parameters, batch statistics and the returned features are
float32; convolutions run in `dtype`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from common.errors import UserError

# depth -> (bottleneck?, blocks per stage), He et al. 2016, table 1
DEPTHS = {
    18: (False, (2, 2, 2, 2)),
    34: (False, (3, 4, 6, 3)),
    50: (True, (3, 4, 6, 3)),
    101: (True, (3, 4, 23, 3)),
    152: (True, (3, 8, 36, 3)),
    200: (True, (3, 24, 36, 3)),
}
STEMS = ("imagenet", "cifar", "patch2", "patch4")


def at_least_float32(dtype: Any) -> Any:
    """float32, or the wider type if `dtype` is one (tests run in float64)."""
    return jnp.promote_types(dtype, jnp.float32)


class BatchNorm(nn.Module):
    """Batch normalisation whose statistics see `groups` contiguous blocks of the global batch.

    Under `jit` over a sharded batch, `groups=1` is the global batch (SimCLR's "global BN"), and
    `groups=G` means the same on any number of devices: block g is rows `[g*B/G, (g+1)*B/G)`. The
    running statistics are updated once, with the mean over the groups (Ioffe & Szegedy 2015,
    algorithm 1; the variance is the biased one, as in TensorFlow and Flax).

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
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalises `x [b, ..., c]` per channel; `train` uses and records batch statistics."""
        channels = x.shape[-1]
        kind = at_least_float32(self.dtype)
        per_channel = (1,) * x.ndim + (channels,)  # the rank of `x` split into groups
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
            axes = tuple(range(1, blocks.ndim - 1))
            wide = blocks.astype(kind)
            # One pass over x: XLA fuses both sums. Clipped, because E[x^2] - E[x]^2 may round
            # below zero.
            mean = wide.mean(axes, keepdims=True)
            var = jnp.maximum((wide * wide).mean(axes, keepdims=True) - mean * mean, 0.0)
            for ref, new in ((mean_ref, mean), (var_ref, var)):
                new = new.reshape(self.groups, channels).mean(0)
                ref.value = self.momentum * ref.value + (1 - self.momentum) * new
        else:
            blocks, mean, var = x[None], mean_ref.value, var_ref.value
            mean, var = (v.reshape(per_channel) for v in (mean, var))
        scale = jax.lax.rsqrt(var + self.epsilon)
        if self.use_scale:
            init = nn.initializers.zeros if self.zero_scale else nn.initializers.ones
            scale = scale * self.param("scale", init, (channels,), kind).reshape(per_channel)
        shift = -mean * scale
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (channels,), kind)
            shift = shift + bias.reshape(per_channel)
        return (blocks.astype(kind) * scale + shift).astype(self.dtype).reshape(x.shape)


def conv(
    features: int, size: int, stride: int = 1, dtype: Any = jnp.float32, name: str | None = None
) -> nn.Conv:
    """A convolution without bias, `size // 2` zeros on every side, He fan-out initialisation."""
    return nn.Conv(
        features,
        (size, size),
        (stride, stride),
        padding=[(size // 2, size // 2)] * 2,
        use_bias=False,
        dtype=dtype,
        param_dtype=at_least_float32(dtype),
        kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
        name=name,
    )


class Block(nn.Module):
    """Residual block: two 3x3 convolutions, or 1x1-3x3-1x1 with a fourfold output."""

    features: int
    stride: int
    bottleneck: bool
    norm: Any
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        layer = functools.partial(conv, dtype=self.dtype)
        width = self.features * (4 if self.bottleneck else 1)
        shapes = (
            [(self.features, 1, 1), (self.features, 3, self.stride), (width, 1, 1)]
            if self.bottleneck
            else [(self.features, 3, self.stride), (self.features, 3, 1)]
        )
        y = x
        for i, (features, size, stride) in enumerate(shapes, 1):
            last = i == len(shapes)
            y = layer(features, size, stride, name=f"conv{i}")(y)
            y = self.norm(zero_scale=last, name=f"bn{i}")(y, train)
            y = y if last else nn.relu(y)
        if x.shape != y.shape:
            x = layer(width, 1, self.stride, name="downsample_conv")(x)
            x = self.norm(name="downsample_bn")(x, train)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Images to pooled features.

    Attributes:
        depth: 18, 34, 50, 101, 152 or 200; ignored where `stages` is given.
        stages: blocks per stage of a network of your own, e.g. `(2, 2, 2)` of basic blocks.
        width: channels of the first stage (64 in the paper); doubled at each later stage.
        width_multiplier: SimCLR's 1x, 2x, 4x.
        stem: "imagenet" (7x7 stride 2, 3x3 max pool), "cifar" (3x3, Chen et al. 2020, B.9),
            "patch2"/"patch4" (p x p patches, one linear map: small images on a CPU).
        bn_groups: blocks of the batch that share statistics, see `BatchNorm`.
        dtype: of the convolutions.
    """

    depth: int = 50
    stages: Sequence[int] = ()
    width: int = 64
    width_multiplier: int = 1
    stem: str = "imagenet"
    bn_groups: int = 1
    dtype: Any = jnp.float32

    @property
    def feature_dim(self) -> int:
        """Length d of the features."""
        bottleneck, stages = self._layout()
        expansion = 4 if bottleneck else 1
        return self.width * self.width_multiplier * 2 ** (len(stages) - 1) * expansion

    def _layout(self) -> tuple[bool, Sequence[int]]:
        return (False, tuple(self.stages)) if self.stages else DEPTHS[self.depth]

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Encodes images.

        Args:
            images: `[b, h, w, c]`, already scaled.
            train: batch statistics (True) or running statistics (False).

        Returns:
            `[b, feature_dim]`, mean over positions, at least float32.
        """
        norm = functools.partial(BatchNorm, groups=self.bn_groups, dtype=self.dtype)
        bottleneck, stages = self._layout()
        width = self.width * self.width_multiplier
        x = images.astype(self.dtype)
        if self.stem == "imagenet":
            x = conv(width, 7, 2, self.dtype, "stem_conv")(x)
        elif self.stem == "cifar":
            x = conv(width, 3, 1, self.dtype, "stem_conv")(x)
        else:
            x = conv(width, 3, 1, self.dtype, "stem_conv")(space_to_depth(x, int(self.stem[-1])))
        x = nn.relu(norm(name="stem_bn")(x, train))
        if self.stem == "imagenet":
            # zeros are below every ReLU output, so they pad a maximum as -inf does
            x = nn.max_pool(x, (3, 3), (2, 2), padding=[(1, 1), (1, 1)])
        for i, blocks in enumerate(stages):
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 else 1
                x = Block(
                    width * 2**i, stride, bottleneck, norm, self.dtype, name=f"layer{i + 1}_{j}"
                )(x, train)
        return x.astype(at_least_float32(self.dtype)).mean((1, 2))


def space_to_depth(x: jax.Array, block: int) -> jax.Array:
    """`[b, h, w, c]` to `[b, h/block, w/block, block*block*c]`."""
    b, h, w, c = x.shape
    if h % block or w % block:
        raise UserError(
            f"stem patch{block} needs an image size that is a multiple of {block}, found {h}x{w}"
        )
    x = x.reshape(b, h // block, block, w // block, block, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h // block, w // block, block * block * c)


def make_encoder(config: Any) -> ResNet:
    """Builds the encoder of `config.model`.

    Raises:
        UserError: for an unknown depth or stem.
    """
    model = config.model
    if not model.stages and model.depth not in DEPTHS:
        raise UserError(
            f"model.depth={model.depth} is unknown: choose one of {sorted(DEPTHS)}, "
            "or give model.stages=(blocks, blocks, ...)"
        )
    if model.stem not in STEMS:
        raise UserError(f"model.stem={model.stem!r} is unknown: choose one of {', '.join(STEMS)}")
    return ResNet(
        depth=model.depth,
        stages=tuple(model.stages),
        width=model.width,
        width_multiplier=model.width_multiplier,
        stem=model.stem,
        bn_groups=model.bn_groups,
        dtype=jnp.dtype(model.dtype),
    )
