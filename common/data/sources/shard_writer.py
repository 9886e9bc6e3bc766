"""`--mode=prepare`: writes a dataset as shards; `shards.py` has the format and reads them."""

import concurrent.futures
import io
import json
import os
import shlex
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from common.data.sources.base import Source, listed
from common.data.sources.folder_tree import plural
from common.data.sources.opening import open_source
from common.data.sources.shards import INDEX, READERS, VERSION
from common.errors import UserError
from common.run import console, files

SHARD_BYTES = 60_000_000
_PIECE = 256  # images read at a time to see their sizes
_USUAL = {"train": "train", "test": "test", "bank": ""}  # the splits that a config names itself


def write(config: ConfigDict, directory: str | epath.PathLike) -> dict:
    """Writes the splits that a config names as shards.

    With `data.on_corrupt="replace"` images that cannot be decoded are left out, and listed.

    Args:
        config: the config's `data` section; its source, splits, labels and `on_corrupt` count.
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
    splits = {role: config[f"{role}_split"] for role in ("train", "test", "bank")}
    opened = {role: open_source(config, role) for role, name in splits.items() if name}
    index: dict[str, Any] = {"version": VERSION, "name": opened["train"].name, "splits": {}}
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
            f"no image of {source.name} ({source.split}) is whole, {left_out[0]} for example: "
            "repair the files, then prepare again"
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
            f"{source.name} is larger than data.cache_gib: it is in large files already; "
            "raise data.cache_gib if it is to be prepared anyway"
        )
    ids = np.arange(source.num_examples)
    if source.kind in ("pixels", "views"):
        sizes = np.full(len(ids), int(np.prod(source.shape)) * 3)
    elif source.kind == "path":
        paths = map(os.fsdecode, source.read(ids)[0])
        sizes = np.array([_length(epath.Path(path)) for path in paths])
    else:
        # several at a time: a source that makes them smaller does so in parallel
        parts = np.array_split(ids, -(-len(ids) // _PIECE))
        sizes = np.array([len(data) for part in parts for data in source.read(part)[0]])
    shard = (np.cumsum(sizes) - sizes) // SHARD_BYTES
    for number in np.unique(shard):
        yield ids[shard == number]


def _length(path: epath.Path) -> int:
    try:
        return path.stat().length
    except OSError:  # a broken link, for example: `_arrays` reports it
        return 0


def _arrays(source: Source, ids: np.ndarray) -> tuple[dict[str, Any], list[str]]:
    """What a shard holds, and the names of the images that are left out of it."""
    payload, labels = source.read(ids)
    names = source.names(ids)
    if source.kind in ("pixels", "views"):
        return {"images": payload, "labels": labels, "names": names}, []
    from common.data.images.decode import fault_of  # TensorFlow, only where files are checked

    def load(i: int) -> bytes | None:
        data, reason = payload[i], ""
        if source.kind == "path":
            try:
                data = epath.Path(os.fsdecode(data)).read_bytes()
            except OSError as error:
                reason = error.strerror or str(error)
        reason = reason or fault_of(data)
        if reason and source.on_corrupt == "replace":
            return None
        if reason:
            raise UserError(
                f"cannot decode {source.describe(int(ids[i]))} ({reason}): repair or remove it, "
                "or leave such files out with data.on_corrupt='replace', then prepare again"
            )
        return data

    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(load, range(len(ids))))
    good = np.array([data is not None for data in found])
    encoded = [data for data in found if data is not None]
    return {
        "data": np.frombuffer(b"".join(encoded), np.uint8),
        "offsets": np.cumsum([0, *map(len, encoded)]),
        "labels": labels[good],
        "names": names[good],
    }, names[~good].tolist()
