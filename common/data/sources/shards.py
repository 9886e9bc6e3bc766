"""Data sets as a few `.npz` files: `--mode=prepare` writes them, `shards:PATH` reads them.

A photo folder of a million small files is slow to read from a bucket; some hundred files of 60 MB
are not. Reading needs nothing but NumPy. A directory holds

    index.json                    written last: without it there is no data set
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
import shlex
import threading
import zipfile
from collections.abc import Iterator

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from common.data.sources.base import ArraySource, Source, listed
from common.data.sources.folder_tree import plural
from common.data.sources.opening import open_source
from common.errors import UserError
from common.run import console, files

INDEX = "index.json"
SHARD_BYTES = 60_000_000
_VERSION = 1
_READERS = 8  # files read at a time
_USUAL = {"train": "train", "test": "test", "bank": ""}  # the splits that a config names itself
_GIB = 2**30
# NumPy reads a header with `ast`, which in Python 3.11 can fail in several threads (CPython's issue
# 106905): what takes time, the reading, is done in parallel, and this is not.
_PARSING = threading.Lock()


def prepare(config: ConfigDict, directory: str | epath.PathLike) -> dict:
    """Writes the splits of `config.data` as shards.

    With `data.on_corrupt="replace"` images that cannot be decoded are left out, and listed.

    Args:
        config: a whole config; of `data`, the source, the splits and `on_corrupt` count.
        directory: new or empty; local or e.g. `gs://...`.

    Returns:
        What `index.json` holds.

    Raises:
        UserError: the directory is in use, an image cannot be decoded (none of a split, with
            "replace"), or the source is not there.
    """
    directory = files.path(directory)
    if directory.exists() and any(directory.iterdir()):
        raise UserError(f"{directory} is not empty: give a new directory to write shards into")
    splits = {role: config.data[f"{role}_split"] for role in ("train", "test", "bank")}
    opened = {role: open_source(config.data, role) for role, name in splits.items() if name}
    index = {"version": _VERSION, "name": opened["train"].name, "splits": {}}
    directory.mkdir(parents=True, exist_ok=True)
    for source in opened.values():
        for line in source.account:
            console.say(line)
        index["splits"][source.split] = _write_split(source, directory)
    files.write_text(directory / INDEX, json.dumps(index, indent=2) + "\n")
    for name, found in index["splits"].items():
        n, count = found["num_examples"], len(found["shards"])
        left_out = listed(found["left_out"], "damaged image", "left out")
        console.say(f"{name}: {n:,} images in {count:,} {plural('file', count)}{left_out}")
    named = {role: name for role, name in splits.items() if name != _USUAL[role]}
    flags = [f"--config.data.{role}_split={name}" for role, name in named.items()]
    flags = [f"--config.data.source=shards:{directory}", *flags]
    console.say(f"Read them with {' '.join(map(shlex.quote, flags))}")
    return index


def _write_split(source: Source, directory: epath.Path) -> dict:
    pieces = list(_sizes(source))
    written, left_out = [], []
    for i, ids in enumerate(pieces):
        arrays, damaged = _arrays(source, ids)
        left_out += damaged
        count = len(arrays["labels"])
        if not count:
            continue
        name = f"{source.split}-{i:05}-of-{len(pieces):05}.npz"
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        (directory / name).write_bytes(buffer.getvalue())
        written.append({"file": name, "examples": count})
    if not written:
        raise UserError(
            f"no image of {source.name} ({source.split}) is whole, {left_out[0]} for one: repair "
            "the files, then prepare again"
        )
    return {
        "num_examples": sum(shard["examples"] for shard in written),
        "num_classes": source.num_classes,
        "class_names": list(source.class_names),
        "left_out": left_out,
        "shards": written,
    }


def _sizes(source: Source) -> Iterator[np.ndarray]:
    """Ids of each shard: as many as make up `SHARD_BYTES`."""
    if source.kind == "stream":
        raise UserError(
            f"{source.name} is larger than data.cache_gib: it is in files of a good size already; "
            "raise data.cache_gib if it is to be prepared all the same"
        )
    ids = np.arange(source.num_examples)
    if source.kind in ("pixels", "views"):
        sizes = np.full(len(ids), int(np.prod(source.image_shape)) * 3)
    elif source.kind == "path":
        paths = map(os.fsdecode, source.read(ids)[0])
        sizes = np.array([_length(epath.Path(path)) for path in paths])
    else:
        sizes = np.array([len(source.read(ids[i : i + 1])[0][0]) for i in ids])
    shard = (np.cumsum(sizes) - sizes) // SHARD_BYTES
    for number in np.unique(shard):
        yield ids[shard == number]


def _length(path: epath.Path) -> int:
    try:
        return path.stat().length
    except OSError:  # a link to nowhere, say: `_arrays` says so
        return 0


def _arrays(source: Source, ids: np.ndarray) -> tuple[dict[str, np.ndarray], list[str]]:
    """What a shard holds, and the names of the images that are left out of it."""
    payload, labels = source.read(ids)
    names = source.names(ids)
    if source.kind in ("pixels", "views"):
        return {"images": payload, "labels": labels, "names": names}, []
    from common.data.feed import corrupt

    def load(i: int) -> bytes | None:
        data, reason = payload[i], ""
        if source.kind == "path":
            try:
                data = epath.Path(os.fsdecode(data)).read_bytes()
            except OSError as error:
                reason = error.strerror or str(error)
        reason = reason or corrupt.fault_of(data)
        if reason and source.on_corrupt == "replace":
            return None
        if reason:
            raise UserError(
                f"cannot decode {source.describe(int(ids[i]))} ({reason}): repair or remove it, "
                "or leave such files out with data.on_corrupt='replace', then prepare again"
            )
        return data

    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        found = list(pool.map(load, range(len(ids))))
    good = np.array([data is not None for data in found])
    encoded = [data for data in found if data is not None]
    return {
        "data": np.frombuffer(b"".join(encoded), np.uint8),
        "offsets": np.cumsum([0, *map(len, encoded)]),
        "labels": labels[good],
        "names": names[good],
    }, names[~good].tolist()


def open_shards(path: str, split: str, config: ConfigDict) -> Source:
    """Opens a split of a directory that `prepare` wrote, and reads it into memory.

    Args:
        path: the directory.
        split: the name it had in the source.
        config: the config's `data` section.

    Raises:
        UserError: no such directory or split, or a set larger than `data.cache_gib`.
    """
    directory, index = files.path(path), _index(path)
    if split not in index["splits"]:
        raise UserError(
            f"{path} holds no split {split!r}; expected one of {', '.join(index['splits'])}. Set "
            "data.train_split and data.test_split."
        )
    found = index["splits"][split]
    names = [shard["file"] for shard in found["shards"]]
    if outside := [n for n in names if "/" in n or "\\" in n or n.startswith("..")]:
        raise UserError(f"{path} names the file {outside[0]!r}: expected names without a folder")
    paths = [directory / name for name in names]
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
    images, labels, names = _load_all(paths, found["num_examples"])
    pixels = images.dtype == np.uint8
    return ShardSource(
        name=index["name"], split=split, kind="pixels" if pixels else "encoded",
        num_examples=len(labels), num_classes=found["num_classes"],
        class_names=tuple(found["class_names"]), labels=labels,
        image_shape=images.shape[1:3] if pixels else None, images=images, names=names,
    )  # fmt: skip


def holds(path: str, split: str) -> bool:
    """Whether a split of that name, which may be a slice of the source's, was prepared."""
    return split in _index(path)["splits"]


def class_names(path: str, split: str) -> tuple[str, ...]:
    """The class names of a split; () where there are none."""
    return tuple(_index(path)["splits"].get(split, {}).get("class_names", ()))


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
            f"{path}/{INDEX} is damaged ({error}): copy the directory anew, or prepare again"
        ) from error
    if index["version"] != _VERSION:
        raise UserError(
            f"{path} has format {index['version']}, this code reads {_VERSION}: prepare the set "
            "again"
        )
    return index


def _load_all(paths: list[epath.Path], n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All shards in order, in place: images are held once, but for the few shards in flight."""
    images, labels, names, done = None, [], [], 0
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        for part, part_labels, part_names in pool.map(_load, paths):
            if images is None:
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
        raise UserError(f"cannot read {path} ({error}): copy it anew, or prepare again") from error
    images = np.empty(len(labels), object)
    images[:] = [data[a:b] for a, b in itertools.pairwise(offsets)]
    return images, labels, names


class ShardSource(ArraySource):
    """A set in memory that knows the files its images came from."""

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
