"""The random numbers of the augmentation: what is done to each view of each example.

Every number is a hash of (seed, epoch, example id, view, slot), see `common/data/order.py`.
"""

import itertools

import numpy as np

from common.data.augment import boxes
from common.data.augment.presets import Augmentation
from common.data.order import GOLDEN, hash64, mix

_VIEW = 2  # a stream of `hash64`

# Where each draw of a view lies in its row of uniform numbers. New draws go to the end: a slot
# that moves would change every run's augmentation.
_FLIP, _ROTATE, _ANGLE, _JITTER, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(8)
_JITTER_ORDER, _GREY, _BLUR, _SIGMA, _SOLARISE, _TOP, _LEFT = range(8, 15)
_CROP = 16  # pairs of (area or height, ratio), one pair for each try
CROP_DRAWS = 2 + 2 * boxes.TORCH_TRIES  # top, left, then torchvision's ten pairs

# Columns of the parameters of a view, see `view_parameters`.
BOX, FLIP, ANGLE, ORDER, FACTORS, GREY, SIGMA, SOLARISE = (
    slice(0, 4), 4, 5, slice(6, 10), slice(10, 14), 14, 15, 16,
)  # fmt: skip
PARAMETERS = 17
JITTER_OPS = ("brightness", "contrast", "saturation", "hue", "none")
_ORDERS = np.array(list(itertools.permutations(range(4))), np.float32)


def uniforms(
    seed: int, epoch: int, ids: np.ndarray, view: int, first: int, count: int
) -> np.ndarray:
    """Uniform numbers of one view of each example.

    Args:
        seed: of the run.
        epoch: >= 0.
        ids: [n] example ids.
        view: 0 or 1.
        first: first slot.
        count: number of slots.

    Returns:
        float32 [n, count] in [0, 1).
    """
    key = hash64(_VIEW, seed, epoch, view, ids)[:, None]
    slots = np.arange(first + 1, first + count + 1, dtype=np.uint64)[None]
    bits = mix(key + slots * GOLDEN) >> np.uint64(40)
    return bits.astype(np.float32) * np.float32(2**-24)


def view_parameters(
    augmentation: Augmentation, seed: int, epoch: int, ids: np.ndarray, view: int
) -> np.ndarray:
    """Draws everything but the crop for one view of each example.

    Args:
        augmentation: the recipe.
        seed, epoch, ids, view: as in `uniforms`.

    Returns:
        float32 [n, PARAMETERS]: crop box (zeros here), flip, angle in radians, order of the four
        jitter operations (indices into JITTER_OPS, all "none" without jitter), their factors (the
        hue's in turns), grey, blur sigma (0 = no blur), solarise.
    """
    a, u = augmentation, uniforms(seed, epoch, ids, view, 0, _CROP)

    def spread(slot: int, low: float, high: float) -> np.ndarray:
        return low + (high - low) * u[:, slot]

    out = np.zeros((len(ids), PARAMETERS), np.float32)
    out[:, FLIP] = u[:, _FLIP] < a.flip
    degrees = spread(_ANGLE, -a.rotate_degrees, a.rotate_degrees)
    out[:, ANGLE] = np.where(u[:, _ROTATE] < a.rotate, np.deg2rad(degrees), 0)
    orders = _ORDERS[(u[:, _JITTER_ORDER] * len(_ORDERS)).astype(np.int64)]
    out[:, ORDER] = np.where(u[:, _JITTER, None] < a.jitter, orders, JITTER_OPS.index("none"))
    low = -a.brightness if a.brightness_style == "add" else max(0, 1 - a.brightness)
    high = a.brightness if a.brightness_style == "add" else 1 + a.brightness
    factors = (
        spread(_BRIGHTNESS, low, high),
        spread(_CONTRAST, max(0, 1 - a.contrast), 1 + a.contrast),
        spread(_SATURATION, max(0, 1 - a.saturation), 1 + a.saturation),
        spread(_HUE, -a.hue, a.hue),
    )
    out[:, FACTORS] = np.stack(factors, axis=1)
    out[:, GREY] = u[:, _GREY] < a.grey
    out[:, SIGMA] = np.where(u[:, _BLUR] < a.blur, spread(_SIGMA, a.sigma_min, a.sigma_max), 0)
    out[:, SOLARISE] = u[:, _SOLARISE] < a.solarise
    return out


def draw_views(
    augmentations: tuple[Augmentation, ...],
    seed: int,
    epoch: int,
    ids: np.ndarray,
    shape: tuple[int, int] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """All draws of every view.

    Args:
        augmentations: one a view.
        seed, epoch, ids: as in `uniforms`.
        shape: (h, w) when all images share it.

    Returns:
        parameters float32 [b, v, PARAMETERS], with boxes if the shape is known; crop draws float32
        [b, v, CROP_DRAWS], or [b, 0] if it is.
    """
    parameters = []
    for view, augmentation in enumerate(augmentations):
        drawn = view_parameters(augmentation, seed, epoch, ids, view)
        if shape is not None:
            drawn[:, BOX] = crop_boxes(augmentation, *shape, seed, epoch, ids, view)
        parameters.append(drawn)
    crops = np.zeros((len(ids), 0), np.float32)
    if shape is None:
        drawn_crops = [crop_draws(seed, epoch, ids, view) for view in range(len(augmentations))]
        crops = np.stack(drawn_crops, axis=1)
    return np.stack(parameters, axis=1), crops


def crop_draws(seed: int, epoch: int, ids: np.ndarray, view: int) -> np.ndarray:
    """Uniform numbers [n, CROP_DRAWS] for crops whose image size is not known yet."""
    place = uniforms(seed, epoch, ids, view, _TOP, 2)
    return np.concatenate([place, uniforms(seed, epoch, ids, view, _CROP, CROP_DRAWS - 2)], axis=1)


def crop_boxes(
    augmentation: Augmentation,
    height: int,
    width: int,
    seed: int,
    epoch: int,
    ids: np.ndarray,
    view: int,
) -> np.ndarray:
    """Draws crop boxes for images of one size.

    Args:
        augmentation: the recipe.
        height, width: of the images, in pixels.
        seed, epoch, ids, view: as in `uniforms`.

    Returns:
        int64 [n, 4]: top, left, height, width, in pixels and inside the image.
    """
    place = uniforms(seed, epoch, ids, view, _TOP, 2)
    tf_style = augmentation.crop == "tf"
    sides = np.zeros((len(ids), 2), np.int64)
    waiting = np.arange(len(ids))
    for attempt in range(boxes.TF_TRIES if tf_style else boxes.TORCH_TRIES):
        u = uniforms(seed, epoch, ids[waiting], view, _CROP + 2 * attempt, 2)
        if tf_style:
            heights, widths, good = boxes.tf_try(augmentation, height, width, u)
        else:
            heights, widths, good = boxes.torch_try(augmentation, height, width, u, np)
        sides[waiting[good]] = np.stack([heights[good], widths[good]], axis=1)
        waiting = waiting[~good]
        if not waiting.size:
            break
    free = np.array([height, width]) - sides
    if tf_style:  # its offsets never reach the last place, as in TensorFlow's kernel
        corner = (place * np.maximum(free, 1)).astype(np.int64)
        fallback = np.array([0, 0, height, width])
    else:
        corner = (place * (free + 1)).astype(np.int64)
        h, w = map(int, boxes.central_sides(augmentation, height, width, np))
        fallback = np.array([(height - h) // 2, (width - w) // 2, h, w])
    drawn = np.concatenate([corner, sides], axis=1)
    drawn[waiting] = fallback
    return drawn
