"""Where images come from: one config string opens a `Source`.

    embedded     Fashion-MNIST, ships with this code (10,000 + 2,000 images, 28 x 28)
    tfds:NAME    any TensorFlow data set of images that is already prepared on this machine
    folder:PATH  a tree of image files, in class folders or not
    shards:PATH  what `--mode=prepare` wrote: any of these as a few large files
    fake         random views, made once: everything but the data can be timed with it

Paths may be remote (`gs://...`). Nothing is ever downloaded. Grey images become RGB.
"""

import dataclasses
import pathlib

import numpy as np
from ml_collections import ConfigDict

from common.data.images import decoding
from common.data.sources import embedded, fake, folder_layout, slices
from common.data.sources.base import Source
from common.errors import UserError

ROLES = ("train", "test", "bank")
KINDS = ("embedded", "fake", "folder", "shards", "tfds")


def open_source(config: ConfigDict, split: str) -> Source:
    """Opens a data set.

    Classes are compared by name: label i of "test" and "bank" is the i-th class of "train", or of
    the bank where "train" has no labels.

    Args:
        config: the config's `data` section.
        split: "train", "test" or "bank" (then `config.train_split` etc. say which split of the
          data set that is), or the name of a split; or a slice of one, such as "train[:80%]".

    Returns:
        The source.

    Raises:
        UserError: unknown source, missing data set or split, empty folder, no image in it, a class
          in the test set that the others lack.
    """
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
    from common.data.sources import class_names, subset

    if role in ("test", "bank") and source.class_names:
        class_names.align(source, config)
    if bounds is None:
        return source

    part = subset.select(source, slices.ids(split, bounds, source.num_examples))
    return dataclasses.replace(part, split=split)


def part_of(kind: str, path: str, split: str) -> tuple[str, tuple[str, str] | None]:
    """The split to open, and which slice of it to take."""
    if kind == "tfds":  # which slices its own sets
        return split, None
    if kind == "shards":
        from common.data.sources import shards

        if shards.holds(path, split):  # a slice that was prepared
            return split, None
    return slices.parse(split)


def kind_of(source: str) -> tuple[str, str]:
    """The kind of `data.source`, and what stands behind the colon.

    Raises:
        UserError: an unknown kind.
    """
    kind, _, rest = source.partition(":")
    if kind in KINDS and bool(rest) == (kind in ("folder", "shards", "tfds")):
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
    # these build on this module
    if kind == "folder":
        from common.data.sources import folder_source

        return folder_source.open_folder(path, split, config.labels)
    if kind == "shards":
        from common.data.sources import shards

        return shards.open_shards(path, split, config)
    from common.data.sources import tfds_source

    return tfds_source.open_tfds(path, split, config, sure=compared)
