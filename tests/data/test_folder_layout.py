"""Trees of folders as people have them: read as they are meant, or refused with what to choose.

Only names matter here, so the images are empty files.
"""

import os
import pathlib

import numpy as np
import pytest

from common.config import section
from common.data.images import decoding
from common.data.sources import folder_tree, slices
from common.data.sources.opening import open_source
from common.errors import UserError


def make(root, tree):
    """Files: {"a/b": 2} is a/b/0.png and a/b/1.png, {"a/x.csv": None} one of that name, {"a/": 0}
    an empty folder."""
    for name, count in tree.items():
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True)
        elif count is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        else:
            path.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                (path / f"{i}.png").touch()
    return root


def opened(root, role="train", **fields):
    c = section("data", source=f"folder:{root}")
    c.update(fields)
    return open_source(c, role)


def named(source):
    """The labels by their names, and the folder of each file: what has to be the same."""
    labels = [source.class_names[i] if i >= 0 else "" for i in source.labels]
    return labels, [pathlib.Path(path).parent.name for path in source.paths]


CLASSES = {"cat": 3, "dog": 2}


def below(folder, tree):
    return {f"{folder}/{name}": count for name, count in tree.items()}


# tree, data.labels, split -> root, images, classes
CAT_DOG = ("cat", "dog")
VEHICLES = {"bus": 4, "car": 4, "train": 4}
READ = [
    # a class that is called like a split
    (VEHICLES, "folders", "train", ".", 12, ("bus", "car", "train")),
    (VEHICLES, "auto", ".", ".", 12, ("bus", "car", "train")),
    (VEHICLES, "none", ".", ".", 12, ()),
    (VEHICLES, "none", "train", ".", 12, ()),
    (VEHICLES | {"test": 2}, "none", "train", "train", 4, ()),
    # other names of splits, other cases
    (below("Train", CLASSES) | below("Test", {"dog": 1}), "auto", "train", "Train", 5, CAT_DOG),
    (below("Train", CLASSES) | below("Test", {"dog": 1}), "auto", "test", "Test", 1, CAT_DOG),
    (below("Training", CLASSES) | below("Testing", {"cat": 1}), "auto", "test", "Testing", 1,
     CAT_DOG),
    (below("train", CLASSES) | below("valid", {"cat": 1}), "auto", "test", "valid", 1, CAT_DOG),
    (below("train", CLASSES) | below("Validation", {"cat": 1}), "auto", "val", "Validation", 1,
     CAT_DOG),
    # the name itself comes before its synonyms
    (below("train", CLASSES) | below("Training", {"cow": 1}), "auto", "train", "train", 5,
     CAT_DOG),
    # an unlabelled split beside labelled ones, and the other way round
    ({"train": 32} | below("test", CLASSES), "auto", "train", "train", 32, ()),
    ({"train": 32} | below("test", CLASSES), "auto", "test", "test", 5, CAT_DOG),
    (below("train", CLASSES) | {"test": 6}, "auto", "test", "test", 6, ()),
    (below("train", CLASSES) | {"unlabelled": 9}, "auto", "unlabelled", "unlabelled", 9, ()),
    # what is no class, no image, or an image that another program made
    (CLASSES | {"aaa/": 0, "__MACOSX/x.png": None, "cat/@eaDir": 3, "cat/.hidden.png": None},
     "auto", "train", ".", 5, CAT_DOG),
    # trees with two readings, once it was said which
    ({"2019/jan": 2, "2019/feb": 2, "2020/jan": 2}, "none", "train", ".", 6, ()),
    ({"2019/jan": 2, "2019/feb": 2, "2020/jan": 2}, "folders", "train", ".", 6, ("2019", "2020")),
    (CLASSES | {"x.png": None}, "none", "train", ".", 6, ()),
    (CLASSES | {"x.png": None}, "folders", "train", ".", 5, CAT_DOG),
    (below("pets", CLASSES), "folders", "train", ".", 5, ("pets",)),
    # a class with some of its images further down
    ({"cat": 1, "cat/more": 2, "dog": 1}, "auto", "train", ".", 4, CAT_DOG),
    ({"holiday": 7}, "auto", "train", ".", 7, ("holiday",)),
    # as runs were read that began before all of this
    (VEHICLES, "legacy", "train", "train", 4, ()),
    (CLASSES | {"aaa/": 0, "x/y": 1}, "legacy", "train", ".", 6, ("aaa", "cat", "dog", "x")),
    (CLASSES | {"x.png": None}, "legacy", "train", ".", 6, ()),
    ({"Train/cat": 1, "Test/cat": 1}, "legacy", "train", ".", 2, ("Test", "Train")),
    (below("train", CLASSES) | below("validation", {"dog": 1}), "legacy", "test", "validation", 1,
     CAT_DOG),
]  # fmt: skip


