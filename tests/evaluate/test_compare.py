"""`--mode=compare`: which runs it finds, what it says of them, what it draws and overwrites."""

import csv
import io
import json
import os

import bucket
import numpy as np
import pytest
import tiny
from absl import flags
from etils import epath
from PIL import Image

import main
from common import config as configs
from common.cli import command_line, modes
from common.errors import UserError
from common.evaluate import compare_mode, compare_picture, compare_runs, compare_table
from common.run import jsonl


def write_run(workdir, method="simclr", steps=(0, 2, 4), summary=None, torn="", **changes):
    """A workdir of a run with 2 steps an epoch; kNN is 0.3, and 0.1 more each epoch."""
    config = tiny.config(method, **{"duration": "3 epochs", **changes})
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(json.dumps(configs.as_dict(config)))
    lines = [{"step": 0, "epoch": 0.0, "knn_top1": 0.3, "knn_top1_raw_pixels": 0.25}]
    for step in steps[1:]:
        timing = {"images_per_second": 100.0 + step, "seconds_step": 0.5, "seconds_pause": 1.0}
        lines.append({"step": step, "epoch": step / 2, "loss": 6.0 - step, **timing})
        lines.append({"step": step, "epoch": step / 2, "knn_top1": 0.3 + step / 20})
    text = "".join(jsonl.dump(line) + "\n" for line in lines)
    (workdir / "metrics.jsonl").write_text(text + torn)
    if summary:
        (workdir / "summary.json").write_text(json.dumps(summary))
    return workdir


def named(runs):
    return [run.name for run in runs]


def compared(tmp_path, capsys, *texts):
    out = tmp_path / "out"
    compare_mode.compare([str(x) for x in texts], str(out))
    return capsys.readouterr().out, list(
        csv.DictReader(io.StringIO((out / "compare.csv").read_text()))
    )


def test_a_run_under_way_beside_one_that_has_ended(tmp_path, capsys, monkeypatch):
    """A half-written line is left out; no device is asked for."""
    import jax

    def busy(*_):
        raise AssertionError("asks for devices")

    for name in ("devices", "process_index", "process_count", "local_devices"):
        monkeypatch.setattr(jax, name, busy)
    write_run(tmp_path / "runs" / "young", torn='{"step": 5, "loss": 0.0, "kn', seed=1)
    ended = {"steps": 6, "images_per_second": 1234.5, "seconds": 3725.0}
    write_run(tmp_path / "runs" / "old", steps=(0, 2, 4, 6), summary=ended)
    (tmp_path / "runs" / "notes").mkdir()
    write_run(tmp_path / "runs" / "torn")
    (tmp_path / "runs" / "torn" / "config.json").write_text("{")
    (tmp_path / "runs" / "a_file").write_text("")
    said, rows = compared(tmp_path, capsys, tmp_path / "runs" / "*")
    assert said.splitlines()[:3] == [
        "run     done  epoch   loss  kNN %  start  images/s     time",
        "old    100 %    3.0  0.000   60.0   30.0     1,234  1:02:05",
        "young   67 %    2.0  2.000   50.0   30.0       103     0:04",
    ]
    assert "Their configs differ. Most common: seed=0\nyoung: seed=1\n" in said
    assert "2 directories without a run skipped" in said
    assert [(r["run"], r["step"], r["total_steps"], r["config.seed"]) for r in rows] == [
        ("old", "6", "6", "0"), ("young", "4", "6", "1"),
    ]  # fmt: skip
    assert float(rows[1]["knn_top1"]) == 0.5 and float(rows[1]["knn_top1_at_start"]) == 0.3
    assert float(rows[1]["seconds"]) == 4.0  # 4 steps of half a second, 2 pauses
    table = (tmp_path / "out" / "compare.md").read_text().splitlines()
    assert table[0].endswith("| images/s | time | `seed` |") and table[3].endswith("| 0:04 | 1 |")
    assert len({line.count("|") for line in table}) == 1
    with Image.open(tmp_path / "out" / "compare.png") as image:
        assert image.width > 500


def test_runs_without_labels_lines_or_config(tmp_path, capsys):
    new, bare, unlabelled = (tmp_path / n for n in ("new", "bare", "unlabelled"))
    write_run(new)
    (new / "metrics.jsonl").unlink()
    write_run(bare)
    (bare / "config.json").unlink()
    write_run(unlabelled, duration="40 steps")
    (unlabelled / "metrics.jsonl").write_text('{"step": 10, "loss": 1.5}\n')
    said, rows = compared(tmp_path, capsys, new, bare, unlabelled)
    assert [r["run"] for r in rows] == ["new", "bare", "unlabelled"]  # in the order given
    assert [(r["step"], r["total_steps"], r["knn_top1"]) for r in rows] == [
        ("0", "", ""), ("4", "", "0.5"), ("10", "40", ""),
    ]  # fmt: skip
    assert said.splitlines()[1].split() == ["new", "simclr"]
    assert "duration=3 epochs" in said and "unlabelled: duration=40 steps" in said


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/a", "runs/b"], ["a", "b"]),
        (["runs/a/seed0", "runs/b/seed0"], ["a", "b"]),
        (["a/seed0", "a/seed1", "b/seed0"], ["a/seed0", "a/seed1", "b/seed0"]),
        (["runs/x/a", "other/b"], ["a", "b"]),
        (["runs/a", "runs/a/b"], ["a", "b"]),
        (["a", "b/a"], ["a", "b/a"]),
        (["gs://bucket/a/run", "gs://bucket/b/run"], ["a", "b"]),
        (["runs/deep/one"], ["one"]),
    ],
)
def test_names_are_as_short_as_they_tell_apart(paths, names):
    assert compare_runs.short([epath.Path(path) for path in paths]) == names


