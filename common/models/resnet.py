"""ResNet v1.5 encoders (He et al. 2016; stride in the 3x3 convolution, as torchvision has it).

Padding is explicit and symmetric, as in PyTorch, so that weights can be exchanged: "SAME" pads a
stride-2 convolution on one side only. Parameters, batch statistics and the returned features are
float32; convolutions run in `dtype`.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from ml_collections import ConfigDict

from common.errors import UserError, one_of
from common.models import cpu_conv, fold, gpu_stem, initial
from common.models.encoder import Encoder, at_least_float32

# depth -> (bottleneck?, blocks per stage), He et al. 2016, table 1
DEPTHS: dict[int, tuple[bool, tuple[int, ...]]] = {
    18: (False, (2, 2, 2, 2)),
    34: (False, (3, 4, 6, 3)),
    50: (True, (3, 4, 6, 3)),
    101: (True, (3, 4, 23, 3)),
    152: (True, (3, 8, 36, 3)),
    200: (True, (3, 24, 36, 3)),
}
STEMS = ("imagenet", "cifar", "patch2", "patch4")


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


class Block(nn.Module):
    """Residual block: two 3x3 convolutions, or 1x1-3x3-1x1 with a fourfold output."""

    features: int
    stride: int
    bottleneck: bool
    norm: Any
    dtype: Any
    fold_norm: bool = True
    conv_init: str = "he"
    zero_init_residual: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """`[b, h, w, c]` to `[b, h / stride, w / stride, width]`."""
        width = self.features * (4 if self.bottleneck else 1)
        zero = self.zero_init_residual
        if self.bottleneck:
            y = nn.relu(self._conv_norm(x, "1", self.features, 1, 1, train))
            y = nn.relu(self._conv_norm(y, "2", self.features, 3, self.stride, train))
            y = self._conv_norm(y, "3", width, 1, 1, train, zero_scale=zero)
        else:
            y = nn.relu(self._conv_norm(x, "1", self.features, 3, self.stride, train))
            y = self._conv_norm(y, "2", self.features, 3, 1, train, zero_scale=zero)
        if x.shape != y.shape:
            x = self._conv_norm(x, "downsample_", width, 1, self.stride, train)
        return nn.relu(x + y)

    def _conv_norm(
        self, x: jax.Array, name: str, features: int, size: int, stride: int, train: bool, **norm
    ) -> jax.Array:
        names = [name + kind if name.endswith("_") else kind + name for kind in ("conv", "bn")]
        normalise = self.norm(name=names[1], **norm)
        if self.fold_norm and size == 1 and self.bottleneck and features > x.shape[-1]:
            x = x[:, ::stride, ::stride].astype(self.dtype)
            kernel = Kernel(features, self.dtype, self.conv_init, name=names[0])(x.shape[-1])
            return normalise(x, train, kernel)
        y = conv(features, size, stride, self.dtype, names[0], self.conv_init)(x)
        return normalise(checkpoint_name(y, "conv"), train)


class ResNet(Encoder):
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
        remat: "none" (store everything for the backward pass), "convs" (of a residual block, store
            its input and its convolutions' outputs) or "blocks" (store its input only).
        fold_norm: in bottlenecks, fold the batch norm of a widening 1x1 convolution into its
            kernel (`common/models/fold.py`): the same function with less memory traffic.
        conv_init: how convolutions are drawn, one of `initial.KERNELS`.
        stem_init: how that of the stem is; "" = as the others.
        zero_init_residual: start the last BN scale of each residual block at 0, so that the block
            starts as the identity (Goyal et al. 2017, section 5.1), as SimCLR's code does; False:
            at 1, as torchvision does by default.
    """

    depth: int = 50
    stages: Sequence[int] = ()
    width: int = 64
    width_multiplier: int = 1
    stem: str = "imagenet"
    bn_groups: int = 1
    dtype: Any = jnp.float32
    remat: str = "none"
    fold_norm: bool = True
    conv_init: str = "he"
    stem_init: str = ""
    zero_init_residual: bool = True

    @property
    def feature_dim(self) -> int:
        """Length d of the features."""
        bottleneck, stages = self._layout()
        expansion = 4 if bottleneck else 1
        return self.width * self.width_multiplier * 2 ** (len(stages) - 1) * expansion

    @property
    def has_batch_norm(self) -> bool:
        """See `Encoder`."""
        return True

    @property
    def layers(self) -> tuple[tuple[str, ...], ...]:
        """See `Encoder`: the stem, and the residual blocks."""
        blocks = ((i, j) for i, count in enumerate(self._layout()[1]) for j in range(count))
        return (("stem_conv", "stem_bn"), *((f"layer{i + 1}_{j}",) for i, j in blocks))

    def in_words(self) -> str:
        """See `Encoder`."""
        name = f"ResNet{list(self.stages)}" if self.stages else f"ResNet-{self.depth}"
        return f"{name} width {self.width * self.width_multiplier}"

    def _layout(self) -> tuple[bool, Sequence[int]]:
        return (False, tuple(self.stages)) if self.stages else DEPTHS[self.depth]

    @nn.compact
    def __call__(self, images: jax.Array, train: bool, keys: jax.Array | None = None) -> jax.Array:
        """See `Encoder`; the features are the mean over positions."""
        del keys  # nothing in it is random
        norm = functools.partial(BatchNorm, groups=self.bn_groups, dtype=self.dtype)
        bottleneck, stages = self._layout()
        width = self.width * self.width_multiplier
        x = images.astype(self.dtype)
        if self.stem.startswith("patch"):
            x = space_to_depth(x, int(self.stem[-1]))
        size, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        init_as = self.stem_init or self.conv_init
        function = gpu_stem.conv_general_dilated
        x = conv(width, size, stride, self.dtype, "stem_conv", init_as, function)(x)
        x = nn.relu(norm(name="stem_bn")(x, train))
        if self.stem == "imagenet":
            x = gpu_stem.max_pool(x)
        block = Block
        if self.remat != "none":
            convs = jax.checkpoint_policies.save_only_these_names("conv")
            policy = convs if self.remat == "convs" else None
            block = nn.remat(Block, static_argnums=(2,), policy=policy)  # `train` is no array
        for i, blocks in enumerate(stages):
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 else 1
                x = block(
                    width * 2**i, stride, bottleneck, norm, self.dtype, self.fold_norm,
                    self.conv_init, self.zero_init_residual, name=f"layer{i + 1}_{j}",
                )(x, train)  # fmt: skip
        return x.astype(at_least_float32(self.dtype)).mean((1, 2))


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


def make_encoder(model: ConfigDict) -> ResNet:
    """Builds the encoder of the model section.

    Raises:
        UserError: for an unknown depth, stem, remat or initialisation.
    """
    if not model.stages and model.depth not in DEPTHS:
        raise UserError(
            f"model.depth={model.depth} is unknown: choose one of {sorted(DEPTHS)}, "
            "or give model.stages=(blocks, blocks, ...)"
        )
    one_of("model.stem", model.stem, STEMS)
    one_of("model.conv_init", model.conv_init, initial.KERNELS)
    if model.stem_init:
        one_of("model.stem_init", model.stem_init, initial.KERNELS)
    return ResNet(
        depth=model.depth,
        stages=tuple(model.stages),
        width=model.width,
        width_multiplier=model.width_multiplier,
        stem=model.stem,
        bn_groups=model.bn_groups,
        dtype=jnp.dtype(model.dtype),
        remat=model.remat,
        fold_norm=model.fold_norm,
        conv_init=model.conv_init,
        stem_init=model.stem_init,
        zero_init_residual=model.zero_init_residual,
    )
