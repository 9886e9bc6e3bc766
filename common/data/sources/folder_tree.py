"""Listings of a tree of folders: the images in it, and counts of everything else."""

import collections
import os
import stat

from absl import logging
from etils import epath

from common.data.images import decoding
from common.errors import UserError

# The extensions that runs read before there was `readable_suffixes`.
_LEGACY_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm",
)  # fmt: skip
# What operating systems and network disks leave among a user's folders and files.
_JUNK_FOLDERS = {
    "__macosx", "@eadir", "#recycle", "@recycle", "$recycle.bin", "system volume information",
    "lost+found", "__pycache__",
}  # fmt: skip
_JUNK_FILES = {"thumbs.db", "desktop.ini"}


class Tree:
    """Folders, each listed once.

    Args:
        legacy: list what older runs did: system folders too, and only `_LEGACY_SUFFIXES`.

    Attributes:
        suffixes: file name extensions of images.
        left_out: counts of what a walk came across that is not an image, by its description.
    """

    def __init__(self, legacy: bool = False) -> None:
        self.suffixes = _LEGACY_SUFFIXES if legacy else decoding.readable_suffixes()
        self.left_out: collections.Counter[str] = collections.Counter()
        self._junk = set() if legacy else _JUNK_FOLDERS
        self._listings: dict[str, tuple[list[str], list[epath.Path], list[str]]] = {}

    def files(self, folder: epath.Path) -> list[str]:
        """Image files directly in a folder, sorted, without hidden ones."""
        return self._listing(folder)[0]

    def folders(self, folder: epath.Path) -> list[epath.Path]:
        """Folders directly in a folder, sorted, without hidden ones and those of the system."""
        return self._listing(folder)[1]

    def with_images(self, folder: epath.Path) -> list[epath.Path]:
        """Of the folders directly in a folder those that hold an image, at any depth."""
        return [inner for inner in self.folders(folder) if self._has_image(inner)]

    def walk(self, folder: epath.Path, above: tuple[str, ...] = ()) -> list[str]:
        """Image files at any depth; a link back to a folder above is not followed again."""
        here = _real(folder)
        if here in above:
            logging.warning("%s links to a folder that holds it: it is left out", shown(folder))
            return []
        self.count_others(folder)
        found = list(self.files(folder))
        for inner in self.folders(folder):
            found += self.walk(inner, (*above, here))
        return found

    def count_others(self, folder: epath.Path) -> None:
        """Counts as left out what lies directly in a folder and is neither image nor folder."""
        self.left_out.update(self._listing(folder)[2])

    def left_out_in_words(self) -> str:
        """E.g. "3 .csv, 12 .heic", or "" where nothing was left out."""
        parts = (f"{n:,} {plural(what, n)}" for what, n in sorted(self.left_out.items()))
        heif = any(suffix in self.left_out for suffix in decoding.HEIF)
        return ", ".join(parts) + (" (for HEIC: pip install pillow-heif)" if heif else "")

    def _has_image(self, folder: epath.Path, above: tuple[str, ...] = ()) -> bool:
        here = _real(folder)
        if here in above:
            return False
        return self.has_image_directly(folder) or any(
            self._has_image(inner, (*above, here)) for inner in self.folders(folder)
        )

    def has_image_directly(self, folder: epath.Path) -> bool:
        """Whether an image lies directly in a folder, at the price of a listing only up to it."""
        if str(folder) in self._listings:
            return bool(self.files(folder))
        try:
            return any(map(self._is_image, folder.iterdir()))
        except OSError:
            return bool(self.files(folder))  # raises the error in words

    def _is_image(self, entry: epath.Path) -> bool:
        name = entry.name
        known = not name.startswith(".") and entry.suffix.lower() in self.suffixes
        return known and not _is_something_else(entry)

    def _listing(self, folder: epath.Path) -> tuple[list[str], list[epath.Path], list[str]]:
        """Images, folders, and descriptions of the rest.

        Raises:
            UserError: if the folder cannot be read. It is never left out: the numbers of the
                images would depend on the permissions of whoever runs this.
        """
        if str(folder) in self._listings:
            return self._listings[str(folder)]
        try:
            entries = sorted((e for e in folder.iterdir() if not e.name.startswith(".")), key=str)
        except OSError as error:
            raise UserError(
                f"cannot read the folder {shown(folder)} ({error.strerror or error}): give this "
                "user access to it, or move it out of the dataset"
            ) from error
        files, folders, others = [], [], []
        for entry in entries:
            name, suffix = entry.name.lower(), entry.suffix.lower()
            if self._is_image(entry):
                files.append(str(entry))
            elif entry.is_dir():
                if name in self._junk:
                    others.append(f"folder {entry.name}")
                else:
                    folders.append(entry)
            elif name not in _JUNK_FILES:
                others.append(suffix or "file without an extension")
        self._listings[str(folder)] = files, folders, others
        return files, folders, others


def first_few(names: list[str] | tuple[str, ...], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(shown(name) for name in names[:most]) + more


def plural(what: str, n: int) -> str:
    """The plural of `what` unless n is 1, on its first word; file extensions stay as they are."""
    if n == 1 or what.startswith("."):
        return what
    noun, space, rest = what.partition(" ")
    return noun + ("es" if noun.endswith("s") else "s") + space + rest


def shown(path: str | epath.PathLike) -> str:
    """A path for a message of one line: a name may hold newlines, or not be text."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def _real(folder: epath.Path) -> str:
    return os.path.realpath(folder) if "://" not in str(folder) else str(folder)


def _is_something_else(path: epath.Path) -> bool:
    """Whether something with an image's extension is a folder, or a pipe that nobody writes to.

    A broken link, and a file that may not be read, count as images: as damaged ones.
    """
    if "://" in str(path):  # there are only files, and asking takes a round trip each
        return False
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False
