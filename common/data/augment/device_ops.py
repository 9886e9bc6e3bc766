"""Image operations in JAX, on a batch, with separate parameters for each image.

What `pixel_ops.py` does in TensorFlow, for inside the train step. Images are float32 [n, 3, h, w]
in [0, 1]. Nothing here is random (`draws.py` is), and images are independent: sharded along n,
nothing is communicated. Where images need different things, all of them are computed and one is
chosen, and what reads pixels elsewhere is a matrix product: an accelerator does both faster than
it gathers.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from common.data.augment.colour import blur_radius, greyscale
from common.data.augment.presets import Augmentation
from common.data.augment.resize import crop_matrices

# A TPU multiplies in bfloat16 by default, whose 8 bits would show in the pixels.
_EXACT = jax.lax.Precision.HIGHEST


def clip(images: jax.Array) -> jax.Array:
    """To [0, 1]."""
    return jnp.clip(images, 0, 1)


def crop_resize(
    images: jax.Array, boxes: jax.Array, flips: jax.Array, augmentation: Augmentation
) -> jax.Array:
    """Crops, resizes and flips images of one shape, each into `views` pictures.

    Args:
        images: float32 [n, 3, h, w].
        boxes: float32 [n * views, 4] top, left, height, width in whole pixels, image-major.
        flips: float32 [n * views], 1 to flip left and right.
        augmentation: for size, interpolation and antialias.

    Returns:
        float32 [n * views, 3, size, size]; bicubic may overshoot the range of `images`.
    """
    n, _, height, width = images.shape
    matrices = crop_matrices(boxes, flips, (height, width), augmentation, jnp)
    rows, cols = (m.reshape(n, -1, *m.shape[1:]) for m in matrices)
    # one image is read once for all of its views
    tall = jnp.einsum("nvih,nchw->nvciw", rows, images, precision=_EXACT)
    views = jnp.einsum("nvciw,nvjw->nvcij", tall, cols, precision=_EXACT)
    return views.reshape(-1, *views.shape[2:])


def rotate(images: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotates [n, 3, h, w] anticlockwise by radians [n]: bilinear, black outside.

    The only gather: as matrix products it would cost more than a network. No preset rotates.
    """
    height, width = images.shape[2:]
    y, x = (height - 1) / 2, (width - 1) / 2
    cos, sin = (f(angles)[:, None, None] for f in (jnp.cos, jnp.sin))
    down = jnp.arange(height, dtype=jnp.float32)[None, :, None] - y
    right = jnp.arange(width, dtype=jnp.float32)[None, None, :] - x
    # the place in the input that a place in the output shows
    left_of, above = cos * right - sin * down + x, sin * right + cos * down + y
    flat = images.reshape(*images.shape[:2], -1)
    total = jnp.zeros_like(flat)
    for dy in (0, 1):
        for dx in (0, 1):
            row, column = jnp.floor(above) + dy, jnp.floor(left_of) + dx
            weight = (1 - abs(above - row)) * (1 - abs(left_of - column))
            seen = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            place = jnp.clip(row, 0, height - 1) * width + jnp.clip(column, 0, width - 1)
            place, weight = (
                v.reshape(-1, 1, height * width)
                for v in (place.astype(jnp.int32), jnp.where(seen, weight, 0))
            )
            total += weight * jnp.take_along_axis(flat, place, axis=2)
    return total.reshape(images.shape)


def grey(images: jax.Array, chosen: jax.Array, style: str) -> jax.Array:
    """Turns the chosen [n] of [n, 3, h, w] grey."""
    return jnp.where(chosen[:, None, None, None], greyscale(images, style), images)


def adjust_brightness(images: jax.Array, factor: jax.Array, style: str) -> jax.Array:
    """Multiplies [n, 3, h, w] by the factors [n], or adds them, and clips."""
    factor = factor[:, None, None, None]
    return jnp.clip(images + factor if style == "add" else images * factor, 0, 1)


def adjust_contrast(images: jax.Array, factor: jax.Array, style: str) -> jax.Array:
    """Scales the distance from each channel's mean ("tf") or the mean grey ("pil"), and clips."""
    mean = images.mean(axis=(2, 3), keepdims=True)
    if style == "pil":
        mean = greyscale(mean, style)  # of the mean: the same, and a third of the work
    factor = factor[:, None, None, None]
    return jnp.clip(images * factor + mean * (1 - factor), 0, 1)


