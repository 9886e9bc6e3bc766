"""The last lines of a run say what its score is compared with."""

import json
import types

import numpy as np
import pytest
import tiny
from etils import epath

from common import report
from common.data import sources

SCORES = {"knn_top1": 0.7, "knn_top1_at_init": 0.5, "knn_top1_raw_pixels": 0.4}
PROGRESS = {"results": SCORES, "images_per_second": 1.0, "seconds": 2.0}


@pytest.mark.parametrize("field", ["init_from", "resume_from", None])
def test_weights_of_another_run_are_not_called_untrained(tmp_path, capsys, field):
    c = tiny.config("simclr", evaluate__pictures=False, **({field: "runs/other"} if field else {}))
    got = report.finish(c, epath.Path(tmp_path), None, None, PROGRESS, "fake (train)", 8)
    said = capsys.readouterr().err
    assert got["started_from"] == ("runs/other" if field else None)
    # rerunning the command says the same of the summary that was written
    assert json.loads((tmp_path / "summary.json").read_text()) == got
    report.finished(epath.Path(tmp_path))
    again = capsys.readouterr().err
    for text in (said, again):
        assert "+20.0 points over" in text and "+30.0 points over raw pixels" in text
        if field:
            assert "at its start, from runs/other: 50.0 %" in text
            assert "learned more: +20.0 points over its start" in text
            assert "without seeing a label in this run." in text
            assert "untrained" not in text and "before training" not in text
        else:
            assert "The same network before training: 50.0 %" in text
            assert "learned: +20.0 points over its untrained state" in text


def test_a_summary_of_an_older_version_is_still_read(tmp_path):
    old = {"method": "moco", "steps": 8, "probe_top1": None} | SCORES
    lines = "\n".join(report.in_words(old, epath.Path(tmp_path), []))
    assert "over its untrained state" in lines


def test_the_summary_at_the_start_is_of_all_devices(capsys):
    """XLA counts the operations of one device, and of a loop over micro-batches one turn."""
    c = tiny.config("simclr", batch_size=32, microbatch=8, model__bn_groups=32, data__source="fake")
    setup = tiny.build(c, 4).setup
    step = types.SimpleNamespace(cost_analysis=lambda: {"flops": 2e9, "bytes accessed": 5.0})
    params = {"backbone": np.zeros((3, 20_000)), "head": np.zeros(40_000)}
    state = types.SimpleNamespace(params=params)
    source = sources.open_source(c.data, "train")
    report.start_up(c, epath.Path("w"), setup.mesh, setup, state, step, source, None, 3, 1200, 128)
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().err.splitlines())
    assert said["steps"] == "1,200 of 32.0 GFLOP (128 an epoch)"
    assert said["devices"].startswith("4 x cpu in 1 process(es)")
    assert said["batch"].startswith("32 images, 8 a device, 2 views each, 8 px")
    assert "0.06 M parameters, 0.10 M with the head" in said["network"]
    assert said["data"] == "fake (train): 4,096 images, 10 classes"
    assert said["resuming"] == "after step 3 of 1,200"
