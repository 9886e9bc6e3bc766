"""Splits a folder into pieces that are small enough to transfer, and restores it from them.

    python -m benchmarks.pieces cut DIR PIECES [--mb=45]
    python -m benchmarks.pieces join PIECES DIR [--keep=STORE]

`cut` writes `NAME.000`, `NAME.001` ... and `NAME.json`, which has the digest of each, into PIECES;
NAME is that of the folder. `join` verifies them and restores the folder. Where not all can be
transferred at once, call `join` after each transfer with `--keep`, a folder that collects the
pieces: it prints which are missing, and restores the folder when all have arrived. For datasets
(`main.py --mode=prepare`) on their way to a machine, and for workdirs on their way back.
"""

import argparse
import hashlib
import io
import json
import lzma
import pathlib
import shutil
import sys
import tarfile
from collections.abc import Iterator, Sequence

from common.errors import UserError
from common.run import files

MB = 1_000_000
_PRESET = 3  # of xz: it compresses CIFAR-10's pixels to 0.77 of their size
_BLOCK = 1 << 20


def cut(directory: pathlib.Path, pieces: pathlib.Path, mb: float = 45) -> dict:
    """Writes a folder as pieces, and their index last.

    Args:
        directory: what is cut; its files are the same afterwards.
        pieces: where to; new or empty.
        mb: 1e6 bytes of a piece at most.

    Returns:
        The index: `name`, and `pieces`, a list of `{"file", "bytes", "sha256"}`.

    Raises:
        UserError: no such folder, nothing or a link in it, or pieces there already.
    """
    if not directory.is_dir() or not any(directory.iterdir()):
        raise UserError(f"{directory}: expected a folder with something in it, to cut into pieces")
    if linked := [p for p in directory.rglob("*") if p.is_symlink()]:
        raise UserError(
            f"{linked[0]} is a link, which may lead nowhere elsewhere: copy what it shows"
        )
    if pieces.resolve().is_relative_to(directory.resolve()):
        raise UserError(f"{pieces} lies in {directory}: give a folder outside for the pieces")
    if pieces.exists() and any(pieces.iterdir()):
        raise UserError(f"{pieces} is not empty: give a new folder for the pieces")
    size = int(mb * MB)
    if size < 1:
        raise UserError(f"--mb={mb:g}: expected more than 0")
    pieces.mkdir(parents=True, exist_ok=True)
    name, written = directory.resolve().name, []
    with (
        _Splitter(pieces, name, size, written) as splitter,
        lzma.open(splitter, "wb", preset=_PRESET) as packed,
        tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as archive,
    ):
        archive.add(directory, arcname=".", filter=_plain)
    index = {"name": name, "pieces": written}
    files.write_text(pieces / f"{name}.json", json.dumps(index, indent=1) + "\n")
    return index


def join(
    pieces: pathlib.Path, directory: pathlib.Path, keep: pathlib.Path | None = None
) -> list[str]:
    """Restores the folder, if all pieces have arrived.

    Args:
        pieces: a folder with the index and some or all pieces, of one folder that was cut.
        directory: what is made; must not exist, unless it was made of the same pieces.
        keep: where pieces of earlier calls are, and those of this one are copied.

    Returns:
        The pieces that are lacking; none, and the folder is there.

    Raises:
        UserError: no index, another one than before, a damaged piece, or `directory` is in use.
    """
    text, index = _index(pieces, keep)
    marker = directory / ".pieces.json"
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()  # an empty one may have been created beforehand
    if directory.exists() and not (marker.exists() and marker.read_text() == text):
        raise UserError(f"{directory} exists, and is not made of these pieces: give a new folder")
    if directory.exists():
        return []
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
        files.write_text(keep / f"{index['name']}.json", text)
    found, damaged = {}, []
    for piece in index["pieces"]:
        for place in filter(None, (keep, pieces)):
            path = place / piece["file"]
            if path.exists() and (fault := _fault(path, piece)):
                damaged.append((piece["file"], fault))
            elif path.exists():
                found[piece["file"]] = path
                break
        if keep and piece["file"] in found and found[piece["file"]].parent != keep:
            files.write_bytes(keep / piece["file"], found[piece["file"]].read_bytes())
    if faults := [fault for file, fault in damaged if file not in found]:
        raise UserError(faults[0])  # after keeping the valid pieces
    lacking = [p["file"] for p in index["pieces"] if p["file"] not in found]
    if not lacking:
        _unpack([found[p["file"]] for p in index["pieces"]], directory, text)
    return lacking


