"""What `benchmarks/` does at length, in short: kills, damaged images, memory of a long run."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def call(module, *arguments):
    """The JSON line of a benchmark, in a process of its own."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *arguments],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["simclr", "moco"])
def test_a_run_that_is_killed_again_and_again_ends_bit_by_bit(method):
    found = call("kills", f"--method={method}", "--kills=3")
    assert found["kills"] == 3 and found["inside_a_save"] >= 1 and found["differing"] == []


@pytest.mark.slow
def test_three_hundred_damaged_images():
    found = call("fuzz_images", "--files=300")
    assert found["files"] == 300 and 30 < found["replaced"] < 285


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="looks into /proc")
def test_memory_stays_flat():
    assert call("memory", "--steps=1200", "--since=400")["growth"] <= 0.02
