"""Simulated pods on this machine, and messages about mistakes."""

import json
import signal
import subprocess
import sys
import time

import pytest
from test_main import ROOT, hurried

from common import distributed
from common.errors import UserError
from common.run import jsonl


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
    """The launcher forwards SIGTERM to all processes; sent twice, as impatient users do."""
    options = "--config.duration=100 steps", "--config.checkpoint.every=0 steps"
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
    assert steps == list(range(1, 101))


@pytest.mark.multiprocess
def test_a_mistake_ends_all_processes_with_one_line(tmp_path):
    process = pod(tmp_path / "run", "--config.batch_size=18", "--config.model.bn_groups=1")
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 1 and "Traceback" not in errors
    assert errors.count("error: ") == 1 and "batch_size=18 cannot be split over 4" in errors


# ------------------------------------------------------------------ the launcher alone

WAIT = "wait_for() { for i in $(seq 250); do [ -e $1 ] && return; sleep 0.02; done; exit 9; }\n"


@pytest.fixture
def play(tmp_path, monkeypatch, capfd):
    """Replaces each process by a shell script, which has its number in $me, in `tmp_path`.

    Returns the launcher's exit status, and what was written to stderr.
    """
    python = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.chdir(tmp_path)

    # (a signal that pytest was started to ignore could not be trapped by a shell)
    def unheard(number, frame):
        raise AssertionError("the launcher does not listen")

    before = {n: signal.signal(n, unheard) for n in (signal.SIGTERM, signal.SIGINT)}

    def call(*scripts):
        cases = "".join(f"{i}) {script};;\n" for i, script in enumerate(scripts))
        python.write_text(
            f'#!/bin/sh\n{WAIT}for last; do :; done\nme=${{last##*,}}\necho "$JAX_NUM_CPU_DEVICES '
            f'$JAX_PLATFORMS $@" > started$me\ncase $me in\n{cases}esac\n'
        )
        python.chmod(0o700)
        status = distributed.simulate(len(scripts), 3, ["--config=c", "--workdir=a b"])
        return status, capfd.readouterr().err

    yield call
    for number, handler in before.items():
        signal.signal(number, handler)


def test_each_process_gets_its_place_in_the_pod(play, tmp_path):
    assert play("wait_for started1; echo said >&2", "echo nothing >&2") == (0, "said\n")
    lines = [(tmp_path / f"started{i}").read_text().split() for i in range(2)]
    for i, (devices, platform, main, *arguments, coordinator) in enumerate(lines):
        assert (devices, platform, arguments) == ("3", "cpu", ["--config=c", "--workdir=a", "b"])
        assert main == str(ROOT / "main.py")
        address, count, index = coordinator.split(",")
        assert address.startswith("--coordinator=127.0.0.1:") and (count, index) == ("2", str(i))
    assert lines[0][-1].split(",")[0] == lines[1][-1].split(",")[0]  # one port for both


def test_when_a_process_fails_the_others_are_stopped_and_it_is_heard(play):
    status, said = play("exec sleep 100", "exec sleep 100", "echo no memory >&2; exit 3")
    assert (status, said) == (3, "process 2:\nno memory\n\n")
    status, said = play("echo no memory >&2; exit 3", "exec sleep 100")
    assert (status, said) == (3, "no memory\n")  # process 0 has reported its own failure


def test_a_mistake_of_the_user_is_said_once(play, monkeypatch):
    """By process 0 if it finds the same mistake; otherwise by the other one."""
    fails = "echo 'error: no such split' >&2; exit 1"
    assert play(f"sleep 0.3; {fails}", fails) == (1, "error: no such split\n")
    monkeypatch.setattr(distributed, "_PATIENCE", 0.1)
    status, said = play("exec sleep 100", fails)
    assert (status, said) == (1, "process 1:\nerror: no such split\n\n")
    assert play("sleep 0.05", fails) == (1, said)  # process 0 has ended without failure


def test_a_process_that_fails_last_is_heard(play):
    """When process 0 has ended without failure, and no process is left to be killed."""
    assert play(":", "sleep 0.3; echo late >&2; exit 3") == (3, "process 1:\nlate\n\n")


@pytest.mark.parametrize("name", ["TERM", "INT"])
def test_signals_are_passed_on_and_every_process_has_time_to_save(name, play, tmp_path):
    """The first process to exit after the signal does not end the others."""
    ready = "touch ready$me; for i in $(seq 250); do sleep 0.02; done; exit 9"
    status, said = play(
        f"trap 'sleep 0.3; touch saved; exit 143' {name}; wait_for ready1; sleep 0.1; "
        f"kill -{name} $PPID; {ready}",
        f"trap 'exit 143' {name}; {ready}",
    )
    assert (status, said) == (143, "") and (tmp_path / "saved").exists()
