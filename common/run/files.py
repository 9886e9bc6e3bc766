"""Writing whole files, on disks and in object stores.

An object store (`gs://...`) can neither append nor rename, but replaces a whole object at once; a
disk can rename, and a write to it may be torn.
"""

import errno
import io
import os
from collections.abc import Callable
from typing import IO

from etils import epath

from common.errors import UserError

# What TensorFlow, fsspec and the stores' own clients raise comes from these packages.
_CLIENTS = ("tensorflow", "fsspec", "gcsfs", "s3fs", "google", "aiohttp", "botocore", "tensorstore")


def path(text: str | epath.PathLike) -> epath.Path:
    """A path that a user gave; a shell leaves the `~` of `--workdir=~/runs` to us."""
    return epath.Path(text).expanduser()


def several(text: str) -> list[str]:
    """The paths in a list with commas between them; a comma in the name of a file is none of these.

    Of a path that is not there, what is before the next comma.
    """
    parts, found = text.split(","), []
    while parts:
        joined = (",".join(parts[:n]).strip() for n in range(1, len(parts) + 1))
        there = (n for n, one in enumerate(joined, 1) if one and _is_there(one))
        n = next(there, 1)
        found.append(",".join(parts[:n]).strip())
        parts = parts[n:]
    return [one for one in found if one]


def _is_there(text: str) -> bool:
    try:
        return path(text).exists()
    except OSError:  # longer than names can be
        return False


def whole(source: str) -> str:
    """A `data.source` with the whole path of its folder, which means the same from anywhere."""
    kind, colon, where = source.partition(":")
    if kind not in ("folder", "shards") or not where or is_remote(where):
        return source
    return kind + colon + os.path.abspath(path(where))


def is_remote(path: str | epath.PathLike) -> bool:
    """Whether `path` is in an object store."""
    return "://" in os.fspath(path)


def reach(path: str) -> None:
    """Asks an object store for a path, whatever there is.

    Raises:
        UserError: if there is no client for it, or if it does not answer.
    """
    scheme = path.partition("://")[0]
    try:
        epath.Path(path).exists()
    except UserError:
        raise
    except Exception as error:  # of whatever client there is
        reason = " ".join(str(error).split())
        none = isinstance(error, (ImportError, KeyError, NotImplementedError))
        if none or type(error).__name__ == "UnimplementedError":
            raise UserError(
                f"no library here reads {scheme}:// ({reason}): give {path} as a directory, or as "
                "a gs:// path"
            ) from error
        raise UserError(_unreachable(path, reason)) from error


def in_one_line(error: Exception) -> str | None:
    """What a person needs to know of an error of a disk or a store; None of any other.

    Of a disk that is full, read-only or broken, or a store that does not answer.
    """
    reason = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in (
        errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO,
    ):  # fmt: skip
        return f"{reason}: make room or repair the disk, then give the same command again"
    if "://" in reason and type(error).__module__.partition(".")[0] in _CLIENTS:
        return _unreachable("an object store", reason)
    return None


def _unreachable(what: str, reason: str) -> str:
    return (
        f"cannot reach {what} ({reason}): check the name, the network and the credentials "
        "(`gcloud auth application-default login`), then give the same command again"
    )


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
