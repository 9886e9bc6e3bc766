"""Writing whole files, on disks and in object stores.

An object store (`gs://...`) can neither append nor rename, but replaces a whole object at once; a
disk can rename, and a write to it may be torn.
"""

import io
import os
from collections.abc import Callable
from typing import IO

from etils import epath


def is_remote(path: str | epath.PathLike) -> bool:
    """Whether `path` is in an object store."""
    return "://" in os.fspath(path)


def write_text(path: epath.Path, text: str) -> None:
    """Writes a file that is, at any moment, whole: the old one or the new one."""
    write_bytes(path, text.encode())


def write_bytes(path: epath.Path, data: bytes) -> None:
    """`write_text` of bytes."""
    write_binary(path, lambda file: file.write(data))


def write_binary(path: epath.Path, write: Callable[[IO[bytes]], object]) -> None:
    """As `write_text`, of what `write(file)` writes; the whole is in memory for an object store."""
    if is_remote(path):
        buffer = io.BytesIO()
        write(buffer)
        path.write_bytes(buffer.getvalue())
        return
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        write(file)
    temporary.replace(path)
