"""Compiles a config's train step for the devices of this machine, or for a TPU slice elsewhere.

libtpu contains the real compiler, which needs no more than a topology: memory, traffic and
collectives are those of a run on such a slice. Each slice is compiled in its own process, because
a fault in the compiler ends the process.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from common.data.feed import resident
from common.errors import UserError
from common.method import Method
from common.plan import collectives, traffic
from common.setup import Setup
from common.sharding import AXIS, local_rows, make_mesh
from common.train.prepare import Extent, prepare
from common.train.step import compile_step, cost

# What libtpu says of a program that does not fit; the second form counts no arguments.
_OUT_OF_MEMORY = re.compile(
    r"(?:[Uu]sed |HLO temporaries \()([\d.]+)([KMGT])\)?(?: of| exceeds available HBM) "
    r"\(?([\d.]+)([KMGT])(?: hbm|\))"
)
# What libtpu prints when it crashes: the check that failed, among other lines, or the signal.
_CHECK = re.compile(r"^F\d{4} .*?\] (.+)$", re.M)
_SIGNAL = re.compile(r"^\*\*\* (SIG\w+)", re.M)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Task:
    """What is compiled; it can be pickled for another process.

    Attributes:
        make_method: class of the method.
        config: of the run.
        extent: of the run.
        quick: compile for a described slice with the least effort.
    """

    make_method: Callable[[Setup], Method]
    config: ConfigDict
    extent: Extent
    quick: bool = False


def check(task: Task) -> None:
    """Builds the method for an abstract mesh; the devices here may be busy with a run.

    Raises:
        UserError: for a mistake in the config, before any time is spent on compiling.
    """
    whole = task.config.copy_and_resolve_references()
    whole.microbatch = 0  # which sizes are possible depends on the devices
    mesh: Any = AbstractMesh((1,), (AXIS,))  # only its size and axis are used
    prepare(task.make_method, whole, mesh, extent=task.extent)


def for_mesh(task: Task, mesh: Mesh, begins: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Compiles for a mesh; returns what the compiler reports, all of it for one device.

    Args:
        task: what to compile.
        mesh: the devices to compile for.
        begins: called when the config has passed its checks, before compiling.

    Returns:
        `devices`; `compile_seconds` of all processor cores (a busy machine takes longer);
        `arguments`, `temporaries`, `outputs`, `aliased` and `peak` in bytes; `flops` and
        `bytes_accessed` as XLA counts, `hbm_bytes` as `traffic` does; `collectives`, a list of
        (kind, bytes, group);
        or, when the program does not fit, `out_of_memory`: `{"peak": ..., "capacity": ...}`.
    """
    local_rows(mesh, task.config.batch_size)  # refuses a batch that cannot be split
    run = prepare(task.make_method, task.config, mesh, extent=task.extent)
    begins()
    begin = time.process_time()
    try:
        compiled = compile_step(run.method.train_step, run, _data(task))
    except jax.errors.JaxRuntimeError as error:
        if not (found := out_of_memory(str(error))):
            raise
        seconds = time.process_time() - begin
        return {"devices": mesh.size, "compile_seconds": seconds, "out_of_memory": found}
    seconds = time.process_time() - begin
    return describe(compiled, mesh.size, run.setup.microbatches) | {"compile_seconds": seconds}


def out_of_memory(message: str) -> dict[str, float]:
    """`peak` and `capacity` in bytes, of an error of libtpu; {} if it is about something else."""
    match = _OUT_OF_MEMORY.search(message)
    sizes = [float(match[i]) * _UNITS[match[i + 1]] for i in (1, 3)] if match else []
    return dict(zip(("peak", "capacity"), sizes, strict=False))


def describe(compiled: jax.stages.Compiled, devices: int, microbatches: int = 1) -> dict[str, Any]:
    """What the compiler reports about a program, as `for_mesh` returns it, without the seconds."""
    memory: Any = compiled.memory_analysis()
    work = cost(compiled, microbatches)
    live = memory.argument_size_in_bytes + memory.output_size_in_bytes
    text = compiled.as_text() or ""
    return {
        "devices": devices,
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "peak": live + memory.temp_size_in_bytes - memory.alias_size_in_bytes,
        "flops": work.get("flops"),
        "bytes_accessed": work.get("bytes accessed"),
        "hbm_bytes": traffic.hbm_bytes(text),
        "collectives": [dataclasses.astuple(c) for c in collectives.read(text, devices)],
    }


