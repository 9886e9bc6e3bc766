"""Shards: what comes back is what went in, in files of bounded size, whole or not at all."""

import json
import os
import pathlib

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from test_sources import config as data_config
from test_sources import picture, write

from common.config import section
from common.data.feed import pipeline
from common.data.feed.recipe import FeedRecipe
from common.data.sources import shard_writer, shards
from common.data.sources.base import listed
from common.data.sources.opening import open_source
from common.errors import UserError


def config(source, batch_size=4, image_size=12, **data):
    c = ConfigDict({"seed": 3, "batch_size": batch_size})
    c.data = data_config(source, image_size=image_size, **data)
    c.augment = section("augment", preset="moco_v1")
    c.augment_view2 = section("augment_view2")
    return c


def batches(c, count):
    source = open_source(c.data, "train")
    found = pipeline.train_batches(source, FeedRecipe.of(c), rows=np.arange(c.batch_size))
    return [next(found) for _ in range(count)]


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photos"
    for i in range(14):
        write(root / "train" / f"class{i % 2}" / f"é {i}.png", i, height=16 + i, width=20)
    for i in range(3):
        write(root / "val" / "class1" / f"{i}.jpg", 50 + i)
    return root


def test_a_folder_trains_the_same_from_its_shards(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writer, "SHARD_BYTES", 4000)
    c = config(f"folder:{folder}")
    index = shard_writer.write(c.data, tmp_path / "shards")
    parts = index["splits"]["train"]["shards"]
    assert len(parts) > 2 and sum(p["examples"] for p in parts) == 14
    assert json.loads((tmp_path / "shards" / "index.json").read_text()) == index
    for path in (tmp_path / "shards").glob("*.npz"):
        assert path.stat().st_size < 3 * 4000
    copy = config(f"shards:{tmp_path / 'shards'}")
    for got, want in zip(batches(copy, 6), batches(c, 6), strict=True):
        for name in want:
            np.testing.assert_array_equal(got[name], want[name])
    train, test = (open_source(copy.data, role) for role in ("train", "test"))
    assert train.class_names == ("class0", "class1") and train.kind == "encoded"
    assert test.labels.tolist() == [1, 1, 1]
    assert train.describe(3) == "train/class0/é 2.png of photos (train)"
    names = open_source(c.data, "train").names(np.arange(14))  # also of later shards
    assert train.names(np.arange(14)).tolist() == names.tolist()
    assert train.listing != test.listing != ""


def test_slices_that_were_prepared_are_one_set_again(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writer, "SHARD_BYTES", 4000)
    c = config(f"folder:{folder}", train_split="train[:-5]", test_split="train[-5:]")
    shard_writer.write(c.data, tmp_path / "s")
    whole = open_source(c.data, "train[:]")
    want = dict(zip(whole.names(np.arange(14)), whole.labels.tolist(), strict=True))
    shards_of = f"{tmp_path / 's'}"
    both = shards.with_rest(shards_of, "train[:-5]")
    assert both == "train[:-5]+train[-5:]" and shards.holds(shards_of, both)
    assert not shards.holds(shards_of, "train[:-5]+train[-4:]")
    assert shards.with_rest(shards_of, "train[-5:]") == "train[-5:]+train[:-5]"
    c.data.update(source=f"shards:{shards_of}", train_split=both)
    source = open_source(c.data, "train")
    assert (source.num_examples, source.split) == (14, both)
    assert source.class_names == whole.class_names
    names = source.names(np.arange(14))
    assert dict(zip(names, source.labels.tolist(), strict=True)) == want
    parts = [open_source(c.data, split) for split in ("train[:-5]", "train[-5:]")]
    assert names.tolist() == [x for p in parts for x in p.names(np.arange(p.num_examples))]
    assert list(source.images) == [x for p in parts for x in p.images]
    assert source.listing not in {p.listing for p in parts}

    index = json.loads((tmp_path / "s" / "index.json").read_text())
    splits = index["splits"]
    splits["train[:-3]"], splits["val[:3]"] = splits["train[:-5]"], splits["train[-5:]"]
    splits["train[-3:]"] = splits["train[-5:]"] | {"class_names": ["other"]}
    (tmp_path / "s" / "index.json").write_text(json.dumps(index))
    assert shards.with_rest(shards_of, "train[:-5]") == both  # no image twice, no other split
    with pytest.raises(UserError, match="differ in their classes: expected the same in each"):
        open_source(c.data, "train[:-5]+train[-3:]")
    splits["train"] = splits["train[:-5]"]
    (tmp_path / "s" / "index.json").write_text(json.dumps(index))
    assert shards.with_rest(shards_of, "train[:-5]") == "train"


