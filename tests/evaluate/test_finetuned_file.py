"""The file that a fine-tuning leaves: its name, what it replaces, and what it may not."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import opened_run
import pytest
import tiny
from known_splits import State
from test_eval_modes import records

from common.cli import modes
from common.errors import UserError
from common.evaluate import finetune, finetuned_file
from common.evaluate.pretrained import Pretrained
from common.models import classifier
from common.run import files

NAMES = ("class 0", "class 1", "class 2")  # of `fake`


@pytest.fixture(scope="module")
def opened():
    """A run with one weight, which is enough to tell one run from another."""
    state = State(jax.device_put({"weight": np.ones(3, np.float32)}), {})
    c = tiny.config("simclr", data__source="fake")
    return Pretrained(c, None, None, None, None, state, opened_run.STEP)


@pytest.fixture
def asked(opened, tmp_path):
    """`reserve` for the run, in a workdir of the test's own."""

    def reserve(epochs=2, **changes):
        settings = opened_run.config(**changes)
        run = dataclasses.replace(opened, settings=settings, workdir=files.path(tmp_path))
        return finetuned_file.reserve(run, NAMES, {"epochs": epochs})

    return reserve


def written(place, **found):
    """The name of the file that a fine-tuning leaves."""
    arrays = {"params": {"network": {}, "classifier": {"bias": np.ones(3)}}, "batch_stats": {}}
    return place.write(arrays, {"top1": 0.5} | found).name


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"finetune__fraction": 0.01}, "1pct_seed0_backbone"),
        ({"finetune__fraction": 0.07, "seed": 3, "layer": "head1"}, "7pct_seed3_head1"),
        ({"finetune__fraction": 0.005}, "0.5pct_seed0_backbone"),
        ({"features": "untrained"}, "100pct_seed0_backbone_untrained"),
    ],
)
def test_names(changes, name):
    assert finetuned_file.default_name(opened_run.config(**changes)) == name


def test_only_the_same_fine_tuning_is_replaced(asked, tmp_path):
    first = written(asked())
    assert first == "100pct_seed0_backbone.safetensors"
    assert written(asked(), top1=0.75) == first
    folder = tmp_path / "finetuned"
    assert classifier.describe(folder / first).info["top1"] == 0.75
    second, third = (f"100pct_seed0_backbone_{i}.safetensors" for i in (2, 3))
    assert written(asked(epochs=3)) == second
    (folder / third).write_bytes(b"of somebody else")
    assert written(asked(area_min=0.5)) == third.replace("3", "4")
    assert written(asked(epochs=3)) == second and written(asked()) == first
    # two at a time, of other recipes: each had found the name free
    for path in folder.iterdir():
        path.unlink()
    both = asked(), asked(epochs=3)
    assert [written(place) for place in both] == [first, second]
    assert [classifier.describe(folder / x).info["epochs"] for x in (first, second)] == [2, 3]