def _data(task: Task) -> dict[str, Any] | None:
    """Shapes of a dataset held in device memory, its images as large as in evaluation."""
    if task.config.data.augment_on != "device":
        return None
    size = task.config.data.image_size
    return resident.shapes_of(task.extent.steps_per_epoch * task.config.batch_size, (size, size))


def for_topology(task: Task, topology: str) -> dict[str, Any]:
    """`for_mesh` for a TPU slice, e.g. "v5e:4x8"; raises as `on_topology`."""
    return on_topology(functools.partial(for_mesh, task), topology, task.quick)


def on_topology(
    compile_for: Callable[[Mesh], dict[str, Any]], topology: str, quick: bool = False
) -> dict[str, Any]:
    """Calls `compile_for` in another process, with a mesh of devices that need not exist here.

    Args:
        compile_for: can be pickled, as can its result.
        topology: e.g. "v5e:4x8".
        quick: compile with the least effort.

    Raises:
        UserError: without libtpu, for an unknown topology, for a mistake in the config, or when
            the compiler crashes.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "planning for a TPU needs its compiler: pip install -U 'jax[tpu]' (it runs on any "
            "Linux machine; no TPU is needed)"
        )
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile("r+", suffix=".log", errors="replace") as log:
        # no device is used, so there is no metadata to query and no lock to hold
        effort = {"JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1.0"} if quick else {}
        with _environment(
            JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", **effort
        ):
            child = context.Process(target=_child, args=(compile_for, topology, sender, log.name))
            child.start()
        sender.close()
        try:
            kind, value = receiver.recv()
        except EOFError:
            kind, value = "died", None
        finally:
            child.join()
        if kind == "died":
            advice = "" if quick else "--quick, "
            known = ", known for ResNets on v6e" if topology.startswith("v6e") else ""
            raise UserError(
                f"the TPU compiler crashed on {topology} (exit status {child.exitcode}"
                f"{_last_words(log.read())}): a fault in libtpu{known}; try {advice}another "
                "topology, or another version of libtpu"
            )
    if kind == "error":
        raise UserError(value)
    return value


def _last_words(text: str) -> str:
    """The line of a crashed compiler's output that says why, after a comma; or ""."""
    found = _CHECK.search(text) or _SIGNAL.search(text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = " ".join(found[1].split()) if found else lines[-1] if lines else ""
    return f", {line[:200]}" if line else ""


def _child(compile_for: Callable, topology: str, sender: Any, log: str) -> None:
    """Sends ("result" | "error", value), unless the compiler crashes."""
    # libtpu prints to the file descriptors, mostly about not being on a TPU machine
    out = os.open(log, os.O_WRONLY | os.O_APPEND)
    sys.stderr.flush()
    os.dup2(out, 1)
    os.dup2(out, 2)
    from jax.experimental import topologies

    try:
        try:
            more: dict[str, Any] = {}
            if topology.endswith(":1x1"):
                # libtpu assumes 2x2 chips a host, and then refuses a slice of one chip
                more["chips_per_host_bounds"] = [1, 1, 1]
            if topology.startswith("v4:"):
                # the default is two devices a chip; on a TPU VM the two cores are one device
                more["chip_config_name"] = "megacore"
            described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **more)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"libtpu knows no topology {topology!r} ({reason}): write e.g. v5e:4x8, v4:4x4x4 "
                "or v3:8x8"
            ) from error
        sender.send(("result", compile_for(make_mesh(described.devices))))
    except UserError as error:
        sender.send(("error", str(error)))
    except Exception as error:
        reason = " ".join(str(error).split())[:600]
        sender.send(("error", f"the TPU compiler refused the step for {topology}: {reason}"))


@contextlib.contextmanager
def _environment(**values: str) -> Any:
    """Sets environment variables for a child that starts now."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
