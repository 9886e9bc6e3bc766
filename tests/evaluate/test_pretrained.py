"""Opening a run for evaluation: which checkpoint, which splits, and which untrained network."""

import flax
import jax
import numpy as np
import opened_run
import pytest
import tiny
from PIL import Image
from test_sources import config as sources_config

from common.cli import modes
from common.data.sources import shard_writer
from common.data.sources.opening import open_source
from common.errors import UserError
from common.evaluate import everything, transfer_mode
from common.method import root_keys
from common.run.checkpoint import Checkpoints
from common.run.workdir import claim
from common.train import resume_from, weights


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """`(workdir, states)` of a MoCo run with the checkpoints 7 and 9."""
    changes = {"data__train_split": "a", "data__bank_split": "b", "data__test_split": "c"}
    changes |= {"model__stages": (1,), "model__bn_groups": 4, "seed": 5}
    workdir = opened_run.write(tmp_path_factory.mktemp("runs") / "run", "moco", **changes)
    method = tiny.build(tiny.config("moco", **changes), 1)
    states = {opened_run.STEP: tiny.place_state(method, seed=3), 9: tiny.place_state(method, 4)}
    with Checkpoints(workdir, keep=None) as checkpoints:
        checkpoints.save(9, states[9], {})
    return workdir, states


@pytest.mark.parametrize(("asked", "found"), [(0, 9), (7, 7)])
def test_the_query_encoder_of_the_step_asked_for_is_opened_or_of_the_newest(runs, asked, found):
    workdir, states = runs
    opened = opened_run.load(workdir, step=asked)
    assert opened.step == found
    for name in ("params", "batch_stats"):
        got, want = (opened_run.leaves(getattr(s, name)) for s in (opened.state, states[found]))
        assert got.keys() == want.keys()
        for leaf, value in want.items():
            np.testing.assert_array_equal(got[leaf], value, err_msg=leaf)


@pytest.mark.parametrize(
    ("changes", "splits"),
    [
        ({}, ("b", "c")),  # the split that votes while training stands for train
        ({"train_split": "d"}, ("d", "c")),
        ({"test_split": "e"}, ("b", "e")),
    ],
)
def test_splits_are_those_asked_for_or_the_runs(runs, changes, splits):
    opened = opened_run.load(runs[0], features="pixels", **changes)
    data = opened.config.data
    assert (data.train_split, data.test_split) == splits
    assert tuple(opened.open(role).split for role in ("train", "test")) == splits


@pytest.mark.parametrize(
    ("changes", "whole"),
    [
        ({}, "a"),  # and not the split that votes
        ({"train_split": "d"}, "d"),
        ({"source": "embedded", "train_split": "test"}, "test"),
    ],
)
def test_all_images_are_those_of_the_training_where_another_split_votes(runs, changes, whole):
    opened = opened_run.load(runs[0], features="pixels", **changes)
    assert everything.open_all(opened).split == whole


def test_another_source_is_opened_where_one_is_asked_for(runs):
    opened = opened_run.load(
        runs[0], features="pixels", source="embedded", data_dir="/x", train_split="train"
    )
    assert (opened.config.data.source, opened.config.data.dir) == ("embedded", "/x")
    assert opened.open("train").num_examples == 10_000


def deep(folder, most):
    """Two classes of 16-bit images of which the largest value is `most`."""
    for split in ("train", "test"):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            values = np.linspace(0, most, 64).astype(np.uint16).reshape(8, 8)
            Image.fromarray(values).save(folder / split / name / "0.png")
    return f"folder:{folder}"


def test_other_data_have_a_value_range_of_their_own(runs, tmp_path, capsys):
    """One for all their splits, reported in one line; `--eval` may give it, and `on_corrupt`."""
    source = deep(tmp_path / "x", 1000)
    splits = {"train_split": "train", "test_split": "test"}
    opened = opened_run.load(
        runs[0], features="pixels", source=source, on_corrupt="replace", **splits
    )
    assert capsys.readouterr().err == ""
    train = opened.open("train")
    assert capsys.readouterr().err.count("--eval.value_range=0:1023)") == 1
    test = opened.open_labelled("test")
    assert "value_range" not in capsys.readouterr().err
    assert train.decoding.value_range == test.decoding.value_range == "0:1023"
    assert train.on_corrupt == "replace" and opened.config.data.on_corrupt == "replace"
    given = opened_run.load(
        runs[0], features="pixels", source=source, value_range="0:2000", **splits
    )
    assert given.open("test").decoding.value_range == "0:2000"
    assert given.open("test").on_corrupt == "error"


def test_each_set_of_a_transfer_has_a_value_range_of_its_own(runs, tmp_path):
    few, many = deep(tmp_path / "few", 1000), deep(tmp_path / "many", 60_000)
    opened = opened_run.load(runs[0], features="pixels", source=few)
    found = [
        [part.decoding.value_range for part in transfer_mode._open(opened, data_set)]
        for data_set in transfer_mode.parse(f"{few},{many},{few}@test:train", None)
    ]
    assert found == [["0:1023"] * 2, ["0:65535"] * 2, ["0:1023"] * 2]


@flax.struct.dataclass
class State:
    """What is drawn at the start."""

    params: dict
    step: int = 0
    batch_stats: dict = flax.struct.field(default_factory=dict)


class Drawn(tiny.METHODS["moco"]):
    """A method that starts from a few random numbers."""

    def init(self, key):
        return State({"backbone": jax.random.normal(key, (4,))})


def test_the_untrained_network_is_the_one_that_the_run_began_with(runs, monkeypatch):
    """By the run's seed, not by the evaluation's."""
    monkeypatch.setitem(tiny.METHODS, "moco", Drawn)
    opened = opened_run.load(runs[0], devices=2, features="untrained", seed=1)
    want = jax.random.normal(root_keys(5)[0], (4,))
    np.testing.assert_array_equal(opened.state.params["backbone"], want)
    assert opened.step == 0


