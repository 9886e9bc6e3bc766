"""Images that cannot be decoded: named to the user, or replaced and counted."""

import concurrent.futures
from collections.abc import Callable, Iterable

import numpy as np
from absl import logging

from common.data.images.decode import fault_of
from common.data.images.tensorflow_host import tf
from common.data.sources.base import Source
from common.errors import UserError

# Errors may overtake the batches before them in tf.data, by about as many as are in flight.
LOOK_AHEAD = 64  # batches
_READERS = 8  # files looked at at a time
# The `Source.on_corrupt` of a mode that replaces an image temporarily and drops it afterwards.
LEAVE_OUT = "leave out"


def file_bytes(source: Source, payload: tf.Tensor) -> tf.Tensor:
    """The encoded image that a payload of kind "encoded" or "path" stands for."""
    return tf.io.read_file(payload) if source.kind == "path" else payload


def replace_or_name(source: Source, batches: Iterable[np.ndarray], error: Exception) -> None:
    """Finds the examples that cannot be decoded, and replaces or reports them.

    Which examples are corrupt and what replaces them follows from the files alone, so a
    resumed run makes the same choice.

    Args:
        source: `source.replaced` gains the corrupt ones, `source.seen_good` the others.
        batches: ids of the batches to search, in order, as far as `_search` goes.
        error: what TensorFlow said; raised again if every image can be decoded.

    Raises:
        UserError: an image is corrupt and `source.on_corrupt` is "error", or no image is good.
    """

    def fault(index: int) -> str:
        if index in source.seen_good:
            return ""
        payload, _ = source.read(np.array([index]))
        found = fault_of(payload[0], is_path=source.kind == "path")
        if not found:
            source.seen_good.add(index)
        return found

    batches = list(batches)
    bad = _search(source, batches, fault)
    if not bad and source.seen_good:  # one of them may have changed since
        source.seen_good.clear()
        bad = _search(source, batches, fault)
    if not bad:
        raise error
    if source.on_corrupt == "error":
        raise error_for(source, *next(iter(bad.items()))) from None
    n = source.num_examples
    for index, reason in bad.items():
        others = ((index + k) % n for k in range(1, n))
        stand_in = next((i for i in others if i not in source.replaced and not fault(i)), None)
        if stand_in is None:
            raise error_for(source, index, reason) from None
        # images that it replaced, when it was still good, need another replacement too
        for i in [k for k, v in source.replaced.items() if v == index]:
            source.replaced[i] = stand_in
        source.replaced[index] = stand_in
        warn(source, index, source.describe(stand_in), reason)


def _search(
    source: Source, batches: list[np.ndarray], fault: Callable[[int], str]
) -> dict[int, str]:
    """The examples at fault of the first batch that has any and of some more, with the reasons.

    One bad image in a million costs the time of one batch. But each search restarts the pipeline,
    so the more images are known to be bad, the further a search goes.
    """
    bad: dict[int, str] = {}
    more = len(source.replaced)
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        for ids in batches:
            places = np.unique(source.stand_ins(ids)).tolist()
            bad |= {i: f for i, f in zip(places, pool.map(fault, places), strict=True) if f}
            if bad and not more:
                break
            more -= bool(bad)
    return bad


def error_for(source: Source, index: int, reason: str) -> UserError:
    """The error that names a corrupt example."""
    return UserError(
        f"cannot decode {source.describe(index)} ({reason}); expected a whole image. Repair or "
        "remove it, or set config.data.on_corrupt='replace' (--eval.on_corrupt of an evaluation)."
    )


def warn(source: Source, index: int, stand_in: str, reason: str) -> None:
    """Logs a replacement, and how many there have been; if there are many, only now and then."""
    count = source.corrupt_count
    what = "left out" if source.on_corrupt == LEAVE_OUT else f"replaced by {stand_in}"
    if count <= 20 or count % 100 == 0:
        logging.warning(
            "corrupt image %s (%s) %s (%d of %d images so far)", source.describe(index), reason,
            what, count, source.num_examples,
        )  # fmt: skip
