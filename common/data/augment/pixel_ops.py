"""Image operations in TensorFlow, on a batch, with separate parameters for each image.

Images are float32 [n, 3, h, w] in [0, 1]: with the channels first, every operation runs over
contiguous planes. Nothing here is random (`draws.py` is).

Colours are computed from one [n, h, w] for each channel: TensorFlow is slow at broadcasting arrays,
and quick where it meets a single number, as all factors are when n is 1.
"""

import functools
from collections.abc import Callable

import numpy as np

from common.data.augment import colour
from common.data.augment.presets import Augmentation
from common.data.augment.resize import crop_matrices
from common.data.images.tensorflow_host import fused, is_fused, tf, xp

greyscale = fused(colour.greyscale)


def clip(images: tf.Tensor) -> tf.Tensor:
    """To [0, 1]."""
    return tf.clip_by_value(images, 0.0, 1.0)


def crop_resize(
    images: tf.Tensor, boxes: tf.Tensor, flips: tf.Tensor, augmentation: Augmentation
) -> tf.Tensor:
    """Crops, resizes and flips images of one shape.

    Args:
        images: float32 [n, 3, h, w].
        boxes: float32 [n, 4] top, left, height, width in whole pixels.
        flips: float32 [n], 1 to flip left and right.
        augmentation: for size, interpolation and antialias.

    Returns:
        float32 [n, 3, size, size]; bicubic may overshoot the range of `images`.
    """
    rows, cols = crop_matrices(boxes, flips, tuple(images.shape[2:]), augmentation, xp)
    n, channels, height, width = tf.unstack(tf.shape(images))
    wide = tf.reshape(images, [n, channels * height, width])
    wide = tf.linalg.matmul(wide, cols, transpose_b=True)
    wide = tf.reshape(wide, [n, channels, height, tf.shape(cols)[1]])
    return tf.linalg.matmul(rows[:, None], wide)


def rotate(images: tf.Tensor, angles: tf.Tensor) -> tf.Tensor:
    """Rotates [n, 3, h, w] anticlockwise by radians [n]: bilinear, black outside."""
    height, width = images.shape[2:]
    y, x = (height - 1) / 2, (width - 1) / 2
    cos, sin = tf.cos(angles), tf.sin(angles)
    zero = tf.zeros_like(angles)
    # The transform takes a place in the output to the place in the input that it shows.
    transforms = tf.stack(
        [cos, -sin, x - x * cos + y * sin, sin, cos, y - x * sin - y * cos, zero, zero], axis=1
    )
    rotated = tf.raw_ops.ImageProjectiveTransformV3(
        images=tf.transpose(images, [0, 2, 3, 1]),
        transforms=transforms,
        output_shape=[height, width],
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode="CONSTANT",
    )
    return tf.transpose(rotated, [0, 3, 1, 2])


def grey(images: tf.Tensor, chosen: tf.Tensor, style: str) -> tf.Tensor:
    """Turns the chosen [n] of [n, 3, h, w] grey."""
    return where(chosen, lambda x: tf.repeat(greyscale(x, style), 3, axis=1), images)


@fused
def adjust_brightness(images: tf.Tensor, factor: tf.Tensor, style: str) -> tf.Tensor:
    """Multiplies [n, 3, h, w] by the factors [n], or adds them, and clips."""
    factor = factor[:, None, None, None]
    images = images + factor if style == "add" else images * factor
    return clip(images)


@fused
def adjust_contrast(images: tf.Tensor, factor: tf.Tensor, style: str) -> tf.Tensor:
    """Scales the distance from each channel's mean ("tf") or the mean grey ("pil"), and clips."""

    def mean(x: tf.Tensor) -> tf.Tensor:
        return tf.reduce_mean(x, axis=[1, 2], keepdims=True)

    channels, factor = tf.unstack(images, axis=1), factor[:, None, None]
    if style == "tf":
        means = [mean(x) for x in channels]
    else:
        means = [mean(greyscale(images, style)[:, 0])] * 3
    scaled = [x * factor + m * (1.0 - factor) for x, m in zip(channels, means, strict=True)]
    return tf.clip_by_value(tf.stack(scaled, axis=1), 0.0, 1.0)


