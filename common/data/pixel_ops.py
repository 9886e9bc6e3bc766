"""Image operations in TensorFlow, on a batch with numbers of its own for each image.

Images are float32 [n, 3, h, w] in [0, 1]: with the channels first, every operation runs over
contiguous planes. Nothing here is random (`draws.py` is). Crops of images that share one shape are
two small matrix products for each image, which holds any interpolation exactly and costs little at
32 pixels.
"""

import numpy as np

from common.data.presets import Augmentation
from common.data.tensorflow_host import tf

_GREY = {"tf": (0.2989, 0.5870, 0.1140), "pil": (0.299, 0.587, 0.114)}


def resize_matrix(
    start: tf.Tensor, length: tf.Tensor, in_size: int, out_size: int, kind: str, antialias: bool
) -> tf.Tensor:
    """Matrices that cut [start, start + length) out of a line of pixels and resize it.

    Args:
      start, length: float32 [n], whole pixels.
      in_size, out_size: pixels of the whole line and of the result.
      kind: "bilinear" or "bicubic".
      antialias: widen the kernel when shrinking.

    Returns:
      float32 [n, out_size, in_size]; rows sum to 1 and are zero outside the cut.
    """
    scale = (length / out_size)[:, None, None]
    centres = (tf.range(out_size, dtype=tf.float32)[None, :, None] + 0.5) * scale
    pixels = tf.range(in_size, dtype=tf.float32)[None, None, :] - start[:, None, None] + 0.5
    distance = tf.abs(pixels - centres)
    if antialias:
        distance = distance / tf.maximum(scale, 1.0)
    if kind == "bilinear":
        weights = tf.maximum(1.0 - distance, 0.0)
    else:  # Keys 1981 with a = -0.5
        near = (1.5 * distance - 2.5) * distance * distance + 1.0
        far = ((-0.5 * distance + 2.5) * distance - 4.0) * distance + 2.0
        weights = tf.where(distance <= 1.0, near, tf.where(distance < 2.0, far, 0.0))
    inside = tf.logical_and(pixels > 0, pixels < length[:, None, None])
    weights = tf.where(inside, weights, 0.0)
    return weights / tf.reduce_sum(weights, axis=2, keepdims=True)


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
    a, (_, _, height, width) = augmentation, images.shape
    rows = resize_matrix(boxes[:, 0], boxes[:, 2], height, a.size, a.interpolation, a.antialias)
    cols = resize_matrix(boxes[:, 1], boxes[:, 3], width, a.size, a.interpolation, a.antialias)
    cols = tf.where(flips[:, None, None] > 0, cols[:, ::-1], cols)
    return _two_sided(rows, images, cols)


def _two_sided(rows: tf.Tensor, images: tf.Tensor, cols: tf.Tensor) -> tf.Tensor:
    """rows @ image @ cols.T for every image [n, 3, h, w]."""
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


def greyscale(images: tf.Tensor, style: str) -> tf.Tensor:
    """Luminance [n, 1, h, w] of float32 [n, 3, h, w], with TensorFlow's or PIL's weights."""
    red, green, blue = _GREY[style]
    return images[:, :1] * red + images[:, 1:2] * green + images[:, 2:] * blue


def adjust_brightness(images: tf.Tensor, factor: tf.Tensor, style: str) -> tf.Tensor:
    """Multiplies [n, 3, h, w] by the factors [n], or adds them, and clips."""
    factor = factor[:, None, None, None]
    images = images + factor if style == "add" else images * factor
    return tf.clip_by_value(images, 0.0, 1.0)


def adjust_contrast(images: tf.Tensor, factor: tf.Tensor, style: str) -> tf.Tensor:
    """Scales the distance from each channel's mean ("tf") or the mean grey ("pil"), and clips."""
    centre = images if style == "tf" else greyscale(images, style)
    mean = tf.reduce_mean(centre, axis=[2, 3], keepdims=True)
    factor = factor[:, None, None, None]
    return tf.clip_by_value(images * factor + mean * (1.0 - factor), 0.0, 1.0)


