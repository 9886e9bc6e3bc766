"""Where images come from: one config string opens a `Source`.

    embedded     Fashion-MNIST, ships with this code (10,000 + 2,000 images, 28 x 28)
    tfds:NAME    any TensorFlow dataset of images that is already prepared on this machine
    folder:PATH  a tree of image files, in class folders or not
    shards:PATH  what `--mode=prepare` wrote: any of these as a few large files
    fake         random views, made once: everything but the data can be timed with it

Paths may be remote (`gs://...`). Nothing is ever downloaded. Grey images become RGB.
"""

import dataclasses
import pathlib
import unicodedata

import numpy as np
from ml_collections import ConfigDict

from common.data.images import decoding
from common.data.sources import (
    embedded,
    fake,
    folder_layout,
    folder_source,
    held_out,
    shards,
    shrunk,
    slices,
    subset,
)
from common.data.sources.base import Source
from common.data.sources.folder_tree import first_few
from common.errors import UserError

ROLES = ("train", "test", "bank")
KINDS = ("embedded", "fake", "folder", "shards", "tfds")
WITH_PATH = ("folder", "shards", "tfds")  # what stands behind the colon of those


def open_source(config: ConfigDict, split: str) -> Source:
    """Opens a dataset.

    Classes are compared by name: label i of "test" and "bank" is the i-th class of "train", or of
    the bank where "train" has no labels.

    Args:
        config: the config's `data` section.
        split: "train", "test" or "bank" (then `config.train_split` etc. say which split of the
          dataset that is), or the name of a split; or a slice of one, such as "train[:80%]".

    Returns:
        The source.

    Raises:
        UserError: unknown source, missing dataset or split, empty folder, no image in it, a class
          in the test set that the others lack.
    """
    config = with_splits(config)
    role, split = split, config[f"{split}_split"] if split in ROLES else split
    if config.on_corrupt not in ("error", "replace"):
        raise UserError(
            f"data.on_corrupt is {config.on_corrupt!r}; expected 'error' (stop and name the file) "
            "or 'replace' (use another image and count it)."
        )
    if config.labels not in folder_layout.LABELS:
        raise UserError(
            f"data.labels is {config.labels!r}; expected 'auto', 'folders' (each folder is a "
            "class) or 'none'."
        )
    how = decoding.of(config)
    kind, path = kind_of(config.source)
    name, bounds = part_of(kind, path, split)
    source = _open(kind, path, name, config, compared=role in ("test", "bank"))
    if config.labels == "none" and source.num_classes:
        source.num_classes, source.class_names = 0, ()
        source.labels = np.full(source.num_examples, -1, np.int32)
    source.on_corrupt, source.decoding = config.on_corrupt, how
    if config.get("shrink"):
        source = shrunk.shrunk(source, config.shrink, config.cache_gib)
    if role in ("test", "bank") and source.class_names:
        align_classes(source, _class_names(config))
    if bounds is None:
        return source

    part = subset.select(source, slices.ids(split, bounds, source.num_examples))
    return dataclasses.replace(part, split=split)


def with_splits(config: ConfigDict) -> ConfigDict:
    """The `data` section with the splits that are "auto" decided; itself where none is.

    Raises:
        UserError: as `open_source`.
    """
    if held_out.AUTO not in (config.train_split, config.test_split):
        return config
    kind, path = kind_of(config.source)
    train, test = held_out.splits(
        config, kind, path, lambda split: _count(kind, path, split, config)
    )
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.train_split, config.test_split = train, test
    return config


def _count(kind: str, path: str, split: str, config: ConfigDict) -> int:
    """Images of a split, without reading a set that says how many it has."""
    if kind == "shards" and shards.holds(path, split):
        return shards.counts(path)[split]
    if kind == "tfds":
        from common.data.sources import tfds_source  # TensorFlow, only where it is used

        counts = tfds_source.counts(path, config)
        if split in counts:
            return counts[split]
    return _open(kind, path, split, config, compared=False).num_examples


