"""The tables of `benchmarks.label_free`, from metrics written by hand; runs that are trained."""

import json
import sys

import pytest

from benchmarks import label_free
from common.train.verdict import LABEL_FREE


def workdir(path, knn, figures, area_min=0.2):
    """A run whose figures at each evaluation are those of one list."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"augment": {"area_min": area_min}}))
    records = [{"step": 1, "loss": 3.0}]
    for i, (accuracy, value) in enumerate(zip(knn, figures, strict=True)):
        record = {"step": 10 * i, "knn_top1": accuracy} | dict.fromkeys(LABEL_FREE, value)
        record |= {f"{name}_raw_pixels": 0.5 for name in ("knn_top1", *LABEL_FREE)} if not i else {}
        records.append(record | {"rankme": -value})
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def printed(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["label_free", *arguments])
    label_free.main()
    lines = capsys.readouterr().out.splitlines()
    return {cells[1].strip(): [c.strip() for c in cells[2:-1]]
            for cells in (line.split("|") for line in lines) if len(cells) > 1}  # fmt: skip


def test_tables_of_steps_and_of_runs(tmp_path, monkeypatch, capsys):
    """Spearman by hand: 1 - 6 sum(d^2) / (n (n^2 - 1))."""
    runs = [
        workdir(tmp_path / "a", [0.1, 0.2, 0.3, 0.4], [1, 2, 4, 3]),  # d^2 = 2
        workdir(tmp_path / "b", [0.1, 0.6], [1, 2]),
        workdir(tmp_path / "c", [0.1, 0.5], [1, 1.5]),
        workdir(tmp_path / "d", [0.1, 0.2], [1, 9], area_min=1.0),
        workdir(tmp_path / "unfinished", [0.9], [1]),
        str(tmp_path / "nothing"),
    ]
    got = printed(monkeypatch, capsys, *runs)
    names = ["run", *got["run"]]
    assert names == ["run", "kNN", *LABEL_FREE]
    # a has a row in both tables, and the second is read last; b, c, a: kNN 60, 50, 40
    assert got["a"] == ["40.0 %", "3.000", "3.000", "-3.000", "3.000", "3.000"]
    assert got["*untrained*"][:2] == ["10.0 %", "1.000"]
    assert got["*raw pixels*"][:3] == ["50.0 %", "0.500", "0.500"]
    # ranks of b, c, a, d: kNN 4, 3, 2, 1, figure 2, 1, 3, 4: d^2 = 4 + 4 + 1 + 9
    assert got["**Spearman, all runs (4)**"] == ["", "-0.80", "-0.80", "+0.80", "-0.80", "-0.80"]
    one = got["**Spearman, of one augmentation (3)**"]
    assert one == ["", "-0.50", "-0.50", "+0.50", "-0.50", "-0.50"]
    assert "unfinished" not in got and "nothing" not in got
    steps = printed(monkeypatch, capsys, runs[0], runs[1])
    assert steps["a"] == ["4", "+0.80", "+0.80", "-0.80", "+0.80", "+0.80"] and "b" not in steps


def test_a_set_of_runs_is_trained_once_each_with_its_own_change(tmp_path, monkeypatch, capsys):
    commands = []

    def train(command, check):
        assert check
        commands.append(command)
        name = command[2].removeprefix(f"--workdir={tmp_path}/set/")
        made = tmp_path / "set" / name
        workdir(made, [0.1, 0.1 + len(commands) / 20], [1, len(commands)])
        (made / "summary.json").write_text("{}")

    monkeypatch.setattr(label_free.subprocess, "run", train)
    arguments = [f"--train={tmp_path / 'set'}", "--steps=80", "--", "--config=FILE"]
    got = printed(monkeypatch, capsys, *arguments)
    n = len(label_free.variants(80))
    assert len(commands) == n and got[f"**Spearman, all runs ({n})**"][1] == "+1.00"
    assert all("--config=FILE" in c and "--config.duration=80 steps" in c for c in commands)
    assert len({tuple(c[3:]) for c in commands}) == n
    # a change comes last, where it wins
    assert [c[-1] for c in commands if c[-1].startswith("--config.duration=")] == [
        "--config.duration=10 steps"
    ]
    assert printed(monkeypatch, capsys, *arguments) == got and len(commands) == n


def test_without_any_figures_it_says_so(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        printed(monkeypatch, capsys, str(tmp_path))
    assert "no WORKDIR has evaluations with kNN" in capsys.readouterr().err
