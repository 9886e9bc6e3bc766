"""Sources: what each kind of data set gives, and what is said when it cannot be opened."""

import gzip
import hashlib
import io
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from common.config import section
from common.data.sources import embedded, make_embedded
from common.data.sources.opening import open_source
from common.errors import UserError


def config(source, **fields):
    """A `data` section."""
    c = section("data", source=source)
    for name, value in fields.items():
        c[name] = value
    return c


def picture(seed, height=20, width=24):
    """Smooth random pixels, so that JPEG keeps them nearly."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.BICUBIC))


def write(path, seed, **size):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(seed, **size)).save(path)
    return path


def write_tfds(
    folder, file_format="tfrecord", examples=60, shards=4, shape=(8, 10, 3), labels=3,
    splits=("train", "test"),
):  # fmt: skip
    """Writes a prepared TFDS set "tiny" of PNGs; with a shape of None, of three sizes."""
    import tensorflow_datasets as tfds

    features = {"image": tfds.features.Image(shape=shape, encoding_format="png")}
    if labels:
        features["label"] = tfds.features.ClassLabel(names=[f"kind{i}" for i in range(labels)])

    def example(i):
        size = (shape[0] or 8 + i % 3, shape[1] or 10)
        values = {"image": picture(i, *size)[..., : shape[2]]}
        return values | ({"label": i % labels} if labels else {})

    return tfds.dataset_builders.store_as_tfds_dataset(
        name="tiny",
        version="1.0.0",
        features=tfds.features.FeaturesDict(features),
        split_datasets={
            splits[0]: [(i, example(i)) for i in range(examples)],
            splits[1]: [(i, example(i)) for i in range(9)],
        },
        data_dir=folder,
        file_format=file_format,
        download_config=tfds.download.DownloadConfig(num_shards=shards, try_download_gcs=False),
    )


def test_embedded_is_the_published_data():
    train = open_source(config("embedded"), "train")
    test = open_source(config("embedded"), "test")
    assert (train.num_examples, test.num_examples, train.num_classes) == (10_000, 2_000, 10)
    assert train.kind == "pixels" and train.image_shape == (28, 28)
    images = train.fetch(np.arange(10_000))
    assert images.shape == (10_000, 28, 28, 3) and images.dtype == np.uint8
    assert (images[..., :1] == images).all()
    # The first labels and the mean of Fashion-MNIST, as every tutorial prints them.
    assert train.labels[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
    assert test.labels[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]
    assert abs(images.mean() / 255 - 0.2860) < 0.002
    assert train.class_names[9] == "Ankle boot"
    assert train.labels.dtype == np.int32
    digest = hashlib.sha256(images[..., 0].tobytes()).hexdigest()
    assert digest.startswith("2929ae1c7b89e0ee")  # of the first 7,840,000 pixels of Debian's file
    archive = pathlib.Path(embedded.__file__).with_name("fashion_mnist.npz")
    assert archive.stat().st_size <= 8e6
    licence = archive.with_name("FASHION_MNIST_LICENSE").read_text()
    assert "MIT License" in licence and "Zalando" in licence


def test_make_embedded_reads_idx(tmp_path):
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    header = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4])
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(header + pixels.tobytes()))
    np.testing.assert_array_equal(make_embedded.read_idx(path), pixels)
    path.write_bytes(gzip.compress(b"\x00\x00\x0d\x01" + b"\x00" * 8))
    with pytest.raises(ValueError, match="not an IDX"):
        make_embedded.read_idx(path)


def test_fake():
    source = open_source(config("fake", fake_examples=100, fake_classes=7), "train")
    assert (source.kind, source.num_examples, source.num_classes) == ("views", 100, 7)
    images, labels = source.read(np.array([3, 4, 99]))
    assert images.shape == (3, 28, 28, 3) and labels.tolist() == [3, 4, 1]
    assert abs(images.mean() - 127.5) < 5 and images.std() > 60
    unlabelled = open_source(config("fake", fake_classes=0), "train")
    assert (unlabelled.labels == -1).all() and unlabelled.num_classes == 0


def test_the_unlabelled_split_of_a_set_with_classes(tmp_path):
    """As STL10 has it: its own labels do not count, those of another split may vote."""
    write_tfds(tmp_path, splits=("unlabelled", "train"), examples=12, shards=1)
    fields = {"dir": str(tmp_path), "train_split": "unlabelled", "bank_split": "train"}
    c = config("tfds:tiny", **fields)
    train, bank = open_source(c, "train"), open_source(c, "bank")
    assert (train.num_examples, train.num_classes, train.class_names) == (12, 0, ())
    assert (train.labels == -1).all()
    assert (bank.num_examples, bank.num_classes) == (9, 3)
    assert sorted(bank.labels.tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_folder_with_classes(tmp_path):
    for name, files in {"b_dog": ["1.JPG", "2.png"], "a_cat": ["x.jpeg", "deep/y.PNG"]}.items():
        for i, file in enumerate(files):
            write(tmp_path / name / file, i)
    (tmp_path / "a_cat" / "notes.txt").write_text("no image")
    (tmp_path / "a_cat" / "._x.jpeg").write_text("what another system leaves behind")
    source = open_source(config(f"folder:{tmp_path}"), "train")
    assert source.class_names == ("a_cat", "b_dog") and source.num_classes == 2
    paths = [os.fsdecode(p) for p in source.fetch(np.arange(4))]
    names = [str(pathlib.Path(p).relative_to(tmp_path)) for p in paths]
    assert names == ["a_cat/x.jpeg", "a_cat/deep/y.PNG", "b_dog/1.JPG", "b_dog/2.png"]
    assert source.labels.tolist() == [0, 0, 1, 1]
    assert source.kind == "path" and "b_dog/1.JPG" in source.describe(2)


def test_folder_errors(tmp_path):
    with pytest.raises(UserError, match=r"no folder .*nowhere"):
        open_source(config(f"folder:{tmp_path}/nowhere"), "train")
    with pytest.raises(UserError, match="no image in"):
        open_source(config(f"folder:{tmp_path}"), "train")
    (tmp_path / "cat").mkdir()
    with pytest.raises(UserError, match="no image in"):
        open_source(config(f"folder:{tmp_path}"), "train")


@pytest.mark.parametrize("bad", ["tfds", "tfds:", "folder:", "cifar10", "embedded:x"])
def test_unknown_source(bad):
    with pytest.raises(UserError, match="expected 'embedded', 'tfds:NAME'"):
        open_source(config(bad), "train")


def test_labels_of_any_source_can_be_left_out():
    for name in ("embedded", "fake"):
        source = open_source(config(name, labels="none"), "train")
        assert source.num_classes == 0 and source.class_names == ()
        assert (source.labels == -1).all() and (source.read(np.arange(3))[1] == -1).all()
    part = open_source(config("embedded", train_split="train[:10%]"), "train")
    whole = open_source(config("embedded"), "train")
    assert part.num_examples == 1000 and (np.bincount(part.labels) > 60).all()
    np.testing.assert_array_equal(part.read(np.arange(9))[0], whole.images[part.ids[:9]])


def test_unknown_split_and_option():
    with pytest.raises(UserError, match="no split 'extra'"):
        open_source(config("embedded", train_split="extra"), "train")
    with pytest.raises(UserError, match=r"on_corrupt is 'ignore'; expected 'error' .stop and name"):
        open_source(config("embedded", on_corrupt="ignore"), "train")


def labelled_by(folder, name, values, kind, test_values=None):
    """A set "tiny" whose label is a feature of `kind`, with these values."""
    import tensorflow_datasets as tfds

    features = {"image": tfds.features.Image(shape=(4, 5, 3)), name: kind}

    def split(values):
        return [(i, {"image": picture(i, 4, 5), name: value}) for i, value in enumerate(values)]

    tfds.dataset_builders.store_as_tfds_dataset(
        name="tiny", version="1.0.0", features=tfds.features.FeaturesDict(features),
        split_datasets={"train": split(values), "test": split(test_values or values)},
        data_dir=folder, disable_shuffling=True,
        download_config=tfds.download.DownloadConfig(num_shards=1, try_download_gcs=False),
    )  # fmt: skip
    return config("tfds:tiny", dir=str(folder))


def test_tfds_labels_that_are_integers_or_text_become_classes(tmp_path):
    """By their values, in all splits; a test set without the smallest value keeps the numbers."""
    import tensorflow_datasets as tfds

    from common.data.sources import tfds_features

    text = labelled_by(tmp_path / "text", "label", ["owl", "ant", "", "owl"],
                       tfds.features.Text(), ["owl", "owl"])  # fmt: skip
    source = open_source(text, "train")
    assert (source.class_names, source.labels.tolist()) == (("ant", "owl"), [1, 0, -1, 1])
    assert source.account == ("classes are the values of 'label': ant, owl",)
    test = open_source(text, "test")
    assert (test.class_names, test.labels.tolist()) == (("ant", "owl"), [1, 1])
    number = labelled_by(tmp_path / "number", "class", [3, 11, -1, 3, 11], np.int64, [11, 11])
    source = open_source(number, "train")
    assert (source.class_names, source.labels.tolist()) == (("3", "11"), [0, 1, -1, 0, 1])
    assert open_source(number, "test").labels.tolist() == [1, 1]
    few = labelled_by(tmp_path / "few", "label", ["a", "b", "c"] * 50, tfds.features.Text(),
                      ["c", "b"])  # fmt: skip
    assert open_source(few, "test").labels.tolist() == [2, 1]
    few.train_split = "train[:3]"
    assert open_source(few, "train").num_classes == 3
    large = labelled_by(tmp_path / "large", "label", [2**63 + 1, 7, 2**63, 7], np.uint64)
    assert open_source(large, "train").labels.tolist() == [2, 0, 1, 0]
    broken = np.array([b"\xff", b"a"], object)
    assert tfds_features.classes_of(broken, "label", True)[1] == ("\\xff", "a")
    number.labels = "none"
    hidden = open_source(number, "train")
    assert (hidden.num_classes, hidden.labels.tolist()) == (0, [-1] * 5)


def test_tfds_labels_that_are_no_classes_are_said(tmp_path):
    import tensorflow_datasets as tfds

    several = labelled_by(tmp_path / "a", "label", [0.5, 1.5], np.float32)
    source = open_source(several, "train")
    assert source.num_classes == 0 and "'label' is " in source.account[0]
    assert "no class, no integer and no text" in source.account[0]
    ids = labelled_by(tmp_path / "b", "label", list(range(100, 230)), np.int64)
    source = open_source(ids, "train")
    assert source.num_classes == 0 and set(source.labels.tolist()) == {-1}
    assert source.account == ("no labels: 'label' has 130 values for 130 images",)
    ids.cache_gib = 0.0
    streamed = open_source(ids, "train")
    assert streamed.num_classes == 0 and "more than data.cache_gib" in streamed.account[0]

    from common.data.sources import tfds_features

    class Info:
        """Stands in for `tfds.core.DatasetInfo`."""

        name = "two"
        features = tfds.features.FeaturesDict({
            "image": tfds.features.Image(),
            "coarse": tfds.features.ClassLabel(num_classes=2),
            "fine": tfds.features.ClassLabel(num_classes=9),
        })  # fmt: skip

    account = tfds_features.Features(Info).account
    assert account == ("no labels: of the classes coarse, fine none is called 'label'",)


def expected_pixels(builder, split="train"):
    """What TFDS's own reader gives, in order."""
    import tensorflow_datasets as tfds

    data = tfds.as_numpy(builder.as_dataset(split=split, shuffle_files=False))
    return list(data)


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_tfds_in_memory(tmp_path, file_format):
    builder = write_tfds(tmp_path, file_format)
    examples = list(builder.as_data_source("train")) if file_format == "array_record" else (
        expected_pixels(builder))  # fmt: skip
    source = open_source(config("tfds:tiny", dir=str(tmp_path)), "train")
    assert source.kind == "pixels" and source.image_shape == (8, 10)
    assert source.num_examples == 60 and source.class_names == ("kind0", "kind1", "kind2")
    np.testing.assert_array_equal(source.fetch(np.arange(60)), [e["image"] for e in examples])
    np.testing.assert_array_equal(source.labels, [e["label"] for e in examples])
    part = open_source(config("tfds:tiny", dir=str(tmp_path), train_split="train[10:15]"), "train")
    np.testing.assert_array_equal(part.fetch(np.arange(5)), source.fetch(np.arange(10, 15)))
    message = "no split 'validation'; expected one of train, test or a slice of it"
    with pytest.raises(UserError, match=message):
        open_source(config("tfds:tiny", dir=str(tmp_path), test_split="validation"), "test")
    with pytest.raises(UserError, match=r"split 'train\[:0\]' of tfds:tiny is empty; expected im"):
        open_source(config("tfds:tiny", dir=str(tmp_path), train_split="train[:0]"), "train")