@pytest.mark.parametrize(("tree", "labels", "split", "root", "count", "classes"), READ)
def test_a_tree_is_read_as_it_is_meant(tree, labels, split, root, count, classes, tmp_path):
    make(tmp_path, tree)
    role = "test" if split in ("test", "val") else "train"
    source = opened(tmp_path, role, labels=labels, **{f"{role}_split": split})
    assert (source.num_examples, source.class_names) == (count, classes)
    assert source.root == str(tmp_path / root) and source.num_classes == len(classes)
    inside = [pathlib.Path(p).relative_to(source.root).parts[0] for p in source.paths]
    if classes:
        assert [classes[i] for i in source.labels] == inside
    else:
        assert (source.labels == -1).all()


REFUSED = [
    (VEHICLES, "train",
     ["train can be a split, or a class as bus, car beside it", "data.labels=folders", "/train"]),
    ({"bus": 4, "car": 4, "test": 4}, "train",
     ["no split 'train'", "it has test", "if test is a class as bus, car: data.train_split=."]),
    ({"val/cat": 4}, "train",
     ["it has val", "or parts of one: data.train_split=val[:80%] and data.test_split=val[80%:]"]),
    (below("Train", CLASSES) | below("training", CLASSES), "train",
     ["Train and training in", "can both be the split 'train': name one of them"]),
    (below("pets/train", CLASSES) | below("pets/test", CLASSES), "train",
     ["pets holds the splits test, train, so", "a level too high", "data.source=folder:"]),
    (below("pets", CLASSES), "train",
     ["pets has all its images in folders below, cat, dog", "pets if those are classes"]),
    ({"2019/jan": 2, "2019/feb": 2, "2020/jan": 2}, "train",
     ["2019 has all its images in folders below, feb, jan: set --config.data.labels=none, or "
      "--config.data.labels=folders if 2019, 2020 are the classes"]),
    (CLASSES | {"x.png": None, "y.png": None}, "train",
     ["has 2 images (x.png) and the folders cat, dog: set --config.data.labels=none, or"]),
    ({"cat/": 0, "a/x.csv": None, "a/IMG_1.RAW": None}, "train",
     ["no image in", "(left out: 1 .csv, 1 .raw)", ".jpg"]),
    (CLASSES, "test", ["no split 'test'", "it has no folder for any split"]),
    (CLASSES, "a/b", ["no split 'a/b'"]),
    (below("pets/train", CLASSES) | below("pets/test", CLASSES) | {"pets/notes/x.csv": None},
     "train", ["pets holds the splits notes, test, train, so", "a level too high"]),
    (below("train", CLASSES) | below("test", {"cow": 1}), "test",
     ["(test) has the class 'cow', which the training split lacks", "cat, dog"]),
]  # fmt: skip


@pytest.mark.parametrize(("tree", "split", "words"), REFUSED)
def test_what_can_be_read_in_two_ways_is_refused_with_both(tree, split, words, tmp_path):
    make(tmp_path, tree)
    role = "test" if split == "test" else "train"
    with pytest.raises(UserError) as error:
        opened(tmp_path, role, **{f"{role}_split": split})
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_a_class_that_is_called_train_leaves_no_test_set(tmp_path):
    make(tmp_path, VEHICLES | {"val": 2})
    assert opened(tmp_path, labels="folders").class_names == ("bus", "car", "train", "val")
    with pytest.raises(UserError, match="no split 'test'"):
        opened(tmp_path, "test", labels="folders")


def test_the_classes_of_another_split_are_told_by_the_first_image_of_each(tmp_path, monkeypatch):
    make(tmp_path, below("train", {"ant": 50, "bee": 50}) | below("test", {"bee": 3}))
    asked, real = [], folder_tree._is_something_else
    monkeypatch.setattr(
        folder_tree, "_is_something_else", lambda path: asked.append(path) or real(path)
    )
    assert opened(tmp_path, "test").labels.tolist() == [1, 1, 1]
    assert len([path for path in asked if "train" in path.parts]) <= 4


def test_folders_are_asked_for_where_there_are_none(tmp_path):
    make(tmp_path, {"photos": 3})
    with pytest.raises(UserError, match=r"data.labels=folders, and .* has no folder with images"):
        opened(tmp_path / "photos", labels="folders")
    with pytest.raises(UserError, match=r"data.labels is 'folder'; expected 'auto', 'folders'"):
        opened(tmp_path, labels="folder")


