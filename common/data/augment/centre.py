"""The centre of images that are held as pixels, as evaluation sees them; NumPy only."""

import numpy as np

from common.data.augment.device_ops import resize_matrix

# From this size on, evaluation cuts the centre out of a larger image, as ImageNet is evaluated;
# smaller sets are used whole.
_CENTRE_CROP_ABOVE = 64
_CENTRE_CROP = 0.875


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
    matrix = resize_matrix(*whole, side, length, "bilinear", antialias=True, xp=np)[0]
    start = (length - size) // 2
    return matrix[start : start + size]
