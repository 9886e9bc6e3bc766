"""`data.shrink`: large photographs made smaller once, instead of decoded whole for every crop.

A photograph of 12 megapixels takes long to decode, and training decodes it twice an epoch, for
views of a hundred pixels. Here it is decoded once, at the moment it is first needed, and
kept in memory as a JPEG that is still larger than any view made of it.
"""

import concurrent.futures
import dataclasses
import io
import os

import numpy as np
from etils import epath
from PIL import Image

from common.data.sources.base import Source

_QUALITY = 95  # of 4:4:4 JPEG: what is lost is less than what a crop's resize loses
_ORIENTATION = 0x0112  # EXIF's tag
_MOST_PIXELS = 89_478_485  # from here on Pillow warns; such files are left as they are
_MODES = ("RGB", "L")  # others are deep, or have a palette or alpha: `decode` has rules for these
# Formats of 8 bits. Pillow reads deeper TIFFs and PNGs as "RGB" too, and drops the lower bits.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "HEIF")
_PNG, _PNG_DEPTH = b"\x89PNG", 24  # how a file begins, and where its header has the bits


@dataclasses.dataclass(kw_only=True)
class Shrunk(Source):
    """Another source whose large images are smaller; everything else is that source's.

    Attributes:
        base: of kind "path" or "encoded".
        side: the shorter side of an image that is made smaller is from here up to twice that.
        room: bytes of images that are kept.
        kept: those so far, by id; None for a file that is small enough as it is.
    """

    base: Source
    side: int
    room: float
    kept: dict[int, bytes | None] = dataclasses.field(default_factory=dict)

    def read(self, ids):
        payload, labels = self.base.read(ids)
        if self.labels is not None:  # which a test split's may differ in: `opening.align_classes`
            labels = self.labels[ids]
        images = np.empty(len(ids), object)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            images[:] = list(pool.map(self._image, ids.tolist(), payload))
        return images, labels

    def describe(self, index):
        return self.base.describe(index)

    def names(self, ids):
        return self.base.names(ids)

    @property
    def listing(self):
        return self.base.listing

    def _image(self, i: int, payload: bytes) -> bytes:
        known = self.kept.get(i, b"")
        if known:
            return known
        data = self._bytes(payload)
        if known is None:
            return data
        small = smaller(data, self.side)
        if small is None or len(small) <= self.room:
            self.kept[i] = small
            self.room -= len(small or b"")
        return small or data

    def _bytes(self, payload: bytes) -> bytes:
        if self.base.kind != "path":
            return payload
        try:
            return epath.Path(os.fsdecode(payload)).read_bytes()
        except OSError:  # no image then, which is reported with its name, or replaced
            return b""


def shrunk(source: Source, side: int, gib: float) -> Source:
    """A source whose large images are smaller; itself if it holds pixels, or is streamed.

    Args:
        source: of any kind.
        side: least length of the shorter side, in pixels, >= 1.
        gib: limit for the images kept, in GiB; what does not fit is made anew each time.
    """
    if source.kind not in ("path", "encoded"):
        return source
    common = {f.name: getattr(source, f.name) for f in dataclasses.fields(Source) if f.init}
    common |= {"kind": "encoded", "base": source, "side": side, "room": gib * 2**30}
    return Shrunk(**common)


def smaller(data: bytes, side: int) -> bytes | None:
    """A smaller copy of an encoded image, as JPEG; None if it is small, deep, damaged or rare.

    JPEGs are decoded at 1/2, 1/4 or 1/8 of their size, which takes a fraction of the time; then,
    and for other formats, whole blocks of pixels are averaged.

    Args:
        data: a file.
        side: the shorter side of the result is from here up to twice that.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            factor = min(width, height) // side
            large = factor >= 2 and width * height <= _MOST_PIXELS
            # (an MPO is the JPEG of a phone with a preview behind it)
            moving = image.format != "MPO" and getattr(image, "n_frames", 1) > 1
            usual = image.format in _FORMATS and image.mode in _MODES
            if not large or moving or not usual or _is_deep(data):
                return None
            orientation = image.getexif().get(_ORIENTATION)
            image.draft(None, (width // factor, height // factor))
            reduced = image.reduce(max(1, min(image.size) // side))
    except Exception:  # whatever is wrong with it is found, and said, where it is decoded
        return None
    exif = Image.Exif()
    if orientation:
        exif[_ORIENTATION] = orientation
    out = io.BytesIO()
    reduced.save(out, "JPEG", quality=_QUALITY, subsampling=0, exif=exif)
    return out.getvalue()


def _is_deep(data: bytes) -> bool:
    return data.startswith(_PNG) and data[_PNG_DEPTH] > 8