def adjust_saturation(images: tf.Tensor, factor: tf.Tensor, style: str) -> tf.Tensor:
    """Scales HSV's saturation ("tf") or the distance from the grey image ("pil"), and clips."""
    factor = factor[:, None, None, None]
    if style == "pil":
        grey = greyscale(images, style)
        return tf.clip_by_value(grey + (images - grey) * factor, 0.0, 1.0)
    # In HSV a pixel is v - (v - rgb) s'/s, and s' = min(s factor, 1) with s = (v - min) / v.
    value = tf.reduce_max(images, axis=1, keepdims=True)
    chroma = value - tf.reduce_min(images, axis=1, keepdims=True)
    ratio = tf.minimum(factor * chroma, value) / tf.maximum(chroma, 1e-12)
    return tf.clip_by_value(value - (value - images) * ratio, 0.0, 1.0)


def adjust_hue(images: tf.Tensor, shift: tf.Tensor) -> tf.Tensor:
    """Turns HSV's hue of [n, 3, h, w] by the shifts [n] (1 = the whole circle), and clips."""
    red, green, blue = images[:, 0], images[:, 1], images[:, 2]
    value = tf.maximum(tf.maximum(red, green), blue)
    chroma = value - tf.minimum(tf.minimum(red, green), blue)
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
    offsets = tf.constant([5.0, 3.0, 1.0])[None, :, None, None]
    k = hue[:, None] + offsets
    k = k - 6.0 * tf.floor(k * (1 / 6))
    share = tf.clip_by_value(tf.minimum(k, 4.0 - k), 0.0, 1.0)
    return tf.clip_by_value(value[:, None] - chroma[:, None] * share, 0.0, 1.0)


def jitter(
    images: tf.Tensor, orders: tf.Tensor, factors: tf.Tensor, augmentation: Augmentation
) -> tf.Tensor:
    """Applies the four colour operations, in an order of its own for each image.

    Args:
      images: float32 [n, 3, h, w].
      orders: [n, 4] indices into `draws.JITTER_OPS`.
      factors: float32 [n, 4], in the order of JITTER_OPS.
      augmentation: for the styles.

    Returns:
      float32 [n, 3, h, w]; jittered images are clipped to [0, 1] after each operation.
    """
    a = augmentation
    ops = (
        lambda x, f: adjust_brightness(x, f, a.brightness_style),
        lambda x, f: adjust_contrast(x, f, a.color_style),
        lambda x, f: adjust_saturation(x, f, a.color_style),
        lambda x, f: adjust_hue(x, f),
        lambda x, f: x,
    )
    orders = tf.cast(orders, tf.int32)
    rows = tf.range(tf.shape(images)[0])
    for turn in range(4):
        # Images are sorted by what they need now, so that each operation runs on its share only.
        places = tf.dynamic_partition(rows, orders[:, turn], len(ops))
        parts = []
        for number, (op, place) in enumerate(zip(ops, places, strict=True)):
            factor = tf.gather(factors[:, min(number, 3)], place)
            parts.append(op(tf.gather(images, place), factor))
        images = tf.ensure_shape(tf.dynamic_stitch(places, parts), images.shape)
    return images


def blur(images: tf.Tensor, sigma: tf.Tensor, augmentation: Augmentation) -> tf.Tensor:
    """Blurs [n, 3, s, s] with Gaussians of the given sigmas [n] in pixels; 0 leaves an image alone.

    Done as two products with banded matrices, which is faster than a convolution whose filter
    differs for each image.
    """
    a, size = augmentation, images.shape[2]
    radius = (a.size // 10) // 2 if a.kernel == "tf" else int(np.ceil(4 * a.sigma_max))
    if radius == 0:
        return images
    selected = tf.where(sigma > 0)[:, 0]
    spread = tf.gather(sigma, selected)[:, None]
    offsets = tf.range(-radius, radius + 1, dtype=tf.float32)[None]
    taps = tf.exp(-0.5 * tf.square(offsets / spread))
    taps = taps / tf.reduce_sum(taps, axis=1, keepdims=True)
    matrix = tf.tensordot(taps, _tap_places(size, radius, a.kernel == "pil"), axes=1)
    blurred = _two_sided(matrix, tf.gather(images, selected), matrix)
    return tf.tensor_scatter_nd_update(images, selected[:, None], blurred)


def _tap_places(size: int, radius: int, repeat_edges: bool) -> np.ndarray:
    """float32 [2 radius + 1, size, size]: 1 where tap k of output pixel i reads input pixel j."""
    places = np.zeros((2 * radius + 1, size, size), np.float32)
    for k in range(2 * radius + 1):
        for i in range(size):
            j = i + k - radius
            if repeat_edges:
                places[k, i, min(max(j, 0), size - 1)] = 1
            elif 0 <= j < size:
                places[k, i, j] = 1
    return places