def test_tfds_kinds(tmp_path):
    """Grey images, images of many sizes, no labels, and sets above the memory limit."""
    write_tfds(tmp_path / "grey", shape=(8, 10, 1), labels=0)
    grey = open_source(config("tfds:tiny", dir=str(tmp_path / "grey")), "train")
    assert grey.images.shape == (60, 8, 10, 3) and (grey.labels == -1).all()
    assert grey.num_classes == 0
    write_tfds(tmp_path / "sizes", shape=(None, None, 3), examples=6)
    sizes = open_source(config("tfds:tiny", dir=str(tmp_path / "sizes")), "train")
    assert sizes.kind == "encoded" and sizes.image_shape is None
    shapes = {Image.open(io.BytesIO(x)).size for x in sizes.fetch(np.arange(6))}
    assert shapes == {(10, 8), (10, 9), (10, 10)}
    stream = open_source(config("tfds:tiny", dir=str(tmp_path / "sizes"), cache_gib=0.0), "train")
    assert stream.kind == "stream" and stream.labels is None and stream.num_examples == 6
    write_tfds(tmp_path / "array", "array_record", shape=(None, None, 3), examples=6)
    array = open_source(config("tfds:tiny", dir=str(tmp_path / "array")), "train")
    assert array.kind == "encoded" and array.labels is None
    images, labels = array.read(np.array([5, 0]))
    assert sorted(array.read(np.arange(6))[1].tolist()) == [0, 0, 1, 1, 2, 2]
    assert labels.dtype == np.int32 and Image.open(io.BytesIO(images[0])).size[0] == 10