def test_a_slice_that_was_prepared_and_one_of_what_was(folder, tmp_path, capsys):
    c = config(f"folder:{folder}", train_split="train[:50%]", test_split="train[50%:]")
    shard_writer.write(c.data, tmp_path / "s")
    said = capsys.readouterr().err
    assert said.splitlines()[0] == f"read from {folder}/train, 2 classes by folder: class0, class1"
    assert said.splitlines()[-1] == (
        f"Read them with --config.data.source=shards:{tmp_path / 's'} "
        "'--config.data.train_split=train[:50%]' '--config.data.test_split=train[50%:]'"
    )
    before = [open_source(c.data, role).names(np.arange(7)) for role in ("train", "test")]
    c.data.source = f"shards:{tmp_path / 's'}"
    for role, names in zip(("train", "test"), before, strict=True):
        source = open_source(c.data, role)
        assert source.names(np.arange(7)).tolist() == names.tolist()
        assert source.labels.tolist() == [int("class1" in name) for name in names]
    whole = config(f"folder:{folder}")
    shard_writer.write(whole.data, tmp_path / "whole")
    whole.data.update(source=f"shards:{tmp_path / 'whole'}", train_split="train[:50%]")
    source = open_source(whole.data, "train")
    assert sorted(source.names(np.arange(7))) == sorted(before[0])
    assert source.labels.tolist() == [int("class1" in n) for n in source.names(np.arange(7))]


def test_names_that_are_no_text_have_a_listing(tmp_path):
    for name in (b"\xff\xfe", b"a"):
        path = os.path.join(os.fsencode(tmp_path), b"p", b"train", name)
        os.makedirs(path)
        Image.fromarray(picture(1)).save(os.path.join(path, b"1.png"))
    c = config(f"folder:{tmp_path / 'p'}", test_split="")
    shard_writer.write(c.data, tmp_path / "s")
    c.data.source = f"shards:{tmp_path / 's'}"
    assert len(open_source(c.data, "train").listing) == 16


def test_older_shards_whose_splits_number_their_classes_differently(tmp_path):
    """They were written before classes were compared by name."""
    root = tmp_path / "photos"
    for split, names in {"training": "abc", "testing": "bc"}.items():
        for name in names:
            write(root / split / name / "1.png", ord(name))
    c = config(f"folder:{root}", train_split="training", test_split="testing")
    shard_writer.write(c.data, tmp_path / "s")
    index = json.loads((tmp_path / "s" / "index.json").read_text())
    index["splits"]["testing"].update(num_classes=2, class_names=["b", "c"])
    (tmp_path / "s" / "index.json").write_text(json.dumps(index))
    (path,) = (tmp_path / "s").glob("testing*")
    arrays = dict(np.load(path))
    np.savez(path, **arrays | {"labels": arrays["labels"] - 1})
    c.data.source = f"shards:{tmp_path / 's'}"
    test = open_source(c.data, "test")
    assert test.labels.tolist() == [1, 2] and test.class_names == ("a", "b", "c")


def test_pixels_and_no_labels(tmp_path):
    c = config("fake", fake_examples=20, fake_classes=0, image_size=8)
    shard_writer.write(c.data, tmp_path / "s")
    source = open_source(config(f"shards:{tmp_path / 's'}").data, "train")
    fake = open_source(c.data, "train")
    assert source.kind == "pixels" and source.image_shape == (8, 8) and source.num_classes == 0
    np.testing.assert_array_equal(source.fetch(np.arange(20)), fake.fetch(np.arange(20)))
    assert (source.labels == -1).all()


