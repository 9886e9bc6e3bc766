"""ResNet v1.5 encoders (He et al. 2016; stride in the 3x3 convolution, as torchvision has it).

With ResNet-D's stem and shortcuts (He et al. 2019, arXiv:1812.01187) and selective kernels
(`selective.py`) they are the networks of SimCLR v2 (Chen et al. 2020, arXiv:2006.10029).

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
from jax.ad_checkpoint import checkpoint_name
from ml_collections import ConfigDict

from common.errors import UserError, one_of
from common.models import gpu_stem, initial
from common.models.batch_norm import BatchNorm
from common.models.convolution import Kernel, average_pool, conv, space_to_depth
from common.models.encoder import Encoder, at_least_float32
from common.models.selective import SelectiveKernels

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


class Block(nn.Module):
    """Residual block: two 3x3 convolutions, or 1x1-3x3-1x1 with a fourfold output.

    Attributes:
        features: channels of the 3x3 convolutions.
        stride: 1 or 2.
        bottleneck: 1x1-3x3-1x1.
        norm: makes a `BatchNorm`.
        dtype: of the convolutions.
        fold_norm: see `ResNet`.
        conv_init: see `ResNet`.
        zero_init_residual: see `ResNet`.
        sk_ratio: see `ResNet`; of bottlenecks.
        pooled_shortcut: average pool and 1x1 convolution on the shortcut, whatever the shapes.
    """

    features: int
    stride: int
    bottleneck: bool
    norm: Any
    dtype: Any
    fold_norm: bool = True
    conv_init: str = "he"
    zero_init_residual: bool = True
    sk_ratio: float = 0.0
    pooled_shortcut: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """`[b, h, w, c]` to `[b, h / stride, w / stride, width]`."""
        width = self.features * (4 if self.bottleneck else 1)
        zero = self.zero_init_residual
        if self.bottleneck:
            y = nn.relu(self._conv_norm(x, "1", self.features, 1, 1, train))
            if self.sk_ratio:
                y = SelectiveKernels(
                    self.features, self.stride, self.sk_ratio, self.norm, self.dtype,
                    self.conv_init, name="sk",
                )(y, train)  # fmt: skip
            else:
                y = nn.relu(self._conv_norm(y, "2", self.features, 3, self.stride, train))
            y = self._conv_norm(y, "3", width, 1, 1, train, zero_scale=zero)
        else:
            y = nn.relu(self._conv_norm(x, "1", self.features, 3, self.stride, train))
            y = self._conv_norm(y, "2", self.features, 3, 1, train, zero_scale=zero)
        if self.pooled_shortcut:
            # another name than without the pool, so that parameters say what network they are of
            x = average_pool(x, self.stride)
            x = self._conv_norm(x, "avg_downsample_", width, 1, 1, train)
        elif x.shape != y.shape:
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
        stages: blocks per stage of a network of your own, e.g. `(2, 2, 2)`.
        bottleneck: blocks of `stages` are bottlenecks, not basic ones.
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
        resnet_d: the "imagenet" stem has three 3x3 convolutions, and the first block of every stage
            averages 2x2 pixels on its shortcut before a 1x1 convolution, as in SimCLR v2's code:
            in the first stage too, at stride 1.
        sk_ratio: selective kernels in bottlenecks, with a squeeze to this share of the channels; 0:
            none. 0.0625 in SimCLR v2's networks.
    """

    depth: int = 50
    stages: Sequence[int] = ()
    bottleneck: bool = False
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
    resnet_d: bool = False
    sk_ratio: float = 0.0

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
        stem = (f"stem_{kind}{name}" for name, *_ in self._stem() for kind in ("conv", "bn"))
        return (tuple(stem), *((f"layer{i + 1}_{j}",) for i, j in blocks))

    def in_words(self) -> str:
        """See `Encoder`."""
        name = f"ResNet{list(self.stages)}" if self.stages else f"ResNet-{self.depth}"
        name += " of bottlenecks" if self.stages and self.bottleneck else ""
        name += f" width {self.width * self.width_multiplier}"
        name += ", ResNet-D" if self.resnet_d else ""
        return f"{name}, selective kernels {self.sk_ratio:g}" if self.sk_ratio else name

    def _layout(self) -> tuple[bool, Sequence[int]]:
        return (self.bottleneck, tuple(self.stages)) if self.stages else DEPTHS[self.depth]

    def _stem(self) -> list[tuple[str, int, int, int]]:
        """(suffix of the name, channels, side of the kernel, stride) of each convolution."""
        width = self.width * self.width_multiplier
        if self.stem != "imagenet":
            return [("", width, 3, 1)]
        if not self.resnet_d:
            return [("", width, 7, 2)]
        half = max(width // 2, 1)
        return [("1", half, 3, 2), ("2", half, 3, 1), ("3", width, 3, 1)]

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
        init_as = self.stem_init or self.conv_init
        function = gpu_stem.conv_general_dilated
        for name, features, size, stride in self._stem():
            x = conv(features, size, stride, self.dtype, f"stem_conv{name}", init_as, function)(x)
            x = nn.relu(norm(name=f"stem_bn{name}")(x, train))
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
                    self.conv_init, self.zero_init_residual, self.sk_ratio,
                    self.resnet_d and j == 0, name=f"layer{i + 1}_{j}",
                )(x, train)  # fmt: skip
        return x.astype(at_least_float32(self.dtype)).mean((1, 2))


def make_encoder(model: ConfigDict) -> ResNet:
    """Builds the encoder of the model section.

    Raises:
        UserError: for an unknown depth, stem, remat or initialisation, or for blocks that cannot be
            as they are asked for.
    """
    if not model.stages and model.depth not in DEPTHS:
        raise UserError(
            f"model.depth={model.depth} is unknown: choose one of {sorted(DEPTHS)}, "
            "or give model.stages=(blocks, blocks, ...)"
        )
    if min(model.stages, default=1) < 1:
        raise UserError(f"model.stages={tuple(model.stages)}: every stage needs at least one block")
    one_of("model.stem", model.stem, STEMS)
    one_of("model.conv_init", model.conv_init, initial.KERNELS)
    if model.stem_init:
        one_of("model.stem_init", model.stem_init, initial.KERNELS)
    if model.bottleneck and not model.stages:
        raise UserError(
            "model.bottleneck is for the blocks of model.stages, which is not set: leave it out, "
            f"model.depth={model.depth} decides"
        )
    encoder = ResNet(
        depth=model.depth,
        stages=tuple(model.stages),
        bottleneck=model.bottleneck,
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
        resnet_d=model.resnet_d,
        sk_ratio=model.sk_ratio,
    )
    if encoder.sk_ratio > 1:
        raise UserError(
            f"model.sk_ratio={model.sk_ratio}: the squeeze has this share of the channels, "
            "expected at most 1 (SimCLR v2: 0.0625)"
        )
    if encoder.sk_ratio and not encoder.resnet_d:
        raise UserError(
            f"model.sk_ratio={model.sk_ratio} without model.resnet_d: networks with selective "
            "kernels are ResNet-Ds, as SimCLR v2's are; add --config.model.resnet_d=True"
        )
    if encoder.sk_ratio and not encoder._layout()[0]:
        raise UserError(
            f"model.sk_ratio={model.sk_ratio} on a network of basic blocks: selective kernels "
            "replace the 3x3 convolution of a bottleneck (model.depth=50 or more, or "
            "model.bottleneck=True with model.stages); without them set model.sk_ratio=0"
        )
    return encoder