def test_a_run_is_opened_whatever_its_training_needs(tmp_path):
    """`test_matrix.py` asks every mode; here, micro-batches and a warm-up of several steps."""
    changes = {"microbatch": 4, "model__bn_groups": 4, "optimizer__warmup": "3 steps"}
    workdir = opened_run.write(tmp_path / "run", **changes)
    opened = opened_run.load(workdir, devices=8)  # which 4 images cannot be split over
    images = np.zeros((8, 8, 8, 3), np.uint8)
    assert np.isfinite(opened.encoder(images)).all()


def test_a_tilde_is_the_home_wherever_a_path_is_given(runs, tmp_path, monkeypatch):
    """A shell does not expand that of `--workdir=~/runs`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").symlink_to(runs[0])
    assert opened_run.load("~/run").workdir == tmp_path / "run"
    assert len(weights.load_weights("~/run").arrays) > 5
    assert resume_from.source_of("~/run", tmp_path / "new")[0] == tmp_path / "run"
    assert resume_from.source_of(f"~/run@{opened_run.STEP}", tmp_path / "new")[1] == opened_run.STEP
    c = tiny.config("simclr", data__source="fake", data__fake_examples=9)
    shard_writer.write(c.data, "~/shards")
    c.data.source = "shards:~/shards"
    assert open_source(c.data, "train").num_examples == 9
    with claim("~/claimed", c) as (claimed, _):
        assert claimed == tmp_path / "claimed" and claimed.is_dir()
    s = opened_run.config(export__dir="~/out", export__format="npz")
    assert modes.run("export", "~/run", s, tiny.METHODS)["dir"] == str(tmp_path / "out")
    with pytest.raises(UserError, match=f"looked in {tmp_path}/sets/cifar10"):
        open_source(sources_config("tfds:cifar10", dir="~/sets"), "train")


def resized_by_hand(table):
    """Positions for 2 x 2 patches as such for 3 x 3: Keys' cubic with a = -1/2, along each axis."""
    near, far = (1.5 / 6**3 - 2.5 / 6**2 + 1), (-0.5 * (7 / 6) ** 3 + 2.5 * (7 / 6) ** 2 - 8 / 3)
    edge = np.array([near, far]) / (near + far)
    rows = np.array([edge, [0.5, 0.5], edge[::-1]])
    grid = np.einsum("ir,jc,rcd->ijd", rows, rows, table[0, 1:].reshape(2, 2, -1))
    return np.concatenate([table[:, :1], grid.reshape(1, 9, -1)], axis=1)


@pytest.mark.slow
def test_a_vit_takes_images_of_another_size_with_its_positions_resized(tmp_path):
    changes = tiny.VIT | {"vit__positions": "learned"}
    run = opened_run.write(tmp_path / "run", "moco_v3", **changes)
    opened = opened_run.load(run, image_size=12)
    params = opened.state.params["backbone"]
    images = np.random.default_rng(0).integers(0, 256, (4, 12, 12, 3), np.uint8)
    encoder = opened.method.setup.network.backbone.clone(image_size=12)
    table = resized_by_hand(np.asarray(params["positions"])).astype(np.float32)
    inputs = opened.method.setup.scale(images)
    want = encoder.apply({"params": params | {"positions": table}}, inputs, train=False)
    np.testing.assert_allclose(opened.encoder(images), want, rtol=1e-4, atol=1e-5)
    assert np.abs(table[0, 1:] - table[0, 1]).max() > 0.1

    seen = []
    train = opened.open("train")
    opened.extract(train, encode=lambda x: seen.append(x.shape) or x.reshape(len(x), -1))
    assert set(seen) == {(16, 12, 12, 3)}
    assert next(opened.batches(train, 8))[0].shape == (8, 12, 12, 3)
    assert (opened_run.load(run).image_size, opened.config.data.image_size) == (8, 8)

    with pytest.raises(
        UserError,
        match=r"eval.image_size=10 does not suit the encoder: .* a multiple of 4, found 10x10$",
    ):
        opened_run.load(run, image_size=10)
    with pytest.raises(UserError, match=r"image_size=-4: expected a side in pixels, or 0"):
        opened_run.load(run, image_size=-4)
    with pytest.raises(UserError, match="image_size=12 is not for exports, whose images"):
        modes.run("export", run, opened_run.config(image_size=12), tiny.METHODS)


def test_a_resnet_takes_images_of_any_size(runs):
    opened = opened_run.load(runs[0], image_size=11)
    assert opened.encoder(np.zeros((2, 11, 11, 3), np.uint8)).shape == (2, 4)


def test_splits_that_were_decided_for_the_runs_data_say_nothing_of_other_data(tmp_path):
    """60 images less 15 held out, of which neither number is of the other folder."""
    run = opened_run.write(
        tmp_path / "run", data__train_split="train[:-15]", data__test_split="train[-15:]",
        data__shrink=8,
    )  # fmt: skip
    own = opened_run.load(run, features="pixels").config.data
    assert (own.train_split, own.test_split) == ("train[:-15]", "train[-15:]")
    (tmp_path / "x").mkdir()
    for i in range(8):
        Image.new("RGB", (6, 5), (i, 2 * i, 9)).save(tmp_path / "x" / f"{i:02}.png")
    source = f"folder:{tmp_path / 'x'}"
    other = opened_run.load(run, features="pixels", source=source, image_size=24).config.data
    assert (other.train_split, other.test_split, other.shrink) == ("train[:-2]", "train[-2:]", 24)
    named = opened_run.load(run, features="pixels", source=source, test_split="train").config.data
    assert named.test_split == "train"
