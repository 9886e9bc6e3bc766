"""What every encoder is: images to features. ResNets and vision transformers are two of them."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def at_least_float32(dtype: Any) -> Any:
    """float32, or the wider type if `dtype` is one (tests run in float64)."""
    return jnp.promote_types(dtype, jnp.float32)


def scale(images: jax.Array, mean: Sequence[float], std: Sequence[float], dtype: Any) -> jax.Array:
    """uint8 `[..., h, w, 3]` to [0, 1], then standardised.

    Args:
        images: uint8, colours last.
        mean: of the colours, in [0, 1]; three zeros: not subtracted.
        std: likewise; three ones: not divided by.
        dtype: of the encoder; what is returned is at least float32.
    """
    kind = at_least_float32(dtype)
    shape = (1,) * (images.ndim - 1) + (3,)
    centre, width = (jnp.asarray(v, kind).reshape(shape) for v in (mean, std))
    return (images.astype(kind) / 255 - centre) / width


class Encoder(nn.Module):
    """Base of encoders: `__call__`, `feature_dim` and a field `dtype`; the rest is optional.

    An encoder with batch norm also has a field `bn_groups`, see `batch_norm.BatchNorm`.
    """

    @property
    def feature_dim(self) -> int:
        """Length d of the features."""
        raise NotImplementedError

    @property
    def has_batch_norm(self) -> bool:
        """Whether rows of a batch see each other in training."""
        return False

    @property
    def is_random(self) -> bool:
        """Whether training draws something from `keys`, e.g. drop path."""
        return False

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of parameters, or of modules, that pretraining leaves as they were drawn."""
        return ()

    @property
    def layers(self) -> tuple[tuple[str, ...], ...]:
        """Names of parameters, or of modules, of each layer, from the input on.

        For learning rates that fall with the distance from the output. What is in none of them
        lies behind the last. (): not known.
        """
        return ()

    @property
    def watched(self) -> str:
        """Name of the module whose gradient norm is logged; "" for none."""
        return ""

    def in_words(self) -> str:
        """For the start-up summary, e.g. "ResNet-50 width 64"."""
        raise NotImplementedError

    def __call__(self, images: jax.Array, train: bool, keys: jax.Array | None = None) -> jax.Array:
        """Encodes images.

        Args:
            images: `[b, h, w, c]`, already scaled.
            train: batch statistics (True) or running statistics (False).
            keys: a random key for each image, `[b]`; None: nothing is drawn. A key a row, so that
                an image gets the same draws in whatever part of a batch it is encoded.

        Returns:
            `[b, feature_dim]`, at least float32.
        """
        raise NotImplementedError
