"""benchmarks.record: what it does when it is cut off, and what its checks detect."""

import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import fake_items
import numpy as np
import pytest

from benchmarks.record import __main__ as record
from benchmarks.record import items, ledger, plan, quality, sanity, schedule, steps
from benchmarks.record.ledger import Found, Ledger
from benchmarks.record.setting import ROOT, Setting, environment, last_words
from benchmarks.running import traced
from common.errors import UserError
from common.run import jsonl

TESTS = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class SimpleState:
    params: dict

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True)
class SimpleRun:
    state: SimpleState


def setting(tmp_path, data=""):
    return Setting(tmp_path, data, steps.TINY)


def states(out):
    return {r["item"]: r["state"] for r in Ledger(out).records()}


def counts(out):
    records = Ledger(out).records()
    return {name: sum(r["item"] == name for r in records) for name in states(out)}


def call(out, *more, minutes=10.0):
    return record.main(
        [f"--out={out}", f"--minutes={minutes}", "--tiny", *more], catalogue="fake_items"
    )


@pytest.fixture
def fakes(monkeypatch):
    """So that the worker finds them too."""
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    )
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # where libtpu is installed, JAX looks for TPUs
    monkeypatch.setattr(schedule, "SAVING", 1.0)


@pytest.mark.slow  # two processes of JAX for each item that ends one
def test_items_that_fail_die_or_hang_stop_no_other_and_are_tried_again(tmp_path, fakes, capsys):
    assert call(tmp_path) == 1
    assert states(tmp_path) == {
        "good": "ok", "wrong": "failed", "raises": "failed", "dies": "failed", "hangs": "failed",
        "late": "ok", "fails": "failed", "nowhere": "failed", "misread": "failed",
        "trains": "ok", "scores": "ok",
    }  # fmt: skip
    found = {r["item"]: r for r in Ledger(tmp_path).records()}
    assert found["wrong"]["values"] == {"off": 3}
    assert found["raises"]["figure"] == "ValueError: a | first line"
    assert found["dies"]["figure"].startswith(f"died (exit status {-signal.SIGABRT}): ")
    assert re.match(r"no end after \d+\.\d s", found["hangs"]["figure"])
    grandchild = int((tmp_path / "grandchild").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(grandchild, 0)
    assert "No such file" in found["nowhere"]["figure"]  # from the child
    assert found["misread"]["figure"].startswith("its result cannot be read: TypeError")
    assert found["fails"]["figure"] == "exit status 1: error: no such thing"
    assert found["good"]["values"]["pid"] != found["late"]["values"]["pid"] != os.getpid()
    said = capsys.readouterr().err
    assert f"4 of 12 ok, 7 failed, 1 left: {tmp_path / ledger.TABLE}" in said
    assert "the same command continues: too_long is next and needs 10000 s" in said
    table = (tmp_path / ledger.TABLE).read_text().splitlines()
    assert table[0].startswith(found["good"]["hardware"])
    assert [line.split(" | ")[1] for line in table[4:]] == list(found)
    assert "| sanity | raises | failed | ValueError: a / first line |" in table[6]
    # ok items are not run again; failed ones are
    assert call(tmp_path) == 1
    assert counts(tmp_path) == {
        name: 2 if state == "failed" else 1 for name, state in states(tmp_path).items()
    }


@pytest.mark.slow
def test_when_the_time_is_up_a_training_run_is_saved_and_carries_on(tmp_path, fakes, monkeypatch):
    monkeypatch.setenv("TRAIN_FOREVER", "1")
    assert call(tmp_path, "--stages=trains,scores", minutes=15 / 60) == 3
    assert states(tmp_path) == {"trains": "saved"}
    step = int((tmp_path / "progress").read_text())
    assert 0 < step < fake_items.STEPS
    figure = Ledger(tmp_path).records()[0]["figure"]
    assert figure == f"told to stop: step {step} is saved"
    assert call(tmp_path, "--stages=trains,scores") == 0
    assert states(tmp_path) == {"trains": "ok", "scores": "ok"}
    assert Ledger(tmp_path).records()[1]["figure"] == str(fake_items.STEPS)
    # an item is not started when there is too little time
    assert call(tmp_path, "--stages=good,hangs", minutes=0.1 / 60) == 3
    assert "good" not in states(tmp_path)


@pytest.mark.slow
def test_a_kill_of_the_whole_leaves_nothing_running_and_the_next_call_goes_on(tmp_path, fakes):
    code = (
        "import sys\nfrom benchmarks.record import __main__ as record\n"
        "record.main(sys.argv[1:], catalogue='fake_items')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, f"--out={tmp_path}", "--minutes=10", "--tiny",
         "--stages=good,trains"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{TESTS}{os.pathsep}{ROOT}", "TRAIN_FOREVER": "1"},
    )  # fmt: skip
    until((tmp_path / "started").exists)
    process.send_signal(signal.SIGKILL)
    process.wait()
    until((tmp_path / "progress").exists)  # its training run got the signal, and saved
    assert states(tmp_path) == {"good": "ok"}
    with (tmp_path / ledger.LINES).open("a") as file:
        file.write('{"item": "trains", "sta')  # as a kill may leave it
    assert call(tmp_path, "--stages=good,trains") == 0
    assert states(tmp_path) == {"good": "ok", "trains": "ok"} and counts(tmp_path)["good"] == 1


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_order_is_untried_then_failed_and_what_depends_waits(tmp_path):
    book = Ledger(tmp_path)
    for name, state in (("good", "ok"), ("wrong", "failed"), ("late", "cut"), ("trains", "saved")):
        book.add("sanity", name, state, Found(""), 1.0)

    def names(left):
        plan = schedule.Schedule(
            setting(tmp_path), book, fake_items.every(None), time.time() + left, 1
        )
        chosen = plan._next()
        return [item.name for item in plan._open()], chosen and chosen.name

    opened, chosen = names(left=1e6)
    assert opened == ["raises", "dies", "hangs", "late", "too_long", "fails", "nowhere", "misread",
                      "trains", "wrong"]  # fmt: skip
    assert chosen == "raises"
    assert names(left=0.5)[1] == "hangs"  # the only one that fits
    assert names(left=0.1)[1] is None
    book.add("quality", "trains", "ok", Found(""), 1.0)
    assert "scores" in names(left=1e6)[0]


def test_a_run_whose_folder_is_gone_is_trained_again(tmp_path):
    book = Ledger(tmp_path)
    item = next(item for item in items.every(steps.TINY) if item.name == "simclr_200_epochs")
    book.add("quality", item.name, "ok", Found(""), 1.0)
    plan = schedule.Schedule(setting(tmp_path), book, [item], time.time() + 1000, 1)
    assert plan._next() is item
    workdir = quality.workdir(setting(tmp_path), item.name)
    workdir.mkdir(parents=True)
    (workdir / "summary.json").write_text("{}")
    assert plan._next() is None and not plan.waiting()


def test_the_last_words_are_those_of_the_error():
    words = "jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: out of memory"
    notice = "For simplicity, JAX has removed its internal frames\n"
    assert last_words(f"Traceback\n  File x\n{words}\n----\n{notice}") == words
    assert last_words("error: no index\n") == "error: no index"
    assert last_words("told to stop: saved\n\n") == "told to stop: saved"
    assert last_words("") == "no output"


def test_the_processes_can_always_use_a_cpu(monkeypatch):
    for given, wanted in (("", ""), ("cuda", "cuda,cpu"), ("cpu", "cpu"), ("tpu,cpu", "tpu,cpu")):
        monkeypatch.setenv("JAX_PLATFORMS", given)
        assert environment()["JAX_PLATFORMS"] == wanted


def test_a_training_run_is_begun_only_with_the_time_to_save_it(tmp_path):
    item = items.Item("run", "quality", 100, command=fake_items.train, training=True)

    def chosen(left):
        return schedule.Schedule(
            setting(tmp_path), Ledger(tmp_path), [item], time.time() + left, 1
        )._next()

    assert chosen(100 + schedule.SAVING - 1) is None
    assert chosen(100 + schedule.SAVING + 1) is item


def test_records_are_strict_json_and_a_torn_line_costs_only_itself(tmp_path):
    book = Ledger(tmp_path)
    book.add("sanity", "a", "ok", Found("fine", {"x": [float("inf"), {"y": np.pi}]}), 1.26)
    with (tmp_path / ledger.LINES).open("a") as file:
        file.write('{"item": "b", "state": "o')
    book.add("rates", "c", "failed", Found("bad | worse", hardware="one"), 61)
    book.add("rates", "c", "ok", Found("good", hardware="two"), 60)
    book.add("rates", "d", "ok", Found("good", hardware="one"), 60)

    def strict(name):
        raise AssertionError(name)

    lines = (tmp_path / ledger.LINES).read_text().splitlines()
    assert json.loads(lines[0], parse_constant=strict)["values"] == {"x": [None, {"y": np.pi}]}
    assert [r["item"] for r in book.records()] == ["a", "c", "c", "d"]
    assert book.state_of("c") == "ok" and book.state_of("b") is None
    table = (tmp_path / ledger.TABLE).read_text().splitlines()
    assert table[0].startswith("two [1]; one [2]; ")
    assert table[4:] == [
        "| sanity | a | ok | fine | 1 |",
        "| rates | c [1] | ok | good | 60 |",
        "| rates | d [2] | ok | good | 60 |",
    ]


def test_mistakes(tmp_path, capsys):
    with pytest.raises(UserError, match="--stages=sanitty is unknown: expected some of sanity"):
        record.main([f"--out={tmp_path}", "--minutes=1", "--stages=sanitty"])
    with pytest.raises(UserError, match=r"quality needs --data=DIR"):
        record.main([f"--out={tmp_path}", "--minutes=1", "--stages=quality"])
    with pytest.raises(UserError, match=r"holds no index\.json"):
        record.main([f"--out={tmp_path}", "--minutes=1", f"--data={tmp_path}"])
    with pytest.raises(UserError, match="expected more than 0"):
        record.main([f"--out={tmp_path}", "--minutes=0"])
    assert record.main([f"--out={tmp_path}", "--minutes=0.0001"]) == 3
    assert "quality is left out" in capsys.readouterr().err
    with pytest.raises(UserError, match="records of the full sizes, and these are the tiny"):
        record.main([f"--out={tmp_path}", "--minutes=1", "--tiny"])
    with (
        record.claimed(tmp_path, steps.FULL),
        pytest.raises(UserError, match="another call is writing"),
        record.claimed(tmp_path, steps.FULL),
    ):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to --out"):
        record.main([f"--out={tmp_path}/file", "--minutes=1", "--tiny"])


def test_the_list_needs_nothing_and_is_of_all_items(capsys):
    every = [item.name for item in items.every(steps.FULL)]
    assert record.main(["--list"]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == every
    assert record.main(["--list", "--stages=quality"]) == 0
    listed = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert ["quality", "simclr_500_epochs"] in listed and {row[0] for row in listed} == {"quality"}
    with pytest.raises(SystemExit):  # anything else does
        record.main(["--stages=quality"])


def test_the_losses_and_knn_are_checked_against_numpy_and_a_wrong_one_is_seen(
    tmp_path, monkeypatch
):
    for name in ("nt_xent", "info_nce"):
        assert sanity.losses(setting(tmp_path), name).ok
    assert sanity.neighbours(setting(tmp_path)).ok
    right = sanity.oracles.info_nce
    monkeypatch.setattr(sanity.oracles, "info_nce", lambda *a: (right(*a)[0], 1.001 * right(*a)[1]))
    assert not sanity.losses(setting(tmp_path), "info_nce").ok
    find = sanity.knn.neighbours
    monkeypatch.setattr(
        sanity.knn, "neighbours", lambda *a: (np.roll(find(*a)[0], 1, axis=1), find(*a)[1])
    )
    assert not sanity.neighbours(setting(tmp_path)).ok


@pytest.mark.slow
def test_a_step_is_right_only_if_its_loss_moves_and_its_state_is_given_up(tmp_path, monkeypatch):
    name = "simclr_device_bfloat16_dispatch"
    found = sanity.step(setting(tmp_path), name)
    assert found.ok and found.values["donated"] == 1

    class Broken(sanity.Running):
        def dispatch(self):
            keep = sanity.jax.tree.map(sanity.jax.numpy.copy, self.state)
            metrics = super().dispatch()
            return metrics | {"loss": metrics["loss"] * np.nan} if keep else metrics

    monkeypatch.setattr(sanity, "Running", Broken)
    assert not sanity.step(setting(tmp_path), name).ok


class FakeFirstStep:
    """A step whose gradient jumps by 1 % where the first parameter is above its start."""

    start = SimpleState({"w": np.array([1.0, 2.0], np.float32)})
    calls: list[str]

    def __init__(self, c, on):
        self.run = SimpleRun(self.start)

    def __call__(self, state, keep=False):
        w = state.params["w"]
        here = len(self.calls) == 1  # the second one is the device's
        self.calls.append("there")
        beyond = self.flips if here else w[0] > 1
        gradient = np.array([1.0, 1.01 if beyond else 1.0], np.float32)
        return np.float32(3), gradient * (self.factor if here else 1)


@pytest.mark.parametrize(
    "flips, factor, ok, states",
    [(False, 1, True, 1), (True, 1, True, 3), (False, 1.001, False, 1 + sanity.NEIGHBOURS)],
)
def test_a_gradient_may_be_that_of_a_state_one_rounding_away(
    flips, factor, ok, states, tmp_path, monkeypatch
):
    fake = type("Fake", (FakeFirstStep,), {"flips": flips, "factor": factor, "calls": []})
    monkeypatch.setattr(sanity, "_FirstStep", fake)
    found = sanity.same_as_cpu(setting(tmp_path), "simclr")
    assert found.ok == ok and found.values["loss"] == 0
    assert found.values["states"] == states
    assert ("states a rounding apart" in found.figure) == (states > 1)
    same = found.values["gradient_of_the_same_state"] < sanity.GRADIENT_TOLERANCE
    assert same == (states == 1)


def test_neighbours_of_a_state_are_one_rounding_away():
    start = SimpleState({"w": np.linspace(0.1, 9, 1000, dtype=np.float32)})
    moved = sanity._neighbour(start, seed=1).params["w"]
    assert moved.dtype == np.float32
    apart = np.abs(moved.view(np.int32) - start.params["w"].view(np.int32))
    assert apart.max() <= 2 and (apart > 0).mean() > 0.9
    assert 0.4 < (moved > start.params["w"]).mean() < 0.6


def test_seconds_to_a_score_are_those_of_the_steps_alone():
    line = {"loss": 1.0}
    records = [
        {"step": 0, "knn_top1": 0.95},  # of the untrained network
        line | {"step": 1},
        line | {"step": 10, "seconds_step": 0.5},
        line | {"step": 20, "seconds_step": 0.1},
        {"step": 20, "knn_top1": 0.89},
        line | {"step": 30},  # the first after a restart
        line | {"step": 40, "seconds_step": 0.2},
        {"step": 40, "knn_top1": 0.91},
        line | {"step": 50, "seconds_step": 9.0},
        {"step": 50, "knn_top1": 0.92},
    ]
    # 9, 10 and 10 timed steps; 11 others count as these do
    mean = (9 * 0.5 + 10 * 0.1 + 10 * 0.2) / 29
    seconds, step = quality.seconds_to(records, 0.9)
    assert step == 40 and seconds == pytest.approx(40 * mean)
    assert quality.seconds_to(records, 0.93) is None


def test_what_a_trained_run_says(tmp_path):
    workdir = quality.workdir(setting(tmp_path), "simclr_500_epochs")
    workdir.mkdir(parents=True)
    summary = {
        "knn_top1": 0.9051, "knn_top1_at_init": 0.3, "steps": 400, "batch_size": 100,
        "images_per_second": 2000.0, "seconds": 31.4, "device": "H100", "jax": "0.11",
    }  # fmt: skip
    (workdir / "summary.json").write_text(json.dumps(summary))
    lines = [
        {"step": 200, "loss": 3.0, "seconds_step": 0.05}, {"step": 200, "knn_top1": 0.9},
        {"step": 400, "loss": 2.0, "seconds_step": 0.05}, {"step": 400, "knn_top1": 0.9051},
    ]  # fmt: skip
    (workdir / jsonl.FILE).write_text("".join(json.dumps(x) + "\n" for x in lines))
    found = quality.trained(setting(tmp_path), "simclr_500_epochs")
    for words in ("90.51%", "31 s in all, 20 s of them in steps", "2,000 images/s", "loss 2.000"):
        assert words in found.figure
    assert found.hardware.startswith("H100, ") and found.hardware.endswith(" jax 0.11")
    assert "90% after 10 s of steps (step 200)" in found.figure
    assert found.values["seconds_to_target"] == pytest.approx(10)


def test_a_run_can_be_carried_to_another_place():
    """A resumed run has to find the config that it had: paths within the checkout are relative."""
    inside = Setting(ROOT / "runs" / "kit", str(ROOT / "runs" / "shards"), steps.FULL)
    command = quality.train(inside, "moco_200_epochs")
    assert "--config.data.source=shards:runs/shards" in command
    outside = Setting(ROOT / "runs" / "kit", "/elsewhere/shards", steps.FULL)
    command = quality.train(outside, "moco_200_epochs")
    assert "--config.data.source=shards:/elsewhere/shards" in command


def test_every_name_is_unique_and_every_run_is_scored_in_both_protocols():
    every = items.every(steps.FULL)
    names = [item.name for item in every]
    assert len(set(names)) == len(names)
    assert [item.stage for item in every] == sorted(
        [item.stage for item in every], key=items.STAGES.index
    )
    for run in quality.RUNS:
        assert {item.name for item in every if item.after == run} == {
            f"{run}_{x}" for x in ("knn200", "knn10", "linear_cached", "linear_augmented")
        }
    assert all(bool(item.work) != bool(item.command and item.read) for item in every)


@pytest.mark.slow
@pytest.mark.parametrize("name", plan.every(steps.FULL))
def test_every_step_is_lowered_for_cuda_and_tpu(name):
    step = traced(plan.every(steps.FULL)[name])
    text = step.lower(lowering_platforms=("cuda", "tpu")).as_text()
    assert "stablehlo.convolution" in text
    assert "stablehlo.custom_call" not in text  # of a library that only one platform has
    assert not re.search(r"stablehlo\.(all_|reduce_scatter|collective_)", text)  # on one device