@pytest.mark.parametrize("names", [("train", "test"), ("training", "validation2"), ("a", "b")])
def test_classes_are_compared_by_name(names, tmp_path):
    """The second split lacks the first class: the others keep their numbers."""
    train, test = names
    make(tmp_path, below(train, {"ant": 2, "bee": 2, "cow": 2}) | below(test, {"bee": 1, "cow": 2}))
    for bank in ("", train):
        fields = {"train_split": train, "test_split": test, "bank_split": bank}
        found = opened(tmp_path, "test", **fields)
        assert found.labels.tolist() == [1, 2, 2] and found.num_classes == 3
        assert found.class_names == opened(tmp_path, **fields).class_names
        labels, folders = named(found)
        assert labels == folders
        assert "1 of 3 classes missing: ant" in found.account
    # the bank has a class that is not trained on: numbers of the others stay
    bank = opened(tmp_path, "bank", train_split=test, bank_split=train)
    assert bank.class_names == ("bee", "cow", "ant")
    assert named(bank) == (["ant"] * 2 + ["bee"] * 2 + ["cow"] * 2,) * 2
    # nothing of the training split is labelled: the bank says what is what
    make(tmp_path, {"photos": 4})
    scored = opened(tmp_path, "test", train_split="photos", bank_split=train, test_split=test)
    assert scored.labels.tolist() == [1, 2, 2]


def test_a_level_too_low(tmp_path):
    make(tmp_path, below("train", CLASSES) | below("test", CLASSES))
    assert opened(tmp_path / "train").num_examples == 5
    with pytest.raises(UserError, match=f"is itself a split by its name: .*folder:{tmp_path}$"):
        opened(tmp_path / "train", "test")


def test_a_name_may_have_the_bytes_of_another_system(tmp_path):
    """macOS writes the accent as a character of its own."""
    composed, apart = "caf\u00e9", "cafe\u0301"
    make(tmp_path, {f"train/{composed}": 1, "train/bar": 1, f"test/{apart}": 2})
    test = opened(tmp_path, "test")
    assert test.labels.tolist() == [1, 1] and test.class_names == ("bar", composed)
    make(tmp_path, {f"train/{apart}": 1})  # two classes then, and each keeps its own
    number = opened(tmp_path).class_names.index(apart)
    assert opened(tmp_path, "test").labels.tolist() == [number] * 2


def test_the_user_is_told_what_was_read_and_what_was_not(tmp_path):
    tree = {f"train/{c}": 2 for c in "abcdefg"} | {
        "train/a/x.csv": None, "train/b/x.csv": None, "train/notes": None, "train/k/1.heic": None,
        "train/__MACOSX/1.png": None, "train/Thumbs.db": None, "train/1.png": None, "extra": 3,
        "train/a/.DS_Store": None,
    }  # fmt: skip
    make(tmp_path, tree)
    heic = ".heic" in decoding.readable_suffixes()
    source = opened(tmp_path, labels="folders")
    assert source.summary()[0] == f"{tmp_path.name} (train): {14 + heic} images, {7 + heic} classes"
    assert source.account[0].startswith(f"read from {tmp_path}/train, {7 + heic} classes by folder")
    assert source.account[0].endswith(f"a, b, c, d, e and {2 + heic} more")
    left_out = source.account[1]
    for words in ("2 .csv", "1 file without an extension", "1 folder __MACOSX",
                  "1 image beside the class folders"):  # fmt: skip
        assert words in left_out
    assert heic or ("1 .heic" in left_out and "pip install pillow-heif" in left_out)
    assert heic or "1 folder without images" in left_out
    assert "db" not in left_out and "DS_Store" not in left_out
    assert source.account[2] == "other folders beside train: extra"
    single = opened(tmp_path / "extra")
    assert single.account == (f"read from {tmp_path}/extra, without labels",)
    make(tmp_path, {"one/only": 2})
    account = opened(tmp_path / "one").account
    assert account[1] == "one class: any accuracy is 100 % and says nothing"


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("2021", "2022 summer", "phone"), True),
        (("06 June", "07_jul", "may"), True),
        (("20230501", "IMG 2023-05-02", "cats"), True),
        (("100CANON", "101_PANA"), True),
        (("marigold", "may", "octopus"), False),
        (("n01440764", "n02102040"), False),
        (("12019", "0012"), False),
    ],
)
def test_folders_that_are_named_like_occasions_are_pointed_out(names, told, tmp_path):
    make(tmp_path, {f"train/{name}": 1 for name in names})
    source = opened(tmp_path)
    assert source.class_names == tuple(sorted(names))  # as ever
    line = "named like dates or cameras: if these folders are no classes, begin a run with "
    assert (f"{line}--config.data.labels=none" in source.account) is told
    assert line not in "".join(opened(tmp_path, labels="folders").account)