def test_a_sum_of_splits_counts_towards_the_memory_limit(tmp_path):
    """TFDS does not know the bytes of a sum, which would make it seem to fit anywhere."""
    write_tfds(tmp_path, shape=(None, None, 3), examples=12)
    for split in ("train+test", "train[:50%]+test"):
        c = config("tfds:tiny", dir=str(tmp_path), cache_gib=0.0, train_split=split)
        assert open_source(c, "train").kind == "stream"
        c.cache_gib = 1.0
        assert open_source(c, "train").kind == "encoded"


def test_a_damaged_tfds_set_is_one_line(tmp_path):
    write_tfds(tmp_path, shards=2, examples=12)
    c = config("tfds:tiny", dir=str(tmp_path))
    first, _ = sorted(tmp_path.rglob("*train.tfrecord*"))
    whole = first.read_bytes()
    size = int.from_bytes(whole[:8], "little") + 16  # of the first record
    first.write_bytes(whole[:size])
    with pytest.raises(UserError, match=r"holds 7 of the 12 images that its description says"):
        open_source(c, "train")
    first.write_bytes(whole[: size + 20])
    with pytest.raises(UserError, match=r"cannot read tfds:tiny: .*prepare the set again"):
        open_source(c, "train")
    first.unlink()
    with pytest.raises(UserError, match="cannot read tfds:tiny"):
        open_source(c, "train")


def test_tfds_errors(tmp_path):
    with pytest.raises(UserError, match=r"TFDS_DATA_DIR.*tfds.builder\('no_such_set'\)"):
        open_source(config("tfds:no_such_set", dir=str(tmp_path)), "train")
    with pytest.raises(UserError, match=r"tfds:cifar10 is not prepared.*tfds.builder\('cifar10'\)"):
        open_source(config("tfds:cifar10", dir=str(tmp_path)), "train")


def test_tfds_without_image():
    import tensorflow_datasets as tfds

    from common.data.sources import tfds_features

    class Info:
        """Stands in for `tfds.core.DatasetInfo`."""

        name = "words"
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})

    with pytest.raises(UserError, match="none of them is an image"):
        tfds_features.Features(Info)


@pytest.mark.skipif("TFDS_DATA_DIR" not in os.environ, reason="TFDS_DATA_DIR is not set")
def test_cifar10():
    try:
        source = open_source(config("tfds:cifar10"), "test")
    except UserError as error:
        pytest.skip(str(error))
    assert source.kind == "pixels" and source.images.shape == (10_000, 32, 32, 3)
    assert np.bincount(source.labels).tolist() == [1000] * 10
    assert source.class_names[:2] == ("airplane", "automobile")
