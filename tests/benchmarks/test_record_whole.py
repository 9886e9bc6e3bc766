"""All of benchmarks.record in tiny sizes, without TensorFlow, and cut off in between."""

import signal
import subprocess
import sys
import time

import pytest
from test_main import ROOT, without_tensorflow

from benchmarks.record import items, steps
from benchmarks.record.ledger import TABLE, Ledger

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
# Forms of a step that lie between those that are kept: left out for their minutes.
ALIKE = ("host_bfloat16", "both_bfloat16", "device_float32", "device_bfloat16")


def test_the_kit_ends_after_it_was_cut_off_and_killed(tmp_path):
    out, said = tmp_path / "out", tmp_path / "said"
    (tmp_path / "none").mkdir()

    alike = [f"{method}_{form}" for method in steps.METHODS for form in ALIKE]
    every = [item.name for item in items.every(steps.TINY) if item.name not in alike]

    def start(minutes):
        with said.open("w") as file:
            return subprocess.Popen(
                [sys.executable, "-m", "benchmarks.record", "--tiny", f"--out={out}",
                 f"--minutes={minutes}", "--patience=30", f"--stages={','.join(every)}"],
                cwd=ROOT, env=without_tensorflow(tmp_path / "none"), stderr=file,
            )  # fmt: skip

    for minutes in (0.7, 1.5, 3):  # in the first, a busy machine finishes nothing
        assert start(minutes).wait() == 3
        assert "the same command continues" in said.read_text()
        done = [r["item"] for r in Ledger(out).records() if r["state"] == "ok"]
        if done:
            break
    assert done == every[: len(done)] and 0 < len(done) < len(every)

    second = start(minutes=25)
    while not (out / "runs" / "moco_200_epochs" / "config.json").exists():
        assert second.poll() is None, said.read_text()
        time.sleep(0.2)
    second.send_signal(signal.SIGKILL)
    second.wait()

    assert start(minutes=25).wait() == 0, said.read_text()
    assert f"{len(every)} of {len(every)} ok, 0 failed, 0 left" in said.read_text()
    records = Ledger(out).records()
    assert not [r for r in records if r["state"] == "failed"]
    assert [sum(r["item"] == name and r["state"] == "ok" for r in records) for name in every] == [
        1 for _ in every
    ]
    text = (out / TABLE).read_text()
    assert len(text.splitlines()) == 4 + len(every)
    logs = [p.read_text() for p in (out / "logs").iterdir()]
    assert not [line for text in logs for line in text.splitlines() if "Traceback" in line]