@pytest.mark.parametrize(
    "name", ["a.JPG", "a.jpeg", "a.Png", "a.TIFF", "a.jfif", "a.jpe", "a.webp"]
)
def test_extensions_of_images(name, tmp_path):
    make(tmp_path, {name: None})
    assert opened(tmp_path).num_examples == 1


def test_names_hold_no_path_outside_the_folder(tmp_path):
    make(tmp_path, below("train", CLASSES))
    source = opened(tmp_path)
    assert source.names(np.array([0, 4])).tolist() == ["train/cat/0.png", "train/dog/1.png"]
    assert opened(tmp_path, train_split="train[:2]").names(np.arange(2))[0].startswith("train/")
    home = os.path.relpath(tmp_path, pathlib.Path.home())
    assert opened(f"~/{home}").num_examples == 5


def test_slices_are_parts_of_all_classes_and_share_nothing(tmp_path):
    make(tmp_path, {"train/a": 50, "train/b": 50})
    whole = opened(tmp_path)
    first, rest = (opened(tmp_path, train_split=f"train[{s}]") for s in (":80%", "80%:"))
    parts = [set(s.names(np.arange(s.num_examples)).tolist()) for s in (first, rest)]
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == set(whole.names(np.arange(100)).tolist())
    assert (len(parts[0]), len(parts[1]), first.split) == (80, 20, "train[:80%]")
    for part in (first, rest):
        images, labels = part.read(np.arange(part.num_examples))
        assert part.labels.tolist() == labels.tolist() and part.class_names == ("a", "b")
        assert [b"/a/" in path for path in images] == (labels == 0).tolist()
        assert min(np.bincount(labels)) > 0.3 * part.num_examples
    assert first.listing != rest.listing != whole.listing
    test = opened(tmp_path, "test", train_split="train[:80%]", test_split="train[80%:]")
    assert test.labels.tolist() == rest.labels.tolist()
    with pytest.raises(UserError, match=r"the slice 'train\[3:3\]' is empty \(3 to 3 of 100 exam"):
        opened(tmp_path, train_split="train[3:3]")
    for bounds, count in (("-1%:", 1), (":-1%", 99), ("-30%:", 30), ("-5:", 5)):
        assert opened(tmp_path, train_split=f"train[{bounds}]").num_examples == count
    with pytest.raises(UserError, match=r"the slice 'train\[-1%:\]' is empty"):  # of 40 it is none
        slices.ids("train[-1%:]", ("-1%", ""), 40)
    with pytest.raises(UserError, match=r"'train\[:half\]' has the bound 'half': expected a count"):
        opened(tmp_path, train_split="train[:half]")


class Split:
    """What TFDS asks of a split when it turns percents into places."""

    def __init__(self, n):
        self.num_examples = n


@pytest.mark.parametrize("n", [10, 97])
def test_a_slice_has_as_many_examples_as_tfds_gives_it(n):
    import tensorflow_datasets as tfds

    for bounds in (":80%", "80%:", "5:", ":-5", "-7:", "10%:-10%", "3:9", "33%:67%"):
        split = f"train[{bounds}]"
        (part,) = tfds.core.ReadInstruction.from_spec(split).to_absolute({"train": Split(n)})
        first, last = part.from_ or 0, n if part.to is None else part.to
        name, found = slices.parse(split)
        assert (name, len(slices.ids(split, found, n))) == ("train", last - first)
    assert slices.parse("train") == ("train", None)


def test_splits_that_share_examples():
    same = [("train", "train"), ("train[:80%]", "train[70%:]"), ("train", "train[-5:]"),
            ("train[:100]", "train[50:60]"), ("train[:3shard]",) * 2]  # fmt: skip
    apart = [("train", "test"), ("train[:80%]", "train[80%:]"), ("train[:100]", "train[100:]"),
             ("train[:80%]", "test[:80%]"), ("train+test", "test"),
             ("train[:3shard]", "train[3shard:]")]  # fmt: skip
    assert all(slices.overlap(a, b) and slices.overlap(b, a) for a, b in same)
    assert not any(slices.overlap(a, b) for a, b in apart)
