"""Projection heads, and the network both methods train: an encoder followed by a head."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from common.errors import UserError, one_of
from common.models import initial
from common.models.resnet import BatchNorm, ResNet, at_least_float32, make_encoder

HEADS = ("simclr", "moco_v1", "moco_v2")


class ProjectionHead(nn.Module):
    """Maps features to the space of the contrastive loss.

    * "simclr": `layers` linear maps, each followed by BN, ReLU between them; the last BN has no
      shift. 2 layers in Chen et al. 2020a, 3 in 2020b.
    * "moco_v1": one linear map (He et al. 2020). "moco_v2": two with a ReLU between, no BN
      (Chen et al. 2020c). Both with biases, as in the authors' code.

    Attributes:
        kind: one of `HEADS`.
        layers: number of linear maps of "simclr"; the other kinds fix it.
        hidden: width of the middle layers; 0 = the input's.
        dim: length of the embedding.
        bn_groups: see `BatchNorm`.
        dtype: of the matrix products; the embedding is at least float32.
        init_as: how linear maps are drawn, one of `initial.KERNELS`.
    """

    kind: str = "simclr"
    layers: int = 2
    hidden: int = 0
    dim: int = 128
    bn_groups: int = 1
    dtype: Any = jnp.float32
    init_as: str = "lecun"

    @property
    def depth(self) -> int:
        """Number of linear maps."""
        return {"simclr": self.layers, "moco_v1": 1, "moco_v2": 2}[self.kind]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, depth: int | None = None) -> jax.Array:
        """Projects `x [b, d]`; `depth` stops after that many layers (to fine-tune from there)."""
        normed = self.kind == "simclr"
        hidden = self.hidden or x.shape[-1]
        x = x.astype(self.dtype)
        for i in range(self.depth if depth is None else depth):
            last = i == self.depth - 1
            x = nn.Dense(
                self.dim if last else hidden,
                use_bias=not normed,
                dtype=self.dtype,
                param_dtype=at_least_float32(self.dtype),
                kernel_init=initial.KERNELS[self.init_as],
                bias_init=initial.bias(self.init_as, x.shape[-1]),
                name=f"dense{i + 1}",
            )(x)
            if normed:
                x = BatchNorm(
                    groups=self.bn_groups, dtype=self.dtype, use_bias=not last, name=f"bn{i + 1}"
                )(x, train)
            if not last:
                x = nn.relu(x)
        return x.astype(at_least_float32(self.dtype))


class Network(nn.Module):
    """Encoder and head; parameters under "backbone" and "head"."""

    backbone: ResNet
    head: ProjectionHead

    def __call__(self, images: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        """Returns `(features [b, d], embeddings [b, dim])` of scaled `images [b, h, w, c]`."""
        features = self.backbone(images, train)
        return features, self.head(features, train)

    def with_groups(self, groups: int) -> "Network":
        """The same network for a part of the batch: one that holds `groups` of the BN groups."""
        return self.clone(
            backbone=self.backbone.clone(bn_groups=groups), head=self.head.clone(bn_groups=groups)
        )

    def encode(self, images: jax.Array, layer: str = "backbone", train: bool = False) -> jax.Array:
        """Features, in eval mode unless `train`.

        Args:
            images: `[b, h, w, c]`, scaled.
            layer: "backbone", "head1" ... (after that many layers of the head), or "projection".
            train: use and record batch statistics, to fine-tune.

        Raises:
            UserError: for a layer that this network does not have.
        """
        depth = self.depth_of(layer)
        features = self.backbone(images, train)
        return self.head(features, train, depth) if depth else features

    def depth_of(self, layer: str) -> int:
        """How many layers of the head `layer` is behind; 0 for the backbone."""
        names = ["backbone", *(f"head{i + 1}" for i in range(self.head.depth))]
        if layer != "projection" and layer not in names:
            raise UserError(
                f"layer {layer!r} is unknown: choose one of {', '.join(names)}, projection"
            )
        return self.head.depth if layer == "projection" else names.index(layer)


def make_network(model: ConfigDict, head: ConfigDict) -> Network:
    """Builds encoder and head from the sections of those names.

    Raises:
        UserError: for an unknown head or initialisation, or a head without layers.
    """
    one_of("head.kind", head.kind, HEADS)
    one_of("head.init", head.init, initial.KERNELS)
    if head.layers < 1:
        raise UserError(f"head.layers={head.layers}: a head needs at least one layer")
    return Network(
        make_encoder(model),
        ProjectionHead(
            kind=head.kind,
            layers=head.layers,
            hidden=head.hidden,
            dim=head.dim,
            bn_groups=model.bn_groups,
            dtype=jnp.dtype(model.dtype),
            init_as=head.init,
        ),
    )
