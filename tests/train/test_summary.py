"""The last lines of a run say what its score is compared with."""

import dataclasses
import json
import types

import numpy as np
import pytest
import tiny
from etils import epath

from common import version
from common.data.sources.opening import open_source
from common.run import console
from common.train import summary
from common.train.position import Position
from common.train.prepare import Extent

SCORES = {"knn_top1": 0.7, "knn_top1_at_init": 0.5, "knn_top1_raw_pixels": 0.4}
POSITION = Position(results=SCORES, images_per_second=1.0, seconds=2.0)


@pytest.mark.parametrize("field", ["init_from", "resume_from", None])
def test_weights_of_another_run_are_not_called_untrained(tmp_path, capsys, field):
    c = tiny.config("simclr", evaluate__pictures=False, **({field: "runs/other"} if field else {}))
    source = types.SimpleNamespace(name="photos", split="train")
    method = types.SimpleNamespace(supervised=False, classification=None)
    run = types.SimpleNamespace(config=c, source=source, extent=Extent(800, 10), method=method)
    got = summary.finish(run, epath.Path(tmp_path), None, None, POSITION)
    said = capsys.readouterr().err
    assert got["started_from"] == ("runs/other" if field else None)
    assert {name: got[name] for name in ("version", "commit")} == version.fields()
    # rerunning the command says the same of the summary that was written
    assert json.loads((tmp_path / "summary.json").read_text()) == got
    summary.finished(epath.Path(tmp_path))
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


def words(tmp_path, **fields):
    made = {"method": "moco", "steps": 800, "probe_top1": None} | SCORES | fields
    return "\n".join(summary.in_words(made, epath.Path(tmp_path)))


def test_a_supervised_run_is_not_said_to_have_seen_no_label(tmp_path):
    said = words(tmp_path, supervised=True)
    assert "Trained moco, supervised, for 800 steps." in said
    assert "over raw pixels, with the labels of its training images." in said
    assert "without seeing" not in said
    said = words(tmp_path, supervised=False)
    assert "supervised" not in said and "without seeing a label." in said


def test_a_summary_of_an_older_version_is_still_read(tmp_path):
    assert "over its untrained state" in words(tmp_path)  # neither dataset nor started_from


@pytest.mark.parametrize(
    ("knn", "init", "raw", "verdict"),
    [
        (0.7, 0.5, 0.4, "So it learned: +20.0 points over its untrained state, +30.0 points over"),
        (0.7, 0.4, 0.5, "So it learned: +30.0 points over its untrained state, +20.0 points over"),
        (0.5, 0.4, 0.6, "does not beat raw pixels (-10.0 points): too little to say that"),
        (0.5, 0.4, 0.5, "It gained +10.0 points over its untrained state, but does not beat raw"),
        (0.5, 0.6, 0.4, "So it did NOT learn: -10.0 points over its untrained state, +10.0 points"),
        (0.5, 0.5, 0.4, "So it did NOT learn: +0.0 points"),
        (1.0, 1.0, 0.4, "Nothing was left to gain: this task is too easy"),
        (1.0, 0.9, 1.0, "Nothing was left to gain: this task is too easy"),
        (0.9, 1.0, 0.4, "So it did NOT learn: -10.0 points"),
        (0.3, 0.5, 0.4, "So it did NOT learn: -20.0 points over its untrained state, -10.0 points"),
    ],
)  # fmt: skip
def test_it_learned_only_if_it_beats_both_baselines(knn, init, raw, verdict, tmp_path):
    scores = {"knn_top1": knn, "knn_top1_at_init": init, "knn_top1_raw_pixels": raw}
    said = words(tmp_path, dataset="photos (train)", **scores)
    assert verdict in said
    assert ("So it learned" in said) == (knn > init and knn > raw)


@pytest.mark.parametrize(
    ("fields", "verdict"),
    [
        ({"dataset": "fake (train)"}, "The images are random: these figures only show"),
        ({"steps": 4, "dataset": "fake (train)"}, "The images are random"),
        ({"steps": 4, "dataset": "fashion_mnist (train)"}, "4 steps are too few to say whether"),
        ({"steps": 99}, "99 steps are too few"),
        ({"steps": 100}, "So it learned"),
    ],
)
def test_a_smoke_run_draws_no_conclusion(fields, verdict, tmp_path):
    said = words(tmp_path, **fields)
    assert verdict in said and "70.0 % of the test images" in said
    assert ("learned" in said) == (verdict == "So it learned")


