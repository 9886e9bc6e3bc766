"""Helpers of the benchmarks: programs timed in turns, and tables that name the hardware."""

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax


def devices(count: int = 8) -> None:
    """Simulates `count` devices on machines without accelerators. Call before JAX starts."""
    if jax.config.jax_platforms in (None, "cpu"):
        jax.config.update("jax_num_cpu_devices", count)


def seconds(programs: dict[str, Callable[[], Any]], repeats: int = 5) -> dict[str, list[float]]:
    """Times programs in turns, so that other load on the machine affects all of them.

    Args:
        programs: each is called once before, and its result is waited for.
        repeats: turns.
    """
    for program in programs.values():
        jax.block_until_ready(program())
    found: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            begin = time.perf_counter()
            jax.block_until_ready(program())
            found[name].append(time.perf_counter() - begin)
    return found


def milliseconds(times: Sequence[float]) -> str:
    """Median and range."""
    low, middle, high = (1e3 * f(times) for f in (min, statistics.median, max))
    digits = 0 if middle >= 100 else 2
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def ratio(times: Sequence[float], reference: Sequence[float]) -> float:
    """Median over turns of the ratio within a turn."""
    return statistics.median(a / b for a, b in zip(times, reference, strict=True))


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a Markdown table under a line with hardware and date."""
    print(f"\n{title} ({hardware()}; {datetime.date.today()})\n")
    print("| " + " | ".join(columns) + " |")
    print("| --- |" + " --: |" * (len(columns) - 1))
    for row in rows:
        print("| " + " | ".join("-" if x is None else str(x) for x in row) + " |", flush=True)


def hardware() -> str:
    """Device, cores, load of the machine and version of JAX."""
    device = jax.devices()[0]
    kind = platform.machine() if device.platform == "cpu" else device.device_kind
    if device.platform == "cpu" and os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            names = (line.partition(":")[2].strip() for line in lines if "model name" in line)
            kind = next(names, kind)
    return f"{kind}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}, jax {jax.__version__}"
