"""Search by image: which images of a split are most like a file of the user's."""

import dataclasses

import numpy as np

from common.data.feed.pipeline import images_of
from common.data.images import decoding
from common.data.sources import shrunk
from common.data.sources.base import ArraySource, Source
from common.data.sources.folder_source import shown
from common.errors import UserError
from common.evaluate import feature_files, knn
from common.evaluate.pretrained import Pretrained
from common.run import files

_FOUND = 15


@dataclasses.dataclass(frozen=True)
class Query:
    """One image and what was found for it.

    Attributes:
        name: of its file, see `Files`.
        image: uint8 `[h, w, 3]`, as the encoder saw it.
        rows: int32 `[k]`, of the features, nearest first.
        cosines: float32 `[k]`, theirs.
    """

    name: str
    image: np.ndarray
    rows: np.ndarray
    cosines: np.ndarray


@dataclasses.dataclass(kw_only=True)
class Files(ArraySource):
    """Image files of the user's, to be decoded as those of another source are.

    Attributes:
        file_names: of each, without directories; of files with one name the path below the
            folder that they share. No two are equal.
    """

    file_names: list[str]


def read(text: str, like: Source, shrink: int = 0) -> Files | None:
    """The files of `eval.embed.query`, to be decoded as those of a source; None for "".

    Args:
        text: a path, or several with commas between them.
        like: the source to search.
        shrink: `data.shrink`, with which that was opened.

    Raises:
        UserError: a file that is not there, or that is no whole image.
    """
    paths = list(dict.fromkeys(files.several(text)))
    if not paths:
        return None
    data = np.empty(len(paths), object)
    # of streams and pixels nothing is made smaller
    side = shrink if like.kind == "encoded" else 0
    data[:] = [_bytes(path, side) for path in paths]
    return Files(
        name="eval.embed.query", split="files", kind="encoded", num_examples=len(paths),
        num_classes=0, class_names=(), labels=np.full(len(paths), -1, np.int32),
        decoding=like.decoding, images=data,
        file_names=_names(paths),
    )  # fmt: skip


def _names(paths: list[str]) -> list[str]:
    """A name of its own for each of different paths, with as few directories as that takes."""
    names: dict[str, str] = {}
    bases = [path.rpartition("/")[2] for path in paths]
    for base in set(bases):
        same = [path for path, other in zip(paths, bases, strict=True) if other == base]
        names |= dict(zip(same, feature_files.below(same)[1], strict=True))
    return [names[path] for path in paths]


def _bytes(text: str, side: int) -> bytes:
    """The file, if `side` is not 0 made smaller as `data.shrink` makes those of the data."""
    from common.data.images import decode  # TensorFlow, only where it is used

    path = files.path(text)
    if path.is_dir():
        raise UserError(f"eval.embed.query={shown(text)} is a folder; expected an image file")
    if not path.exists():
        raise UserError(
            f"eval.embed.query: there is no file {shown(text)}; expected the path of an image, or "
            "several with commas between them"
        )
    data = path.read_bytes()
    fault = decode.fault_of(data)
    if fault:
        heif = path.suffix.lower() in decoding.HEIF and not decoding.register_heif()
        raise UserError(
            f"eval.embed.query: cannot decode {shown(text)} ({fault}); expected an image file, "
            f"such as a JPEG{' (for HEIC: pip install pillow-heif)' if heif else ''}"
        )
    return (shrunk.smaller(data, side) if side else None) or bytes(data)


def search(opened: Pretrained, queries: Files | None, features: np.ndarray) -> list[Query]:
    """Finds the images nearest to each query, by the cosine of the features of `opened`.

    Every process must call it.

    Args:
        opened: whose encoder made the features.
        queries: of `read`.
        features: `[n, d]`, n at least 1.
    """
    if queries is None:
        return []
    own = opened.extract(queries).features
    found, cosines = knn.neighbours(features, own, min(_FOUND, len(features)))
    images = images_of(queries, np.arange(len(own)), opened.image_size)
    parts = zip(queries.file_names, images, found, cosines, strict=True)
    return [Query(*fields) for fields in parts]
