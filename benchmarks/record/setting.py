"""The inputs of every item: output folder, data and sizes; and how processes are started."""

import dataclasses
import os
import pathlib
import re
import sys

from benchmarks.record.steps import Sizes
from common.cli import command_line

LOGS = "logs"  # folder for the output of the processes
_ERROR = re.compile(r"(\w[\w.]*(Error|Exception|Interrupt)|error|Fatal Python error)\b")
ROOT = pathlib.Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Setting:
    """The setting of one call.

    Attributes:
        out: folder of the records; runs and profiles go there too.
        data: folder with shards of CIFAR-10; "": none.
        sizes: of networks, batches and runs.
        catalogue: module whose `every(sizes)` lists the items; tests have their own.
    """

    out: pathlib.Path
    data: str
    sizes: Sizes
    catalogue: str = "benchmarks.record.items"

    def main_py(self, *arguments: str) -> list[str]:
        """The command of a process that trains or evaluates."""
        return [sys.executable, str(ROOT / "main.py"), f"--compile_cache={cache()}", *arguments]


def cache() -> str:
    """Folder of compiled programs, for all processes and for the next call."""
    return os.environ.get("JAX_COMPILATION_CACHE_DIR") or command_line.CACHE


def hardware(device: str = "", jax_version: str = "") -> str:
    """A description of the machine; by default of this process's first device."""
    if not device:
        import jax

        device, jax_version = jax.devices()[0].device_kind, jax.__version__
    return f"{device}, {os.cpu_count()} cores, jax {jax_version}"


# Asks Linux for SIGTERM when the parent ends, and executes the command. Not in `preexec_fn`: that
# runs Python in a fork of a process with JAX's threads, which may deadlock.
_BOUND = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""


def bound(command: list[str]) -> list[str]:
    """A command that gets SIGTERM, on which a training run saves, when this process is killed."""
    if sys.platform != "linux":
        return command
    return [sys.executable, "-I", "-S", "-c", _BOUND, str(os.getpid()), *command]


def last_words(text: str) -> str:
    """The line of a process's output that says what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.match(line)]
    return (errors or lines or ["no output"])[-1][:300]


def environment() -> dict[str, str]:
    """The environment of child processes, which allocate device memory only as needed."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and "cpu" not in platforms.split(","):
        platforms += ",cpu"  # the reference for what a device computes
    return (
        os.environ
        | ({"JAX_PLATFORMS": platforms} if platforms else {})
        | {
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": os.environ.get(
                "XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9"
            ),
            "JAX_TRACEBACK_FILTERING": "off",  # else its notice is the last line of an error
            "PYTHONFAULTHANDLER": "1",
            "PYTHONPATH": os.pathsep.join(
                filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])
            ),
        }
    )