def test_names_patterns_and_equals_signs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("lr=0.1", "lr=0.2", "deep/x/run", "deep/y/run"):
        write_run(tmp_path / "runs" / name)
    runs, skipped = compare_runs.find(["runs/lr=0.1/", "SimCLR=runs/lr=0.2", "runs/lr=*"])
    assert named(runs) == ["lr=0.1", "SimCLR"] and skipped == 0  # each once
    runs, skipped = compare_runs.find(["runs/deep/*/run"])
    assert named(runs) == ["x", "y"]
    assert compare_runs.find(["runs/*"])[1] == 1  # deep is no run


def test_runs_in_a_bucket(tmp_path, monkeypatch, capsys):
    with bucket.mounted(tmp_path / "store", monkeypatch):
        for name in ("a", "b"):
            write_run(tmp_path / "store" / "mine" / "runs" / name, seed=len(name))
        compare_mode.compare(["gs://mine/runs/*"], "gs://mine/compared")
        assert capsys.readouterr().out.splitlines()[2].startswith("b    67 %")
    found = sorted(os.listdir(tmp_path / "store" / "mine" / "compared"))
    assert found == ["compare.csv", "compare.md", "compare.png"]


def run_of(name, method="simclr", **changes):
    flat = configs.flat(tiny.config(method, **changes))
    return compare_runs.Run(name, flat, [], {})


def test_which_fields_differ():
    runs = [
        run_of("a", simclr__temperature=0.2, log_every=3, duration="2epochs"),
        run_of("b", simclr__temperature=0.2, checkpoint__keep=7, duration="2 epochs"),
        run_of("c", simclr__temperature=0.5, duration="2 epochs"),
        run_of("d", "moco", duration="2 epochs"),
    ]
    same = {n: v for n, v in runs[0].config.items() if n in runs[3].config and n != "method"}
    runs[3].config.update(same)  # only method and section are another
    fields = compare_table.differing(runs)
    assert fields == {
        "method": ["simclr", "simclr", "simclr", "moco"],
        "simclr.temperature": ["0.2", "0.2", "0.5", None],
    }


def test_a_run_older_than_a_field_has_what_the_code_did_then():
    old, new, other = run_of("old"), run_of("new"), run_of("other", data__exif_rotation=True)
    for name in ("data.exif_rotation", "simclr.loss", "data.jpeg"):
        del old.config[name]
    assert new.config["data.jpeg"] == "exact"
    assert compare_table.differing([old, new]) == {"data.jpeg": ["fast", "exact"]}
    said = compare_table.text(runs := [old, new, other], compare_table.differing(runs))
    assert "Most common: data.exif_rotation=False, data.jpeg=exact\n" in said
    assert "\nold: data.jpeg=fast\nother: data.exif_rotation=True" in said
    assert compare_table.differing([old, other])["data.exif_rotation"] == ["False", "True"]


def test_the_table_fits_a_terminal():
    config = run_of("x").config | {"data.source": "folder:" + "very_long/" * 12}
    runs = [
        compare_runs.Run(
            f"a_long_name_of_a_run_that_ends_in_{i}",
            config | {"seed": i, "batch_size": 32 * i, "optimizer.learning_rate": i / 7}
            | ({"method": "moco_v3"} if i else {}),
            [{"step": 10**6, "epoch": 1234.5, "loss": 12.5, "knn_top1": 1.0,
              "images_per_second": 1e6, "view_agreement": 0.5, "rankme": 99.0}],
            {"seconds": 400_000.0, "steps": 10**6},
        )
        for i in range(12)
    ]  # fmt: skip
    text = compare_table.text(runs, compare_table.differing(runs))
    lines = text.splitlines()
    assert max(map(len, lines)) <= compare_table.COLUMNS
    assert lines[0].endswith("time")  # no room for more, as there is below
    assert "…" in lines[3] and lines[3].split()[0].endswith("_2")  # both ends of the name
    unlabelled = [compare_runs.Run("a", {}, [{"step": 1, "loss": 1.0, "rankme": 9.5}], {})]
    assert compare_table.text(unlabelled, {}).splitlines()[0].split() == ["run", "loss", "RankMe"]


