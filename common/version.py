"""Which code this is: its version and, in a checkout, the git commit."""

import functools
import pathlib
import subprocess

VERSION = "0.1.0"  # pyproject.toml reads it from here
# Address to clone this code from, decided here. The notebook, README.md, CITATION.cff
# (repository-code), pyproject.toml ([project.urls]) and mkdocs.yml (repo_url) repeat it, and
# tests/test_version.py holds them to it. The value below means: there is none yet.
REPOSITORY = "ADDRESS-OF-THE-REPOSITORY"

_ROOT = pathlib.Path(__file__).resolve().parents[1]


@functools.cache
def commit(root: pathlib.Path = _ROOT) -> str | None:
    """The commit of the checkout, with "-dirty" behind it where tracked files were changed.

    Args:
        root: directory of the checkout.

    Returns:
        12 hexadecimal digits, or None where the code is not in a checkout of its own (installed
        code may lie in somebody else's) or git does not answer.
    """
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--abbrev=12"]
    try:
        found = subprocess.run(
            [*command, "--dirty"], capture_output=True, text=True, check=True, timeout=5
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def fields() -> dict[str, str | None]:
    """`version` and `commit`, as they stand in `summary.json` and `export.json`."""
    return {"version": VERSION, "commit": commit()}


def in_words() -> str:
    """E.g. "0.1.0 (commit 0123456789ab)"."""
    return VERSION + (f" (commit {commit()})" if commit() else "")
