"""Resizing as matrix products, one definition for NumPy, JAX and TensorFlow; and centre crops.

`xp` is `numpy`, `jax.numpy` or `tensorflow_host.xp`, which has TensorFlow's functions under NumPy's
names.
"""

from typing import Any

import numpy as np

from common.data.augment.presets import Augmentation

# From this size on, evaluation cuts the centre out of a larger image, as ImageNet is evaluated;
# smaller sets are used whole.
_CENTRE_CROP_ABOVE = 64
_CENTRE_CROP = 0.875


def resize_matrix(
    start: Any, length: Any, in_size: int, out_size: int, kind: str, antialias: bool, xp: Any
) -> Any:
    """Matrices that cut [start, start + length) out of a line of pixels and resize it.

    Args:
        start, length: float32 [n], whole pixels.
        in_size, out_size: pixels of the whole line and of the result.
        kind: "bilinear" or "bicubic".
        antialias: widen the kernel when shrinking.
        xp: see the top of this file.

    Returns:
        float32 [n, out_size, in_size]; rows sum to 1 and are zero outside the cut.
    """
    zero, half, one = map(np.float32, (0, 0.5, 1))
    scale = (length / np.float32(out_size))[:, None, None]
    centres = (xp.arange(out_size, dtype=np.float32)[None, :, None] + half) * scale
    pixels = xp.arange(in_size, dtype=np.float32)[None, None, :] - start[:, None, None] + half
    distance = abs(pixels - centres)
    if antialias:
        distance = distance / xp.maximum(scale, one)
    if kind == "bilinear":
        weights = xp.maximum(1 - distance, zero)
    else:  # Keys 1981 with a = -0.5
        near = (1.5 * distance - 2.5) * distance * distance + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weights = xp.where(distance <= 1, near, xp.where(distance < 2, far, zero))
    inside = (pixels > 0) & (pixels < length[:, None, None])
    weights = xp.where(inside, weights, zero)
    return weights / xp.sum(weights, axis=2, keepdims=True)


def crop_matrices(
    boxes: Any, flips: Any, shape: tuple[int, int], augmentation: Augmentation, xp: Any
) -> tuple[Any, Any]:
    """The matrices of crop, resize and flip: a view is `rows @ image @ cols.T`.

    Args:
        boxes: float32 [n, 4] top, left, height, width in whole pixels.
        flips: float32 [n], 1 to flip left and right.
        shape: height and width of the images.
        augmentation: for size, interpolation and antialias.
        xp: see the top of this file.

    Returns:
        float32 [n, size, height] and [n, size, width].
    """
    size, how = augmentation.size, (augmentation.interpolation, augmentation.antialias)
    rows = resize_matrix(boxes[:, 0], boxes[:, 2], shape[0], size, *how, xp)
    cols = resize_matrix(boxes[:, 1], boxes[:, 3], shape[1], size, *how, xp)
    return rows, xp.where(flips[:, None, None] > 0, cols[:, ::-1], cols)


def resize_to(image_size: int) -> int:
    """Length of the shorter side before the centre is cut out."""
    return round(image_size / _CENTRE_CROP) if image_size > _CENTRE_CROP_ABOVE else image_size


def centre(images: np.ndarray, image_size: int) -> np.ndarray:
    """Resizes the shorter side (bilinear, antialiased) and cuts the centre out.

    Args:
        images: uint8 [n, h, w, 3].
        image_size: side of the result.

    Returns:
        uint8 [n, image_size, image_size, 3]: what `on_host.centre` makes of one image, but for
        images that have this size already, which are used whole.
    """
    sides = np.array(images.shape[1:3])
    if (sides == image_size).all():
        return images
    lengths = np.rint(sides * np.float32(resize_to(image_size) / sides.min())).astype(int)
    rows, cols = (
        _middle(int(side), int(length), image_size)
        for side, length in zip(sides, lengths, strict=True)
    )
    tall = np.einsum("ih,nhwc->niwc", rows, images.astype(np.float32), optimize=True)
    resized = np.einsum("niwc,jw->nijc", tall, cols, optimize=True)
    return (np.clip(resized, 0, 255) + np.float32(0.5)).astype(np.uint8)


def _middle(side: int, length: int, size: int) -> np.ndarray:
    """float32 [size, side]: resizes a line of `side` pixels to `length` and keeps the middle."""
    whole = np.zeros(1, np.float32), np.full(1, side, np.float32)
    matrix = resize_matrix(*whole, side, length, "bilinear", True, np)[0]
    start = (length - size) // 2
    return matrix[start : start + size]
