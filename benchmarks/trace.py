"""Where the device's time goes in a training step: convolutions, norms, augmentation, idle ...

    python -m benchmarks.trace [--method=simclr] [--width=64] [--batch=512] [--dtype=bfloat16]

The step of `benchmarks/resident.py`, one step a dispatch; with another `--size` than 32 that of
`benchmarks/train_step.py`, whose images are already on the device (`--size=224 --depth=50`).

XLA puts many GPU kernels into CUDA graphs, and a profile then does not name the operation of a
kernel: library calls are then "other products", those of the loss too. So graphs are off here
without `--graphs`; the kernels are the same, but launching them takes longer (idle). Steps in a
loop on the device (`steps_per_dispatch`) would be such a graph.
"""

import argparse
import contextlib
import importlib.util
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import jax
from ml_collections import ConfigDict

from benchmarks import resident, scaling, side_by_side, train_step
from benchmarks.hlo_parts import AROUND, CONVOLUTIONS, COPIES, OTHER, PRODUCTS, ROWS, categories
from benchmarks.xplane import Event, read
from common.errors import UserError

IDLE = "idle"
WARM_UP = 2  # steps
# Library kernels, for profiles that do not name the operation; the first match counts.
KERNELS = (
    (r"fprop|dgrad|wgrad|implicit_gemm|convolve|winograd|cudnn", CONVOLUTIONS),
    (r"gemm|cublas|cutlass|nvjet", PRODUCTS),
    (r"memcpy|memset", COPIES),
)


def _plain(name: str) -> str:
    """XLA's name for the kernel of an instruction: loop_add_fusion_12 for loop_add_fusion.12."""
    return re.sub(r"\W", "_", name)


def _category(event: Event, of: dict[str, str]) -> str:
    """The category of an event, by its instruction, else by its kernel.

    Args:
        event: the event.
        of: as `categories` gives it, names made `_plain`.
    """
    # a second kernel of an instruction has the suffix "__1"
    names = (event.name, event.kernel, re.sub(r"__\d+$", "", event.kernel))
    found = [of[name] for name in map(_plain, names) if name in of]
    # the kernels of a CUDA graph may have the name of the call that runs it
    inner = next((category for category in found if category != AROUND), None)
    if inner:
        return inner
    for pattern, category in KERNELS:
        if re.search(pattern, event.kernel, re.IGNORECASE):
            return category
    return found[0] if found else OTHER


def summary(
    events: Iterable[Event], of: dict[str, str], steps: int = 1
) -> list[tuple[str, float, float]]:
    """Where the time from the first event's start to the last one's end went.

    Every instant counts once. An operation around others, such as a loop, counts where none of
    them runs (as "other"). Between others that run at once, on several streams or threads, an
    instant is shared out evenly. Idle is when nothing runs, also between two steps.

    Args:
        events: of one device.
        of: as `categories` gives it.
        steps: that the events are of.

    Returns:
        Category, milliseconds a step, share in [0, 1], for all `hlo_parts.ROWS` and "idle". The
        shares sum to 1.
    """
    of = {_plain(name): category for name, category in of.items()}
    edges = []
    for event in events:
        category = _category(event, of)
        edges += [(event.start, 1, category), (event.start + event.duration, -1, category)]
    edges.sort(key=lambda edge: edge[0])
    running: Counter[str] = Counter()
    times: Counter[str] = Counter()
    last = edges[0][0]
    for time, change, category in edges:
        inner = {name: n for name, n in running.items() if n and name != AROUND}
        inner = inner or {OTHER if running[AROUND] else IDLE: 1}
        for name, n in inner.items():
            times[name] += (time - last) * n / sum(inner.values())
        running[category] += change
        last = time
    span = last - edges[0][0]
    return [(name, times[name] / steps / 1e6, times[name] / span) for name in (*ROWS, IDLE)]


@contextlib.contextmanager
def _own_names() -> Iterator[None]:
    """Cached programs with names of other code are not used: names become part of the key."""
    setting = "jax_compilation_cache_include_metadata_in_key"
    before = getattr(jax.config, setting)
    jax.config.update(setting, True)
    try:
        yield
    finally:
        jax.config.update(setting, before)


def profile(
    c: ConfigDict, directory: str | None = None, steps: int = 5
) -> list[tuple[str, float, float]]:
    """Compiles the step of a config, warms up, and traces a few dispatches.

    Args:
        c: of `resident.config` (`data.augment_on="device"`), or of `scaling.config`.
        directory: for the profile, to look at in xprof; None keeps none.
        steps: dispatches, each of `c.steps_per_dispatch`.

    Returns:
        Rows as of `summary`.

    Raises:
        UserError: if the host does half of the augmentation.
    """
    if c.data.augment_on == "both":
        raise UserError('data.augment_on="both" cannot be traced here: use "device" or "host"')
    with _own_names():
        program, compiled = (resident if c.data.augment_on == "device" else scaling).ready(c)
    for _ in range(WARM_UP):
        jax.block_until_ready(program())
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it would slow the host down
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(directory or folder, profiler_options=options):
            for _ in range(steps):
                metrics = program()
            jax.block_until_ready(metrics)
        events = read(directory or folder)
    return summary(events, categories(compiled.as_text()), steps * c.steps_per_dispatch)


def no_graphs() -> None:
    """Turns XLA's CUDA graphs off; call before JAX starts."""
    if any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
        given = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{given} --xla_gpu_enable_command_buffer="


def config(flags: argparse.Namespace) -> ConfigDict:
    """The config: images of 32 pixels in device memory, larger ones from the host."""
    if flags.size != 32:
        return train_step.config(flags, flags.width)
    flags.steps = 1  # a dispatch
    c = resident.config(flags)
    c.model.depth = flags.depth
    return c


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=["simclr", "moco"], default="simclr")
    for name, value in (("width", 64), ("batch", 512), ("size", 32), ("depth", 18), ("traced", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--images", type=int, default=resident.IMAGES)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--graphs", action="store_true", help="CUDA graphs as in training")
    parser.add_argument("--directory", help="keep the profile there, e.g. for xprof")
    flags = parser.parse_args(arguments)
    if not flags.graphs:
        no_graphs()
    rows = profile(config(flags), flags.directory, flags.traced)
    side_by_side.show(
        f"{flags.method}, ResNet-{flags.depth} of width {flags.width}, {flags.size} px, "
        f"batch {flags.batch}, {flags.dtype}",
        ["", "ms a step", "share"],
        [[name, f"{time:.2f}", f"{share:.1%}"] for name, time, share in rows],
    )


if __name__ == "__main__":
    main()
