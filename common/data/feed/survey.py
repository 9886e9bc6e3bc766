"""A look at some images of a set before training: their depth, their EXIF, their contrast.

What it decides follows from the files alone, so that every process and every restart decides alike.
"""

import concurrent.futures
import dataclasses
import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from common.data.images.decoding import AUTO, SIXTEEN_BITS, UPPER_8, Decoding
from common.data.sources.base import Source

SAMPLE = 256  # images whose first bytes are read, spread evenly
_HEAD = 131072  # bytes: EXIF is a segment of 64 KiB at most, and the size comes after it
_DEEP, _DEEP_BYTES = (8, 64), 200_000_000  # files whose values are looked at: fewer of large ones
_DECODED = 32  # images whose contrast is looked at
_LARGE_JPEG = 500_000  # bytes; of larger ones an eighth of the rows and columns will do
_READERS = 8
_BITS = (8, 10, 12, 14, 16, 24, 31, 32)
FLAT = 16  # levels between an image's darkest and brightest; with fewer it is nearly constant
_MANY = 0.1  # share of the sample
_SHALLOW = (
    b"\xff\xd8",
    b"GIF8",
    b"RIFF",
    b"BM",
)  # formats of 8 bits at most, by their start
_PNG = b"\x89PNG"


def decide_value_range(
    config: ConfigDict, source: Source, known: str = UPPER_8
) -> tuple[str, list[str]]:
    """What `data.value_range` stands for, and what the user should know about the images.

    Args:
        config: the `data` section; it is not changed.
        source: the images that decide; its `decoding` is decided too.
        known: the range of a run that sees other data, see `look`.

    Returns:
        The value range ("auto" still for images held as pixels: there is nothing to decide), and
        lines for the user.
    """
    lines = look(source, known)
    decided = source.decoding.value_range
    return decided if config.value_range == AUTO else config.value_range, lines


def ensure_decided(source: Source) -> None:
    """Decides a value range that is still "auto", where `decide_value_range` was not called."""
    if source.decoding.value_range == AUTO and source.kind not in ("pixels", "views"):
        for line in look(source):
            logging.info("%s", line)


def look(source: Source, known: str = UPPER_8) -> list[str]:
    """Looks at a sample; decides `source.decoding`, and returns lines for the user.

    Args:
        source: of any kind.
        known: a value range that is taken where the values are inside, and would otherwise only
            give the least and greatest that was seen: of a run that sees other data.
    """
    what = f"{source.name} ({source.split})"
    if source.kind == "views":
        return []
    if source.kind == "pixels":
        images = source.read(_spread(source.num_examples, _DECODED))[0]
        return _of_contrast(what, [_spread_of(image) for image in images], "")
    heads, whole = _sample(source)
    lines = _of_depth(what, source, heads, whole, known) + _of_rotation(what, source, heads)

    def spread(i: int) -> int:
        return _spread_of(_decoded(whole(i), source))

    places = _spread(len(heads), _DECODED).tolist()
    deep = any(map(_may_be_deep, heads))
    hint = f", or give data.value_range (now {source.decoding.value_range})" if deep else ""
    return lines + _of_contrast(what, _map(spread, places), hint)


def range_of(lows: Sequence, highs: Sequence, whole_numbers: bool) -> tuple[str, bool]:
    """The range "LOW:HIGH" for images of more than 8 bits, from the least and most value of each.

    Integers from 0 on: the fewest of the usual numbers of bits that hold them. Floats: 0 to 1 or 0
    to 255 where they are inside. Anything else: what was seen.

    Returns:
        The range, and whether it is a usual one, not only what was seen.
    """
    low, high = min(lows), max(highs)
    if whole_numbers and low >= 0 and high < 2 ** _BITS[-1]:
        return f"0:{2 ** next(b for b in _BITS if high < 2**b) - 1}", True
    if not whole_numbers and low >= 0 and high <= 255:
        return ("0:1" if high <= 1 else "0:255"), True
    if not low < high:
        high = low + 1
    return (f"{int(low)}:{int(high)}" if whole_numbers else f"{low:.9g}:{high:.9g}"), False