def test_a_chosen_name_is_kept_or_refused_before_training(asked, tmp_path):
    place = asked(finetune__name="mine.safetensors")
    assert written(place) == written(asked(finetune__name="mine")) == "mine.safetensors"
    with pytest.raises(UserError, match="is of another fine-tuning: give another"):
        asked(finetune__name="mine", seed=1)
    (tmp_path / "finetuned" / "mine.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"is of another fine-tuning: .* or remove it"):
        asked(finetune__name="mine")
    for name in ("../mine", "/tmp/mine", ".mine", "a\\b"):
        with pytest.raises(UserError, match="is no name of a file in WORKDIR/finetuned"):
            asked(finetune__name=name)
    with pytest.raises(UserError, match="save=False writes none: leave one of them out"):
        asked(finetune__name="mine", finetune__save=False)
    assert asked(finetune__save=False) is None


def test_process_0_decides_for_all(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert written(asked()) and not list(tmp_path.iterdir())
    monkeypatch.setattr(finetuned_file, "first_process", lambda here: True)
    with pytest.raises(UserError, match=r"process 0 cannot use .*finetuned: see its message"):
        asked()


def test_other_weights_to_start_from_are_another_fine_tuning(asked, opened, tmp_path):
    """A run that was trained again in the same workdir, to the same step."""
    first = written(asked())
    params = {"weight": np.array([1, 1, 1.5], np.float32)}
    state = dataclasses.replace(opened.state, params=jax.device_put(params))
    settings, workdir = opened_run.config(), files.path(tmp_path)
    run = dataclasses.replace(opened, state=state, settings=settings, workdir=workdir)
    place = finetuned_file.reserve(run, NAMES, {"epochs": 2})
    assert place.path.name == first.replace(".", "_2.")


def test_a_disk_that_is_full(asked, tmp_path, monkeypatch, caplog):
    (tmp_path / "finetuned").write_text("in the way")
    with pytest.raises(UserError, match=r"finetuned \(File exists\): make room for the network"):
        asked()
    (tmp_path / "finetuned").unlink()
    place = asked()

    def fails(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_bytes", fails)
    assert place.write({"params": {"bias": np.ones(3)}}, {}) is None
    assert "No space left" in caplog.text


@pytest.mark.slow
def test_what_was_scored_is_what_is_saved(tmp_path, monkeypatch):
    """Behind the first layer of a head of three, by LARS; then the same again, and from scratch."""
    workdir = opened_run.write(tmp_path / "run", head__layers=3)
    kept, inner = [], finetune.Finetuner.train

    def train(tuner, *args):
        kept.append((tuner, inner(tuner, *args)))
        return kept[-1][1]

    monkeypatch.setattr(finetune.Finetuner, "train", train)
    changes = {"layer": "head1", "finetune__optimizer": "lars", "finetune__epochs": 3}
    record = modes.run("finetune", workdir, opened_run.config(**changes), tiny.METHODS)
    assert record["finetuned"] == "finetuned/100pct_seed0_head1.safetensors"
    assert (record["scaling"], record["learning_rate"]) == ("sqrt", 0.005)
    assert records(workdir)[-1] == json.loads(json.dumps(record))
    path = pathlib.Path(workdir) / record["finetuned"]
    found, arrays = classifier.load(path)
    tuner, state = kept[0]
    assert arrays["params"]["network"]["head"].keys() == {"dense1", "bn1"}
    tiny.assert_close(arrays["params"], jax.device_get(state.params), 0, 0)
    tiny.assert_close(arrays["batch_stats"], jax.device_get(state.batch_stats), 0, 0)
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    got = jax.jit(found.logits)(arrays, images)
    np.testing.assert_allclose(got, tuner.logits(state, images), rtol=1e-5, atol=1e-6)
    assert found.classes == NAMES and found.image_size == 8
    same = ("top1", "top5", "fraction", "checkpoint_step", "learning_rate", "epochs", "num_train")
    assert {name: found.info[name] for name in same} == {name: record[name] for name in same}
    assert found.info["checkpoint_step"] == opened_run.STEP

    written_at = path.stat().st_mtime_ns
    again = modes.run("finetune", workdir, opened_run.config(**changes), tiny.METHODS)
    assert again["finetuned"] == record["finetuned"] and path.stat().st_mtime_ns > written_at
    scratch = opened_run.config(features="untrained", **changes)
    from_scratch = modes.run("finetune", workdir, scratch, tiny.METHODS)
    assert from_scratch["finetuned"] == "finetuned/100pct_seed0_head1_untrained.safetensors"
    changes["layer"] = "head4"
    with pytest.raises(
        UserError, match="layer 'head4' is unknown: choose one of backbone, head1, "
    ):
        modes.run("finetune", workdir, opened_run.config(**changes), tiny.METHODS)
    monkeypatch.setattr(classifier, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    changes["layer"] = "head2"
    record = modes.run("finetune", workdir, opened_run.config(**changes), tiny.METHODS)
    assert record["finetuned"] is None and record["top1"] is not None
