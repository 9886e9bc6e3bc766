"""Which image files can be decoded on this machine. No TensorFlow."""

import functools

from PIL import features

# Pillow's own readers, or TensorFlow's
_ALWAYS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm",
    ".pbm", ".pnm",
)  # fmt: skip
# What a build of Pillow may lack. (`features.check` of a name that it does not know warns.)
_OPTIONAL = {"webp": (".webp",), "avif": (".avif",), "jpg_2000": (".jp2", ".j2k")}
HEIF = (".heic", ".heif")


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
    """Teaches Pillow HEIC where `pillow-heif` is installed; whether it is."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True
