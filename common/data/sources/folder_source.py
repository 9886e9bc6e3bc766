"""A tree of image files, in class folders or not."""

import dataclasses
import hashlib
import os

import numpy as np
from etils import epath

from common.data.sources import folder_layout
from common.data.sources.base import Source
from common.data.sources.folder_tree import shown
from common.errors import UserError
from common.run import files


@dataclasses.dataclass(kw_only=True)
class FolderSource(Source):
    """Files on disk.

    Attributes:
        paths: object [num_examples], of str.
        base: folder that the user named; names are given below it.
        root: folder of the split.
    """

    paths: np.ndarray
    base: str
    root: str

    def read(self, ids):
        # as bytes, because a name need not be valid UTF-8
        paths = [os.fsencode(path) for path in self.paths[ids]]
        return np.array(paths, object), self.labels_of(ids)

    def describe(self, index):
        return shown(self.paths[index])

    def names(self, ids):
        base = self.base.rstrip("/") + "/"
        return np.array([str(path).removeprefix(base) for path in self.paths[ids]])

    @property
    def listing(self):
        # of the names below the root: the whole folder may move
        text = "\0".join(os.path.relpath(p, self.root) for p in self.paths)
        return hashlib.sha256(os.fsencode(text)).hexdigest()[:16]


def open_folder(path: str, split: str, labels: str = "auto") -> Source:
    """Opens a tree of image files, which `folder_layout.read` reads.

    Args:
        path: folder, local or remote.
        split: name of the split.
        labels: see `folder_layout.read`.

    Returns:
        A source of kind "path", in sorted order.

    Raises:
        UserError: no such folder, and what `folder_layout.read` raises.
    """
    base = _base(path)
    reading = folder_layout.read(base, split, labels)
    n, names = len(reading.paths), reading.class_names
    return FolderSource(
        name=base.name, split=split, kind="path", num_examples=n, num_classes=len(names),
        class_names=names, labels=np.array(reading.classes, np.int32), account=reading.account,
        paths=np.array(reading.paths, object), base=str(base), root=str(reading.root),
    )  # fmt: skip


def class_names(path: str, split: str, labels: str) -> tuple[str, ...]:
    """The class names of a split; empty where nothing is labelled."""
    return folder_layout.class_names(_base(path), split, labels)


def test_split(path: str) -> str:
    """See `folder_layout.test_split`."""
    return folder_layout.test_split(_base(path))


def _base(path: str) -> epath.Path:
    base = files.path(path)
    if not base.is_dir():
        raise UserError(
            f"no folder {path}; expected a folder of image files: --config.data.source=folder:PATH"
        )
    return base
