"""Writing whole files, on disks and in object stores.

An object store (`gs://...`) can neither append nor rename, but replaces a whole object at once; a
disk can rename, and a write to it may be torn.
"""

import os

from etils import epath


def is_remote(path: str | epath.PathLike) -> bool:
    """Whether `path` is in an object store."""
    return "://" in os.fspath(path)


def write_text(path: epath.Path, text: str) -> None:
    """Writes a file that is, at any moment, whole: the old one or the new one."""
    if is_remote(path):
        path.write_text(text)
        return
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)
