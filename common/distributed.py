"""Several processes as one run, and several processes of this machine playing a pod.

    python -m common.distributed --processes=2 --devices=2 -- --config=... --workdir=...

starts `main.py` that many times, each with so many simulated CPU devices, and passes signals on.
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
from types import FrameType
from typing import IO

import jax

from common.errors import UserError
from common.train.preemption import TOLD

# Running, finished, told to stop, interrupted while Python was ending, which handles no signal.
_FINE = (None, 0, *TOLD, -signal.SIGINT)
_PATIENCE = 10.0  # seconds for process 0 to say itself what another one has said


def start(coordinator: str = "") -> None:
    """Joins the other processes of the run; call it before anything touches a device.

    Args:
        coordinator: "HOST:PORT,COUNT,INDEX": where process 0 listens, the number of processes, and
            which of them this is. "" where JAX finds out by itself: Cloud TPU, Slurm, GKE, MPI.

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


def _last_line(log: IO[str]) -> str:
    log.seek(0)
    return (log.read().rstrip().splitlines() or [""])[-1]


def simulate(processes: int, devices: int, arguments: list[str]) -> int:
    """Runs `main.py` in several processes on this machine's CPU until all of them end.

    Process 0 alone speaks.

    Args:
        processes: how many.
        devices: simulated devices of each.
        arguments: of `main.py`.

    Returns:
        Exit status of process 0, or of the first that failed: the others are then stopped, and what
        it said is shown.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    main = pathlib.Path(__file__).resolve().parents[1] / "main.py"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    children, logs = [], []
    for i in range(processes):
        command = [sys.executable, str(main), *arguments]
        command.append(f"--coordinator=127.0.0.1:{port},{processes},{i}")
        logs.append(tempfile.TemporaryFile("w+") if i else None)  # noqa: SIM115
        children.append(subprocess.Popen(command, env=environment, stdout=logs[i], stderr=logs[i]))

    def forward(number: int, frame: FrameType | None) -> None:
        for child in children:
            child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    failed, statuses = None, [None]
    try:
        while None in statuses:
            statuses = [child.poll() for child in children]  # those of the last to end as well
            failed = next((i for i, s in enumerate(statuses) if s not in _FINE), None)
            if failed is not None:
                if failed and _last_line(logs[failed]).startswith("error: "):
                    # a mistake of the user, which process 0 is about to find as well
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        if children[0].wait(timeout=_PATIENCE) == statuses[failed]:
                            failed = 0
                break
            time.sleep(0.1)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
            child.wait()
    if failed:  # process 0 has spoken for itself
        logs[failed].seek(0)
        print(f"process {failed}:\n{logs[failed].read()[-4000:]}", file=sys.stderr)
    for log in logs[1:]:
        log.close()
    first = failed if failed is not None else 0
    return children[first].returncode


def _main() -> None:
    parser = argparse.ArgumentParser(description="Several processes of this machine as one run.")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=2, help="of each process")
    parser.add_argument("arguments", nargs="+", help="-- and then the arguments of main.py")
    options = parser.parse_args()
    sys.exit(simulate(options.processes, options.devices, options.arguments))


if __name__ == "__main__":
    _main()
