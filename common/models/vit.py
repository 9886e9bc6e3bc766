"""Vision transformers (Dosovitskiy et al. 2021), as MoCo v3 trains them (Chen et al. 2021).

Pre-norm blocks, exact GELU, LayerNorm with epsilon 1e-6, query, key and value each drawn as a
matrix of its own: the network that timm calls `vit_*_patch16_224`. Parameters and the returned
features are float32, as are the statistics of norms and the softmax; all else runs in `dtype`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from ml_collections import ConfigDict

from common.config import one_of_field
from common.errors import UserError
from common.models import attention, initial, positions
from common.models.batch_norm import BatchNorm
from common.models.convolution import conv, space_to_depth
from common.models.encoder import Encoder, at_least_float32

# name -> width, depth, heads: Dosovitskiy et al. 2021, table 1; Touvron et al. 2021, table 1. MoCo
# v3 gives its ViT-S 12 heads.
VARIANTS: dict[str, tuple[int, int, int]] = {
    "Ti": (192, 12, 3),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
}
EPSILON = 1e-6


def dense(features: int, dtype: Any, name: str | None = None, **init: Any) -> nn.Dense:
    """A linear map; `init` may replace Xavier's kernel (Glorot & Bengio 2010, eq. 16)."""
    xavier: dict[str, Any] = {"kernel_init": nn.initializers.xavier_uniform()}
    kind = at_least_float32(dtype)
    return nn.Dense(features, dtype=dtype, param_dtype=kind, name=name, **xavier | init)


def layer_norm(dtype: Any, name: str | None = None) -> nn.LayerNorm:
    """Over the last axis; statistics are at least float32."""
    return nn.LayerNorm(EPSILON, dtype=dtype, param_dtype=at_least_float32(dtype), name=name)