@fused
def adjust_saturation(images: tf.Tensor, factor: tf.Tensor, style: str) -> tf.Tensor:
    """Scales HSV's saturation ("tf") or the distance from the grey image ("pil"), and clips."""
    channels, factor = tf.unstack(images, axis=1), factor[:, None, None]
    if style == "pil":
        grey = greyscale(images, style)[:, 0]
        scaled = [grey + (x - grey) * factor for x in channels]
    else:  # In HSV a pixel is v - (v - rgb) s'/s, and s' = min(s factor, 1) with s = (v - min) / v.
        value, chroma = _value_and_chroma(channels)
        ratio = tf.minimum(factor * chroma, value) / tf.maximum(chroma, 1e-12)
        scaled = [value - (value - x) * ratio for x in channels]
    return tf.clip_by_value(tf.stack(scaled, axis=1), 0.0, 1.0)


@fused
def adjust_hue(images: tf.Tensor, shift: tf.Tensor) -> tf.Tensor:
    """Turns HSV's hue of [n, 3, h, w] by the shifts [n] (1 = the whole circle), and clips."""
    red, green, blue = channels = tf.unstack(images, axis=1)
    value, chroma = _value_and_chroma(channels)
    inverse = 1.0 / tf.maximum(chroma, 1e-12)
    hue = tf.where(
        tf.equal(value, red),
        (green - blue) * inverse,
        tf.where(
            tf.equal(value, green), (blue - red) * inverse + 2.0, (red - green) * inverse + 4.0
        ),
    )  # in sixths of the circle, -1 to 5
    hue = hue + 6.0 * shift[:, None, None]
    # Smith 1978 in closed form: channel n is v - c * clip(min(k, 4 - k), 0, 1), k = n + hue mod 6.
    turned = []
    for offset in (5.0, 3.0, 1.0):
        k = hue + offset
        k = k - 6.0 * tf.floor(k * (1 / 6))
        share = tf.clip_by_value(tf.minimum(k, 4.0 - k), 0.0, 1.0)
        turned.append(value - chroma * share)
    return tf.clip_by_value(tf.stack(turned, axis=1), 0.0, 1.0)


