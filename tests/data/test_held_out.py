"""`data.test_split=auto`: which images are held out, of every kind of source."""

import numpy as np
import pytest
from PIL import Image
from test_folder_layout import CLASSES, below, make

from common.config import section
from common.data.sources import held_out, opening, shard_writer
from common.data.sources.opening import open_source, with_splits
from common.errors import UserError


def data(source, train="auto", test="auto", **fields):
    return section("data", source=source, train_split=train, test_split=test, **fields)


def splits(*arguments, **fields):
    c = with_splits(data(*arguments, **fields))
    return c.train_split, c.test_split


@pytest.mark.parametrize(
    ("images", "expected"),
    [(1, 1), (3, 1), (40, 10), (200, 50), (400, 100), (900, 100), (3_667, 366), (10**5, 2_000)],
)
def test_a_tenth_within_limits(images, expected):
    assert held_out.size(images) == expected


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"photos": 400}, ("train[:-100]", "train[-100:]")),
        ({"ant": 200, "bee": 200}, ("train[:-100]", "train[-100:]")),
        (below("train", CLASSES) | below("test", CLASSES), ("train", "test")),
        (below("Training", CLASSES) | below("validation", CLASSES), ("train", "test")),
        ({"train": 40}, ("train[:-10]", "train[-10:]")),
        # a class of that name beside another one is no split
        ({"test": 20, "bee": 20}, ("train[:-10]", "train[-10:]")),
    ],
)
def test_of_a_folder(tmp_path, tree, expected):
    root = make(tmp_path / "x", tree)
    if "photos" in tree:
        root = root / "photos"
    labels = "folders" if "bee" in tree else "auto"
    train = "." if "test" in tree else "auto"
    found = splits(f"folder:{root}", train, labels=labels)
    assert found == tuple(name.replace("train", ".") if train == "." else name for name in expected)


def test_both_parts_are_opened_by_role_and_share_no_image(tmp_path):
    c = data(f"folder:{make(tmp_path / 'x', {'a': 30, 'b': 10})}")
    parts = [open_source(c, role) for role in ("train", "test")]
    names = [set(part.names(np.arange(part.num_examples))) for part in parts]
    assert [len(n) for n in names] == [30, 10] and not names[0] & names[1]
    assert parts[0].class_names == parts[1].class_names == ("a", "b")
    assert c.test_split == "auto"  # a config is not changed in passing


def test_what_is_given_is_kept(tmp_path):
    root = f"folder:{make(tmp_path / 'x', {'a': 40})}"
    assert splits(root, test="") == ("train", "")
    assert splits(root, "train[:80%]") == ("train[:80%]", "")
    assert splits(root, test="train[90%:]") == ("train[:90%]", "train[90%:]")
    assert splits(root, test="train[:7]") == ("train[7:]", "train[:7]")
    assert splits(root, test="other") == ("train", "other")
    with pytest.raises(UserError, match="what is left of the split is not one piece"):
        splits(root, test="train[5:9]")
    c = data(root, "train[:80%]", "train[80%:]")
    assert with_splits(c) is c
    assert splits("embedded") == splits("fake") == ("train", "test")
    with pytest.raises(UserError, match="no folder"):
        splits(f"folder:{tmp_path / 'none'}")


def test_one_image_is_trained_on(tmp_path):
    assert splits(f"folder:{make(tmp_path / 'x', {'a': 1})}") == ("train", "")


def test_splits_that_were_decided_are_known():
    assert held_out.decided("train[:-36]", "train[-36:]")
    for train, test in (
        ("train", "test"), ("train[:90%]", "train[90%:]"), ("train[:-9]", "train[-8:]"),
        ("train[:-9%]", "train[-9%:]"), ("train[:-9]", "val[-9:]"), ("train", ""),
    ):  # fmt: skip
        assert not held_out.decided(train, test)


def test_a_set_that_says_its_size_is_not_read_to_be_counted(tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    for i in range(8):
        Image.new("RGB", (6, 5), (i, 2 * i, 9)).save(tmp_path / "x" / f"{i:02}.png")
    c = data(f"folder:{tmp_path / 'x'}", "train", "")
    shard_writer.write(c, tmp_path / "shards")
    monkeypatch.setattr(opening, "_open", None)
    assert splits(f"shards:{tmp_path / 'shards'}") == ("train[:-2]", "train[-2:]")


def test_of_shards(tmp_path):
    """What was held out of the folder is held out of what was prepared of it."""
    (tmp_path / "x").mkdir()
    for i in range(40):
        Image.new("RGB", (6, 5), (i, 2 * i, 9)).save(tmp_path / "x" / f"{i:02}.png")
    c = data(f"folder:{tmp_path / 'x'}")
    shard_writer.write(c, tmp_path / "shards")
    shards = data(f"shards:{tmp_path / 'shards'}")
    assert splits(shards.source) == ("train[:-10]", "train[-10:]")
    for role in ("train", "test"):
        a, b = open_source(c, role), open_source(shards, role)
        names = [s.names(np.arange(s.num_examples)).tolist() for s in (a, b)]
        assert names[0] == names[1]
