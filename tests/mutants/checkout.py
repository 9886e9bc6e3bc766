"""Copies of the working tree."""

import os
import pathlib
import shutil
import subprocess
from collections.abc import Iterable, Iterator

NOT_SOURCE = ("__pycache__", "build", "runs", "site")  # as in .gitignore


def copy_checkout(root: pathlib.Path, target: pathlib.Path) -> None:
    """Copies the working tree: what git has or would add; else what is neither hidden nor built."""
    for name in _with_git(root) or _without_git(root):
        if (root / name).is_file():  # and has not been deleted
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)


def _with_git(root: pathlib.Path) -> Iterable[str]:
    if not (root / ".git").exists() or not shutil.which("git"):
        return ()
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others"]
    found = subprocess.run([*command, "--exclude-standard"], capture_output=True, check=False)
    return [os.fsdecode(name) for name in found.stdout.split(b"\0") if name]


def _without_git(root: pathlib.Path) -> Iterator[str]:
    for folder, inner, files in os.walk(root):
        here = pathlib.Path(folder)
        environments = {name for name in inner if (here / name / "pyvenv.cfg").exists()}
        inner[:] = {x for x in inner if not x.startswith((".", *NOT_SOURCE))} - environments
        yield from (str((here / x).relative_to(root)) for x in files if not x.startswith("."))