def part_of(kind: str, path: str, split: str) -> tuple[str, tuple[str, str] | None]:
    """The split to open, and which slice of it to take."""
    if kind == "tfds":  # which slices its own sets
        return split, None
    if kind == "shards" and shards.holds(path, split):  # a slice that was prepared
        return split, None
    return slices.parse(split)


def kind_of(source: str) -> tuple[str, str]:
    """The kind of `data.source`, and what stands behind the colon.

    Raises:
        UserError: an unknown kind.
    """
    kind, _, rest = source.partition(":")
    if kind in KINDS and bool(rest) == (kind in WITH_PATH):
        return kind, rest
    near = f" Did you mean 'folder:{source}'?" if pathlib.Path(source).is_dir() else ""
    raise UserError(
        f"data.source is {source!r}; expected 'embedded', 'tfds:NAME', 'folder:PATH', "
        f"'shards:PATH' or 'fake'.{near}"
    )


def _open(kind: str, path: str, split: str, config: ConfigDict, compared: bool) -> Source:
    if kind == "embedded":
        return embedded.open_embedded(split)
    if kind == "fake":
        return fake.open_fake(config, split)
    if kind == "folder":
        return folder_source.open_folder(path, split, config.labels)
    if kind == "shards":
        return shards.open_shards(path, split, config)
    from common.data.sources import tfds_source  # TensorFlow, only where it is used

    return tfds_source.open_tfds(path, split, config, sure=compared)


def align_classes(source: Source, names: tuple[str, ...]) -> None:
    """Numbers the labels of a test set or a bank as the training split does: by name.

    Args:
        source: with class names; it is changed.
        names: of the classes 0, 1, ... that it is compared with; with none it is left as it is.

    Raises:
        UserError: a class that is not among those of the training split and the bank.
    """
    if not names or names == source.class_names:
        return
    exact = {name: i for i, name in enumerate(names)}
    # a name has other bytes where macOS wrote it
    alike = {unicodedata.normalize("NFC", name): i for i, name in enumerate(names)}
    numbers = [
        exact.get(name, alike.get(unicodedata.normalize("NFC", name), -1))
        for name in source.class_names
    ]
    unknown = [n for n, i in zip(source.class_names, numbers, strict=True) if i < 0]
    if unknown:
        raise UserError(
            f"{source.name} ({source.split}) has the class {unknown[0]!r}, which the training "
            f"split lacks; expected classes out of {first_few(names)}. Rename or remove it, or "
            "name other splits."
        )
    source.labels = np.array([*numbers, -1], np.int32)[source.labels]  # -1 stays -1
    missing = [name for i, name in enumerate(names) if i not in numbers]
    source.class_names, source.num_classes = names, len(names)
    if missing:
        source.account += (f"{len(missing)} of {len(names)} classes missing: {first_few(missing)}",)


def _class_names(config: ConfigDict) -> tuple[str, ...]:
    """Names of the classes 0, 1, ...: those of "train", then what only the bank has."""
    names: tuple[str, ...] = ()
    for split in dict.fromkeys((config.train_split, config.bank_split or config.train_split)):
        try:
            found = _class_names_of(config, split)
        except UserError:  # there need be no training set to make features of the test set
            continue
        names += tuple(name for name in found if name not in names)
    return names


def _class_names_of(config: ConfigDict, split: str) -> tuple[str, ...]:
    """The class names of a split, as cheaply as its kind allows; () where it has none."""
    kind, path = kind_of(config.source)
    if kind == "folder":
        return folder_source.class_names(path, part_of(kind, path, split)[0], config.labels)
    if kind == "shards":
        return shards.class_names(path, part_of(kind, path, split)[0])
    if kind == "tfds":
        from common.data.sources import tfds_source  # TensorFlow, only where it is used

        return tfds_source.class_names(path, split, config)
    return ()
