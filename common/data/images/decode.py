"""The bytes of a file to pixels, for every kind of image found in people's folders.

TensorFlow decodes JPEG and PNG, which is nearly all of any dataset, quickly and in parallel. What
it cannot read, or only in part (GIF, WebP, TIFF, ...), goes through Pillow, and only that. The
rules, case by case, are in docs/reliability.md; where libraries differ they follow torchvision's
ImageFolder: the first frame of an animation, alpha dropped, no rotation by EXIF unless it is asked
for.
"""

import io
import re
import warnings
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from common.data.images import decoding, orientation
from common.data.images.decoding import Decoding
from common.data.images.tensorflow_host import tf

decoding.register_heif()

# Twice Pillow's limit, where it too takes a file for a decompression bomb: 537 MB as pixels.
MAX_PIXELS = 178_956_970
_PNG = b"\x89PNG\r\n\x1a\n"
T = TypeVar("T")


def decode(data: tf.Tensor, how: Decoding = decoding.DEFAULT) -> tf.Tensor:
    """Decodes a scalar string, a file of any kind of image, to uint8 `[h, w, 3]`.

    Args:
        data: the file.
        how: the rules of its dataset.

    Raises:
        tf.errors.OpError: (when it runs) what is no whole image, or too large a one.
    """

    def as_shown(image: tf.Tensor) -> tf.Tensor:
        return orientation.turned(image, orientation.of(data)) if how.exif_rotation else image

    def jpeg() -> tf.Tensor:
        return as_shown(tf.io.decode_jpeg(data, channels=3, dct_method=how.dct_method))

    def png() -> tf.Tensor:
        return as_shown(_png(data, how))

    def other() -> tf.Tensor:
        return tf.cond(_is_fine_png(data), png, lambda: _through_pillow(data, how))

    image = tf.cond(is_fine_jpeg(data), jpeg, other)
    return tf.ensure_shape(image, [None, None, 3])


def is_fine_jpeg(data: tf.Tensor) -> tf.Tensor:
    """Whether a file begins as a JPEG of a size that is allowed."""

    def fine() -> tf.Tensor:
        size = tf.image.extract_jpeg_shape(data, tf.int32)[:2]
        return tf.reduce_prod(tf.cast(size, tf.int64)) <= MAX_PIXELS

    return tf.cond(tf.io.is_jpeg(data), fine, lambda: tf.constant(False))


def _is_fine_png(data: tf.Tensor) -> tf.Tensor:
    """Whether a file begins as a PNG of a size that is allowed."""

    def fine() -> tf.Tensor:
        size = tf.io.decode_raw(tf.strings.substr(data, 16, 8), tf.uint8)
        size = tf.reshape(tf.cast(size, tf.int64), [2, 4])
        width, height = tf.unstack(tf.reduce_sum(size * [2**24, 2**16, 2**8, 1], axis=1))
        return tf.logical_and(width <= MAX_PIXELS, width * height <= MAX_PIXELS)

    begins = tf.equal(tf.strings.substr(data, 0, len(_PNG)), _PNG)
    return tf.cond(
        tf.logical_and(tf.strings.length(data) >= 24, begins), fine, lambda: tf.constant(False)
    )


def _png(data: tf.Tensor, how: Decoding) -> tf.Tensor:
    """A PNG; TensorFlow itself takes the upper 8 of 16 bits."""
    if how.bounds in (None, (0, 65535)):
        return tf.io.decode_png(data, channels=3)
    table = decoding.scaled(np.arange(65536), *how.bounds)

    def deep() -> tf.Tensor:
        return tf.gather(table, tf.cast(tf.io.decode_png(data, 3, tf.uint16), tf.int32))

    is_deep = tf.equal(tf.strings.substr(data, 24, 1), b"\x10")  # bits a sample, in IHDR
    return tf.cond(is_deep, deep, lambda: tf.io.decode_png(data, channels=3))


def _through_pillow(data: tf.Tensor, how: Decoding) -> tf.Tensor:
    image = tf.numpy_function(lambda x: pillow(x, how), [data], tf.uint8, stateful=False)
    image.set_shape([None, None, 3])
    return image


def pillow(data: bytes, how: Decoding = decoding.DEFAULT) -> np.ndarray:
    """Decodes a file with Pillow to uint8 `[h, w, 3]`: its first frame.

    Raises:
        ValueError: what is no whole image, or too large a one.
    """
    return _opened(data, lambda image: _to_rgb(image, how))


def fault_of(payload: bytes, is_path: bool = False) -> str:
    """What is wrong with a file, or with the bytes of one; "" if it is a whole image."""
    try:
        data = tf.io.read_file(payload) if is_path else tf.constant(payload)
    except tf.errors.OpError as error:
        return _short(error)
    size = int(tf.strings.length(data))
    if not size:
        return "the file is empty"
    try:
        decode(data)
    except (tf.errors.OpError, ValueError) as error:  # the second out of Pillow
        return _short(error)
    return ""


def _short(error: Exception) -> str:
    """One line of TensorFlow's many."""
    if isinstance(error, tf.errors.NotFoundError):
        return "no such file"
    if isinstance(error, tf.errors.PermissionDeniedError):
        return "permission denied"
    # less the names of its operations
    text = re.sub(r"\{\{.*?\}\}|\[Op:.*", "", getattr(error, "message", str(error))).strip()
    return " ".join(text.split())[:120] or "unreadable"


def deep_values(data: bytes) -> np.ndarray | None:
    """The values of an image of more than 8 bits as they are in its file; None of any other.

    Raises:
        ValueError: as `pillow`.
        tf.errors.OpError: a PNG that is not whole.
    """
    if data.startswith(_PNG):
        if data[24:25] != b"\x10" or not _is_fine_png(tf.constant(data)):
            return None
        # without alpha, whose values say nothing of the others
        return tf.io.decode_png(data, 3, tf.uint16).numpy()
    if data.startswith(b"\xff\xd8"):
        return None
    return _opened(data, lambda image: np.asarray(image) if _is_deep(image) else None)


def _opened(data: bytes, use: Callable[[Image.Image], T]) -> T:
    if not isinstance(data, bytes):  # TensorFlow run eagerly wraps it
        data = data.item()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata, and sizes below the limit
            with Image.open(io.BytesIO(data)) as image:  # which also looks at the size
                return use(image)
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise ValueError("not an image in any known format") from None
    except Exception as error:  # Pillow's readers can raise anything on a broken file
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _is_deep(image: Image.Image) -> bool:
    return image.mode.startswith(("I", "F"))


def _to_rgb(image: Image.Image, how: Decoding) -> np.ndarray:
    if how.exif_rotation:
        image = ImageOps.exif_transpose(image)
    if not _is_deep(image):
        return np.asarray(image.convert("RGB"))
    values = np.asarray(image)  # `convert` would cut 16 bits off at 255
    grey = decoding.scaled(values, *how.bounds) if how.bounds else upper_8(values)
    return np.repeat(grey[..., None], 3, axis=-1)


def upper_8(values: np.ndarray) -> np.ndarray:
    """The rule of runs older than `data.value_range`: each image is scaled separately.

    Floats are cut off at 0 and 255, and so are integers; those are divided by 256 before, but only
    if one of the image exceeds 255.
    """
    if np.issubdtype(values.dtype, np.integer):
        values = values / (256.0 if values.max(initial=0) > 255 else 1.0)
    return np.clip(np.nan_to_num(values), 0, 255).astype(np.uint8)
