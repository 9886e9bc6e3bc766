"""Whole runs through `train`: they end, resume bit by bit, and stop cleanly when they must."""

import importlib
import json
import math
import shutil

import jax
import numpy as np
import opened_run
import pytest
import tiny
from PIL import Image
from test_writer import read_events

import main
from common.cli import modes
from common.data.sources.opening import open_source
from common.errors import UserError
from common.evaluate.online import make_evaluator
from common.optim import steps_of
from common.run import jsonl
from common.run.checkpoint import Checkpoints
from common.run.writer import TIMING_KEYS
from common.sharding import make_mesh
from common.train import loop
from common.train.position import Position
from common.train.prepare import Extent, prepare
from common.train.summary import PICTURES

CONFIGS = [f"{m}_{n}" for m in ("simclr", "moco") for n in ("tpu", "cifar10", "demo")]
CONFIGS += ["moco_v3_tpu", "moco_v3_cifar10", "moco_v2plus_cifar10", "simclr_vit_tpu"]
CONFIGS += ["simclr_v2_tpu:r152"]
SUMMARY = {"method", "dataset", "steps", "knn_top1", "knn_top1_at_init", "knn_top1_raw_pixels",
           "probe_top1", "label_free", "images_per_second"}  # fmt: skip
TOTAL = 7


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Two classes of small JPEGs of several shapes: 20 to train on, 6 to test."""
    root, rng = tmp_path_factory.mktemp("folder"), np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 6)):
        for i in range(count):
            path = root / split / ("dark", "light")[i % 2] / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            shape = (12 + i % 3, 14, 3)
            pixels = rng.integers(0, 128, shape, np.uint8) + np.uint8(i % 2 * 100)
            Image.fromarray(pixels).save(path)
    return root


def small(method, folder=None, **changes):
    """A run of 7 steps over epochs of 2, with a checkpoint after 3 and 6, scores after 2, 4, 6."""
    settings = {
        "data__source": f"folder:{folder}" if folder else "fake",
        "data__fake_examples": 20,
        "batch_size": 8,
        "duration": f"{TOTAL} steps",
        "log_every": 3,
        "evaluate__every": "2 steps",
        "evaluate__pictures": False,
        "checkpoint__every": "3 steps",
        "optimizer__learning_rate": 0.05,
        "optimizer__schedule": "cosine",
        "model__bn_groups": 2,
        **({"moco__queue_length": 12} if method == "moco" else {}),
    }
    return tiny.config(method, **(settings | changes))


def run(c, workdir, devices=2):
    return loop.train(
        main.METHODS[c.method], c, workdir, make_evaluator, make_mesh(jax.devices()[:devices])
    )


def saved(c, workdir, step, classes=2):
    """The state of a checkpoint, on one device."""
    extent = Extent(steps_of(c.duration, 2), 2, classes)
    mesh = make_mesh(jax.devices()[:1])
    prepared = prepare(main.METHODS[c.method], c, mesh, extent=extent, workdir=workdir)
    with Checkpoints(workdir, c.checkpoint.keep) as checkpoints:
        return checkpoints.restore(step, prepared.abstract, prepared.shardings)[0]


def lines(workdir, name=jsonl.FILE):
    """Records without what two runs of one computation differ in."""
    return [{k: v for k, v in r.items() if k not in TIMING_KEYS}
            for r in jsonl.read(workdir / name)]  # fmt: skip


def assert_same_run(c, got, want, classes=2):
    assert lines(got) == lines(want)
    a, b = (tiny.named_leaves(saved(c, w, TOTAL, classes)) for w in (got, want))
    assert a.keys() == b.keys()
    for name, x in b.items():
        np.testing.assert_array_equal(a[name], x, err_msg=name)
    wanted = {"params", "batch_stats", "opt_state", "probe", "step"}
    wanted |= {"key_params", "key_batch_stats"} if "moco" in c.method else set()
    wanted |= {"queue"} if c.method == "moco" else set()
    wanted |= {"teacher"} if c.method == "distil" else set()
    if "simclr" in c and c.simclr.memory_length:
        wanted |= {"key_params", "key_batch_stats", "queue"}
    assert wanted <= {name.split(".")[1].split("[")[0] for name in b}


class Killed(Exception):
    """Stands for the end of the process."""


def kill_before(monkeypatch, step):
    """Makes the run die when it would take `step`."""
    taken, to_global = iter(range(1, 1000)), loop.to_global

    def wrapped(*arguments):
        if next(taken) == step:
            raise Killed
        return to_global(*arguments)

    monkeypatch.setattr(loop, "to_global", wrapped)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_each_config_runs_as_a_smoke_test_without_data(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "nothing"))
    name, _, variant = name.partition(":")
    c = importlib.import_module(f"configs.{name}").get_config(f"{variant}:smoke".lstrip(":"))
    c.evaluate.pictures = "demo" in name  # they take longer than the rest
    work = tmp_path / "run"
    summary = run(c, work, devices=1)
    assert summary == json.loads((work / "summary.json").read_text())
    assert summary.keys() >= SUMMARY
    method = "moco_v3" if "v3" in name else name.split("_")[0]
    assert (summary["method"], summary["steps"]) == (method, 4)
    assert summary["dataset"] == "fake (train)" and summary["images_per_second"] > 0
    for score in ("knn_top1", "knn_top1_at_init", "knn_top1_raw_pixels", "probe_top1"):
        assert 0 <= summary[score] <= 1
    assert json.loads((work / "config.json").read_text())["method"] == c.method
    losses = {r["step"]: r["loss"] for r in lines(work) if "loss" in r}
    assert sorted(losses) == [1, 2, 3, 4] and all(map(math.isfinite, losses.values()))
    scores = {r["step"]: r["knn_top1"] for r in lines(work) if "knn_top1" in r}
    assert sorted(scores) == [0, 2, 4] and scores[4] == summary["knn_top1"]
    assert sorted(p.name for p in (work / "checkpoints").iterdir()) == ["2", "4"]
    pictures = set(PICTURES) if "demo" in name else set()
    assert {p.name for p in work.glob("*.png")} == pictures


# Images are in device memory, augmented there and trained on in dispatches of two steps.
DEVICE = tiny.VIT | {"data__augment_on": "device", "steps_per_dispatch": 2, "microbatch": 4}


@pytest.mark.parametrize(
    ("method", "images", "dies_at"),
    [
        ("simclr", "fake", 6),
        pytest.param("moco", "jpeg", 6, marks=pytest.mark.slow),
        pytest.param("moco_v3", "device", 5, marks=pytest.mark.slow),  # steps 5 and 6
        pytest.param("simclr", "memory", 6, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_continues_bit_by_bit(method, images, dies_at, folder, tmp_path, monkeypatch):
    changes = {"device": DEVICE, "memory": {"simclr__memory_length": 20}}.get(images, {})
    c = small(method, folder if images == "jpeg" else None, data__fake_classes=2, **changes)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    summary = run(c, whole)
    assert [r["step"] for r in lines(whole) if "loss" in r] == [1, 3, 6, 7]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_before(patch, dies_at)
        run(c, broken)
    assert [r["step"] for r in lines(broken) if "knn_top1" in r] == [0, 2, 4]
    # what a crash may leave: a torn line, a torn checkpoint
    with (broken / jsonl.FILE).open("a") as file:
        file.write('{"step": 5, "lo')
    (broken / "checkpoints" / "6.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    resumed = run(c, broken)  # from step 3, in the middle of the second epoch
    assert_same_run(c, broken, whole)
    assert [r["step"] for r in lines(broken, jsonl.DISCARDED)] == [4]
    purges = [e.step for e in read_events(broken / "tensorboard")[-1] if e.session_log.status]
    assert purges == [4]  # TensorBoard hides what the first attempt wrote from there on
    timed = {"images_per_second", "seconds"}
    assert {k: v for k, v in resumed.items() if k not in timed} == {
        k: v for k, v in summary.items() if k not in timed}  # fmt: skip

    # run once more, a finished run says the same and takes no step
    text = (broken / jsonl.FILE).read_text()
    with monkeypatch.context() as patch:
        kill_before(patch, 1)
        assert run(c, broken) == resumed
        if method != "simclr":
            return
        # also where it was killed between the last checkpoint and the summary
        (broken / "summary.json").unlink()
        again = run(c, broken)
    assert again == resumed and (broken / jsonl.FILE).read_text() == text


@pytest.mark.slow
def test_a_run_goes_on_with_more_devices_and_one_step_left(tmp_path, monkeypatch):
    """On 2 devices, then on 4: the losses that 2 would have had. The rate is known all the same."""
    c = small("moco", log_every=1, checkpoint__every="2 steps")
    run(c, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_before(patch, 7)
        run(c, tmp_path / "moved")
    summary = run(c, tmp_path / "moved", devices=4)
    assert summary["images_per_second"] > 0
    got, want = (
        [(r["step"], r["loss"]) for r in lines(tmp_path / name) if "loss" in r]
        for name in ("moved", "whole")
    )
    assert [step for step, _ in got] == list(range(1, TOTAL + 1))
    np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.slow
def test_data_that_has_grown_is_not_continued(folder, tmp_path, monkeypatch):
    copy = tmp_path / "images"
    shutil.copytree(folder, copy)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_before(patch, 5)
        run(small("simclr", copy), tmp_path / "work")
    shutil.copy(copy / "train" / "dark" / "4.jpg", copy / "train" / "dark" / "new.jpg")
    bad(tmp_path, ["21 images", "had 20", "--workdir"], folder=copy)


def test_other_files_of_the_same_number_are_not_continued(folder):
    source = open_source(small("simclr", folder).data, "train")
    Position(num_examples=20, listing=source.listing).check_same_data(source)
    Position.of({"num_examples": 20}).check_same_data(source)  # by code that did not list them
    with pytest.raises(UserError, match="20 images as before, but files were renamed, or added"):
        Position(num_examples=20, listing="another").check_same_data(source)


@pytest.mark.slow
def test_after_the_first_scores_and_checkpoint_nothing_compiles(tmp_path, monkeypatch):
    """Every function of the loop, of the evaluation and of the checkpoints, not only the step."""
    compiled, step, to_global = [], [0], loop.to_global

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(step[0])

    def wrapped(*arguments):
        step[0] += 1
        return to_global(*arguments)

    monkeypatch.setattr(loop, "to_global", wrapped)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        run(small("moco"), tmp_path)  # scores after 2, 4, 6, checkpoints after 3 and 6
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert step[0] == TOTAL and 0 in compiled
    assert max(compiled) <= 3


@pytest.mark.slow
def test_a_run_without_labels_or_test_set(tmp_path):
    c = small("simclr", data__fake_classes=0, data__test_split="", duration="3 steps")
    summary = run(c, tmp_path, devices=1)
    assert summary["knn_top1"] is None and summary["probe_top1"] is None
    assert not any("probe_loss" in r for r in lines(tmp_path))


@pytest.mark.slow
def test_a_supervised_run_says_that_it_is_one(tmp_path, capsys):
    """Where its method, its score or its encoder are named; random pixels and the untrained not."""
    changes = {"microbatch": 4, "model__bn_groups": 4, "duration": "3 steps"}
    c = small("simclr", simclr__loss="supcon", **changes)
    assert run(c, tmp_path)["supervised"]
    said = capsys.readouterr().err
    assert "method  simclr, supervised: its loss reads the labels" in said
    assert "Trained simclr, supervised, for 3 steps." in said
    for features, word in (("trained", "the supervised encoder after step 3"), ("pixels", "raw")):
        settings = opened_run.config(features=features)
        record = modes.run("knn", str(tmp_path), settings, main.METHODS)
        assert record["supervised"] == (features == "trained")
        assert word in capsys.readouterr().out


def bad(tmp_path, words, method="simclr", devices=2, **changes):
    with pytest.raises(UserError) as caught:
        run(small(method, **changes), tmp_path / "work", devices)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"augment__preset": "simclear"}, ["simclear", "Did you mean 'simclr'"]),
        ({"data__source": "webdataset"}, ["webdataset", "embedded", "folder:PATH"]),
        ({"data__source": "tfds:no_such_set"}, ["no_such_set", "TFDS_DATA_DIR"]),
        ({"data__source": "folder:/no/such/folder"}, ["/no/such/folder", "data.source"]),
        (
            {"simclr__loss": "supcon", "data__fake_classes": 0},
            ["simclr.loss=supcon", "data.labels", "nt_xent"],
        ),
        ({"batch_size": 9, "model__bn_groups": 3}, ["batch_size=9", "2 devices", "8"]),
        ({"batch_size": 40}, ["40", "20 examples", "batch_size"]),
        ({"model__bn_groups": 3}, ["bn_groups=3", "batch_size=8"]),
        ({"data__bank_split": "nope", "data__source": "embedded"}, ["nope", "train or test"]),
        ({"duration": "0 steps"}, ["duration", "0 steps"]),
        ({"duration": "-3 epochs"}, ["duration", "-3 epochs", "500 steps"]),
        ({"checkpoint__every": "-1 steps"}, ["checkpoint.every", "-1 steps"]),
        ({"evaluate__every": "often"}, ["evaluate.every", "often"]),
        ({"optimizer__warmup": "8 steps"}, ["optimizer.warmup", "8 steps", "7"]),
        ({"optimizer__name": "adam"}, ["optimizer.name", "adamw"]),
        ({"head__kind": "mlp"}, ["mlp", "simclr"]),
        ({"method": "moco", "moco__queue_length": -1}, ["queue of length -1", "65536"]),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_anything_is_trained(changes, words, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "nothing"))
    bad(tmp_path, words, **changes)
    # the same workdir serves when the mistake is mended
    assert {p.name for p in (tmp_path / "work").glob("*")} <= {"config.json", "checkpoints", "lock"}


def test_empty_folder(tmp_path):
    (tmp_path / "images" / "train").mkdir(parents=True)
    bad(tmp_path, ["no image in", "train", ".jpg"], folder=tmp_path / "images")


@pytest.mark.slow
def test_a_corrupt_jpeg_stops_the_run_or_is_replaced(folder, tmp_path, caplog):
    copy = tmp_path / "images"
    shutil.copytree(folder, copy)
    torn = copy / "train" / "dark" / "4.jpg"
    torn.write_bytes(torn.read_bytes()[:200])
    bad(tmp_path, [str(torn), "on_corrupt"], folder=copy, data__test_split="")
    # what the error recommends, in the workdir of the run that stopped
    mended = small("simclr", copy, data__on_corrupt="replace", data__test_split="")
    summary = run(mended, tmp_path / "work", 1)
    assert summary["steps"] == TOTAL
    warnings = [r.getMessage() for r in caplog.records if str(torn) in r.getMessage()]
    assert len(warnings) == 1 and "1 of 20" in warnings[0]


def claim(workdir, c):
    with loop.claim(workdir, c) as (path, _):
        return path


def test_a_mended_config_may_use_the_workdir_that_never_trained(tmp_path):
    bad(tmp_path, ["bn_groups"], model__bn_groups=3)
    work = claim(tmp_path / "work", small("simclr"))
    assert json.loads((work / "config.json").read_text())["model"]["bn_groups"] == 2
    (work / jsonl.FILE).write_text('{"step": 0}\n')  # what is measured before the first step
    claim(work, small("simclr", seed=2))
    claim(work, small("simclr"))
    (work / jsonl.FILE).write_text('{"step": 0}\n{"step": 1}\n')  # now it has begun
    bad(tmp_path, ["holds the run of another config", "seed (was 0, now 1)"], seed=1)
    claim(work, small("simclr", log_every=7))
    with loop.claim(work, small("simclr")):
        bad(tmp_path, ["work is in use by another run", "--workdir"])


def test_a_workdir_that_is_not_ours(tmp_path):
    work = tmp_path / "work"
    work.write_text("a file")
    bad(tmp_path, ["work is a file", "--workdir"])
    work.unlink()
    work.mkdir()
    (work / "thesis.txt").write_text("precious")
    bad(tmp_path, ["holds no run", "--workdir"])
    (work / "config.json").write_text('{"hidden_size": 768}')
    bad(tmp_path, ["another config"])
    (work / "config.json").write_text("{")
    bad(tmp_path, ["config.json is not JSON"])
    assert sorted(p.name for p in work.iterdir()) == ["config.json", "lock", "thesis.txt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot use .*file/run as a workdir: "):
        run(small("simclr"), tmp_path / "file" / "run")
