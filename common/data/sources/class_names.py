"""Classes are compared by name: a label means the same in all splits that are used together."""

import unicodedata

import numpy as np
from ml_collections import ConfigDict

from common.data.sources.base import Source
from common.data.sources.folder_tree import some
from common.data.sources.opening import kind_of, part_of
from common.errors import UserError


def align(source: Source, config: ConfigDict) -> None:
    """Numbers the labels of a test set or a bank as the training split does.

    Args:
        source: with class names; it is changed. Without a training split it is left as it is.
        config: the config's `data` section.

    Raises:
        UserError: a class that is not among those of the training split and the bank.
    """
    names = _of_reference(config)
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
            f"split lacks; expected classes out of {some(names)}. Rename or remove it, or name "
            "other splits."
        )
    source.labels = np.array([*numbers, -1], np.int32)[source.labels]  # -1 stays -1
    missing = [name for i, name in enumerate(names) if i not in numbers]
    source.class_names, source.num_classes = names, len(names)
    if missing:
        source.account += (f"{len(missing)} of {len(names)} classes missing: {some(missing)}",)


def _of_reference(config: ConfigDict) -> tuple[str, ...]:
    """Names of the classes 0, 1, ...: those of "train", then what only the bank has."""
    names = ()
    for split in dict.fromkeys((config.train_split, config.bank_split or config.train_split)):
        try:
            found = _of_split(config, split)
        except UserError:  # there need be no training set to make features of the test set
            continue
        names += tuple(name for name in found if name not in names)
    return names


def _of_split(config: ConfigDict, split: str) -> tuple[str, ...]:
    """The class names of a split, as cheaply as its kind allows; () where it has none."""
    kind, path = kind_of(config.source)
    if kind == "folder":
        from common.data.sources import folder_source

        return folder_source.class_names(path, part_of(kind, path, split)[0], config.labels)
    if kind == "shards":
        from common.data.sources import shards

        return shards.class_names(path, part_of(kind, path, split)[0])
    if kind == "tfds":
        from common.data.sources import tfds_source

        return tfds_source.class_names(path, split, config)
    return ()
