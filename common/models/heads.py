"""Projection heads, and the network that methods train: an encoder followed by a head."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from common.config import one_of_field
from common.errors import UserError, one_of
from common.models import initial, resnet, vit
from common.models.batch_norm import BatchNorm
from common.models.encoder import Encoder, at_least_float32

HEADS = ("simclr", "moco_v1", "moco_v2", "moco_v3")


class ProjectionHead(nn.Module):
    """Maps features to the space of the contrastive loss.

    * "simclr": `layers` linear maps, each followed by BN, ReLU between them; the last BN has no
      shift. 2 layers in Chen et al. 2020a, 3 in 2020b.
    * "moco_v1": one linear map (He et al. 2020). "moco_v2": two with a ReLU between, no BN
      (Chen et al. 2020c). Both with biases, as in the authors' code.
    * "moco_v3": as "simclr", but the last BN has neither scale nor shift (Chen et al. 2021,
      section 5, and the authors' code).

    Attributes:
        kind: one of `HEADS`.
        layers: number of linear maps of "simclr" and "moco_v3"; the other kinds fix it.
        hidden: width of the middle layers; 0 = the input's.
        dim: length of the embedding.
        bn_groups: see `BatchNorm`.
        dtype: of the matrix products; the embedding is at least float32.
        init_as: how linear maps are drawn, one of `initial.KERNELS`.
        last_norm: whether a BN follows the last linear map, of kinds that have BN.
    """

    kind: str = "simclr"
    layers: int = 2
    hidden: int = 0
    dim: int = 128
    bn_groups: int = 1
    dtype: Any = jnp.float32
    init_as: str = "lecun"
    last_norm: bool = True

    @property
    def depth(self) -> int:
        """Number of linear maps."""
        return {"moco_v1": 1, "moco_v2": 2}.get(self.kind, self.layers)

    @property
    def has_batch_norm(self) -> bool:
        """Whether rows of a batch see each other in training."""
        return self._normed and (self.last_norm or self.depth > 1)

    @property
    def _normed(self) -> bool:
        """Whether this kind has BN, where others have biases."""
        return self.kind in ("simclr", "moco_v3")

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, depth: int | None = None) -> jax.Array:
        """Projects `x [b, d]`; `depth` stops after that many layers (to fine-tune from there)."""
        normed = self._normed
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
            if normed and (self.last_norm or not last):
                x = BatchNorm(
                    groups=self.bn_groups,
                    dtype=self.dtype,
                    use_scale=not last or self.kind != "moco_v3",
                    use_bias=not last,
                    name=f"bn{i + 1}",
                )(x, train)
            if not last:
                x = nn.relu(x)
        return x.astype(at_least_float32(self.dtype))


class Network(nn.Module):
    """Encoder and head; parameters under "backbone" and "head".

    Attributes:
        backbone: the encoder.
        head: of its features.
        predictor: maps embeddings to embeddings, under "predictor"; None where a method has none.
    """

    backbone: Encoder
    head: ProjectionHead
    predictor: ProjectionHead | None = None

    def __call__(self, images: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        """Returns `(features [b, d], embeddings [b, dim])` of scaled `images [b, h, w, c]`."""
        features = self.backbone(images, train)
        embeddings = self.head(features, train)
        if self.predictor is not None and self.is_initializing():
            self.predictor(embeddings, train)
        return features, embeddings

    def features(self, images: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Features of scaled images, in training."""
        return self.backbone(images, True, keys)

    def project(self, features: jax.Array) -> jax.Array:
        """Embeddings of features, in training."""
        return self.head(features, True)

    def predict(self, embeddings: jax.Array) -> jax.Array:
        """What the predictor makes of embeddings, in training."""
        assert self.predictor is not None
        return self.predictor(embeddings, True)

    @property
    def has_batch_norm(self) -> bool:
        """Whether rows of a batch see each other in training."""
        parts = (self.backbone, self.head, self.predictor)
        return any(part is not None and part.has_batch_norm for part in parts)

    @property
    def frozen(self) -> tuple[tuple[str, ...], ...]:
        """Where the parameters lie that pretraining leaves as they were drawn."""
        return tuple(("backbone", name) for name in self.backbone.frozen)

    def with_groups(self, groups: int) -> "Network":
        """The same network with another number of BN groups."""
        changed = {name: getattr(self, name) for name in ("backbone", "head", "predictor")}
        return self.clone(
            **{
                name: module.clone(bn_groups=groups)
                for name, module in changed.items()
                if hasattr(module, "bn_groups")
            }
        )

    def encode(
        self,
        images: jax.Array,
        layer: str = "backbone",
        train: bool = False,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """Features, in eval mode unless `train`.

        Args:
            images: `[b, h, w, c]`, scaled.
            layer: "backbone", "head1" ... (after that many layers of the head), or "projection".
            train: use and record batch statistics, to fine-tune.
            keys: for draws of the encoder, see `Encoder`.

        Raises:
            UserError: for a layer that this network does not have.
        """
        depth = self.depth_of(layer)
        features = self.backbone(images, train, keys)
        return self.head(features, train, depth) if depth else features

    def depth_of(self, layer: str) -> int:
        """How many layers of the head `layer` is behind; 0 for the backbone."""
        names = ["backbone", *(f"head{i + 1}" for i in range(self.head.depth))]
        if layer != "projection" and layer not in names:
            raise UserError(
                f"layer {layer!r} is unknown: choose one of {', '.join(names)}, projection"
            )
        return self.head.depth if layer == "projection" else names.index(layer)


def make_network(config: ConfigDict, image_size: int) -> Network:
    """Builds the encoder of the section "model" (and "vit"), and the head of the section "head".

    Args:
        config: of the run.
        image_size: side of the training views.

    Raises:
        UserError: for an unknown encoder, remat, head or initialisation, a head without layers or
            outputs, or from the builder of the encoder.
    """
    model, head = config.model, config.head
    one_of("head.kind", head.kind, HEADS)
    one_of("head.init", head.init, initial.KERNELS)
    one_of_field("model.remat", model.remat)
    if head.layers < 1:
        raise UserError(f"head.layers={head.layers}: a head needs at least one layer")
    if head.dim < 1:  # 0 is for a method that decides on it, see `Method.complete`
        raise UserError(f"head.dim={head.dim}: embeddings need at least one dimension")
    if one_of_field("model.encoder", model.encoder) == "vit":
        encoder: Encoder = vit.make_encoder(model, config.vit, image_size)
    else:
        encoder = resnet.make_encoder(model)
    return Network(
        encoder,
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
