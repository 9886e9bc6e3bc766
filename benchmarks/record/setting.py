"""What every item is given: where it writes, where its data are, how large it is."""

import dataclasses
import os
import pathlib
import sys

from benchmarks.record.steps import Sizes
from common import command_line

ROOT = pathlib.Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Setting:
    """Of one call.

    Attributes:
        out: folder of the records; runs and profiles go into it too.
        data: folder of CIFAR-10's shards; "": there are none.
        sizes: how large everything is.
        catalogue: module whose `every(sizes)` lists the items; tests have one of their own.
    """

    out: pathlib.Path
    data: str
    sizes: Sizes
    catalogue: str = "benchmarks.record.items"

    def main_py(self, *arguments: str) -> list[str]:
        """The command of a process that trains or evaluates."""
        return [sys.executable, str(ROOT / "main.py"), f"--compile_cache={cache()}", *arguments]


def cache() -> str:
    """Folder of compiled programs, for all processes of the kit and for the next call."""
    return os.environ.get("JAX_COMPILATION_CACHE_DIR") or command_line.CACHE


def environment() -> dict[str, str]:
    """Of every process that is started: memory is taken as it is needed, for several share it."""
    return os.environ | {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
    }
