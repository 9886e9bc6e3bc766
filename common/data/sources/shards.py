"""Datasets as a few `.npz` files: `shards:PATH` reads what `--mode=prepare` wrote.

A photo folder of a million small files is slow to read from a bucket; some hundred files of 60 MB
are not. Reading needs nothing but NumPy. A directory holds

    index.json                    written last: without it there is no dataset
    train-00000-of-00007.npz      either images uint8 [n, h, w, 3]
                                  or data uint8 [bytes] and offsets int64 [n + 1], the files as
                                  they were; and labels int32 [n] (-1: none), names str [n]
"""

import concurrent.futures
import hashlib
import io
import itertools
import json
import os
import threading
import zipfile

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from common.data.sources import slices
from common.data.sources.base import ArraySource, Source
from common.errors import UserError
from common.run import files

INDEX = "index.json"
VERSION = 1
READERS = 8  # files read at a time
_GIB = 2**30
_AND = "+"  # between the splits of a sum, as in TFDS
# NumPy reads a header with `ast`, which in Python 3.11 can fail in several threads (CPython's issue
# 106905): what takes time, the reading, is done in parallel, and this is not.
_PARSING = threading.Lock()


def open_shards(path: str, split: str, config: ConfigDict) -> Source:
    """Opens a split of a directory that `prepare` wrote, and reads it into memory.

    Args:
        path: the directory.
        split: the name it had in the source, or those of several with "+" between them.
        config: the config's `data` section.

    Raises:
        UserError: no such directory or split, splits of unlike classes, or a set larger than
            `data.cache_gib`.
    """
    directory, index = files.path(path), _index(path)
    parts = _parts(index, split)
    if not parts:
        raise UserError(
            f"{path} holds no split {split!r}; expected one of {', '.join(index['splits'])}. Set "
            "data.train_split and data.test_split."
        )
    found = parts[0]
    if any(part["class_names"] != found["class_names"] for part in parts):
        raise UserError(
            f"the parts of {split!r} in {path} differ in their classes: expected the same in each, "
            "so name one of them"
        )
    file_names = [shard["file"] for part in parts for shard in part["shards"]]
    if outside := [n for n in file_names if "/" in n or "\\" in n or n.startswith("..")]:
        raise UserError(f"{path} names the file {outside[0]!r}: expected names without a folder")
    paths = [directory / name for name in file_names]
    if absent := [p.name for p in paths if not p.exists()]:
        raise UserError(
            f"{path} lacks {len(absent)} of {len(paths)} shards, e.g. {absent[0]}: copy them too"
        )
    size = sum(p.stat().length for p in paths) / _GIB
    if size > config.cache_gib:
        raise UserError(
            f"{path} ({split}) has {size:.1f} GiB, more than data.cache_gib={config.cache_gib:g}: "
            "raise that if the memory is there, or prepare the set with TFDS, which is streamed"
        )
    images, labels, names = _load_all(paths, sum(part["num_examples"] for part in parts))
    pixels = images.dtype == np.uint8
    return ShardSource(
        name=index["name"], split=split, kind="pixels" if pixels else "encoded",
        num_examples=len(labels), num_classes=found["num_classes"],
        class_names=tuple(found["class_names"]), labels=labels,
        image_shape=images.shape[1:3] if pixels else None, images=images, names=names,
    )  # fmt: skip


def holds(path: str, split: str) -> bool:
    """Whether a split of that name, which may be a slice or a sum, can be opened as it is."""
    return bool(_parts(_index(path), split))


def counts(path: str) -> dict[str, int]:
    """The splits that were prepared, and how many images each has."""
    return {name: found["num_examples"] for name, found in _index(path)["splits"].items()}


def class_names(path: str, split: str) -> tuple[str, ...]:
    """The class names of a split; () where there are none."""
    return next((tuple(part["class_names"]) for part in _parts(_index(path), split)), ())


def with_rest(path: str, split: str) -> str:
    """The sum of a prepared slice and all others of the same split that share no image with it.

    Args:
        path: the directory.
        split: a slice that was prepared, e.g. "train[:-50]".

    Returns:
        Such as "train[:-50]+train[-50:]"; the whole split where that was prepared too.
    """
    splits = _index(path)["splits"]
    whole = slices.parse(split)[0]
    if whole in splits:
        return whole
    parts = [split]
    for other, found in splits.items():
        fits = slices.parse(other)[0] == whole and not any(slices.overlap(p, other) for p in parts)
        if fits and found["class_names"] == splits[split]["class_names"]:
            parts.append(other)
    return _AND.join(parts)


def _parts(index: dict, split: str) -> list[dict]:
    """What an index says of a split, or of each in a sum; [] if one is not there."""
    splits = index["splits"]
    names = [split] if split in splits else split.split(_AND)
    return [splits[name] for name in names] if set(names) <= set(splits) else []


def _index(path: str) -> dict:
    """What `index.json` holds.

    Raises:
        UserError: no such directory, or an index that cannot be read.
    """
    file = files.path(path) / INDEX
    if not file.exists():
        raise UserError(
            f"no {INDEX} in {path}: expected a directory that `main.py --mode=prepare "
            "--workdir=DIR` has finished writing"
        )
    try:
        index = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(
            f"{path}/{INDEX} is damaged ({error}): copy the directory again, or prepare again"
        ) from error
    if index["version"] != VERSION:
        raise UserError(
            f"{path} has format {index['version']}, this code reads {VERSION}: prepare the set "
            "again"
        )
    return index


def _load_all(paths: list[epath.Path], n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All shards in order, in place: images are held once, but for the few shards in flight."""
    images, done = np.empty(0), 0
    labels: list[np.ndarray] = []
    names: list[np.ndarray] = []
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        for part, part_labels, part_names in pool.map(_load, paths):
            if not labels:
                images = np.empty((n, *part.shape[1:]), part.dtype)
            images[done : done + len(part)] = part
            done += len(part)
            labels.append(part_labels)
            names.append(part_names)
    return images, np.concatenate(labels), np.concatenate(names)


def _load(path: epath.Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(images [n, h, w, 3] or the bytes of files [n], labels [n], names [n]) of a shard."""
    try:
        content = io.BytesIO(path.read_bytes())
        with _PARSING, np.load(content, allow_pickle=False) as arrays:
            labels, names = arrays["labels"], arrays["names"]
            if "images" in arrays:
                return arrays["images"], labels, names
            data, offsets = arrays["data"].tobytes(), arrays["offsets"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path} ({error}): copy it again, or prepare again") from error
    images = np.empty(len(labels), object)
    images[:] = [data[a:b] for a, b in itertools.pairwise(offsets)]
    return images, labels, names


class ShardSource(ArraySource):
    """Images in memory, with the names of the files that they came from."""

    def __init__(self, names: np.ndarray, **fields) -> None:
        super().__init__(**fields)
        self._names = names

    def describe(self, index):
        return f"{self._names[index]} of {self.name} ({self.split})"

    def names(self, ids):
        return np.asarray(self._names)[ids]

    @property
    def listing(self):
        text = "\0".join(map(str, self._names))  # a name need not be valid UTF-8
        return hashlib.sha256(os.fsencode(text)).hexdigest()[:16]
