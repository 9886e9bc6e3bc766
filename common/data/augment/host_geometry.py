"""Crop, resize and rotation in TensorFlow, of a batch with numbers of its own for each image.

Crops of images that share one shape are two small matrix products for each image, which holds any
interpolation exactly and costs little at 32 pixels.
"""

from common.data.augment.presets import Augmentation
from common.data.images.tensorflow_host import tf


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
    """`rows @ image @ cols.T` for every image [n, 3, h, w]."""
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
