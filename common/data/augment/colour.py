"""What follows crop, resize and flip, and in which order: one definition for host and device.

`pixel_ops.py` (TensorFlow) and `device_ops.py` (JAX) have the operations.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol

from common.data.augment import draws
from common.data.augment.presets import Augmentation

_GREY = {"tf": (0.2989, 0.5870, 0.1140), "pil": (0.299, 0.587, 0.114)}


class Operations(Protocol):
    """The operations, on images float32 [n, 3, h, w], with separate parameters for each."""

    def clip(self, images: Any) -> Any: ...
    def rotate(self, images: Any, angles: Any) -> Any: ...
    def grey(self, images: Any, chosen: Any, style: str) -> Any: ...
    def adjust_brightness(self, images: Any, factor: Any, style: str) -> Any: ...
    def adjust_contrast(self, images: Any, factor: Any, style: str) -> Any: ...
    def adjust_saturation(self, images: Any, factor: Any, style: str) -> Any: ...
    def adjust_hue(self, images: Any, shift: Any) -> Any: ...
    def jitter(self, images: Any, orders: Any, factors: Any, steps: tuple) -> Any: ...
    def blur(self, images: Any, sigma: Any, augmentation: Augmentation) -> Any: ...
    def solarise(self, images: Any, chosen: Any, threshold: float) -> Any: ...


def colour_ops(images: Any, parameters: Any, augmentation: Augmentation, ops: Operations) -> Any:
    """Everything after crop, resize and flip.

    Args:
        images: float32 [n, 3, size, size], about [0, 1].
        parameters: float32 [n, draws.PARAMETERS].
        augmentation: the recipe; operations of probability 0 leave no trace in the program.
        ops: `pixel_ops` or `device_ops`.

    Returns:
        float32 [n, 3, size, size], about [0, 1].
    """
    a, p = augmentation, parameters
    if a.color_style == "pil":  # PIL clips what bicubic overshoots, TensorFlow carries it along
        images = ops.clip(images)
    if a.rotate > 0:
        images = ops.rotate(images, p[:, draws.ANGLE])
    if a.grey > 0 and a.grey_first:
        images = ops.grey(images, p[:, draws.GREY] > 0, a.color_style)
    if a.jitter > 0:
        images = ops.jitter(images, p[:, draws.ORDER], p[:, draws.FACTORS], jitter_steps(a, ops))
    if a.grey > 0 and not a.grey_first:
        images = ops.grey(images, p[:, draws.GREY] > 0, a.color_style)
    if a.blur > 0:
        images = ops.blur(images, p[:, draws.SIGMA], a)
    if a.solarise > 0:
        images = ops.solarise(images, p[:, draws.SOLARISE] > 0, a.solarise_threshold)
    return images


def jitter_steps(a: Augmentation, ops: Operations) -> tuple[Callable[[Any, Any], Any], ...]:
    """The four operations of the jitter, each of images and factors [n], as `draws.JITTER_OPS`."""
    return (
        lambda x, f: ops.adjust_brightness(x, f, a.brightness_style),
        lambda x, f: ops.adjust_contrast(x, f, a.color_style),
        lambda x, f: ops.adjust_saturation(x, f, a.color_style),
        lambda x, f: ops.adjust_hue(x, f),
    )


def greyscale(images: Any, style: str) -> Any:
    """Luminance [n, 1, h, w] of float32 [n, 3, h, w], with TensorFlow's or PIL's weights."""
    red, green, blue = _GREY[style]
    return images[:, :1] * red + images[:, 1:2] * green + images[:, 2:] * blue


def blur_radius(a: Augmentation) -> int:
    """Of the Gaussian, in pixels; 0 is no blur at all."""
    return (a.size // 10) // 2 if a.kernel == "tf" else math.ceil(4 * a.sigma_max)
