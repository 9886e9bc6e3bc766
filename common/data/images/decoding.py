"""Which image files can be read here, and how they become 8-bit pixels. No TensorFlow."""

import dataclasses
import functools
import re

import numpy as np
from ml_collections import ConfigDict
from PIL import features

from common.errors import UserError

AUTO = "auto"  # decided from a sample when a run begins, see survey.py
UPPER_8 = "upper8"  # in runs older than the field: a rule for each image separately
SIXTEEN_BITS = "0:65535"
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER}):({_NUMBER})")
_DCT = {"exact": "INTEGER_ACCURATE", "fast": "INTEGER_FAST"}
# Pillow's own readers, or TensorFlow's
_ALWAYS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm",
    ".pbm", ".pnm",
)  # fmt: skip
# What a build of Pillow may lack. (`features.check` warns about names it does not have.)
_OPTIONAL = {"webp": (".webp",), "avif": (".avif",), "jpg_2000": (".jp2", ".j2k")}
HEIF = (".heic", ".heif")


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What of `config.data` decides how a file is decoded.

    Attributes:
        value_range: of images of more than 8 bits: "LOW:HIGH", the values that become 0 and 255;
          "auto", not decided yet; "upper8", see `decode.upper_8`.
        jpeg: "exact" (libjpeg's accurate integer DCT, Pillow's default, to the byte) or "fast"
          (TensorFlow's default).
        exif_rotation: turn images as their EXIF says, as `PIL.ImageOps.exif_transpose` does.
    """

    value_range: str = AUTO
    jpeg: str = "exact"
    exif_rotation: bool = False

    def __post_init__(self):
        if self.value_range not in (AUTO, UPPER_8):
            _parsed(self.value_range)
        if self.jpeg not in _DCT:
            raise UserError(
                f"data.jpeg is {self.jpeg!r}; expected 'exact' (as Pillow decodes) or 'fast' (off "
                "by some levels, TensorFlow's default)."
            )

    @property
    def bounds(self) -> tuple[float, float] | None:
        """(low, high) of `value_range`; None for "upper8". One that is not decided is 16 bits."""
        if self.value_range == UPPER_8:
            return None
        return _parsed(SIXTEEN_BITS if self.value_range == AUTO else self.value_range)

    @property
    def dct_method(self) -> str:
        """TensorFlow's name for `jpeg`."""
        return _DCT[self.jpeg]


DEFAULT = Decoding()


def of(config: ConfigDict) -> Decoding:
    """The decoding of a config's `data` section.

    Raises:
        UserError: a field has a value out of its range.
    """
    return Decoding(config.value_range, config.jpeg, config.exif_rotation)


def _parsed(text: str) -> tuple[float, float]:
    found = _RANGE.fullmatch(text)
    low, high = map(float, found.groups()) if found else (0.0, 0.0)
    if not low < high < np.inf:
        raise UserError(
            f"data.value_range is {text!r}; expected 'auto', or LOW:HIGH with LOW below HIGH, the "
            "values that become black and white, e.g. 0:4095."
        )
    return low, high


def scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Pixels of more than 8 bits to uint8: 256 steps of one width from `low` to `high`.

    What is outside is clipped, NaN is black. Of integers with the range 0 to 2^k - 1 these are the
    upper 8 of k bits, to the last one; of floats that are n / 255 or n they are n.

    Args:
        values: of any shape, integers or floats.
        low, high: low < high.

    Returns:
        uint8 of that shape.
    """
    # float64 holds 32-bit integers; the division comes last, or 10 / 255 would fall below its step
    values = np.nan_to_num(np.asarray(values, np.float64), nan=low, posinf=high, neginf=low)
    steps = (np.clip(values, low, high) - low) * 256 / (high - low)
    return np.minimum(steps, 255).astype(np.uint8)


@functools.cache
def readable_suffixes() -> tuple[str, ...]:
    """File extensions of images that can be read here, in lower case, each with its dot."""
    known = {*features.modules, *features.codecs}
    found = [
        suffixes for name, suffixes in _OPTIONAL.items() if name in known and features.check(name)
    ]
    if register_heif():
        found.append(HEIF)
    return (*_ALWAYS, *(suffix for suffixes in found for suffix in suffixes))


@functools.cache
def register_heif() -> bool:
    """Makes Pillow read HEIC where `pillow-heif` is installed; whether it is."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True