def drawn(runs, monkeypatch):
    """The figure of these runs."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (figures.append(f), save(f, *a, **k)))
    image = Image.open(io.BytesIO(compare_picture.draw(runs)))
    (figure,) = figures
    return figure, image


def test_the_picture_has_a_curve_for_each_run_and_all_names(tmp_path, monkeypatch):
    runs = [
        compare_runs.Run(
            f"run_{i}", {},
            [{"step": s, "epoch": s / 10, "loss": float(i)} for s in range(1000)]
            + [{"step": 1000, "epoch": 100.0, "knn_top1": i / 100}] * (i != 3),
            {},
        )
        for i in range(12)
    ]  # fmt: skip
    runs[0].records.append({"step": 1000, "epoch": 100.0, "rankme": 17.0})
    figure, image = drawn(runs, monkeypatch)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["training loss", "kNN top-1 (%)", "RankMe"]
    looks = {(line.get_color(), str(line.get_linestyle())) for line in figure.axes[0].lines}
    assert len(looks) == 12
    assert [len(line.get_xdata()) for line in figure.axes[0].lines] == [compare_picture.POINTS] * 12
    assert [len(line.get_xdata()) for line in figure.axes[1].lines] == [1, 1, 1, 0] + [1] * 8
    assert figure.axes[1].lines[5].get_ydata()[0] == pytest.approx(5.0)
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == named(runs)
    box, page = legend.get_window_extent(), figure.bbox
    assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0
    assert all(box.y1 <= a.get_tightbbox().y0 for a in figure.axes[-1:])  # below the panels
    assert np.asarray(image).std() > 0


def test_a_long_curve_is_averaged_and_a_short_one_is_not():
    lines = [{"step": s, "loss": float(s % 2)} for s in range(1, 401)]
    x, y = compare_picture.curve(compare_runs.Run("", {}, lines, {}), "loss", "step")
    assert len(x) == 100 and set(y) == {0.5} and x[0] == 2.5
    x, y = compare_picture.curve(compare_runs.Run("", {}, lines[:3], {}), "loss", "step", 100)
    assert x.tolist() == [1, 2, 3] and y.tolist() == [100, 0, 100]


def test_only_an_earlier_comparison_is_overwritten(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a")
    compare_mode.compare(["a"])
    first = (tmp_path / "comparison" / "compare.csv").read_text()
    assert "What differs" not in capsys.readouterr().out  # of one run there is nothing to say
    write_run(tmp_path / "b")
    compare_mode.compare(["a", "b"])
    assert "Their configs do not differ." in capsys.readouterr().out
    second = (tmp_path / "comparison" / "compare.csv").read_text()
    assert second.startswith(first) and len(second.splitlines()) == 3
    (tmp_path / "a_file").write_text("")
    with pytest.raises(UserError, match="a_file is a file: give a directory for the comparison"):
        compare_mode.compare(["a"], "a_file")
    before = sorted(os.listdir(tmp_path / "b"))
    with pytest.raises(UserError, match=r"b holds other things than a comparison \(e.g. config"):
        compare_mode.compare(["a"], "b")
    assert sorted(os.listdir(tmp_path / "b")) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--mode=compare needs the runs: --workdirs=runs/a,runs/b"),
        (("--workdirs=nowhere",), "--workdirs: there is no directory nowhere"),
        (("--workdirs=empty",), "--workdirs='empty/*'"),
        (("--workdirs=NAME=empty",), "empty holds no run (no config.json, no metrics.jsonl)"),
        (("--workdirs=e*",), "no directory that fits this pattern holds a run (1 fit it)"),
        (("--workdirs=a", "--config=configs/simclr_demo.py:smoke"), "and takes no --config"),
        (("--workdirs", "a", "b"), "'b': write --workdirs='runs/*' in quotes, or commas"),
        (("--workdirs=a", "--mode=knn"), "--workdirs goes with --mode=compare, and --mode=knn"),
        (("--workdirs=a", "--workdir=b"), "holds other things than a comparison"),
    ],
)
def test_mistakes(arguments, words, tmp_path, monkeypatch):
    for name in ("configs", "a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("")
    (tmp_path / "a" / "metrics.jsonl").write_text("")
    root = os.path.dirname(main.__file__)
    arguments = [a.replace("configs/", f"{root}/configs/") for a in arguments]
    monkeypatch.chdir(tmp_path)
    values = flags.FlagValues()
    with pytest.raises(UserError) as caught:
        command_line.define(modes.MODES, values)
        given = ["main.py", "--mode=compare", "--compile_cache=", *arguments]
        main.main(command_line.parse(given, values, main.METHODS), values)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "comparison").exists()


def test_the_mode_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "a")
    values = flags.FlagValues()
    command_line.define(modes.MODES, values)
    given = ["main.py", "--mode=compare", "--workdirs=MoCo=runs/a,runs/*", "--compile_cache="]
    main.main(command_line.parse(given, values, main.METHODS), values)
    assert capsys.readouterr().out.splitlines()[1].startswith("MoCo  67 %")
    assert (tmp_path / "comparison" / "compare.png").exists()
