"""Images that cannot be decoded: named to the user, or replaced and counted."""

from collections.abc import Iterable

import numpy as np
from absl import logging

from common.data import augment_host
from common.data.sources import Source
from common.data.tensorflow_host import tf
from common.errors import UserError

# Errors may overtake the batches before them in tf.data, by about as many as are in flight.
LOOK_AHEAD = 64  # batches


def file_bytes(source: Source, payload: tf.Tensor) -> tf.Tensor:
    """The encoded image that a payload of kind "encoded" or "path" stands for."""
    return tf.io.read_file(payload) if source.kind == "path" else payload


def replace_or_name(source: Source, batches: Iterable[np.ndarray], error: Exception) -> None:
    """Finds the examples that cannot be decoded, and replaces or reports them.

    Which examples are corrupt and what stands in for them follows from the files alone, so a
    resumed run makes the same choice.

    Args:
      source: `source.replaced` gains the corrupt ones of `ids`.
      batches: ids of the batches to search, in order; the first with a corrupt image counts.
      error: what TensorFlow said; raised again if every image can be decoded.

    Raises:
      UserError: an image is corrupt and `source.on_corrupt` is "error", or no image is good.
    """

    def good(index: int) -> bool:
        payload, _ = source.read(np.array([index]))
        return decodes(payload[0], is_path=source.kind == "path")

    for ids in batches:
        bad = [int(i) for i in np.unique(source.stand_ins(ids)) if not good(int(i))]
        if bad:
            break
    else:
        raise error
    if source.on_corrupt == "error":
        raise error_for(source, bad[0]) from None
    n = source.num_examples
    for index in bad:
        others = ((index + k) % n for k in range(1, n))
        stand_in = next((i for i in others if i not in source.replaced and good(i)), None)
        if stand_in is None:
            raise error_for(source, index) from None
        source.replaced[index] = stand_in
        warn(source, index, source.describe(stand_in))


def error_for(source: Source, index: int) -> UserError:
    """The error that names a corrupt example."""
    return UserError(
        f"cannot decode {source.describe(index)}; expected a whole JPEG or PNG image. Repair or "
        "remove it, or set config.data.on_corrupt='replace'."
    )


def warn(source: Source, index: int, stand_in: str) -> None:
    """Logs a replacement, and how many there have been."""
    logging.warning(
        "corrupt image %s replaced by %s (%d of %d images so far)",
        source.describe(index), stand_in, source.corrupt_count, source.num_examples,
    )  # fmt: skip


def decodes(payload: bytes, is_path: bool = False) -> bool:
    """Whether a file, or the bytes of one, is a whole image."""
    try:
        augment_host.decode(tf.io.read_file(payload) if is_path else tf.constant(payload))
    except tf.errors.OpError:
        return False
    return True