def test_a_student_is_put_beside_its_teacher(tmp_path):
    scores = {"teacher": "W", "student_top1": 0.56, "teacher_top1": 0.5}
    said = words(tmp_path, **scores)
    assert "right on 56.0 % of the test images, its teacher on 50.0 % (+6.0 points)." in said
    assert "by what its teacher says of the images" in said and "without seeing" not in said
    none = dict.fromkeys(SCORES)
    assert "so no score" not in words(tmp_path, **(none | scores))
    assert "classifier the student" not in words(tmp_path, **(scores | {"student_top1": None}))


def test_a_run_without_labels_ends_with_what_can_be_looked_at(tmp_path):
    workdir = tmp_path / "my run"
    workdir.mkdir()
    none = dict.fromkeys(SCORES)
    command = f"  python main.py --mode=embed --workdir='{workdir}': features, and a report"
    bare = words(workdir, **none).splitlines()
    assert bare[2] == "No test images with labels, so no score. What can be looked at next:"
    assert bare[3].startswith(command) and len(bare) == 5
    assert bare[4].startswith(f"  python main.py --mode=suggest --workdir='{workdir}': which few")
    for name in summary.PICTURES:
        (workdir / name).write_text("")
    lines = words(workdir, **none).splitlines()
    assert lines[3].startswith(f"  {workdir}/augmented_pairs.png: images as training")
    assert lines[4].startswith(f"  {workdir}/nearest_neighbours.png: test images")
    assert lines[5] == f"  {workdir}/nearest_neighbours_before.png: the same before training"
    assert lines[6].startswith(command)
    scored = words(workdir).splitlines()
    assert "mode=embed" not in scored[-1]
    assert scored[-1] == "Pictures to look at: " + ", ".join(
        f"{workdir}/{n}" for n in summary.PICTURES
    )


def test_on_a_terminal_nothing_that_is_said_breaks_inside_a_word(monkeypatch, capsys):
    text = "      data  a set with a name-of-parts, and a second half\n   workdir  /a/path-of/parts"
    console.say(text, indent=12)
    assert capsys.readouterr().err == text + "\n"  # a log file gets it as it is
    monkeypatch.setattr(console.sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(console.sys.stderr, "fileno", lambda: 99)
    sizes = {99: types.SimpleNamespace(columns=28)}
    monkeypatch.setattr(console.os, "get_terminal_size", sizes.get)
    console.say(text, indent=12)
    assert capsys.readouterr().err.splitlines() == [
        "      data  a set with a",
        "            name-of-parts,",
        "            and a second",
        "            half",
        "   workdir",
        "            /a/path-of/parts",
    ]


def test_the_summary_at_the_start_is_of_all_devices(capsys):
    """XLA counts the operations of one device, and of a loop over micro-batches one turn."""
    c = tiny.config("simclr", batch_size=32, microbatch=8, model__bn_groups=32, data__source="fake")
    step = types.SimpleNamespace(cost_analysis=lambda: {"flops": 2e9, "bytes accessed": 5.0})
    params = {"backbone": np.zeros((3, 20_000)), "head": np.zeros(40_000)}
    state = types.SimpleNamespace(params=params)
    run = dataclasses.replace(
        tiny.prepared(c, 4), data=open_source(c.data, "train"), extent=Extent(1200, 128)
    )
    summary.start_up(run, epath.Path("w"), state, step, None, 3)
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().err.splitlines())
    assert said["steps"] == "1,200 of 32.0 GFLOP (128 an epoch)"
    assert said["devices"].startswith("4 x cpu in 1 process(es)")
    assert said["batch"].startswith("32 images, 8 a device, 2 views each, 8 px")
    assert "0.06 M parameters, 0.10 M with the head" in said["network"]
    assert said["data"] == "fake (train): 4,096 images, 10 classes"
    assert said["code"] == f"version {version.in_words()}"
    assert said["resuming"] == "after step 3 of 1,200"


def test_the_summary_names_the_predictor_and_what_is_not_trained(capsys):
    c = tiny.config("moco_v3", data__source="fake", **tiny.VIT)
    step = types.SimpleNamespace(cost_analysis=lambda: {"flops": 2e9, "bytes accessed": 5.0})
    state = types.SimpleNamespace(params={"backbone": np.zeros(1), "predictor": np.zeros(30_000)})
    run = dataclasses.replace(tiny.prepared(c, 1), data=open_source(c.data, "train"))
    summary.start_up(run, epath.Path("w"), state, step, None, 0)
    said = capsys.readouterr().err
    assert "0.03 M with head and predictor, float32, patches not trained" in said