def _of_depth(
    what: str, source: Source, heads: list[bytes], whole: Callable, known: str
) -> list[str]:
    """Decides the range, if nobody has."""
    from common.data.images import decode

    if source.decoding.value_range != AUTO:
        return []

    def values(i: int) -> tuple[bool, float, float] | None:
        found = decode.deep_values(whole(i))
        if found is None:
            return None
        integers = np.issubdtype(found.dtype, np.integer)
        found = found if integers else found[np.isfinite(found)]
        return (integers, found.min().item(), found.max().item()) if found.size else None

    # of 8-bit files nothing is read
    places = [i for i, head in enumerate(heads) if _may_be_deep(head)]
    if places:
        count = np.clip(_DEEP_BYTES // max(1, len(_map(whole, places[:1])[0] or b"")), *_DEEP)
        places = [places[i] for i in _spread(len(places), int(count))]
    found = [x for x in _map(values, places) if x]
    if not found:
        _set_range(source, SIXTEEN_BITS)  # for deep images that the sample may have missed
        return []
    integers, lows, highs = zip(*found, strict=True)
    chosen, usual = range_of(lows, highs, all(integers))
    low, high = Decoding(known).bounds or (np.inf, -np.inf)
    if not usual and low <= min(lows) and max(highs) <= high:
        chosen, usual = known, True
    _set_range(source, chosen)
    line = (
        f"{what}: images of more than 8 bits, of which {len(found)} were looked at, have values "
        f"from {min(lows):.6g} to {max(highs):.6g}: black is {chosen.replace(':', ', white ')} in "
        f"all of them (data.value_range={chosen})"
    )
    if not usual:
        line += ", values outside are clipped; give LOW:HIGH if others have more"
    if len(set(integers)) > 1:
        line += f". {integers.count(False)} have floats and the others integers: give LOW:HIGH"
    return [line]


def _set_range(source: Source, value_range: str) -> None:
    source.decoding = dataclasses.replace(source.decoding, value_range=value_range)


def _may_be_deep(head: bytes) -> bool:
    if head.startswith(_PNG):
        return head[24:25] == b"\x10"
    return not head.startswith(_SHALLOW)


def _of_rotation(what: str, source: Source, heads: list[bytes]) -> list[str]:
    from common.data.images import orientation

    count = sum(orientation.stored(head) != 1 for head in heads)
    if not count or source.decoding.exif_rotation:
        return []
    return [
        f"{what}: {count} of {len(heads)} images that were looked at carry an EXIF rotation, which "
        "is not applied (nor does torchvision's ImageFolder); data.exif_rotation=True applies it"
    ]


def _of_contrast(what: str, spreads: list[int | None], hint: str) -> list[str]:
    known = [x for x in spreads if x is not None]
    flat = sum(x < FLAT for x in known)
    if flat < max(2, _MANY * len(known)):
        return []
    return [
        f"{what}: {flat} of {len(known)} images that were looked at are nearly one colour "
        f"(within {FLAT} of 256 levels): look at the files{hint}"
    ]


def _spread_of(image: np.ndarray) -> int:
    return int(image.max()) - int(image.min())


def _decoded(data: bytes, source: Source) -> np.ndarray:
    from common.data.images import decode
    from common.data.images.tensorflow_host import tf

    if len(data) > _LARGE_JPEG and data.startswith(b"\xff\xd8"):
        return tf.io.decode_jpeg(data, channels=3, ratio=8).numpy()
    return decode.decode(tf.constant(data), source.decoding).numpy()


def _spread(n: int, count: int) -> np.ndarray:
    """At most `count` of 0..n-1 at even distances."""
    count = min(n, count)
    return np.arange(count) * n // max(1, count)


def _sample(source: Source) -> tuple[list[bytes], Callable[[int], bytes]]:
    """The first bytes of a sample of files, and a function from position to the whole file.

    A streamed set has no random access: its first images are taken.
    """
    if source.kind == "stream":
        files = [image for _, image, _ in itertools.islice(source.in_order(), _DEEP[1])]
        return files, files.__getitem__
    payload = source.read(_spread(source.num_examples, SAMPLE))[0]
    if source.kind != "path":
        return list(payload), payload.__getitem__
    paths = [epath.Path(os.fsdecode(path)) for path in payload]

    def head(i: int) -> bytes:
        with paths[i].open("rb") as file:
            return file.read(_HEAD)

    return [x or b"" for x in _map(head, range(len(paths)))], lambda i: paths[i].read_bytes()


def _map(function: Callable[[int], Any], places) -> list[Any]:
    """The results in order; None where a file cannot be read: the error comes later."""
    from common.data.images.tensorflow_host import tf

    def tried(i: int) -> Any:
        try:
            return function(i)
        except (OSError, ValueError, tf.errors.OpError):
            return None

    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(tried, places))
