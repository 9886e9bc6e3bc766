"""Augmentation recipes by name, and how a config overrides them."""

import dataclasses
import difflib

from ml_collections import ConfigDict

from common.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Everything that decides how one view of an image is made, in the order it is applied.

    Crop and resize, flip, rotate, colour jitter and grey (grey before jitter with `grey_first`),
    blur, solarise. Every `*_probability`-like field (`flip`, `jitter`, `grey`, `blur`, `solarise`,
    `rotate`) is the chance that one image gets the operation, drawn for each image on its own.

    Attributes:
        size: side of the square output in pixels, >= 1.
        crop: "tf" draws the box as `sample_distorted_bounding_box` does (height and ratio uniform,
          never less than 10 % of the image, 100 tries); "torch" as torchvision's
          `RandomResizedCrop` (area uniform, ratio log-uniform, 10 tries, then the central crop).
        area_min, area_max: share of the image's area, 0 < min <= max <= 1.
        ratio_min, ratio_max: width / height, 0 < min <= max.
        interpolation: "bilinear" or "bicubic" (Keys, a = -0.5).
        antialias: widen the kernel when the crop is larger than `size`, as PIL does.
        flip: probability of a left-right flip.
        jitter: probability of the colour jitter; its four operations come in random order.
        brightness, contrast, saturation: factors are uniform in [max(0, 1 - x), 1 + x].
        hue: shift is uniform in [-hue, hue] of the colour circle, hue <= 0.5.
        color_style: "tf" (contrast around each channel's mean, saturation scaled in HSV) or "pil"
          (contrast around the mean grey, saturation mixed with the grey image).
        brightness_style: "multiply", or "add" (shift uniform in [-x, x], SimCLR's first version).
        grey: probability of a greyscale image.
        grey_first: grey comes before the jitter (MoCo v1).
        blur: probability of a Gaussian blur, with one sigma for each image.
        sigma_min, sigma_max: standard deviation in pixels, 0 < min <= max.
        kernel: "tf" (size // 10 taps made odd, zeros outside the image) or "pil" (cut at 4 sigma,
          edge pixels repeated).
        solarise: probability of inverting the values at or above `solarise_threshold`.
        solarise_threshold: in [0, 1].
        rotate: probability of a rotation, uniform in [-rotate_degrees, rotate_degrees].
        rotate_degrees: in [0, 180]; uncovered pixels are black.
        mean, std: subtracted and divided by on the device, for pixels in [0, 1].
    """

    size: int
    crop: str = "tf"
    area_min: float = 0.08
    area_max: float = 1.0
    ratio_min: float = 3 / 4
    ratio_max: float = 4 / 3
    interpolation: str = "bicubic"
    antialias: bool = False
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.8
    contrast: float = 0.8
    saturation: float = 0.8
    hue: float = 0.2
    color_style: str = "tf"
    brightness_style: str = "multiply"
    grey: float = 0.2
    grey_first: bool = False
    blur: float = 0.5
    sigma_min: float = 0.1
    sigma_max: float = 2.0
    kernel: str = "tf"
    solarise: float = 0.0
    solarise_threshold: float = 0.5
    rotate: float = 0.0
    rotate_degrees: float = 15.0
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def __post_init__(self):
        _check(self)


def crop_only(augmentation: Augmentation) -> Augmentation:
    """The part of a recipe that ends with the flip."""
    return dataclasses.replace(
        augmentation, rotate=0.0, jitter=0.0, grey=0.0, blur=0.0, solarise=0.0
    )


_PROBABILITIES = ("flip", "jitter", "grey", "blur", "solarise", "rotate")
_CHOICES = {
    "crop": ("tf", "torch"),
    "interpolation": ("bilinear", "bicubic"),
    "color_style": ("tf", "pil"),
    "brightness_style": ("multiply", "add"),
    "kernel": ("tf", "pil"),
}


def _check(a: Augmentation) -> None:
    def need(good: bool, field: str, expected: str) -> None:
        if not good:
            raise UserError(
                f"augment.{field}={getattr(a, field)!r} is not allowed; expected {expected}."
            )

    for field, choices in _CHOICES.items():
        need(getattr(a, field) in choices, field, f"one of {', '.join(choices)}")
    for field in _PROBABILITIES:
        need(0 <= getattr(a, field) <= 1, field, "a probability between 0 and 1")
    for field in ("brightness", "contrast", "saturation"):
        need(getattr(a, field) >= 0, field, "a number >= 0")
    need(a.size >= 1, "size", "at least 1 pixel")
    need(0 < a.area_min <= 1, "area_min", "a share of the image, 0 < area_min <= 1")
    need(a.area_min <= a.area_max <= 1, "area_max", f"{a.area_min} (area_min) to 1")
    need(a.ratio_min > 0, "ratio_min", "a number > 0")
    need(a.ratio_max >= a.ratio_min, "ratio_max", f"at least {a.ratio_min} (ratio_min)")
    need(0 <= a.hue <= 0.5, "hue", "0 to 0.5 (half the colour circle)")
    need(a.sigma_min > 0, "sigma_min", "a number > 0")
    need(a.sigma_max >= a.sigma_min, "sigma_max", f"at least {a.sigma_min} (sigma_min)")
    need(0 <= a.solarise_threshold <= 1, "solarise_threshold", "0 to 1")
    need(0 <= a.rotate_degrees <= 180, "rotate_degrees", "0 to 180")
    need(len(a.mean) == 3, "mean", "three numbers (red, green, blue)")
    need(len(a.std) == 3 and min(a.std) > 0, "std", "three numbers > 0 (red, green, blue)")


_MOCO = dict(
    crop="torch", area_min=0.2, interpolation="bilinear", antialias=True,
    brightness=0.4, contrast=0.4, saturation=0.4, color_style="pil", kernel="pil",
    mean=IMAGENET_MEAN, std=IMAGENET_STD,
)  # fmt: skip

# The fields in which a recipe differs from `Augmentation`'s defaults, which are SimCLR's.
PRESETS: dict[str, dict] = {
    # Chen et al. 2020 (arXiv:2002.05709), appendix A; github.com/google-research/simclr, tf2.
    "simclr": {},
    # The same authors on CIFAR-10 (appendix B.9): colour strength 0.5 and no blur.
    "cifar": dict(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, blur=0.0),
    # He et al. 2020 (arXiv:1911.05722): strong hue, always jittered, no blur.
    "moco_v1": _MOCO | dict(jitter=1.0, hue=0.4, grey_first=True, blur=0.0),
    # Chen et al. 2020 (arXiv:2003.04297): `--aug-plus`.
    "moco_v2": _MOCO | dict(hue=0.1),
    # Chen et al. 2021 (arXiv:2104.02057), view 1; view 2 has blur 0.1 and solarise 0.2. Crops as
    # for ViTs; for ResNets area_min is 0.2.
    "moco_v3": _MOCO | dict(area_min=0.08, saturation=0.2, hue=0.1, blur=1.0),
}

_SCALED = ("brightness", "contrast", "saturation", "hue")


def resolve(config: ConfigDict, image_size: int, base: Augmentation | None = None) -> Augmentation:
    """Turns a view's config into the values that are used.

    Args:
        config: the `augment` section; fields that are None or absent keep the preset's value.
        image_size: side of the views unless `config.size` says otherwise.
        base: view 1, when this is view 2; used where `config` names no preset.

    Returns:
        The `Augmentation`, checked.

    Raises:
        UserError: unknown preset or field, or a value out of its range.
    """
    given = {name: value for name, value in config.items() if value is not None}
    preset, strength = given.pop("preset", None), given.pop("strength", None)
    if preset is None and base is not None:
        values = dataclasses.asdict(base)
    elif preset in PRESETS:
        values = {"size": image_size} | PRESETS[preset]
    else:
        close = difflib.get_close_matches(str(preset), PRESETS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UserError(
            f"unknown augmentation preset {preset!r}; expected one of "
            f"{', '.join(PRESETS)}.{hint} Set config.augment.preset."
        )
    fields = {field.name: field.default for field in dataclasses.fields(Augmentation)}
    values = {name: default for name, default in fields.items() if name != "size"} | values
    if strength is not None:
        if strength < 0:
            raise UserError(f"augment.strength is {strength}; expected a number >= 0.")
        values |= {name: values[name] * strength for name in _SCALED}
    for name, value in given.items():
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise UserError(f"unknown field augment.{name}.{hint} Remove it or correct its name.")
        values[name] = tuple(value) if name in ("mean", "std") else value
    return Augmentation(**values)


def resolve_views(
    augment: ConfigDict, augment_view2: ConfigDict | None, image_size: int
) -> tuple[Augmentation, Augmentation]:
    """The augmentations of both views.

    Args:
        augment, augment_view2: view 1's config, and what view 2 changes of it, if anything.
        image_size: as in `resolve`.

    Returns:
        Augmentations of view 1 and view 2, equal unless `augment_view2` sets something. Mean and
        std are view 1's: one network sees both.

    Raises:
        UserError: as `resolve`, views of two sizes, or a mean or std of view 2.
    """
    first, other = resolve(augment, image_size), augment_view2 or {}
    for name in ("mean", "std"):
        if other.get(name) is not None:
            raise UserError(
                f"augment_view2.{name} is {tuple(other[name])}; expected None: one network sees "
                f"both views. Set augment.{name}."
            )
    second = resolve(other, image_size, base=first)
    second = dataclasses.replace(second, mean=first.mean, std=first.std)
    if first.size != second.size:
        raise UserError(
            f"the two views have sizes {first.size} and {second.size}; expected one size. "
            "Set augment.size and augment_view2.size alike."
        )
    return first, second