def _value_and_chroma(channels: list[tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
    red, green, blue = channels
    value = tf.maximum(tf.maximum(red, green), blue)
    return value, value - tf.minimum(tf.minimum(red, green), blue)


def jitter(
    images: tf.Tensor, orders: tf.Tensor, factors: tf.Tensor, steps: tuple[Callable, ...]
) -> tf.Tensor:
    """Applies the four colour operations, in a separate order for each image.

    Args:
        images: float32 [n, 3, h, w].
        orders: [n, 4] indices into `draws.JITTER_OPS`.
        factors: float32 [n, 4], in the order of JITTER_OPS.
        steps: from `colour.jitter_steps`.

    Returns:
        float32 [n, 3, h, w]; jittered images are clipped to [0, 1] after each operation.
    """
    ops = (*steps, lambda x, f: x)
    orders = tf.cast(orders, tf.int32)
    rows = tf.range(tf.shape(images)[0])
    for turn in range(4):
        if images.shape[0] == 1:
            cases = [
                functools.partial(op, images, factors[:, min(number, 3)])
                for number, op in enumerate(ops)
            ]
            images = tf.ensure_shape(tf.switch_case(orders[0, turn], cases), images.shape)
            continue
        # Images are sorted by what they need now, so that each operation runs on its share only.
        places = tf.dynamic_partition(rows, orders[:, turn], len(ops))
        parts = []
        for number, (op, place) in enumerate(zip(ops, places, strict=True)):
            factor = tf.gather(factors[:, min(number, 3)], place)
            parts.append(op(tf.gather(images, place), factor))
        images = tf.ensure_shape(tf.dynamic_stitch(places, parts), images.shape)
    return images


def where(chosen: tf.Tensor, op: Callable, images: tf.Tensor, *numbers: tf.Tensor) -> tf.Tensor:
    """Applies `op` to the chosen [n] of the images [n, 3, h, w]; the others cost nothing.

    Args:
        chosen: bool [n].
        op: of images and what belongs to them.
        images: float32 [n, 3, h, w].
        numbers: [n, ...], further arguments of `op`.
    """
    if images.shape[0] == 1:
        return tf.cond(chosen[0], lambda: op(images, *numbers), lambda: images)
    places = tf.where(chosen)
    done = op(*(tf.gather(x, places[:, 0]) for x in (images, *numbers)))
    return tf.tensor_scatter_nd_update(images, places, done)


def blur(images: tf.Tensor, sigma: tf.Tensor, augmentation: Augmentation) -> tf.Tensor:
    """Blurs [n, 3, s, s] with Gaussians of the given sigmas [n] in pixels; 0 leaves an image alone.

    Of a batch by products with banded matrices, which is faster than a convolution whose filter
    differs for each image; of a large image by a sum, which XLA makes one pass.
    """
    if colour.blur_radius(augmentation) == 0:
        return images
    return where(sigma > 0, lambda x, s: _blurred(x, s, augmentation), images, sigma)


@fused
def _blurred(images: tf.Tensor, sigma: tf.Tensor, augmentation: Augmentation) -> tf.Tensor:
    """`blur` of images that all get it, clipped first, as SimCLR does before its blur."""
    images = tf.clip_by_value(images, 0.0, 1.0)
    radius, edges = colour.blur_radius(augmentation), augmentation.kernel == "pil"
    offsets = tf.range(-radius, radius + 1, dtype=tf.float32)[None]
    taps = tf.exp(-0.5 * tf.square(offsets / sigma[:, None]))
    taps = taps / tf.reduce_sum(taps, axis=1, keepdims=True)
    if is_fused(images):
        images = _sum_of_taps(_pad(images, radius, 3, edges), taps[0], 3)
        return _sum_of_taps(_pad(images, radius, 2, edges), taps[0], 2)
    # The band of a large image is narrow: a piece of a line needs its neighbourhood only. Pieces of
    # one length share a matrix.
    size, least = images.shape[2], min(images.shape[2], 4 * radius, 32)
    piece = next(x for x in range(1, size + 1) if size % x == 0 and x >= least)
    window, starts = piece + 2 * radius, range(0, size, piece)
    band = tf.tensordot(taps, _tap_places(piece, radius), axes=1)[:, None]
    images = _pad(images, radius, 3, edges)
    images = tf.concat(
        [tf.linalg.matmul(images[..., i : i + window], band, transpose_b=True) for i in starts],
        axis=3,
    )
    images = _pad(images, radius, 2, edges)
    return tf.concat([tf.linalg.matmul(band, images[:, :, i : i + window]) for i in starts], axis=2)


def solarise(images: tf.Tensor, chosen: tf.Tensor, threshold: float) -> tf.Tensor:
    """Inverts the values at or above the threshold of the chosen [n] of [n, 3, h, w]."""
    return tf.where(chosen[:, None, None, None] & (images >= threshold), 1.0 - images, images)


def _sum_of_taps(padded: tf.Tensor, taps: tf.Tensor, axis: int) -> tf.Tensor:
    """A symmetrical filter [2 radius + 1] along an axis; compiled, it is one pass."""
    last = taps.shape[0] - 1
    size = padded.shape[axis] - last

    def shifted(k: int) -> tf.Tensor:
        return padded[..., k : k + size] if axis == 3 else padded[:, :, k : k + size]

    out = shifted(last // 2) * taps[last // 2]
    for k in range(last // 2):
        out += (shifted(k) + shifted(last - k)) * taps[k]
    return out


def _pad(images: tf.Tensor, radius: int, axis: int, repeat_edges: bool) -> tf.Tensor:
    """Adds `radius` pixels on both ends of an axis: zeros, or the edge again."""
    if not repeat_edges:
        return tf.pad(images, [[radius, radius] if i == axis else [0, 0] for i in range(4)])
    first, last = (tf.gather(images, [i] * radius, axis=axis) for i in (0, images.shape[axis] - 1))
    return tf.concat([first, images, last], axis=axis)


def _tap_places(piece: int, radius: int) -> np.ndarray:
    """float32 [taps, piece, piece + 2 radius]: 1 where tap k of output i reads padded input j."""
    taps = 2 * radius + 1
    places = np.zeros((taps, piece, piece + 2 * radius), np.float32)
    for k in range(taps):
        places[k, np.arange(piece), np.arange(piece) + k] = 1
    return places
