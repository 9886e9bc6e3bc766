"""EXIF's orientation: how an image is stored, and how it is to be shown.

An orientation o in 1..8 is a transposition (of 5 to 8), then a reversal of columns (2, 3, 6, 7)
and of rows (3, 4, 7, 8): the table of TIFF 6.0's tag 274, which EXIF took over.
"""

import io
import warnings

from PIL import ExifTags, Image

from common.data.images.tensorflow_host import tf

_JPEG, _PNG = b"\xff\xd8", b"\x89PNG"
# Where Pillow looks for an orientation. A file without any of them need not be parsed.
_MARKS = {
    _JPEG: (b"Exif\0\0", b"http://ns.adobe.com/xap"),
    _PNG: (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp"),
}


def stored(data: bytes) -> int:
    """The orientation 1 to 8 that Pillow finds in a file; 1 (as it is) where there is none."""
    if not isinstance(data, bytes):  # TensorFlow run eagerly wraps it
        data = data.item()
    for start, marks in _MARKS.items():
        if data.startswith(start) and not any(mark in data for mark in marks):
            return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                # Pillow turns TIFFs whenever it loads them
                found = image.getexif().get(ExifTags.Base.Orientation, 1)
                return found if image.format != "TIFF" and found in range(1, 9) else 1
    except MemoryError:
        raise
    except Exception:  # not an image; the decoder reports what is wrong
        return 1


def of(data: tf.Tensor) -> tf.Tensor:
    """int32 scalar, the orientation of a file."""
    found = tf.numpy_function(lambda x: tf.int32.as_numpy_dtype(stored(x)), [data], tf.int32,
                              stateful=False)  # fmt: skip
    return tf.ensure_shape(found, [])


def turned(image: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    """An image [h, w, c] as stored to how it is shown."""

    def turn() -> tf.Tensor:
        sides = tf.cond(_swaps(orientation), lambda: tf.transpose(image, [1, 0, 2]), lambda: image)
        sides = tf.cond(_in(orientation, 2, 3, 6, 7), lambda: sides[:, ::-1], lambda: sides)
        return tf.cond(_in(orientation, 3, 4, 7, 8), lambda: sides[::-1], lambda: sides)

    return tf.cond(tf.equal(orientation, 1), lambda: image, turn)


def shape_shown(shape: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    """Height and width [2] as stored to those shown; its own inverse."""
    return tf.where(_swaps(orientation), shape[::-1], shape)


def box_shown(box: tf.Tensor, shape: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    """A box of the stored image to where it is in the shown one.

    Args:
        box: int32 [4], top, left, height, width.
        shape: int32 [2], height and width as stored.
        orientation: int32 scalar, 1 to 8.
    """
    start, size = shape_shown(box[:2], orientation), shape_shown(box[2:], orientation)
    return _reversed(start, size, shape_shown(shape, orientation), orientation)


def box_stored(box: tf.Tensor, shape: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    """The inverse of `box_shown`; `shape` is as stored here too."""
    box = _reversed(box[:2], box[2:], shape_shown(shape, orientation), orientation)
    return tf.concat([shape_shown(box[:2], orientation), shape_shown(box[2:], orientation)], axis=0)


def _reversed(start, size, shape, orientation) -> tf.Tensor:
    sides = tf.stack([_in(orientation, 3, 4, 7, 8), _in(orientation, 2, 3, 6, 7)])
    return tf.concat([tf.where(sides, shape - start - size, start), size], axis=0)


def _swaps(orientation: tf.Tensor) -> tf.Tensor:
    return orientation >= 5


def _in(orientation: tf.Tensor, *values: int) -> tf.Tensor:
    return tf.reduce_any(tf.equal(orientation, values))
