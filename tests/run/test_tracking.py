"""Weights & Biases: what it gets, and that training never waits for it.

With a module in its place that notes the calls; and once with the real one, where it is installed.
"""

import json
import pathlib
import sys
import threading
import types

import jax
import pytest
import toy

from common.errors import UserError
from common.run import jsonl, tracking


class FakeWandb(types.ModuleType):
    """Notes what is asked of `wandb`; `broken` names calls that fail."""

    def __init__(self, broken=()):
        super().__init__("wandb")
        self.inits, self.calls, self.broken = [], [], broken

    def init(self, **options):
        self.inits.append(options)
        return self._call("init") or self

    def _call(self, name, *values):
        if name in self.broken:
            raise ConnectionError("no route to W&B\nmore lines")
        self.calls.append((name, *values))

    def define_metric(self, name, step_metric=None):
        self._call("define_metric", name, step_metric)

    def log(self, values):
        self._call("log", values)

    def finish(self, exit_code):
        self._call("finish", exit_code)

    @property
    def summary(self):
        return types.SimpleNamespace(update=lambda values: self._call("summary", values))

    def Image(self, image):
        return ("image", image.size)

    def of(self, name):
        return [values[0] for call, *values in self.calls if call == name]


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in (*tracking._PATIENCE, "WANDB_NAME", "WANDB_RUN_ID"):
        monkeypatch.setenv(name, "1")  # so that what the code sets is taken back
        monkeypatch.delenv(name)
    return fake


def config(**changes):
    settings = {"log__wandb": "mine", "evaluate__every": "3 steps", "data__test_split": "test"}
    return toy.config(**(settings | changes))


SCORED = toy.scored(toy.SCORES)


def test_a_run_arrives_with_config_records_summary_and_pictures(tmp_path, wandb):
    workdir = tmp_path / "my_run"
    summary = toy.train(config(evaluate__pictures=True), workdir, make_evaluator=SCORED)
    (options,) = wandb.inits
    assert options["project"] == "mine" and options["name"] == "my_run"
    assert options["resume"] == "allow" and options["allow_val_change"]
    assert options["config"] == json.loads((workdir / "config.json").read_text())
    assert json.loads((workdir / "wandb.json").read_text()) == {
        "project": "mine", "id": options["id"],
    }  # fmt: skip
    assert wandb.calls[1:3] == [("define_metric", "step", None), ("define_metric", "*", "step")]
    *lines, shown = wandb.of("log")
    want = jsonl.read(workdir / jsonl.FILE)
    assert lines == [{n: x for n, x in line.items() if n != "time"} for line in want]
    assert [x["step"] for x in lines] == [0, 1, 3, 3, 6, 6, 7, 7] and lines[2]["epoch"] == 1.5
    ((kind, size),) = shown.values()
    assert list(shown) == ["augmented_pairs"] and kind == "image" and min(size) > 50
    assert wandb.of("summary") == [{n: x for n, x in summary.items() if x is not None}]
    assert wandb.calls[-1] == ("finish", 0)  # all of it before this


def test_a_resumed_run_continues_the_same_one(tmp_path, wandb):
    """Steps that it takes again are logged again, by a step of their own."""
    toy.train_until(5, config(), tmp_path, make_evaluator=SCORED)
    assert wandb.calls[-1] == ("finish", 1) and wandb.of("summary") == []
    toy.train(config(), tmp_path, make_evaluator=SCORED)
    first, second = wandb.inits
    assert first["id"] == second["id"] and second["resume"] == "allow"
    assert [x["step"] for x in wandb.of("log")] == [0, 1, 3, 3, 6, 6, 7, 7]
    toy.train(config(), tmp_path, make_evaluator=SCORED)
    assert len(wandb.inits) == 2  # of a finished run there is nothing to log


def test_another_project_has_another_run_and_the_variables_of_wandb_win(tmp_path, monkeypatch):
    path = tmp_path / "wandb.json"
    assert tracking._id(path, "a") == tracking._id(path, "a") != tracking._id(path, "b")
    path.write_text('{"project": "b", "i')  # torn
    new = tracking._id(path, "b")
    assert json.loads(path.read_text())["id"] == new


