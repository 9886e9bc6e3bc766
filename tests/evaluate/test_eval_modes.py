"""The modes that evaluate a run: what they may see, what they may change, and what they leave."""

import dataclasses
import functools
import json
import sys

import jax
import numpy as np
import opened_run
import pytest
import tiny
from test_knn import by_hand

from common.cli import modes
from common.data.sources import fake
from common.data.sources.fake import FakeSource
from common.errors import UserError
from common.evaluate import (
    batches,
    finetune,
    finetune_mode,
    finetune_recipe,
    knn_mode,
    linear,
    linear_mode,
    logistic,
    transfer_mode,
)
from common.evaluate.finetune_recipe import Recipe
from common.evaluate.linear import Candidate
from common.run import jsonl
from common.setup import make_encoder_setup
from common.sharding import make_mesh


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return opened_run.write(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def opened(workdir):
    """Opened once: its encoder compiles once."""
    return opened_run.load(workdir)


def with_settings(opened, **changes):
    """The same run and compiled encoder under other settings."""
    other = dataclasses.replace(opened, settings=opened_run.config(**changes))
    other.__dict__["encoder"] = opened.encoder
    return other


def records(workdir):
    return [json.loads(line) for line in (workdir / jsonl.RESULTS).read_text().splitlines()]


@pytest.fixture
def events(monkeypatch):
    """Names of events in order: splits read, fits, choices."""
    seen = []

    def spy(owner, name, word):
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def wrapped(*args, **options):
            seen.append(word(*args))
            return inner(*args, **options)

        monkeypatch.setattr(owner, name, wrapped)

    spy(FakeSource, "read", lambda source, ids: source.split)
    spy(linear, "fit", lambda *_: "fit")
    spy(logistic, "fit", lambda *_: "fit")
    spy(linear, "best", lambda *_: "choice")
    return seen


@pytest.mark.parametrize("optimizer", ["sgd", "lbfgs"])
def test_the_sweep_never_sees_the_test_split(opened, events, optimizer):
    metrics, _ = linear_mode.run(with_settings(opened, linear__optimizer=optimizer))
    assert events.count("choice") == 1 and events.count("fit") == 2
    assert "test" in events and "test" not in events[: events.index("choice") + 1]
    assert events.index("test") > max(i for i, e in enumerate(events) if e == "fit")
    assert metrics["num_held_out"] == 6 and metrics["num_train"] == 60  # then trained on all


def test_transfer_chooses_without_the_test_split(opened, events):
    sets = "fake,fake@test:train"
    metrics, sentence = transfer_mode.run(with_settings(opened, transfer__sources=sets))
    first = events[: len(events) // 2]
    assert "test" not in first[: first.index("choice") + 1]
    one, other = metrics["data_sets"]
    assert (one["train_split"], other["train_split"]) == ("train", "test")
    assert (metrics["source"], metrics["test_split"]) == ("fake,fake", "test,train")
    assert metrics["top1"] == pytest.approx((one["top1"] + other["top1"]) / 2)
    assert sentence.count("% of 60 images of fake") == 2


def test_cached_equals_augmented_when_nothing_is_augmented(opened):
    """Random images come without crops; `test_cached_equals_crops_of_whole_images` has some."""
    train = opened.open_labelled("train")
    rows, grid = np.flatnonzero(np.arange(60) % 5), [Candidate(30.0, 0.0), Candidate(60.0, 0.01)]
    fits = [
        linear_mode.Bank(opened, train, variant).fit(rows, grid)
        for variant in ("cached", "augmented")
    ]
    features = opened.extract(train)[0]
    for a, b in zip(*fits, strict=True):
        assert np.ptp(a.logits(features)) > 0.5
        np.testing.assert_allclose(a.logits(features), b.logits(features), atol=2e-3)


@pytest.mark.slow
def test_cached_equals_crops_of_whole_images(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(40):
        path = tmp_path / "images" / "train" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    whole = {f"augment__{name}": 1.0 for name in ("area_min", "ratio_min", "ratio_max")}
    run = opened_run.write(
        tmp_path / "run", data__source=f"folder:{tmp_path / 'images'}", data__test_split="train",
        augment__flip=0.0, **whole,
    )  # fmt: skip
    opened = opened_run.load(run)
    train = opened.open_labelled("train")
    features = opened.extract(train)[0]
    fits = [
        linear_mode.Bank(opened, train, variant).fit(np.arange(40), [Candidate(100.0, 0.0)])[0]
        for variant in ("cached", "augmented")
    ]
    np.testing.assert_allclose(*(f.logits(features) for f in fits), atol=2e-3)
    assert np.ptp(fits[0].logits(features)) > 0.5


def test_linear_eval_leaves_the_encoder_a_line_and_a_classifier(opened, workdir, capsys):
    before = opened_run.leaves((opened.state.params, opened.state.batch_stats))
    run = with_settings(opened, linear__variant="augmented", linear__epochs=1)
    metrics, sentence = linear_mode.run(run)
    after = opened_run.leaves((opened.state.params, opened.state.batch_stats))
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    assert "crops and flips" in sentence and "step 7" in sentence and metrics["top5"] is None
    with np.load(workdir / "linear_eval.npz") as saved:
        assert saved["image_size"] == opened.config.data.image_size
        features, labels, _ = opened.extract(opened.open("test"))
        logits = features @ saved["kernel"] + saved["bias"]
        assert (logits.argmax(1) == labels).mean() == pytest.approx(metrics["top1"])
        assert saved["class_names"].tolist() == ["class 0", "class 1", "class 2"]
        assert saved["step"] == 7 and saved["layer"] == "backbone"


def test_a_changed_bit_of_the_encoder_is_noticed(opened):
    before = jax.device_get(opened.state.batch_stats)
    after = jax.tree.map(np.copy, before)
    linear_mode.check_unchanged(before, after)
    jax.tree.leaves(after)[3][:1] = np.nextafter(jax.tree.leaves(after)[3][:1], 9)
    with pytest.raises(RuntimeError, match="the frozen encoder changed"):
        linear_mode.check_unchanged(before, after)


def test_a_run_with_a_warm_up_of_several_epochs_opens(tmp_path):
    run = opened_run.write(tmp_path / "run", optimizer__warmup="2 epochs")
    assert opened_run.load(run).step == opened_run.STEP


def test_results_line_and_sentence(workdir, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py", "--mode=knn", "--workdir=a b"])
    config = opened_run.config(knn__k=5, features="pixels", seed=4)
    modes.run("knn", workdir, config, tiny.METHODS)
    (line,) = [r for r in records(workdir) if r["mode"] == "knn"]
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and f"{100 * line['top1']:.2f} % of 60 images" in out
    assert "kNN" in line["protocol"] and line["command"] == "main.py --mode=knn '--workdir=a b'"
    wanted = {"k": 5, "num_train": 60, "num_test": 60, "seed": 4, "checkpoint_step": 0,
              "train_split": "train", "test_split": "test", "features": "pixels"}  # fmt: skip
    assert {name: line[name] for name in wanted} == wanted


def test_knn_uses_its_settings(opened):
    """Each of them changes the score here; the train split votes."""
    (bank, labels, _), (queries, wanted, _) = (
        opened.extract(opened.open(split)) for split in ("train", "test")
    )
    found = []
    for k, temperature, center in ((5, 0.1, 0), (5, 0.1, 1), (30, 0.1, 1), (30, 9.0, 1)):
        c = with_settings(opened, knn__k=k, knn__temperature=temperature, knn__center=bool(center))
        record, _ = knn_mode.run(c)
        want = by_hand(bank, labels, queries, wanted, k, temperature, center)
        assert record["top1"] == pytest.approx(want, abs=1e-9)
        said = {"k": k, "temperature": temperature, "center": center, "metric": "cosine"}
        assert record.items() >= said.items()
        found.append(want)
    assert len(set(found)) == 4


@pytest.mark.parametrize(("layer", "said"), [("backbone", ": "), ("head1", ", layer head1: ")])
def test_knn_names_a_layer_of_the_head(opened, layer, said):
    _, sentence = knn_mode.run(with_settings(opened, layer=layer))
    assert f"on the encoder after step 7{said}" in sentence


def unlabel(monkeypatch):
    """Every third example of `fake` loses its label."""
    inner = fake.open_fake

    def open_fake(config, split):
        source = inner(config, split)
        source.labels[::3] = -1
        return source

    monkeypatch.setattr(fake, "open_fake", open_fake)


def test_unlabelled_rows_are_left_out(opened, monkeypatch):
    unlabel(monkeypatch)  # labels are 0, 1, 2, 0, ...: none of class 0 is left
    bank = linear_mode.Bank(opened, opened.open_labelled("train"), "cached")
    assert len(bank.labels) == 40 and set(bank.labels) == {1, 2}
    metrics, _ = linear_mode.run(with_settings(opened, linear__optimizer="lbfgs"))
    assert (metrics["num_train"], metrics["num_test"]) == (40, 40)


def test_finetune_moves_every_layer_by_the_listed_examples_only(workdir, monkeypatch):
    files = {p: p.read_bytes() for p in (workdir / "checkpoints").rglob("*") if p.is_file()}
    opened = opened_run.load(
        workdir, devices=2, layer="head1", finetune__fraction=0.5, finetune__epochs=6, seed=1
    )
    seen, kept, inner = set(), [], finetune.Finetuner.train
    views, read = FakeSource.views, FakeSource.read

    def spied_views(source, ids, size):
        seen.update(ids.tolist() if source.split == "train" else ())
        return views(source, ids, size)

    def spied_read(source, ids):
        seen.update(ids.tolist() if source.split == "train" else ())
        return read(source, ids)

    monkeypatch.setattr(FakeSource, "views", spied_views)
    monkeypatch.setattr(FakeSource, "read", spied_read)
    monkeypatch.setattr(finetune.Finetuner, "train", lambda *a: kept.append(inner(*a)) or kept[-1])
    before = opened_run.leaves(opened.state.params)
    metrics, sentence = finetune_mode.run(opened)

    saved = json.loads((workdir / "finetune_ids_0.5_seed1.json").read_text())
    assert np.bincount(np.array(saved["ids"]) % 3).tolist() == [10, 10, 10]
    assert seen and seen <= set(saved["ids"])
    assert metrics["num_train"] == 30 and metrics["ids"] == "finetune_ids_0.5_seed1.json"
    assert "50 % of the labels (30 images)" in sentence

    after = opened_run.leaves(kept[0].params["network"])
    assert {name for name in after if "head" in name} == {
        "['head']['dense1']['kernel']", "['head']['bn1']['scale']", "['head']['bn1']['bias']"
    }  # fmt: skip
    assert len([n for n in before if "backbone" in n]) == len([n for n in after if "back" in n])
    for name, value in after.items():
        assert np.abs(value - before[name]).max() > 0, name
    stats = opened_run.leaves(opened.state.batch_stats)
    for name, value in opened_run.leaves(kept[0].batch_stats).items():
        assert np.abs(value - stats[name]).max() > 0, name
    assert np.abs(kept[0].params["classifier"]["kernel"]).max() > 0
    again = opened_run.leaves(opened.state.params)  # the run's own arrays and files are as before
    assert all(before[name].tobytes() == again[name].tobytes() for name in before)
    assert files == {p: p.read_bytes() for p in (workdir / "checkpoints").rglob("*") if p.is_file()}
    finetune_mode.save_ids(opened, opened.open("train"), np.array(saved["ids"]))
    with pytest.raises(UserError, match="earlier fine-tuning on other data"):
        finetune_mode.save_ids(opened, opened.open("train"), np.array([1, 2]))


@pytest.mark.slow
def test_finetune_is_the_same_on_any_number_of_devices():
    c = tiny.config("simclr")
    state = tiny.draw_state(jax.eval_shape(tiny.build(c, 1).init, jax.random.key(0)))
    found = []
    for devices in (1, 8):
        mesh = make_mesh(jax.devices()[:devices])
        recipe = Recipe(learning_rate=0.5, weight_decay=1e-3)
        tx = finetune_recipe.optimizer(recipe, 16, 3, 1)
        tuner = finetune.Finetuner(make_encoder_setup(c, mesh), "backbone", 3, tx)
        tuned = tuner.init(state.params, state.batch_stats)
        for t in range(3):
            batch = tiny.host_batch(c, t)
            pair = batches.to_global(mesh, (batch["images"][:, 0], batch["labels"]))
            tuned, _ = tuner.step(tuned, *pair)
        found.append(jax.device_get((tuned.params, tuned.batch_stats)))
    tiny.assert_close(*found, relative=2e-4, absolute=1e-6)


def test_finetune_optimizer_is_nesterov_sgd_on_a_cosine():
    tx = finetune_recipe.optimizer(Recipe(weight_decay=0.1), 512, 4, 2)
    p, state, w, v = {"kernel": np.full((1, 1), 2.0, np.float32)}, None, 2.0, 0.0
    state = tx.init(p)
    for t in range(4):
        updates, state = tx.update({"kernel": 3 * p["kernel"]}, state, p)
        p = {"kernel": np.asarray(p["kernel"] + updates["kernel"])}
        g = 3.1 * w
        v = 0.9 * v + g
        w -= 0.1 * (1 + np.cos(np.pi * t / 4)) / 2 * (g + 0.9 * v)
        assert p["kernel"].item() == pytest.approx(w, rel=1e-5)


def test_mistakes(opened, workdir, tmp_path):
    def fails(match, run=workdir, mode="finetune", **changes):
        with pytest.raises(UserError, match=match):
            modes.run(mode, run, opened_run.config(**changes), tiny.METHODS)

    fails("give the --workdir that a run was trained in", run=tmp_path)
    fails("no checkpoint of step 3: choose one of 7, or 0 for the newest", step=3)
    fails("layer 'head9' is unknown: choose one of backbone, head1", layer="head9")
    fails("less than one image a class", finetune__fraction=0.01)
    fails("needs a network", features="pixels")
    fails("eval.finetune.epochs=-1 is less than one step", finetune__epochs=-1)
    fails("raw pixels: use cached", mode="linear_eval", features="pixels",
          linear__variant="augmented")  # fmt: skip
    fails('"cashed" is unknown.*"cached"', mode="linear_eval", linear__variant="cashed")
    fails("needs a learning_rate, .* above 0", mode="linear_eval", linear__learning_rate=())
    fails('"l2" is unknown', mode="knn", knn__metric="l2")
    fails("no split 'val'", mode="knn", source="embedded", test_split="val")
    unlabelled = opened_run.write(tmp_path / "unlabelled", data__fake_classes=0)
    fails("has no labels", run=unlabelled)
    fails("has no labels", run=unlabelled, mode="transfer")
    for path in (unlabelled / "checkpoints").iterdir():
        path.rename(tmp_path / "gone")
    fails("no checkpoint yet: train first", run=unlabelled)


def test_datasets_of_transfer(tmp_path):
    own = transfer_mode.Dataset("fake", "a", "b")

    def parse(text):
        return [tuple(vars(d).values()) for d in transfer_mode.parse(text, own)]

    assert parse(" ") == [("fake", "a", "b")]
    assert parse("embedded,tfds:cifar10, folder:/x@y/z@train:val") == [
        ("embedded", "train", "test"),
        ("tfds:cifar10", "train", "test"),
        ("folder:/x@y/z", "train", "val"),
    ]
    assert parse("tfds:a:1.0.0@train[:80%]:train[80%:]") == [
        ("tfds:a:1.0.0", "train[:80%]", "train[80%:]")
    ]
    assert parse("folder:gs://b/x@y/c") == [("folder:gs://b/x@y/c", "train", "test")]
    assert parse("folder:/a, b/c,shards:/d@x:y") == [
        ("folder:/a, b/c", "train", "test"), ("shards:/d", "x", "y")
    ]  # fmt: skip
    for name in ("pets @home, été (1)", "pets@a:b"):  # an @ in the name of what is there
        (tmp_path / name).mkdir()
        assert parse(f"folder:{tmp_path / name}") == [
            (f"folder:{tmp_path / name}", "train", "test")
        ]
        assert parse(f"folder:{tmp_path / name}@a:b")[0][1:] == ("a", "b")
    with pytest.raises(UserError, match="expected SOURCE@TRAIN:TEST"):
        parse("embedded@train")
    with pytest.raises(UserError, match="a comma too many"):
        parse("embedded,")
