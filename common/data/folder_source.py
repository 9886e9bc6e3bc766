"""A tree of image files, in class folders or not."""

import dataclasses
import hashlib
import os
import stat

import numpy as np
from absl import logging
from etils import epath

from common.data.sources import Source
from common.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
# What stands in for a split that has no folder of its name.
_STAND_INS = {"test": ("val", "validation"), "val": ("validation", "test"), "train": ()}


@dataclasses.dataclass
class FolderSource(Source):
    """Files on disk."""

    paths: np.ndarray = None
    root: str = ""

    def read(self, ids):
        # as bytes, because a name need not be valid UTF-8
        paths = [os.fsencode(path) for path in self.paths[ids]]
        return np.array(paths, object), self.labels[ids]

    def describe(self, index):
        return shown(self.paths[index])

    @property
    def listing(self):
        # of the names below the root: the whole folder may move
        text = "\0".join(os.path.relpath(p, self.root) for p in self.paths)
        return hashlib.sha256(os.fsencode(text)).hexdigest()[:16]


def shown(path: str) -> str:
    """A path for a message of one line: a name may hold newlines, or be no text at all."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def open_folder(path: str, split: str) -> Source:
    """Opens a tree of image files.

    PATH/<split> is used when it exists ("val" and "validation" stand in for "test"). Below that,
    either every folder is a class (sorted names are the labels 0, 1, ...), or images lie directly
    in the root and nothing is labelled, at any depth.

    Args:
      path: folder, local or remote.
      split: name of the split.

    Returns:
      A source of kind "path", in sorted order.

    Raises:
      UserError: no such folder, no such split, no image file, or a folder that cannot be read.
    """
    base = epath.Path(path).expanduser()
    if not base.is_dir():
        raise UserError(
            f"no folder {path}; expected a folder of image files. "
            "Check data.source, or --eval.source of an evaluation."
        )
    root, train = _split_folder(base, split), base / "train"
    files, folders = _listing(root)
    if files:
        if folders:
            logging.warning(
                "%s lies beside the folders of %s, so those are no classes and nothing is "
                "labelled; move it away if they are", files[0], root,
            )  # fmt: skip
        paths, names, labels = _walk(root), (), None
    else:
        names = tuple(folder.name for folder in folders)
        if root != train and train.is_dir():  # a split may lack a class: the training set decides
            known = tuple(folder.name for folder in _listing(train)[1])
            unknown = sorted(set(names) - set(known))
            if unknown and known:
                raise UserError(
                    f"{root} has the class folder {unknown[0]!r}, which {train} has not; expected "
                    "the same classes in both. Rename or remove it."
                )
            names = known
        per_class = [_walk(root / name) if (root / name).is_dir() else [] for name in names]
        paths = [file for group in per_class for file in group]
        labels = np.repeat(np.arange(len(names), dtype=np.int32), [len(g) for g in per_class])
    if not paths:
        raise UserError(
            f"no image in {root}; expected files ending in {', '.join(IMAGE_SUFFIXES)}, either "
            "directly there or in one folder for each class."
        )
    if labels is None:
        labels = np.full(len(paths), -1, np.int32)
    return FolderSource(
        name=base.name, split=split, kind="path", num_examples=len(paths), num_classes=len(names),
        class_names=names, labels=labels, paths=np.array(paths, object), root=str(root),
    )  # fmt: skip


def _split_folder(base: epath.Path, split: str) -> epath.Path:
    for name in (split, *_STAND_INS.get(split, ())):
        if (base / name).is_dir():
            return base / name
    present = [n for n in ("train", "val", "validation", "test") if (base / n).is_dir()]
    if split == "train" and not present:
        return base
    found = f"it has {', '.join(present)}" if present else "it has no folder for any split"
    raise UserError(
        f"no split {split!r} in {base} ({found}); expected the folder {base / split}. Make it, or "
        "name another one in data.train_split or data.test_split."
    )


def _listing(folder: epath.Path) -> tuple[list[str], list[epath.Path]]:
    """Image files and folders directly in `folder`, sorted, without hidden ones.

    Raises:
        UserError: if the folder cannot be read. It is never left out: which image is which number
            would depend on who may read what.
    """
    try:
        entries = sorted((e for e in folder.iterdir() if not e.name.startswith(".")), key=str)
    except OSError as error:
        raise UserError(
            f"cannot read the folder {shown(folder)} ({error.strerror or error}): give this user "
            "access to it, or move it out of the data set"
        ) from error
    files, folders = [], []
    for entry in entries:
        image = entry.suffix.lower() in IMAGE_SUFFIXES
        if image and not _is_something_else(entry):
            files.append(str(entry))
        elif entry.is_dir():
            folders.append(entry)
    return files, folders


def _is_something_else(path: epath.Path) -> bool:
    """Whether what is called like an image is a folder, or a pipe that nobody would ever fill.

    A link that leads nowhere, and a file that may not be read, count as images, as bad ones.
    """
    if "://" in str(path):  # there are only files, and asking takes a round trip each
        return False
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def _walk(folder: epath.Path, above: tuple[str, ...] = ()) -> list[str]:
    """Image files at any depth; a link back to a folder above is not followed again."""
    here = os.path.realpath(folder) if "://" not in str(folder) else str(folder)
    if here in above:
        logging.warning("%s links to a folder that holds it: it is left out", shown(folder))
        return []
    files, folders = _listing(folder)
    for inner in folders:
        files += _walk(inner, (*above, here))
    return files