def adjust_saturation(images: jax.Array, factor: jax.Array, style: str) -> jax.Array:
    """Scales HSV's saturation ("tf") or the distance from the grey image ("pil"), and clips."""
    factor = factor[:, None, None, None]
    if style == "pil":
        grey = greyscale(images, style)
        return jnp.clip(grey + (images - grey) * factor, 0, 1)
    # In HSV a pixel is v - (v - rgb) s'/s, and s' = min(s factor, 1) with s = (v - min) / v.
    value = images.max(axis=1, keepdims=True)
    chroma = value - images.min(axis=1, keepdims=True)
    ratio = jnp.minimum(factor * chroma, value) / jnp.maximum(chroma, 1e-12)
    return jnp.clip(value - (value - images) * ratio, 0, 1)


def adjust_hue(images: jax.Array, shift: jax.Array) -> jax.Array:
    """Turns HSV's hue of [n, 3, h, w] by the shifts [n] (1 = the whole circle), and clips."""
    red, green, blue = images[:, 0], images[:, 1], images[:, 2]
    value = images.max(axis=1)
    chroma = value - images.min(axis=1)
    inverse = 1 / jnp.maximum(chroma, 1e-12)
    # Not `value == red`: the compiler may compute the two apart, and round them differently. Where
    # two channels are nearly equal, either formula gives nearly the same hue.
    hue = jnp.where(
        (red >= green) & (red >= blue),
        (green - blue) * inverse,
        jnp.where(green >= blue, (blue - red) * inverse + 2, (red - green) * inverse + 4),
    )  # in sixths of the circle, -1 to 5
    hue = hue + 6 * shift[:, None, None]
    # Smith 1978 in closed form: channel n is v - c * clip(min(k, 4 - k), 0, 1), k = n + hue mod 6.
    offsets = jnp.array([5, 3, 1], jnp.float32)[None, :, None, None]
    k = hue[:, None] + offsets
    k = k - 6 * jnp.floor(k * (1 / 6))
    share = jnp.clip(jnp.minimum(k, 4 - k), 0, 1)
    return jnp.clip(value[:, None] - chroma[:, None] * share, 0, 1)


def jitter(
    images: jax.Array, orders: jax.Array, factors: jax.Array, steps: tuple[Callable, ...]
) -> jax.Array:
    """Applies the four colour operations, in a separate order for each image.

    Args:
        images: float32 [n, 3, h, w].
        orders: [n, 4] indices into `draws.JITTER_OPS`.
        factors: float32 [n, 4], in the order of JITTER_OPS.
        steps: from `colour.jitter_steps`.

    Returns:
        float32 [n, 3, h, w]; jittered images are clipped to [0, 1] after each operation.
    """
    for turn in range(4):
        now, result = orders[:, turn, None, None, None], images
        for number, op in enumerate(steps):
            result = jnp.where(now == number, op(images, factors[:, number]), result)
        images = result
    return images


def blur(images: jax.Array, sigma: jax.Array, augmentation: Augmentation) -> jax.Array:
    """Clips, and blurs [n, 3, s, s] with Gaussians of sigmas [n] in pixels; 0 is no blur.

    (SimCLR clips before its blur, which is a step of its own.) Two products with banded matrices:
    a convolution whose filter differs for each image would run in as many groups as there are
    images.
    """
    images, size, radius = clip(images), images.shape[2], blur_radius(augmentation)
    if radius == 0:
        return images
    offsets = jnp.arange(-radius, radius + 1, dtype=jnp.float32)[None]
    taps = jnp.exp(-0.5 * jnp.square(offsets / jnp.where(sigma > 0, sigma, 1)[:, None]))
    taps = taps / taps.sum(axis=1, keepdims=True)
    places = _tap_places(size, radius, augmentation.kernel == "pil")
    matrix = jnp.einsum("nk,kij->nij", taps, places, precision=_EXACT)
    blurred = jnp.einsum("nih,nchw->nciw", matrix, images, precision=_EXACT)
    blurred = jnp.einsum("nciw,njw->ncij", blurred, matrix, precision=_EXACT)
    return jnp.where(sigma[:, None, None, None] > 0, blurred, images)


def solarise(images: jax.Array, chosen: jax.Array, threshold: float) -> jax.Array:
    """Inverts the values at or above the threshold of the chosen [n] of [n, 3, h, w]."""
    return jnp.where(chosen[:, None, None, None] & (images >= threshold), 1 - images, images)


def _tap_places(size: int, radius: int, repeat_edges: bool) -> jax.Array:
    """float32 [2 radius + 1, size, size]: 1 where tap k of output pixel i reads input pixel j."""
    read = np.arange(size)[None, :] + np.arange(-radius, radius + 1)[:, None]
    if repeat_edges:
        read = np.clip(read, 0, size - 1)
    return (read[:, :, None] == jnp.arange(size)[None, None]).astype(jnp.float32)
