"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019), one draw for a whole batch."""

import jax
import jax.numpy as jnp


def draw(key: jax.Array, mixup: float, cutmix: float, height: int, width: int) -> jax.Array:
    """How much of each pixel an image keeps; the rest comes from its partner in the batch.

    With lambda from Beta(alpha, alpha), mixup keeps lambda of every pixel. CutMix keeps all outside
    a box whose sides are sqrt(1 - lambda) of the image's, around a centre that is uniform over the
    image; what lies outside the image is cut off. Where both are on, either is drawn with
    probability 1/2. As in DeiT (Touvron et al. 2021), whose alphas are 0.8 and 1.

    Args:
        key: of this draw alone.
        mixup: alpha, 0 = off.
        cutmix: alpha, 0 = off; not both 0.
        height: of the images.
        width: of the images.

    Returns:
        float32 `[height, width]` in [0, 1]. Their mean is the share of an image's own label.
    """
    of_mixup, of_cutmix, choice, row, column = jax.random.split(key, 5)
    # an alpha of 0 has no Beta: its draw is not used
    keep = jax.random.beta(of_mixup, mixup or 1.0, mixup or 1.0)
    side = jnp.sqrt(1 - jax.random.beta(of_cutmix, cutmix or 1.0, cutmix or 1.0))
    inside = _range(row, side, height)[:, None] & _range(column, side, width)[None]
    cut = jax.random.bernoulli(choice, 0.5 if mixup and cutmix else float(cutmix > 0))
    return jnp.where(cut, 1 - inside.astype(jnp.float32), keep.astype(jnp.float32))


def _range(key: jax.Array, side: jax.Array, length: int) -> jax.Array:
    """True on `side * length` neighbours of `[length]`, or on those of them that exist."""
    size = (side * length).astype(jnp.int32)
    first = jax.random.randint(key, (), 0, length) - size // 2
    at = jnp.arange(length)
    return (at >= first) & (at < first + size)


def mix(images: jax.Array, keep: jax.Array) -> jax.Array:
    """Mixes each image `[b, h, w, c]` with that at the same place from the end of the batch."""
    keep = keep.astype(images.dtype)[None, :, :, None]
    return images * keep + images[::-1] * (1 - keep)
