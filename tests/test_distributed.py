"""Pods of this machine, as a person starts them, and what is said of mistakes."""

import json
import signal
import subprocess
import sys
import time

import pytest
from test_main import ROOT, hurried

from common import distributed, jsonl
from common.errors import UserError


def pod(workdir, *arguments):
    command = [sys.executable, "-m", "common.distributed", "--processes=2", "--devices=2", "--",
               "--config=configs/moco_demo.py:smoke", "--compile_cache=", f"--workdir={workdir}",
               *arguments]  # fmt: skip
    return subprocess.Popen(command, cwd=ROOT, env=hurried(), stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("text", ["here:1", "here:1,2", "here,2,0", "here:1,2,2"])
def test_a_coordinator_in_another_form(text):
    with pytest.raises(UserError, match="write HOST:PORT,COUNT,INDEX"):
        distributed.start(text)


def test_no_cluster_to_be_found(monkeypatch):
    def initialize():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(distributed.jax.distributed, "initialize", initialize)
    with pytest.raises(UserError, match=r"on Cloud TPU VMs .*--coordinator=HOST:PORT"):
        distributed.start()


@pytest.mark.multiprocess
def test_a_pod_on_this_machine_trains(tmp_path):
    process = pod(tmp_path / "run")
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert "4 x cpu in 2 process(es)" in errors and errors.count("Trained moco for 4 steps") == 1
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 4 and summary["knn_top1"] is not None


@pytest.mark.multiprocess
def test_a_pod_that_is_told_to_stop_saves_and_carries_on(tmp_path):
    """SIGTERM for the launcher goes to all; twice, as an impatient person sends it."""
    options = "--config.duration=400 steps", "--config.checkpoint.every=0 steps"
    options += "--config.evaluate.every=0 steps", "--config.evaluate.pictures=False"
    process, path = pod(tmp_path / "run", *options), tmp_path / "run" / jsonl.FILE
    while process.poll() is None and not (
        path.exists() and any(r["step"] >= 5 for r in jsonl.read(path))
    ):
        time.sleep(0.02)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 143 and "told to stop: step " in errors, errors
    (saved,) = (int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
    process = pod(tmp_path / "run", *options)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0 and f"after step {saved}" in errors, errors
    steps = [r["step"] for r in jsonl.read(path) if "loss" in r]
    assert steps == list(range(1, 401))


@pytest.mark.multiprocess
def test_a_mistake_ends_all_processes_with_one_line(tmp_path):
    process = pod(tmp_path / "run", "--config.batch_size=18", "--config.model.bn_groups=1")
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 1 and "Traceback" not in errors
    assert errors.count("error: ") == 1 and "batch_size=18 cannot be split over 4" in errors
