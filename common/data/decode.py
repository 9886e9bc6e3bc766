"""The bytes of a file to pixels, for every kind of image that people have in their folders.

TensorFlow decodes JPEG and PNG, which is nearly all of any data set, quickly and in parallel. What
it does not know, or only in part (GIF, WebP, TIFF, ...), goes through Pillow, and only that. The
rules, case by case, are in docs/reliability.md; where libraries differ they follow torchvision's
ImageFolder: the first frame of an animation, no rotation by EXIF, alpha dropped.
"""

import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from common.data.tensorflow_host import tf

# Twice Pillow's limit, where it too takes a file for a decompression bomb: 537 MB as pixels.
MAX_PIXELS = 178_956_970
_PNG = b"\x89PNG\r\n\x1a\n"


def decode(data: tf.Tensor) -> tf.Tensor:
    """Decodes a scalar string, a file of any kind of image, to uint8 `[h, w, 3]`.

    Raises:
        tf.errors.OpError: (when it runs) what is no whole image, or too large a one.
    """
    image = tf.cond(is_fine_jpeg(data), lambda: tf.io.decode_jpeg(data, channels=3), lambda:
                    tf.cond(_is_fine_png(data), lambda: tf.io.decode_png(data, channels=3),
                            lambda: _through_pillow(data)))  # fmt: skip
    return tf.ensure_shape(image, [None, None, 3])


def is_fine_jpeg(data: tf.Tensor) -> tf.Tensor:
    """Whether a file begins as a JPEG of a size that can be borne."""

    def fine() -> tf.Tensor:
        size = tf.image.extract_jpeg_shape(data, tf.int32)[:2]
        return tf.reduce_prod(tf.cast(size, tf.int64)) <= MAX_PIXELS

    return tf.cond(tf.io.is_jpeg(data), fine, lambda: tf.constant(False))


def _is_fine_png(data: tf.Tensor) -> tf.Tensor:
    """Whether a file begins as a PNG of a size that can be borne."""

    def fine() -> tf.Tensor:
        size = tf.io.decode_raw(tf.strings.substr(data, 16, 8), tf.uint8)
        size = tf.reshape(tf.cast(size, tf.int64), [2, 4])
        width, height = tf.unstack(tf.reduce_sum(size * [2**24, 2**16, 2**8, 1], axis=1))
        return tf.logical_and(width <= MAX_PIXELS, width * height <= MAX_PIXELS)

    begins = tf.equal(tf.strings.substr(data, 0, len(_PNG)), _PNG)
    return tf.cond(
        tf.logical_and(tf.strings.length(data) >= 24, begins), fine, lambda: tf.constant(False)
    )


def _through_pillow(data: tf.Tensor) -> tf.Tensor:
    image = tf.numpy_function(pillow, [data], tf.uint8, stateful=False)
    image.set_shape([None, None, 3])
    return image


def pillow(data: bytes) -> np.ndarray:
    """Decodes a file with Pillow to uint8 `[h, w, 3]`: its first frame.

    Raises:
        ValueError: what is no whole image, or too large a one.
    """
    if not isinstance(data, bytes):  # TensorFlow run eagerly wraps it
        data = data.item()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, and of sizes below the limit
            with Image.open(io.BytesIO(data)) as image:  # which also looks at the size
                return _to_rgb(image)
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise ValueError("no image of a kind that is known") from None
    except Exception as error:  # Pillow's readers raise whatever a broken file makes them raise
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith(("I;16", "I", "F")):
        # `convert` would cut 16 bits off at 255; TensorFlow keeps the upper 8 of a PNG's, so here
        wide = np.asarray(image)
        if image.mode != "F":
            wide = wide / (256.0 if wide.max(initial=0) > 255 else 1.0)
        grey = np.clip(np.nan_to_num(wide), 0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)
    return np.asarray(image.convert("RGB"))
