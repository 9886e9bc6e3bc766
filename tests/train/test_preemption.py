"""SIGTERM: the step is saved, the process exits, and the same command gives the same result."""

import logging
import os
import signal

import pytest
from test_end_to_end import assert_same_run, lines, run, small

from common.run import jsonl
from common.train import loop, preemption
from common.train.preemption import PreemptedError


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


def test_that_processes_agree_to_stop_is_no_warning(monkeypatch, caplog):
    """Orbax's warning, once a process and thread, through absl; other warnings are shown."""
    monkeypatch.setattr(preemption.jax, "process_count", lambda: 2)
    log = logging.getLogger("absl")
    for inside in (True, False):
        with preemption.Preemption() if inside else caplog.at_level("WARNING"):
            log.warning("[process=%s][thread=%s] Reached preemption sync point, step=%s", 0, "x", 7)
            log.warning("the disk is slow")
    found = [record.getMessage().split("]")[-1].strip() for record in caplog.records]
    assert found == [
        "the disk is slow",
        "Reached preemption sync point, step=7",
        "the disk is slow",
    ]