class _Splitter(io.RawIOBase):
    """A file that continues in the next one when it is full."""

    def __init__(self, pieces: pathlib.Path, name: str, size: int, written: list[dict]) -> None:
        self._pieces, self._name, self._size, self._written = pieces, name, size, written
        self._buffer = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:
        self._buffer += data
        while len(self._buffer) >= self._size:
            self._put(self._size)
        return len(data)

    def close(self) -> None:
        if self._buffer:
            self._put(len(self._buffer))
        super().close()

    def _put(self, size: int) -> None:
        data, self._buffer = bytes(self._buffer[:size]), self._buffer[size:]
        file = f"{self._name}.{len(self._written):03}"
        (self._pieces / file).write_bytes(data)
        print(f"{file}: {size / MB:,.1f} MB", file=sys.stderr)
        digest = hashlib.sha256(data).hexdigest()
        self._written.append({"file": file, "bytes": size, "sha256": digest})


class _Joined(io.RawIOBase):
    """Reads files as one."""

    def __init__(self, paths: list[pathlib.Path]) -> None:
        self._blocks = self._read(paths)
        self._left = b""

    @staticmethod
    def _read(paths: list[pathlib.Path]) -> Iterator[bytes]:
        for path in paths:
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    yield block

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        self._left = self._left or next(self._blocks, b"")
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Drops owners, so that the archive is the same everywhere, and the marker of `join`."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return None if member.name == "./.pieces.json" else member


def _index(pieces: pathlib.Path, keep: pathlib.Path | None) -> tuple[str, dict]:
    """Text and content of the index, from either folder."""
    found = {}
    for place in filter(None, (pieces, keep)):
        for path in sorted(place.glob("*.json")) if place.is_dir() else []:
            try:
                index = json.loads(path.read_text())
            except ValueError as error:
                raise UserError(f"{path} is damaged ({error}): carry it anew") from error
            if isinstance(index, dict) and isinstance(index.get("pieces"), list):
                found[path.read_text()] = index
    if not pieces.is_dir():
        raise UserError(f"no folder {pieces}: expected the pieces that have arrived")
    if not found:
        raise UserError(
            f"{pieces} holds no index, without which no piece can be checked: nothing was taken "
            "in; carry the NAME.json that `cut` wrote first, or with each piece"
        )
    if len(found) > 1:
        names = ", ".join(sorted(index["name"] for index in found.values()))
        raise UserError(
            f"the indices in {pieces} and --keep differ ({names}): expected one of one cut; give "
            "each its own folder"
        )
    return next(iter(found.items()))


def _fault(path: pathlib.Path, piece: dict) -> str:
    """What is wrong with a piece; "" if nothing."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    if digest.hexdigest() != piece["sha256"]:
        size = path.stat().st_size
        return (
            f"{path} is damaged: {size:,} bytes of {piece['bytes']:,}, and another digest than "
            "when it was cut: carry it anew"
        )
    return ""


def _unpack(paths: list[pathlib.Path], directory: pathlib.Path, index: str) -> None:
    """Unpacks next to the folder and renames, so that a folder that exists is complete."""
    beside = directory.with_name(directory.name + ".unpacking")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    with (
        lzma.open(io.BufferedReader(_Joined(paths))) as packed,
        tarfile.open(fileobj=packed, mode="r|") as archive,
    ):
        archive.extractall(beside, filter="data")
    (beside / ".pieces.json").write_text(index)
    beside.rename(directory)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 3 while pieces are missing."""
    parser = argparse.ArgumentParser("python -m benchmarks.pieces", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    for name, first, second in (("cut", "DIR", "PIECES"), ("join", "PIECES", "DIR")):
        sub = commands.add_parser(name)
        sub.add_argument("source", type=pathlib.Path, metavar=first, help="to read")
        sub.add_argument("target", type=pathlib.Path, metavar=second, help="to write")
    add = commands.choices["cut"].add_argument
    add("--mb", type=float, default=45, help="largest size of a piece, in 1e6 bytes (default 45)")
    add = commands.choices["join"].add_argument
    add("--keep", type=pathlib.Path, help="folder that collects pieces over more than one transfer")
    flags = parser.parse_args(argv)
    if flags.command == "cut":
        index = cut(flags.source, flags.target, flags.mb)
        total = sum(piece["bytes"] for piece in index["pieces"])
        print(f"{total / MB:,.1f} MB in {len(index['pieces'])} pieces: {flags.target}")
        return 0
    lacking = join(flags.source, flags.target, flags.keep)
    if lacking:
        print(f"pieces that are lacking: {', '.join(lacking)}", file=sys.stderr)
        return 3
    print(f"complete: {flags.target}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
