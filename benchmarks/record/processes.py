"""Sanity checks that need whole runs of `main.py`: SIGTERM and resume, the exported encoder."""

import importlib.util
import itertools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
from jax import export

from benchmarks.record.ledger import Found
from benchmarks.record.sanity import relative
from benchmarks.record.setting import (
    ROOT,
    Setting,
    bound,
    environment,
    last_words,
)
from common.distributed import STOPPED
from common.run import jsonl

# Tolerance for the losses of a run that was stopped and of one that was not, in float32. They are
# equal on a CPU, and on a GPU with deterministic sums. Otherwise differences grow with the steps:
# this many after the stop are compared.
RESUMED, STEPS_AFTER = 0.02, 50
# Tolerance for the features of one encoder: a GPU multiplies 6 layers in TF32, which has 10 bits.
EXPORTED = 0.02


def resume(setting: Setting, method: str) -> Found:
    """A run that is stopped and continued has the losses of one that was not stopped."""
    total, stop = setting.sizes.resume
    whole, stopped = (setting.out / "sanity" / f"{method}_{x}" for x in ("whole", "stopped"))
    for workdir in (whole, stopped):  # left by an attempt that was cut off
        shutil.rmtree(workdir, ignore_errors=True)
    _call(setting, method, whole, total)
    status, seconds = _stopped(setting, method, stopped, stop)
    at = max([r["step"] for r in jsonl.read(stopped / jsonl.FILE)], default=0)
    _call(setting, method, stopped, total)
    lines = [
        {r["step"]: r["loss"] for r in jsonl.read(workdir / jsonl.FILE) if "loss" in r}
        for workdir in (whole, stopped)
    ]
    same = lines[0].keys() == lines[1].keys() and total in lines[0]
    compared = [s for s in lines[0] if s <= at + STEPS_AFTER]
    off = max((relative(lines[1].get(s, np.nan), lines[0][s]) for s in compared), default=np.nan)
    return Found(
        f"stopped at step {at} of {total}: exit status {status} after {seconds:.1f} s; losses "
        f"until step {compared[-1]} within {off:.1e} of a run that was not stopped",
        {"status": status, "stopped_at": at, "seconds_to_stop": seconds, "difference": off},
        ok=status == STOPPED[0] and stop <= at < total and same and off < RESUMED,
    )


def exported(setting: Setting, method: str) -> Found:
    """The encoder as StableHLO computes the same features here as on a CPU."""
    workdir = setting.out / "sanity" / f"{method}_whole"
    _call(setting, method, workdir, setting.sizes.resume[0])
    _run(setting.main_py(
        "--mode=export", f"--workdir={workdir}", "--eval.export.format=stablehlo"
    ), workdir)  # fmt: skip
    data = (workdir / "export" / "encoder.stablehlo").read_bytes()
    encode = export.deserialize(bytearray(data)).call
    images = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), np.uint8)
    here, there = (
        np.asarray(jax.jit(encode)(jax.device_put(images, on)))
        for on in (jax.devices()[0], jax.devices("cpu")[0])
    )
    off, spread = relative(here, there), float(there.std(0).mean())
    return Found(
        f"{len(data) / 1e3:,.0f} kB, features {list(here.shape)}, relative difference from a CPU's "
        f"{off:.1e}",
        {"bytes": len(data), "difference": off, "spread": spread},
        ok=off < EXPORTED and spread > 0,
    )


def _arguments(setting: Setting, method: str, workdir: pathlib.Path, total: int) -> list[str]:
    """The command of a small run on random images, augmented on the device."""
    return setting.main_py(
        f"--config={ROOT}/configs/{method}_cifar10.py:smoke", f"--workdir={workdir}",
        f"--config.duration={total} steps", "--config.steps_per_dispatch=5",
        "--config.data.augment_on=device", "--config.augment.size=32",
        "--config.log_every=5", "--config.evaluate.every=0 steps",
        "--config.evaluate.pictures=false", f"--config.checkpoint.every={total // 2} steps",
    )  # fmt: skip


def _call(setting: Setting, method: str, workdir: pathlib.Path, total: int) -> None:
    _run(_arguments(setting, method, workdir, total), workdir)


def _run(command: list[str], workdir: pathlib.Path) -> None:
    done = subprocess.run(
        bound(command), cwd=ROOT, env=_environment(), capture_output=True, text=True,
        errors="replace",
    )  # fmt: skip
    sys.stderr.write(done.stderr)  # into the worker's log
    if done.returncode:
        words = last_words(done.stderr)
        raise RuntimeError(f"{workdir.name}: exit status {done.returncode}: {words}")


def _environment() -> dict[str, str]:
    """Sums in a fixed order on a GPU, so that two runs can be compared."""
    flags = os.environ.get("XLA_FLAGS", "")
    if any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
        flags += " --xla_gpu_deterministic_ops=true"
    return environment() | {"XLA_FLAGS": flags}


def _stopped(setting: Setting, method: str, workdir: pathlib.Path, stop: int) -> tuple[int, float]:
    """Exit status of a run that gets SIGTERM once it has logged `stop`, and the seconds it took."""
    total = setting.sizes.resume[0]
    process = subprocess.Popen(
        bound(_arguments(setting, method, workdir, total)), cwd=ROOT, env=_environment(),
    )  # fmt: skip
    path = workdir / jsonl.FILE
    try:
        for _ in itertools.count():
            logged = max([r["step"] for r in jsonl.read(path)], default=0) if path.exists() else 0
            if logged >= stop or process.poll() is not None:
                break
            time.sleep(0.01)
        begin = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        return process.wait(), time.perf_counter() - begin
    finally:
        process.kill()
        process.wait()
