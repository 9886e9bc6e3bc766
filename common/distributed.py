"""Several processes as one run, and a pod simulated by several processes on this machine.

    python -m common.distributed --processes=2 --devices=2 -- --config=... --workdir=...

starts `main.py` twice, each with two simulated CPU devices, and forwards signals to both.
"""

import argparse
import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from types import FrameType

import jax

from common.errors import UserError

# Exit statuses of a run that a signal stopped and that has saved its state, as a shell reports
# them: SIGTERM, Ctrl-C.
STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT)
# Running, finished, stopped, interrupted during Python's shutdown, when no handler is left.
_FINE = (None, 0, *STOPPED, -signal.SIGINT)
_PATIENCE = 10.0  # seconds for process 0 to report a mistake that another process has found


def start(coordinator: str = "") -> None:
    """Joins the other processes of the run; call it before anything touches a device.

    Args:
        coordinator: "HOST:PORT,COUNT,INDEX": the address of process 0, the number of processes,
            and the index of this one. "" where JAX detects them: Cloud TPU, Slurm, GKE, MPI.

    Raises:
        UserError: if `coordinator` has another form, or is missing where it is needed.
    """
    if not coordinator:
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise UserError(
                f"--distributed found no cluster here ({error}): on Cloud TPU VMs it finds the pod "
                "by itself; elsewhere give --coordinator=HOST:PORT,COUNT,INDEX"
            ) from error
        return
    match = re.fullmatch(r"(.+:\d+),(\d+),(\d+)", coordinator)
    if not match or int(match[3]) >= int(match[2]):
        raise UserError(
            f"--coordinator={coordinator}: write HOST:PORT,COUNT,INDEX with INDEX from 0 to "
            "COUNT - 1, e.g. 10.0.0.2:8476,4,0"
        )
    jax.distributed.initialize(match[1], int(match[2]), int(match[3]))


def simulate(processes: int, devices: int, arguments: list[str]) -> int:
    """Runs `main.py` in several processes on this machine's CPU until all of them have ended.

    Only process 0 writes to the terminal.

    Args:
        processes: how many.
        devices: simulated devices of each.
        arguments: of `main.py`.

    Returns:
        Exit status of process 0, or of the first that failed: the others are then killed, and the
        output of the failed one is shown.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    main = pathlib.Path(__file__).resolve().parents[1] / "main.py"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    children: list[subprocess.Popen] = []
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(processes)]
        stack.callback(_kill, children)
        for i in range(processes):
            command = [sys.executable, str(main), *arguments]
            command.append(f"--coordinator={address},{processes},{i}")
            out = logs[i] if i else None
            children.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out))

        def forward(number: int, frame: FrameType | None) -> None:
            for child in children:
                child.send_signal(number)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, forward)
        failed = _first_failure(children)
        if failed:  # process 0 has reported its own failure
            logs[failed].seek(0)
            output = logs[failed].read()
            if not _reported_by_first(children, failed, output):
                print(f"process {failed}:\n{output[-4000:]}", file=sys.stderr)
        return children[failed].returncode


def _first_failure(children: Sequence[subprocess.Popen]) -> int:
    """Index of the first process that fails; 0 when all have ended and none failed."""
    while True:
        statuses = [child.poll() for child in children]
        failed = [i for i, status in enumerate(statuses) if status not in _FINE]
        if failed or None not in statuses:
            return failed[0] if failed else 0
        time.sleep(0.1)


def _reported_by_first(children: Sequence[subprocess.Popen], failed: int, output: str) -> bool:
    """Whether process 0 ends in the same way as one that found a mistake of the user."""
    lines = output.rstrip().splitlines()
    if not lines or not lines[-1].startswith("error: "):
        return False
    with contextlib.suppress(subprocess.TimeoutExpired):
        return children[0].wait(_PATIENCE) == children[failed].returncode
    return False


def _kill(children: Sequence[subprocess.Popen]) -> None:
    for child in children:
        child.kill()  # nothing happens to one that has ended
        child.wait()


def _main() -> None:
    parser = argparse.ArgumentParser(description="Several processes of this machine as one run.")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=2, help="of each process")
    parser.add_argument("arguments", nargs="+", help="-- and then the arguments of main.py")
    options = parser.parse_args()
    sys.exit(simulate(options.processes, options.devices, options.arguments))


if __name__ == "__main__":
    _main()
