"""`metrics.csv` has what `metrics.jsonl` has, whatever happens to a run."""

import csv
import io
import json
import os

import pytest
import toy
from etils import epath
from test_writer import make_writer, run

from common.run import csv_copy, jsonl

PATH = "metrics.csv"


def table(workdir):
    """The rows of the table, each as the record it stands for."""
    rows = list(csv.DictReader(io.StringIO((workdir / PATH).read_text())))
    for row in rows:
        assert None not in row and None not in row.values()  # as many cells as columns
    return [{name: float(cell) for name, cell in row.items() if cell} for row in rows]


def records(workdir):
    lines = jsonl.read(workdir / jsonl.FILE)
    return [{name: x for name, x in line.items() if x is not None} for line in lines]


def test_the_text_of_records_with_different_columns():
    text = csv_copy.of_records(
        [{"step": 0, "knn_top1": 0.1}, {"step": 1, "loss": 1 / 3}, {"step": 2, "knn_top1": None}]
    )
    assert text == "step,knn_top1,loss\n0,0.1,\n1,,0.3333333333333333\n2,,\n"
    assert csv_copy.of_records([]) == "\n"
    assert csv_copy.of_records([{"step": 1, 'a, "b"': 2}]) == 'step,"a, ""b"""\n1,2\n'


def write(workdir, start, stop, total=10):
    with make_writer(workdir, start, total, copies=[csv_copy.CsvCopy(epath.Path(workdir))]) as w:
        for step in range(start + 1, stop + 1):
            w.write(step, {"loss": 10 / step, "gradient_norm": float("nan") if step == 2 else 1.0})
            if step == 3:
                w.write_now(step, {"knn_top1": 0.5})


def test_a_resumed_run_takes_lines_back(tmp_path):
    write(tmp_path, 0, 7)
    assert table(tmp_path) == records(tmp_path) and len(table(tmp_path)) == 8
    seen = []
    writer = make_writer(tmp_path, 4, 10, copies=[csv_copy.CsvCopy(epath.Path(tmp_path))])
    seen.append([r["step"] for r in table(tmp_path)])  # before the first step
    writer.close()
    assert seen == [[1, 2, 3, 3, 4]]
    write(tmp_path, 4, 10)
    assert [r["step"] for r in table(tmp_path)] == [1, 2, 3, 3, 4, 5, 6, 7, 8, 9, 10]
    assert table(tmp_path) == records(tmp_path)


def test_it_is_up_to_date_after_each_pause_but_takes_no_more_than_its_share(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(csv_copy.time, "monotonic", lambda: now[0])
    made = []
    real = csv_copy.of_records

    def slow(lines):
        now[0] += 2.0
        made.append(now[0])
        return real(lines)

    monkeypatch.setattr(csv_copy, "of_records", slow)
    with make_writer(tmp_path, copies=[csv_copy.CsvCopy(epath.Path(tmp_path))]) as writer:
        for step in range(1, 5):
            writer.write(step, {"loss": 1.0})
            with writer.pause():
                assert len(made) == 1 + (step == 4)  # 2 s every 200 s
            now[0] += 67.0
        assert table(tmp_path) == records(tmp_path)
        writer.write(5, {"loss": 1.0})
    assert len(made) == 3 and len(table(tmp_path)) == 5  # the last is always made


def test_a_full_disk_costs_a_warning_and_the_next_table_is_whole(tmp_path, caplog, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device")

    copy = csv_copy.CsvCopy(epath.Path(tmp_path))
    with make_writer(tmp_path, copies=[copy]) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(csv_copy.files, "write_text", full)
            for step in range(1, 4):
                writer.write(step, {"loss": 1.0})
                copy._next = 0.0
                with writer.pause():
                    pass
            assert not (tmp_path / PATH).exists()
        writer.write(4, {"loss": 1.0})
    said = [r.getMessage() for r in caplog.records if PATH in r.getMessage()]
    assert len(said) == 1 and "training continues" in said[0] and "No space left" in said[0]
    assert table(tmp_path) == records(tmp_path) and len(table(tmp_path)) == 4


def test_without_it_there_is_no_table(tmp_path):
    run(tmp_path, 0, 3)
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "tensorboard"]


@pytest.mark.parametrize("on", [True, False])
def test_training_writes_it_and_a_mended_config_may_use_the_workdir(tmp_path, on):
    """It is one of the files that a run which never took a step may have left."""
    c = toy.config(log__csv=on)
    toy.train_until(1, c, tmp_path)
    toy.train(toy.config(log__csv=on, seed=5), tmp_path)
    assert (tmp_path / PATH).exists() == on
    if on:
        assert table(tmp_path) == records(tmp_path)
        assert [r["step"] for r in table(tmp_path)] == [1, 3, 6, 7]
        assert json.loads((tmp_path / "config.json").read_text())["log"]["csv"]


def test_the_table_of_a_killed_run_is_replaced_at_the_next_start(tmp_path):
    toy.train_until(6, toy.config(), tmp_path)
    (tmp_path / PATH).write_text("step,loss\n99,")
    toy.train(toy.config(), tmp_path)
    assert table(tmp_path) == records(tmp_path) and table(tmp_path)[-1]["step"] == 7
