"""The size of a crop, from uniform numbers: one try as TensorFlow or as torchvision makes it."""

from typing import Any

import numpy as np

from common.data.augment.presets import Augmentation

TORCH_TRIES, TF_TRIES = 10, 100
OBJECT_COVERED = 0.1  # SimCLR's min_object_covered, the object being the whole image


def tf_try(
    a: Augmentation, height: int, width: int, u: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One try of `sample_distorted_bounding_box` with the whole image as the object.

    It is the height that is uniform here, not the area. (TensorFlow's kernel does this itself where
    the size of an image is known late.)

    Args:
        a: the recipe.
        height, width: of the images, in pixels.
        u: [n, 2] uniform in [0, 1), for height and ratio.

    Returns:
        Heights and widths [n] in whole pixels, and whether each is allowed.
    """
    u_height, u_ratio = u[:, 0], u[:, 1]
    ratio = a.ratio_min + (a.ratio_max - a.ratio_min) * u_ratio
    min_area, max_area = a.area_min * height * width, a.area_max * height * width
    shortest = np.rint(np.sqrt(min_area / ratio))
    tallest = np.rint(np.sqrt(max_area / ratio))
    too_wide = np.rint(tallest * ratio) > width
    tallest = np.where(too_wide, np.floor((width + 0.5 - 1e-6) / ratio), tallest)
    tallest = np.minimum(tallest, height)
    shortest = np.minimum(shortest, tallest)
    h = shortest + np.floor(u_height * (tallest - shortest + 1))
    h = np.where(h * np.rint(h * ratio) < min_area, h + 1, h)  # forgive what rounding did
    h = np.where(h * np.rint(h * ratio) > max_area, h - 1, h)
    w = np.rint(h * ratio)
    area = h * w
    covered = area >= OBJECT_COVERED * height * width
    good = covered & (min_area <= area) & (area <= max_area)
    good &= (1 <= h) & (h <= height) & (1 <= w) & (w <= width)
    return h, w, good


def torch_try(a: Augmentation, height: Any, width: Any, u: Any, xp: Any) -> tuple[Any, Any, Any]:
    """One try of torchvision's `RandomResizedCrop`, of each row of `u`.

    Args:
        a: the recipe.
        height, width: of the images, in pixels.
        u: [n, 2] uniform in [0, 1), for area and ratio.
        xp: `numpy`, or `tensorflow_host.xp` where the size of an image is known late.

    Returns:
        Heights and widths [n] in whole pixels, and whether each is allowed.
    """
    area = height * width * (a.area_min + (a.area_max - a.area_min) * u[:, 0])
    low, high = np.log(a.ratio_min), np.log(a.ratio_max)
    ratio = xp.exp(low + (high - low) * u[:, 1])
    h, w = xp.rint(xp.sqrt(area / ratio)), xp.rint(xp.sqrt(area * ratio))
    return h, w, (h >= 1) & (h <= height) & (w >= 1) & (w <= width)


def central_sides(a: Augmentation, height: Any, width: Any, xp: Any) -> tuple[Any, Any]:
    """Torchvision's fallback: height and width of the largest central box within the ratios."""
    h = xp.clip(xp.rint(width / a.ratio_min), 1.0, height)
    return h, xp.clip(xp.rint(height * a.ratio_max), 1.0, width)
