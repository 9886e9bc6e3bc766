"""Writing whole files, on disks and in object stores.

An object store (`gs://...`) can neither append nor rename, but replaces a whole object at once; a
disk can rename, and a write to it may be torn.
"""

import os
from collections.abc import Callable

from etils import epath


def is_remote(path: str | epath.PathLike) -> bool:
    """Whether `path` is in an object store."""
    return "://" in os.fspath(path)


def write_text(path: epath.Path, text: str) -> None:
    """Writes a file that is, at any moment, whole: the old one or the new one."""
    _write(path, lambda target: target.write_text(text))


def write_bytes(path: epath.Path, data: bytes) -> None:
    """`write_text` of bytes."""
    _write(path, lambda target: target.write_bytes(data))


def _write(path: epath.Path, write: Callable[[epath.Path], object]) -> None:
    if is_remote(path):
        write(path)
        return
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    temporary.replace(path)
