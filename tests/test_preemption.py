"""SIGTERM: the step is saved, the process leaves, and the same command ends where it would have."""

import os
import signal
import subprocess
import time

import pytest
from test_end_to_end import assert_same_run, lines, run, small
from test_main import REAL, command, environment

from common import jsonl
from common import train as loop
from common.metrics import TIMING_KEYS
from common.preemption import EXIT_STATUS, PreemptedError


def tell_before(monkeypatch, step, times=1):
    """Sends this process SIGTERM while `step` is prepared."""
    taken, to_global = iter(range(1, 1000)), loop.to_global

    def wrapped(*arguments):
        if next(taken) == step:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGTERM)
        return to_global(*arguments)

    monkeypatch.setattr(loop, "to_global", wrapped)


@pytest.mark.slow  # `test_restarts.py` has a default one
@pytest.mark.parametrize("step", [4, 5, 7])  # scores are due after 4 and 7, nothing after 5
def test_told_to_stop_and_started_again(step, tmp_path, monkeypatch):
    c = small("moco", data__fake_classes=2)
    whole, told = tmp_path / "whole", tmp_path / "told"
    summary = run(c, whole)
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch, pytest.raises(PreemptedError) as caught:
        tell_before(patch, step, times=2)
        run(c, told)
    assert f"step {step} of 7 is saved in {told}" in str(caught.value)
    assert str(step) in {p.name for p in (told / "checkpoints").iterdir()}
    assert step not in [r["step"] for r in lines(told) if "knn_top1" in r]  # there was no time
    assert signal.getsignal(signal.SIGTERM) is before
    again = run(c, told)
    assert_same_run(c, told, whole)
    assert not lines(told, jsonl.DISCARDED) if (told / jsonl.DISCARDED).exists() else True
    timed = {"images_per_second", "seconds"}
    assert {k: v for k, v in again.items() if k not in timed} == {
        k: v for k, v in summary.items() if k not in timed}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("config", ["simclr_demo", "moco_demo"])
def test_a_process_that_gets_sigterm_continues_bit_by_bit(config, tmp_path):
    arguments = (f"--config=configs/{config}.py:smoke", *REAL, "--config.duration=100 steps",
                 "--config.checkpoint.every=0 steps", "--config.data.train_split=test")  # fmt: skip

    def call(workdir, **options):
        return subprocess.Popen(
            command(*arguments, f"--workdir={workdir}"), env=environment(), text=True,
            stderr=subprocess.PIPE, cwd=os.path.dirname(os.path.dirname(__file__)), **options,
        )  # fmt: skip

    def records(workdir):
        return [{k: v for k, v in r.items() if k not in TIMING_KEYS}
                for r in jsonl.read(workdir / jsonl.FILE)]  # fmt: skip

    whole, told = tmp_path / "whole", tmp_path / "told"
    process = call(whole)
    assert process.communicate() and process.returncode == 0
    process = call(told)
    path = told / jsonl.FILE
    while process.poll() is None and not (
        path.exists() and any(r["step"] >= 9 for r in jsonl.read(path))
    ):
        time.sleep(0.01)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == EXIT_STATUS == 143, errors
    assert "told to stop: step " in errors and "Traceback" not in errors
    (saved,) = (int(p.name) for p in (told / "checkpoints").iterdir())
    assert 9 <= saved < 100
    process = call(told)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert f"after step {saved}" in errors
    assert records(told) == records(whole)  # losses and norms of all parameters, to the last bit