def test_variables_of_wandb_win(tmp_path, wandb, monkeypatch):
    for name, value in (("WANDB_NAME", "n"), ("WANDB_RUN_ID", "i"), ("WANDB_INIT_TIMEOUT", "9")):
        monkeypatch.setenv(name, value)
    with tracking.Tracker(config(), tmp_path) as tracker:
        tracker.add({"step": 1, "time": 2.0})
    assert (wandb.inits[0]["name"], wandb.inits[0]["id"]) == ("n", "i")
    assert tracking.os.environ["WANDB_INIT_TIMEOUT"] == "9"
    assert tracking.os.environ["WANDB_FINISH_TIMEOUT"] == "40"


@pytest.mark.parametrize("broken", ["init", "define_metric", "log", "summary", "finish"])
def test_a_failure_costs_one_warning(tmp_path, wandb, caplog, broken):
    wandb.broken = (broken,)
    toy.train(config(), tmp_path, make_evaluator=SCORED)
    said = [r.getMessage() for r in caplog.records if "W&B" in r.getMessage()]
    assert len(said) == 1 and "(no route to W&B)" in said[0]
    assert "training does not need it" in said[0] and "WANDB_MODE=offline" in said[0]
    assert len(jsonl.read(tmp_path / jsonl.FILE)) == 8


def test_nothing_waits_for_a_service_that_hangs(tmp_path, wandb, caplog, monkeypatch):
    """Neither the steps, nor, for long, the end; what does not fit into the queue is dropped."""
    go = threading.Event()
    monkeypatch.setattr(wandb, "init", lambda **options: go.wait(60) and wandb)
    monkeypatch.setattr(tracking, "_END_SECONDS", 0.05)
    monkeypatch.setattr(tracking, "_MOST_WAITING", 3)
    try:
        toy.train(config(), tmp_path, make_evaluator=SCORED)
    finally:
        go.set()
    assert (tmp_path / "summary.json").exists()
    said = [r.getMessage() for r in caplog.records if "W&B" in r.getMessage()]
    assert len(said) == 1 and "it does not keep up" in said[0]
    caplog.clear()
    go.clear()
    try:
        with tracking.Tracker(config(), tmp_path) as tracker:
            tracker.add({"step": 1, "time": 0.0})
    finally:
        go.set()
    assert "(no answer in 0.05 s)" in caplog.text


@pytest.mark.parametrize("module", [None, types.ModuleType("wandb")])
def test_a_missing_package_shows_before_anything_else(tmp_path, module, monkeypatch):
    """Also where W&B's own directory ./wandb looks like the package."""
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(UserError, match=r"log.wandb=mine needs a package that is missing: pip in"):
        toy.train(config(data__source="folder:/nowhere"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    toy.train(toy.config(), tmp_path / "run")  # who does not ask for it does not need it


def test_off_and_on_other_processes_it_does_nothing(tmp_path, wandb, monkeypatch):
    toy.train(config(log__wandb=""), tmp_path / "off", make_evaluator=SCORED)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with tracking.Tracker(config(), tmp_path) as tracker:
        tracker.add({"step": 1, "time": 0.0})
    assert wandb.inits == [] and not (tmp_path / "wandb.json").exists()


def test_with_the_real_package_offline(tmp_path, monkeypatch):
    if tracking._installed() is None:
        pytest.skip("wandb is not installed: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in tracking._PATIENCE:
        monkeypatch.setenv(name, "60")
    workdir = tmp_path / "run"
    c = config(evaluate__pictures=True)
    toy.train_until(5, c, workdir, make_evaluator=SCORED)
    toy.train(c, workdir, make_evaluator=SCORED)
    ident = json.loads((workdir / "wandb.json").read_text())["id"]
    runs = sorted((tmp_path / "wandb").glob(f"offline-run-*-{ident}"))
    assert len(runs) == 2  # one a start, of one id
    written = [pathlib.Path(run, f"run-{ident}.wandb").read_bytes() for run in runs]
    assert all(b"loss" in data and b"learning_rate" in data for data in written)
    assert list(runs[-1].glob("files/media/images/augmented_pairs*.png"))