class Block(nn.Module):
    """Self-attention and a two-layer perceptron, each added to its input.

    Attributes:
        heads: number of heads; divides the width.
        hidden: width inside the perceptron.
        dtype: of the matrix products and of the tokens.
        kernel: see `attention.attend`.
    """

    heads: int
    hidden: int
    dtype: Any
    kernel: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, keep: jax.Array | None = None) -> jax.Array:
        """Tokens `[b, n, d]` to tokens; `keep [b, 2]` multiplies what the two branches add."""
        width = x.shape[-1]
        y = layer_norm(self.dtype, "norm1")(x)
        heads = (*y.shape[:2], self.heads, width // self.heads)
        query, key, value = (
            checkpoint_name(dense(width, self.dtype, name)(y), "product").reshape(heads)
            for name in ("query", "key", "value")
        )
        y = attention.attend(query, key, value, self.kernel).reshape(x.shape)
        y = checkpoint_name(y, "product")
        x = x + self._kept(dense(width, self.dtype, "out")(y), keep, 0)
        y = layer_norm(self.dtype, "norm2")(x)
        y = checkpoint_name(dense(self.hidden, self.dtype, "mlp1")(y), "product")
        y = dense(width, self.dtype, "mlp2")(nn.gelu(y, approximate=False))
        return x + self._kept(y, keep, 1)

    def _kept(self, y: jax.Array, keep: jax.Array | None, branch: int) -> jax.Array:
        return y if keep is None else y * keep[:, branch, None, None].astype(y.dtype)


class ViT(Encoder):
    """Images to the final state of a class token, or to the mean of the patches.

    Attributes:
        width: d, of the tokens.
        depth: number of blocks.
        heads: of attention; divides the width.
        mlp_ratio: width of the perceptron / d.
        patch: side of a patch in pixels.
        image_size: side of the images it is made for; others get resized positions.
        pool: "token" (a class token, after a final norm) or "mean" (no class token, no final norm:
            Chen et al. 2021, section 6.2, found the norm before a mean to cost much).
        positions: "sincos" (fixed: `positions.sincos`) or "learned".
        patches: "linear", "frozen" (linear, as drawn: Chen et al. 2021, section 4.2) or "conv"
            (3x3 convolutions of stride 2 with batch norm: Xiao et al. 2021).
        drop_path: probability of leaving out a branch in the last block, rising linearly from 0 in
            the first (Huang et al. 2016); of an image, in training.
        bn_groups: of the "conv" patches, see `BatchNorm`.
        dtype: of matrix products and tokens.
        remat: "none", "convs" (of a block, store its input and the outputs of matrix products) or
            "blocks" (store its input only).
        kernel: see `attention.attend`; with it `attention.row_major` too.
    """

    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    patch: int = 16
    image_size: int = 224
    pool: str = "token"
    positions: str = "sincos"
    patches: str = "linear"
    drop_path: float = 0.0
    bn_groups: int = 1
    dtype: Any = jnp.float32
    remat: str = "none"
    kernel: bool = True

    @property
    def feature_dim(self) -> int:
        """See `Encoder`."""
        return self.width

    @property
    def has_batch_norm(self) -> bool:
        """See `Encoder`."""
        return self.patches == "conv"

    @property
    def is_random(self) -> bool:
        """See `Encoder`."""
        return self.drop_path > 0

    @property
    def frozen(self) -> tuple[str, ...]:
        """See `Encoder`."""
        return ("patches",) if self.patches == "frozen" else ()

    @property
    def layers(self) -> tuple[tuple[str, ...], ...]:
        """See `Encoder`: what makes the tokens, and the blocks."""
        return (("patches", "token", "positions"), *((f"block{i}",) for i in range(self.depth)))

    @property
    def watched(self) -> str:
        """See `Encoder`: instability shows in the patches first (Chen et al. 2021, section 4)."""
        return "patches"

    def in_words(self) -> str:
        """See `Encoder`."""
        named = {(d, depth): name for name, (d, depth, _) in VARIANTS.items()}
        name = named.get((self.width, self.depth))
        name = (
            f"ViT-{name}/{self.patch}"
            if name
            else f"ViT of {self.depth} blocks, patch {self.patch}"
        )
        return f"{name}, width {self.width}, {self.heads} heads"

    @nn.compact
    def __call__(self, images: jax.Array, train: bool, keys: jax.Array | None = None) -> jax.Array:
        """See `Encoder`."""
        kind = at_least_float32(self.dtype)
        x = images.astype(self.dtype)
        if self.patches == "conv":
            x = ConvPatches(self.width, self.patch, self.bn_groups, self.dtype, name="patches")(
                x, train
            )
        else:
            x = dense(self.width, self.dtype, "patches")(space_to_depth(x, self.patch))
        b, *grid, d = x.shape
        x = x.reshape(b, -1, d)
        token = self.pool == "token"
        table = self._table(token, kind)
        table = positions.resized(table, grid, int(token)).astype(self.dtype)
        if token:
            first = self.param("token", nn.initializers.normal(1e-6), (1, 1, d), kind)
            x = jnp.concatenate([jnp.broadcast_to(first.astype(x.dtype), (b, 1, d)), x], axis=1)
        x = x + table
        x = attention.row_major(x) if self.kernel else x
        keep = self.keep(keys, kind) if train and self.drop_path and keys is not None else None
        block = self._block()
        for i in range(self.depth):
            hidden = int(self.mlp_ratio * d)
            x = block(self.heads, hidden, self.dtype, self.kernel, name=f"block{i}")(
                x, None if keep is None else keep[:, i]
            )
        if token:
            return layer_norm(kind, "norm")(x[:, 0].astype(kind))
        return x.astype(kind).mean(1)

    def _table(self, token: bool, kind: Any) -> jax.Array:
        side = self.image_size // self.patch
        if self.positions == "learned":
            # of the class token too, as timm has it; drawn as there (and in Dosovitskiy's code)
            shape = (1, side * side + token, self.width)
            return self.param("positions", nn.initializers.normal(0.02), shape, kind)
        return jnp.asarray(positions.sincos(side, side, self.width, token), kind)

    def keep(self, keys: jax.Array, kind: Any) -> jax.Array:
        """Factors `[b, depth, 2]`: 0, or 1 / the probability of keeping the branch."""
        rates = jnp.asarray(np.linspace(0, self.drop_path, self.depth), kind)[None, :, None]
        # of one type, so that the same branches are left out whatever the model computes in
        draws = jax.vmap(lambda key: jax.random.uniform(key, (self.depth, 2), jnp.float32))(keys)
        return (draws >= rates) / (1 - rates)

    def _block(self) -> Any:
        if self.remat == "none":
            return Block
        products = jax.checkpoint_policies.save_only_these_names("product")
        return nn.remat(Block, policy=products if self.remat == "convs" else None)


class ConvPatches(nn.Module):
    """A stem of 3x3 convolutions with stride 2, batch norm and ReLU, and a 1x1 convolution.

    As in MoCo v3's code: for patches of 16 pixels four of them, of d/8, d/4, d/2 and d channels;
    all are drawn as PyTorch draws a convolution.
    """

    width: int
    patch: int
    bn_groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """`[b, h, w, 3]` to `[b, h / patch, w / patch, d]`."""
        layers = self.patch.bit_length() - 1
        for i in range(layers):
            features = self.width // 2 ** (layers - 1 - i)
            x = conv(features, 3, 2, self.dtype, f"conv{i + 1}", "torch")(x)
            x = nn.relu(BatchNorm(self.bn_groups, dtype=self.dtype, name=f"bn{i + 1}")(x, train))
        draws = {
            "kernel_init": initial.KERNELS["torch"],
            "bias_init": initial.bias("torch", x.shape[-1]),
        }
        return dense(self.width, self.dtype, "project", **draws)(x)


def make_encoder(model: ConfigDict, vit: ConfigDict, image_size: int) -> ViT:
    """Builds the encoder of the sections of those names.

    Args:
        model: what all encoders have.
        vit: what only a ViT has.
        image_size: side of the training views.

    Raises:
        UserError: for an unknown variant or option, sizes that do not go together, or an image
            size that is no multiple of the patch.
    """
    v = vit
    for name in ("variant", "pool", "positions", "patches"):
        one_of_field(f"vit.{name}", v[name])
    width, depth, heads = VARIANTS[v.variant]
    if v.patches == "conv" and not v.depth:
        depth -= 1  # as in MoCo v3's code: the convolutions stand for a block
    width, depth, heads = v.width or width, v.depth or depth, v.heads or heads
    if width % heads or (v.positions == "sincos" and width % 4):
        raise UserError(
            f"vit.width={width} and heads={heads}: expected a width that is a multiple of "
            "the heads, and of 4 for sincos positions"
        )
    if image_size % v.patch:
        raise UserError(
            f"vit.patch={v.patch}: the sides of views, {image_size} pixels, are no multiple of it; "
            "choose a divisor, or set data.image_size or augment.size"
        )
    if v.patches == "conv" and (v.patch & (v.patch - 1) or v.patch < 2 or width % (v.patch // 2)):
        raise UserError(
            f"vit.patches=conv halves the image again and again, found patch={v.patch} and "
            f"width={width}: expected a patch of 2, 4, 8, 16 or 32, and a width that is a multiple "
            "of half of it"
        )
    if not v.mlp_ratio * width >= 1:
        raise UserError(
            f"vit.mlp_ratio={v.mlp_ratio} leaves a perceptron of width {width} without a hidden "
            "layer: expected a number above 0, 4 in all published networks"
        )
    if not 0 <= v.drop_path < 1:
        raise UserError(f"vit.drop_path={v.drop_path}: expected 0 or more, and less than 1")
    return ViT(
        width=width,
        depth=depth,
        heads=heads,
        mlp_ratio=v.mlp_ratio,
        patch=v.patch,
        image_size=image_size,
        pool=v.pool,
        positions=v.positions,
        patches=v.patches,
        drop_path=v.drop_path,
        bn_groups=model.bn_groups,
        dtype=jnp.dtype(model.dtype),
        remat=model.remat,
        kernel=v.tpu_kernel,
    )
