"""What a run, a data set or a mode refuses, where no other test comes by."""

import dataclasses
import json

import jax
import numpy as np
import opened_run
import pytest
import tiny
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from test_sources import config as data_config

from common import config as configs
from common.data.feed import pipeline
from common.data.sources import shard_writer, shards
from common.data.sources.opening import open_source
from common.errors import UserError
from common.evaluate import batches, linear_mode, pretrained
from common.optim import steps_of
from common.run import formats, saved_config
from common.run.workdir import claim
from common.sharding import make_mesh
from common.train import replay
from common.train.position import Position
from common.train.prepare import open_evaluation


def refused(words, call, *args):
    """Calls it, and looks for the words in the one line that it raises."""
    with pytest.raises(UserError) as caught:
        call(*args)
    said = str(caught.value)
    assert "\n" not in said
    for word in words if isinstance(words, list) else [words]:
        assert word in said, said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__augment_on": "gpu"}, ["augment_on='gpu'", "choose host, both (colour and blur"]),
        ({"steps_per_dispatch": 5}, ["steps_per_dispatch=5", "set data.augment_on=device"]),
    ],
)
def test_where_views_are_made(changes, words):
    refused(words, configs.check, tiny.config("simclr", **changes))


@pytest.mark.parametrize(
    ("duration", "words"),
    [
        ("soon", 'every="soon" is not a duration: write "10 epochs"'),
        ("5 parsecs", 'every="5 parsecs" is not a duration'),
        (2.5, 'every="2.5" is not a whole number of steps: write "10 epochs"'),
    ],
)
def test_durations(duration, words):
    refused(words, steps_of, duration, 10, 100, "every")


@pytest.mark.parametrize("saved", [{"colour": 1}, {"model": {"colour": 1}}, {"seed": {"a": 1}}])
def test_a_config_of_a_newer_version(saved):
    words = ["w/config.json has a field", "this version of the code does not know: use the version"]
    refused(words, configs.update, tiny.config("simclr"), saved, "w/config.json")


# ------------------------------------------------------------------ workdirs


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return opened_run.write(tmp_path_factory.mktemp("runs") / "run")


def hold(workdir):
    with claim(workdir, tiny.config("simclr")):
        pass


def test_a_config_json_that_is_torn(tmp_path):
    (tmp_path / "config.json").write_text('{"method": ')
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    refused(["config.json is not JSON (", "or give another --workdir"], hold, tmp_path)
    words = ["config.json is not JSON (", "restore it from a copy"]
    refused(words, saved_config.load, tmp_path, tiny.METHODS)


