"""The last lines of a run say what its score is compared with."""

import json

import pytest
import tiny
from etils import epath

from common import report

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