def test_mistakes(folder, tmp_path):
    c = config(f"folder:{folder}")
    out = tmp_path / "s"
    with pytest.raises(UserError, match=r"no index.json in .*--mode=prepare"):
        open_source(config(f"shards:{out}").data, "train")
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="is not empty"):
        shard_writer.write(c.data, out)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    (out / "mine.txt").unlink()
    torn = folder / "train" / "class0" / "é 4.png"
    whole = torn.read_bytes()
    torn.write_bytes(whole[:100])
    with pytest.raises(UserError, match=r"cannot decode .*é 4.png.*repair or remove"):
        shard_writer.write(c.data, out)
    assert not (out / "index.json").exists()  # not to be trained on
    torn.write_bytes(whole)
    shard_writer.write(c.data, tmp_path / "good")
    good = f"shards:{tmp_path / 'good'}"
    with pytest.raises(UserError, match="holds no split 'extra'; expected one of train, test"):
        open_source(config(good, train_split="extra").data, "train")
    with pytest.raises(UserError, match=r"more than data.cache_gib=0"):
        open_source(config(good, cache_gib=0.0).data, "train")
    shard = next((tmp_path / "good").glob("train*.npz"))
    shard.write_bytes(shard.read_bytes()[:300])
    with pytest.raises(UserError, match=r"cannot read .*: copy it again, or prepare again"):
        open_source(config(good).data, "train")
    index = tmp_path / "good" / "index.json"
    index.write_text(index.read_text().replace(shard.name, "../../etc/x.npz"))
    with pytest.raises(UserError, match=r"names the file '../../etc/x.npz': expected names w"):
        open_source(config(good).data, "train")


def test_damaged_files_are_left_out_if_that_is_wanted(folder, tmp_path, monkeypatch, capsys):
    """Names, labels and images of the others stay together, over the bounds of shards too."""
    monkeypatch.setattr(shard_writer, "SHARD_BYTES", 4000)
    before = open_source(config(f"folder:{folder}").data, "train")
    bad = [0, 5, 6, 13]
    for i in bad:
        pathlib.Path(before.paths[i]).write_bytes(b"no image")
    pathlib.Path(before.paths[6]).unlink()
    pathlib.Path(before.paths[6]).symlink_to(folder / "nowhere.png")
    with pytest.raises(UserError, match=r"or leave such files out with data.on_corrupt='replace'"):
        shard_writer.write(config(f"folder:{folder}").data, tmp_path / "strict")
    c = config(f"folder:{folder}", on_corrupt="replace")
    index = shard_writer.write(c.data, tmp_path / "s")["splits"]["train"]
    names = before.names(np.arange(14)).tolist()
    assert index["left_out"] == [names[i] for i in bad]
    said = capsys.readouterr().err
    assert f"train: 10 images in {len(index['shards'])} files; 4 damaged images left out: " in said
    assert names[13] in said and "test: 3 images in 1 file\n" in said
    copy = open_source(config(f"shards:{tmp_path / 's'}").data, "train")
    good = [i for i in range(14) if i not in bad]
    assert copy.num_examples == index["num_examples"] == 10
    assert copy.names(np.arange(10)).tolist() == [names[i] for i in good]
    np.testing.assert_array_equal(copy.labels, before.labels[good])
    for i, data in enumerate(copy.fetch(np.arange(10))):
        assert data == pathlib.Path(before.paths[good[i]]).read_bytes()


def test_a_split_of_damaged_files_only(folder, tmp_path):
    for path in (folder / "val" / "class1").iterdir():
        path.write_bytes(b"")
    with pytest.raises(
        UserError, match=r"no image of photos .test. is whole, .*1/0.jpg for example"
    ):
        shard_writer.write(config(f"folder:{folder}", on_corrupt="replace").data, tmp_path / "s")
    assert not (tmp_path / "s" / "index.json").exists()


def test_lists_for_messages():
    assert listed([], "image", "gone") == ""
    assert listed(["a"], "image", "gone") == "; 1 image gone: a"
    found = listed([*"abcdefg"], "image", "gone")
    assert found == "; 7 images gone: a, b, c, d, e and 2 more"