def test_a_config_json_that_holds_something_else_or_is_missing(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    refused("holds a run whose config.json is missing: restore it", hold, tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    words = ["config.json holds no config but a list: restore it from a copy"]
    refused(words, hold, tmp_path)
    refused(words, saved_config.load, tmp_path, tiny.METHODS)


@pytest.mark.parametrize("saved", ['{"method": "byol"}', "{}"])
def test_a_run_of_another_method(tmp_path, saved):
    (tmp_path / "config.json").write_text(saved)
    words = ["is of the method ", "expected one of simclr, moco"]
    refused(words, saved_config.load, tmp_path, tiny.METHODS)


def test_a_replay_without_its_checkpoint(workdir, tmp_path):
    folder = tmp_path / replay.FOLDER
    folder.mkdir()
    (tmp_path / "config.json").write_text((workdir / "config.json").read_text())
    for step, checkpoint in ((2, 1), (10, 4), (9, 3)):  # the newest counts
        record = {"step": step, "checkpoint": checkpoint}
        (folder / f"step_{step}.json").write_text(json.dumps(record))
    words = "the checkpoint of step 4 in "
    refused([words, "is gone: no replay"], replay.replay, tmp_path, tiny.METHODS)


def test_a_run_that_named_no_test_split(workdir):
    opened = opened_run.load(workdir, features="pixels")
    with opened.config.unlocked():
        opened.config.data.test_split = ""
    words = [f"no test split: the run of {workdir} named none", "give --eval.test_split=NAME"]
    refused(words, opened.open, "test")


def test_a_linear_classifier_of_a_run_that_diverged(workdir, monkeypatch):
    opened = opened_run.load(workdir, features="pixels")
    found = np.full((4, 2), np.nan), np.zeros(4, np.int32), np.arange(4)
    monkeypatch.setattr(pretrained.Pretrained, "extract", lambda *_: found)
    words = "are not finite: this run has diverged; choose an earlier checkpoint with --eval.step"
    refused(words, linear_mode.Bank, opened, opened.open("train"), "cached")


def test_process_0_decides_for_all(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda _: np.int32(1))
    refused(
        f"process 0 refuses the workdir {tmp_path / 'w'}: see its message", hold, tmp_path / "w"
    )
    assert not (tmp_path / "w").exists()


def test_the_batch_of_a_classifier():
    mesh = make_mesh(jax.devices()[:1])
    refused("own batch_size is 0: expected at least 1", batches.batch_size_for, 0, 9, mesh)


# ---------------------------------------------------------------------- data


def test_a_run_goes_on_with_its_own_data_only():
    source = open_source(data_config("fake", fake_examples=20), "train")
    Position(num_examples=20).check_same_data(source)
    refused("20 images, and had 19", Position(num_examples=19).check_same_data, source)


@pytest.mark.parametrize("wrong", [{"fake_examples": 0}, {"fake_classes": -1}])
def test_random_images_of_no_number(wrong):
    fields = {"fake_examples": 5, "fake_classes": 3} | wrong
    n, classes = fields.values()
    words = f"examples is {n} and data.fake_classes {classes}; expected at least 1 and 0."
    refused(words, open_source, data_config("fake", **fields), "train")


def test_a_test_split_that_is_not_there():
    data = tiny.config("simclr", data__source="embedded", data__test_split="val").data
    words = ["no split 'val'", "Set data.test_split='' to train without"]
    refused(words, open_evaluation, data, None)


def test_a_streamed_set_needs_no_shards(tmp_path, monkeypatch):
    source = open_source(data_config("fake"), "train")
    stream = dataclasses.replace(source, kind="stream", name="huge")
    monkeypatch.setattr(shard_writer, "open_source", lambda *_: stream)
    c = ConfigDict({"data": data_config("fake")})
    words = ["huge is larger than data.cache_gib", "raise data.cache_gib if it is to be prepared"]
    refused(words, shard_writer.write, c.data, tmp_path / "out")


def test_shards_that_are_not_whole(tmp_path):
    shard_writer.write(data_config("fake", fake_examples=20), tmp_path / "s")
    c, index = data_config(f"shards:{tmp_path / 's'}"), tmp_path / "s" / shards.INDEX
    whole = json.loads(index.read_text())
    index.write_text(json.dumps(whole | {"version": 9}))
    words = ["has format 9, this code reads 1", "prepare the set again"]
    refused(words, open_source, c, "train")
    index.write_text(json.dumps(whole)[:-9])
    words = ["index.json is damaged (", "copy the directory again, or prepare again"]
    refused(words, open_source, c, "train")
    index.write_text(json.dumps(whole))
    (shard,) = (tmp_path / "s").glob("train*.npz")
    shard.unlink()
    refused(f"lacks 1 of 1 shards, e.g. {shard.name}", open_source, c, "train")


def test_a_tfds_name_that_is_none(tmp_path):
    c = data_config("tfds:cifar10/no_such_config", dir=str(tmp_path))
    words = ["cannot open tfds:cifar10/no_such_config: ", "download_and_prepare()"]
    refused(words, open_source, c, "train")


def test_an_evaluation_in_batches_of_nothing():
    source = open_source(data_config("fake"), "train")
    words = "the evaluation's batch size is -4; expected at least 1."
    refused(words, pipeline.eval_batches, source, -4, 8, np.arange(4))


# ------------------------------------------------------------------- weights


def test_arrays_of_eight_bits(tmp_path):
    header = json.dumps({"w": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))
    refused("has arrays of the type F8_E4M3: convert them to F32", formats.read, path)
