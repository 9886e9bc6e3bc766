"""Writing whole files, on disks and in object stores.

An object store (`gs://...`) can neither append nor rename, but replaces a whole object at once; a
disk can rename, and a write to it may be torn.
"""

import io
import os
from collections.abc import Callable
from typing import IO

from etils import epath


def path(text: str | epath.PathLike) -> epath.Path:
    """A path that a user gave; a shell leaves the `~` of `--workdir=~/runs` to us."""
    return epath.Path(text).expanduser()


def is_remote(path: str | epath.PathLike) -> bool:
    """Whether `path` is in an object store."""
    return "://" in os.fspath(path)


def write_text(path: epath.Path, text: str) -> None:
    """Writes a file that is, at any moment, whole: the old one or the new one."""
    _whole(path, lambda target: target.write_text(text))


def write_bytes(path: epath.Path, data: bytes) -> None:
    """`write_text` of bytes."""
    _whole(path, lambda target: target.write_bytes(data))


def write_binary(path: epath.Path, write: Callable[[IO[bytes]], object]) -> None:
    """As `write_text`, of what `write(file)` writes; the whole is in memory for an object store."""
    if is_remote(path):
        buffer = io.BytesIO()
        write(buffer)
        path.write_bytes(buffer.getvalue())
        return

    def through_file(target: epath.Path) -> None:
        with target.open("wb") as file:
            write(file)

    _whole(path, through_file)


def _whole(path: epath.Path, write: Callable[[epath.Path], object]) -> None:
    if is_remote(path):
        write(path)
        return
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    temporary.replace(path)
