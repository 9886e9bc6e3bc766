"""Batches: their order, their split among processes, resuming, padding and corrupt images."""

import logging
import os
import subprocess
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from test_sources import picture, write_tfds

from common.config import section
from common.data.augment import draws
from common.data.feed import pipeline
from common.data.feed.recipe import FeedRecipe
from common.data.sources.base import ArraySource
from common.data.sources.opening import open_source
from common.errors import UserError


def config(source="embedded", batch_size=8, image_size=12, preset="light", seed=3, **data):
    """A whole config; the "light" preset only crops, flips and solarises, which compiles faster."""
    c = ConfigDict({"seed": seed, "batch_size": batch_size})
    c.data = section("data", source=source, image_size=image_size)
    for name, value in data.items():
        c.data[name] = value
    c.augment = section("augment", preset="moco_v1" if preset == "light" else preset)
    if preset == "light":
        c.augment.update({"jitter": 0.0, "grey": 0.0, "solarise": 0.3})
    c.augment_view2 = section("augment_view2")
    return c


def array_source(n=30, size=14):
    images = np.stack([picture(i, size, size) for i in range(n)])
    return ArraySource(
        name="array", split="train", kind="pixels", num_examples=n, num_classes=4,
        class_names=tuple("abcd"), labels=(np.arange(n) % 4).astype(np.int32),
        image_shape=(size, size), images=images,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of 22 JPEG and PNG files of several sizes in two classes."""
    root = tmp_path_factory.mktemp("folder")
    for i in range(22):
        path = root / f"class{i % 2}" / f"{i:02}.{'jpg' if i % 3 else 'png'}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(picture(i, 20 + i % 5, 24)).save(path)
    return root


@pytest.fixture(scope="module")
def stream_dir(tmp_path_factory):
    """A TFRecord set of 60 images in 4 files."""
    root = tmp_path_factory.mktemp("tfds")
    write_tfds(root)
    return root


def take(batches, count):
    return [next(batches) for _ in range(count)]


def train(source, c, count, rows=None, **options):
    rows = np.arange(c.batch_size) if rows is None else rows
    return take(pipeline.train_batches(source, FeedRecipe.of(c), rows=rows, **options), count)


def same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
            assert a[name].dtype == b[name].dtype


def by_id(batches):
    """(id -> views) of one epoch's batches."""
    pairs = [(i, x) for b in batches for i, x in zip(b["ids"], b["images"], strict=True)]
    assert len({i for i, _ in pairs}) == len(pairs)
    return dict(pairs)


# ---------------------------------------------------------------- order


def test_order_is_pinned():
    """Literal numbers: a change here changes every run, and breaks every resume."""
    assert pipeline.order(0, 0, 10).tolist() == PINNED[0]
    assert pipeline.order(0, 1, 10).tolist() == PINNED[1]
    assert pipeline.order(1, 0, 10).tolist() == PINNED[2]


PINNED = [
    [8, 9, 2, 4, 3, 1, 6, 7, 5, 0],
    [5, 6, 4, 2, 3, 9, 7, 8, 1, 0],
    [3, 1, 0, 8, 9, 5, 6, 4, 7, 2],
]


def test_order_is_a_fair_permutation():
    first_places = np.array([pipeline.order(seed, 5, 8) for seed in range(4000)])
    assert (np.sort(first_places, axis=1) == np.arange(8)).all()
    counts = np.stack([np.bincount(column, minlength=8) for column in first_places.T])
    assert np.abs(counts - 500).max() < 5 * np.sqrt(500)


# ---------------------------------------------------------------- training, random access


def test_batches_follow_the_order():
    source, c = array_source(), config()
    batches = pipeline.train_batches(source, FeedRecipe.of(c), rows=np.arange(8))
    assert batches.steps_per_epoch == 3 and batches.position == 0
    found = take(batches, 7)
    assert batches.position == 7
    for step, batch in enumerate(found):
        epoch, t = divmod(step, 3)
        ids = pipeline.order(3, epoch, 30)[t * 8 : t * 8 + 8]
        np.testing.assert_array_equal(batch["ids"], ids)
        np.testing.assert_array_equal(batch["labels"], ids % 4)
        assert batch["images"].shape == (8, 2, 12, 12, 3)
        assert batch["images"].dtype == np.uint8 and batch["labels"].dtype == np.int32
        assert batch["ids"].dtype == np.int64
    seen = np.concatenate([b["ids"] for b in found[:3]])
    assert len(set(seen)) == 24  # every example at most once an epoch; 6 are dropped
    assert set(seen) != set(np.concatenate([b["ids"] for b in found[3:6]]))


@pytest.mark.parametrize("kind", ["pixels", "folder", "fake"])
def test_starting_late_equals_skipping(kind, folder):
    if kind == "folder":
        c = config(f"folder:{folder}")
        source = open_source(c.data, "train")
    elif kind == "fake":
        c = config("fake", fake_examples=30)
        source = open_source(c.data, "train")
    else:
        source, c = array_source(), config()
    whole = train(source, c, 7)
    same(train(source, c, 2, start_step=5), whole[5:])
    same(train(source, c, 1, start_step=3), whole[3:4])  # an epoch's first
    late = pipeline.train_batches(source, FeedRecipe.of(c), rows=np.arange(8), start_step=5)
    next(late)
    assert late.position == 6  # which the next checkpoint holds, and the next start begins at


@pytest.mark.parametrize("kind", ["pixels", "folder"])
def test_processes_share_the_global_batch(kind, folder):
    source, c = array_source(), config(preset="simclr")  # the one with everything in it
    if kind == "folder":
        c = config(f"folder:{folder}", preset="simclr")
        source = open_source(c.data, "train")
    whole = train(source, c, 4)
    split = [np.array([0, 1, 6, 7]), np.array([5, 4, 3, 2])]
    parts = [
        train(source, c, 4, rows=rows, process_index=i, process_count=2)
        for i, rows in enumerate(split)
    ]
    for step, batch in enumerate(whole):
        for rows, part in zip(split, parts, strict=True):
            same([part[step]], [{name: value[rows] for name, value in batch.items()}])


@pytest.mark.parametrize("kind", ["pixels", "folder"])
def test_views_depend_on_seed_epoch_and_id_only(kind, folder):
    def views(batch_size, steps, seed=3, start=0):
        if kind == "folder":
            c = config(f"folder:{folder}", batch_size, seed=seed)
            source = open_source(c.data, "train")
        else:
            source, c = array_source(22), config(batch_size=batch_size, seed=seed)
        return by_id(train(source, c, steps, start_step=start))

    one, other, next_epoch = views(11, 2), views(2, 11), views(11, 2, start=2)
    assert one.keys() == other.keys() == next_epoch.keys() == set(range(22))
    for index, pair in one.items():
        np.testing.assert_array_equal(pair, other[index])
        assert (pair != next_epoch[index]).any() and (pair[0] != pair[1]).any()
    assert all((pair != views(22, 1, seed=4)[index]).any() for index, pair in list(one.items())[:3])


@pytest.mark.parametrize("kind", ["pixels", "folder", "stream"])
def test_what_the_device_is_to_do_is_left_to_it(kind, folder, stream_dir):
    """With augment_on="both" the host crops and flips, and says what else was drawn."""
    if kind == "pixels":
        source, c = array_source(), config(augment_on="both")
    elif kind == "folder":
        c = config(f"folder:{folder}", augment_on="both")
        source = open_source(c.data, "train")
    else:
        source, c = stream(stream_dir, augment_on="both")
    (found,) = train(source, c, 1)
    shape = source.image_shape
    want, _ = draws.draw_views(FeedRecipe.of(c).views, c.seed, 0, found["ids"], shape)
    np.testing.assert_array_equal(found.pop("parameters"), want)
    assert want[..., draws.SOLARISE].any()
    c.data.augment_on, c.augment.solarise = "host", 0.0  # the rest of this recipe
    same([found], train(source, c, 1))


def test_unlabelled_folder(tmp_path):
    for i in range(4):
        Image.fromarray(picture(i)).save(tmp_path / f"{i}.png")
    c = config(f"folder:{tmp_path}", batch_size=4)
    batch = train(open_source(c.data, "train"), c, 1)[0]
    assert batch["labels"].tolist() == [-1] * 4


def test_batch_larger_than_the_set():
    with pytest.raises(UserError, match=r"batch_size is 31, but array .train. has 30"):
        train(array_source(), config(batch_size=31), 1)
    with pytest.raises(UserError, match="unknown augmentation preset"):
        train(array_source(), config(preset="nothing"), 1)


def test_accelerators_are_hidden_from_tensorflow():
    from common.data.images.tensorflow_host import tf

    assert not tf.config.get_visible_devices("GPU") and not tf.config.get_visible_devices("TPU")


def test_tensorflow_is_imported_on_use_only():
    """Fake views and evaluation at the set's own size do without it."""
    code = (
        "import sys, numpy as np\n"
        "from ml_collections import ConfigDict\n"
        "from common.config import section\n"
        "from common.data.feed import pipeline\n"
        "from common.data.feed.recipe import FeedRecipe\n"
        "from common.data.sources import opening\n"
        "c = ConfigDict(dict(seed=0, batch_size=4, data=section('data', source='fake')))\n"
        "c.augment = section('augment')\n"
        "s = opening.open_source(c.data, 'train')\n"
        "next(pipeline.train_batches(s, FeedRecipe.of(c), rows=np.arange(4)))\n"
        "s = opening.open_source(section('data'), 'test')\n"
        "next(pipeline.eval_batches(s, 4, 28, np.arange(4)))\n"
        "assert 'tensorflow' not in sys.modules and 'tensorflow_datasets' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


# ---------------------------------------------------------------- evaluation


def evaluate(source, batch_size, size, splits):
    """Every process's batches."""
    return [
        list(pipeline.eval_batches(
            source, batch_size, size, rows, process_index=i, process_count=len(splits)))
        for i, rows in enumerate(splits)
    ]  # fmt: skip


def test_eval_of_a_limited_number_is_spaced_evenly():
    source = array_source(30)
    for size in (14, 9):
        batches = list(pipeline.eval_batches(source, 4, size, np.arange(4), limit=7))
        ids = np.concatenate([b["ids"] for b in batches])
        assert ids.tolist() == [0, 4, 8, 12, 17, 21, 25, -1]
        for batch in batches:
            real = batch["mask"]
            np.testing.assert_array_equal(batch["labels"][real], source.labels[batch["ids"][real]])
            if size == 14:
                images = source.images[batch["ids"][real]]
                np.testing.assert_array_equal(batch["images"][real], images)
    whole = list(pipeline.eval_batches(source, 4, 14, np.arange(4), limit=99))
    assert sum(b["mask"].sum() for b in whole) == 30


@pytest.mark.parametrize("size", [14, 9])
def test_eval_pads_and_masks(size):
    source = array_source(21)
    whole = evaluate(source, 8, size, [np.arange(8)])[0]
    assert [b["mask"].sum() for b in whole] == [8, 8, 5]
    assert whole[-1]["ids"].tolist() == [16, 17, 18, 19, 20, -1, -1, -1]
    assert whole[-1]["labels"].tolist() == [0, 1, 2, 3, 0, -1, -1, -1]
    assert (whole[-1]["images"][5:] == 0).all()
    images = np.concatenate([b["images"] for b in whole])[:21]
    expected = [Image.fromarray(i).resize((size, size), Image.BILINEAR) for i in source.images]
    assert np.abs(images.astype(int) - np.stack([np.asarray(e, int) for e in expected])).max() <= 1
    halves = evaluate(source, 8, size, [np.arange(4), np.arange(4, 8)])
    assert len(halves[0]) == len(halves[1]) == 3
    for step, batch in enumerate(whole):
        for i in range(2):
            rows = slice(4 * i, 4 * i + 4)
            same([halves[i][step]], [{name: value[rows] for name, value in batch.items()}])
    assert not halves[1][2]["mask"][1:].any()


def test_eval_of_a_folder_cuts_the_centre(folder):
    source = open_source(config(f"folder:{folder}").data, "train")
    for size, shorter in ((16, 16), (72, 82)):
        batches = evaluate(source, 10, size, [np.arange(10)])[0]
        assert [b["mask"].sum() for b in batches] == [10, 10, 2]
        images = np.concatenate([b["images"] for b in batches])[:22]
        np.testing.assert_array_equal(
            np.concatenate([b["labels"] for b in batches])[:22], source.labels
        )
        for path, found in list(zip(source.paths, images, strict=True))[::4]:
            image = Image.open(path)
            scale = shorter / min(image.size)
            wide, tall = (round(side * scale) for side in image.size)
            x, y = (wide - size) // 2, (tall - size) // 2
            resized = np.asarray(image.resize((wide, tall), Image.BILINEAR), int)
            expected = resized[y : y + size, x : x + size]
            assert np.abs(found - expected).mean() < 1.5  # JPEG decoders differ a little


@pytest.mark.slow
def test_tensorflow_leaves_the_accelerators_alone():
    """In a process of its own: here TensorFlow is imported already."""
    code = (
        "import tensorflow as tf; hidden = []; real = tf.config.set_visible_devices\n"
        "def note(devices, kind=None): hidden.append((list(devices), kind)); real(devices, kind)\n"
        "tf.config.set_visible_devices = note\n"
        "from common.data.images import tensorflow_host\n"
        "assert ([], 'GPU') in hidden and ([], 'TPU') in hidden, hidden\n"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_keras_is_loaded_on_use_and_is_the_one_it_would_have_been():
    code = (
        "import os, sys\n"
        "from common.data.images import tensorflow_host\n"
        "assert not {'keras', 'sklearn', 'scipy.stats'} & set(sys.modules)\n"
        "assert 'TF_USE_LEGACY_KERAS' not in os.environ\n"
        "import tensorflow as tf\n"
        "from tensorflow.keras.layers import Dense\n"
        "import keras\n"
        "assert Dense is tf.keras.layers.Dense is keras.layers.Dense\n"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- corrupt images


def spoil(folder, kind):
    """Makes one file of a copy unreadable in a given way; returns its id and name."""
    source = open_source(config(f"folder:{folder}").data, "train")
    index = 4
    path = source.paths[index]
    with open(path, "rb") as file:
        data = file.read()
    with open(path, "wb") as file:
        file.write({"text": b"hello", "cut": data[: len(data) // 2], "empty": b""}[kind])
    return index, path


@pytest.fixture
def own_folder(tmp_path):
    for i in range(10):
        Image.fromarray(picture(i, 40, 40)).save(tmp_path / f"{i}.jpg", quality=95)
    return tmp_path


@pytest.mark.parametrize("kind", ["text", "cut", "empty"])
def test_corrupt_image_is_named(own_folder, kind):
    _, path = spoil(own_folder, kind)
    c = config(f"folder:{own_folder}", batch_size=5)
    source = open_source(c.data, "train")
    with pytest.raises(UserError, match=rf"cannot decode {path} .*; .*on_corrupt='replace'"):
        train(source, c, 40)  # twenty epochs: a cut file fails once a crop reaches the missing part
    with pytest.raises(UserError, match=f"cannot decode {path}"):
        list(pipeline.eval_batches(source, 5, 16, np.arange(5)))


def numbered(c):
    """The folder of a config, each image a class of its own."""
    source = open_source(c.data, "train")
    source.labels = np.arange(source.num_examples, dtype=np.int32)
    return source


@pytest.mark.parametrize("kind", ["text", "cut"])
def test_corrupt_image_is_replaced_and_counted(own_folder, kind, caplog):
    index, path = spoil(own_folder, kind)
    spoil_next = own_folder / f"{index + 1}.jpg"
    spoil_next.write_bytes(b"")
    c = config(f"folder:{own_folder}", batch_size=5, on_corrupt="replace")
    source = numbered(c)
    batches = pipeline.train_batches(source, FeedRecipe.of(c), rows=np.arange(5))
    with caplog.at_level(logging.WARNING):
        found = take(batches, 6)
    assert batches.corrupt_count == source.corrupt_count == 2
    assert source.replaced == {index: 6, 5: 6}
    assert path in caplog.text and "2 of 10" in caplog.text
    assert set(np.concatenate([b["ids"] for b in found[:2]])) == set(range(10))
    for batch in found:  # the label is that of the image
        np.testing.assert_array_equal(
            batch["labels"], np.where(np.isin(batch["ids"], [4, 5]), 6, batch["ids"])
        )
    for late in (1, 3):  # a run that starts again makes the same choice
        again = numbered(c)
        same(train(again, c, 6 - late, start_step=late), found[late:])
    evaluated = list(pipeline.eval_batches(numbered(c), 5, 16, np.arange(5)))
    images = np.concatenate([b["images"] for b in evaluated])
    labels = np.concatenate([b["labels"] for b in evaluated])
    assert labels.tolist() == [0, 1, 2, 3, 6, 6, 6, 7, 8, 9]
    np.testing.assert_array_equal(images[[4, 5]], images[[6, 6]])
    assert (images[3] != images[6]).any()


def test_which_images_are_bad_does_not_depend_on_their_crops(own_folder):
    """A crop that does not reach the missing part would hide it until a later epoch."""
    path = own_folder / "4.jpg"
    Image.fromarray(picture(4, 400, 400)).save(path, quality=95)
    path.write_bytes(path.read_bytes()[:-40])  # of the last of 25 rows of blocks
    c = config(f"folder:{own_folder}", batch_size=5, on_corrupt="replace")
    source = open_source(c.data, "train")
    train(source, c, 2, start_step=2)  # an epoch in which neither crop reaches it
    assert source.replaced == {4: 5}


def test_nothing_but_corrupt_images(own_folder):
    for path in own_folder.iterdir():
        path.write_bytes(b"no image")
    c = config(f"folder:{own_folder}", batch_size=5, on_corrupt="replace")
    with pytest.raises(UserError, match="cannot decode"):
        train(open_source(c.data, "train"), c, 1)


def test_vanished_file_is_named(own_folder):
    c = config(f"folder:{own_folder}", batch_size=10)
    source = open_source(c.data, "train")
    (own_folder / "3.jpg").unlink()
    with pytest.raises(UserError, match=r"3\.jpg"):
        train(source, c, 1)


@pytest.mark.slow
def test_a_run_that_crashes_ends(own_folder):
    """Python that ends with a pipeline open would wait for ever, more often than not."""
    program = f"""
import numpy as np
from common.data.sources import opening
from test_pipeline import FeedRecipe, config, pipeline

c = config("folder:{own_folder}", 2)
source = opening.open_source(c.data, "train")
left_open = [pipeline.train_batches(source, FeedRecipe.of(c), rows=np.arange(2)) for _ in range(6)]
for count, batches in enumerate(left_open):
    for _ in range(count):
        next(batches)
raise RuntimeError("something unforeseen")
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert ended.returncode == 1 and "something unforeseen" in ended.stderr


# ---------------------------------------------------------------- streamed TFRecord sets


def stream(stream_dir, batch_size=8, **data):
    c = config("tfds:tiny", batch_size, dir=str(stream_dir), cache_gib=0.0, **data)
    source = open_source(c.data, "train")
    assert source.kind == "stream"
    return source, c


def in_memory(stream_dir):
    c = config("tfds:tiny", 8, dir=str(stream_dir))
    return open_source(c.data, "train"), c


@pytest.mark.parametrize("count", [1, 3])
def test_stream_is_split_and_complete(stream_dir, count):
    steps, b = 5, 60 // 5 // count
    source, c = stream(stream_dir, b * count, shuffle_buffer=16)
    epochs = []
    for index in range(count):
        batches = train(
            source, c, 2 * steps, rows=np.arange(b * index, b * index + b),
            process_index=index, process_count=count,
        )  # fmt: skip
        ids = np.stack([b["ids"] for b in batches])
        epochs.append(ids.reshape(2, -1))
        assert (epochs[-1][0] != epochs[-1][1]).any()  # a new order
    for epoch in (0, 1):
        ids = np.concatenate([e[epoch] for e in epochs])
        assert sorted(ids) == list(range(60))


def test_stream_shuffles_files_and_records(stream_dir):
    from common.data.feed import stream as module

    def ids(epoch, buffer, seed=0):
        source, _ = stream(stream_dir, shuffle_buffer=buffer)
        records = module.epoch_records(source, seed, epoch, 0, 1)
        return [int(i) for i, _ in records.as_numpy_iterator()]

    files = {tuple(ids(epoch, 1)[:16]) for epoch in range(6)}
    assert len(files) > 1 and all(block[0] % 15 == 0 for block in files)  # 4 files of 15 records
    assert ids(0, 60) != ids(1, 60) and ids(0, 60) != ids(0, 60, seed=1)
    assert ids(0, 60) == ids(0, 60) and sorted(ids(0, 60)) == list(range(60))


def test_stream_matches_the_set_in_memory(stream_dir):
    """Ids name the same examples, whose views are the same, streamed or not."""
    source, c = stream(stream_dir, 10)
    memory_config = config("tfds:tiny", 10, dir=str(stream_dir))
    memory = open_source(memory_config.data, "train")
    assert memory.kind == "pixels"
    # MoCo's crops: of TensorFlow's, only the distribution is the same.
    c.augment = memory_config.augment = section("augment", preset="moco_v1")
    streamed, expected = train(source, c, 12), train(memory, memory_config, 12)
    for batch in streamed:
        np.testing.assert_array_equal(batch["labels"], memory.labels[batch["ids"]])
    for epoch in (slice(6), slice(6, 12)):  # other views in each
        views = by_id(expected[epoch])
        for index, pair in by_id(streamed[epoch]).items():
            assert np.abs(pair.astype(int) - views[index]).max() <= 1
    order = [b["ids"].tolist() for b in streamed[:6]]
    assert order != [list(range(i, i + 10)) for i in range(0, 60, 10)]
    assert np.abs(np.diff(np.concatenate(order))).mean() > 10


def test_stream_resumes_inside_an_epoch(stream_dir, capfd):
    source, c = stream(stream_dir, 8)  # 7 steps an epoch
    whole = train(source, c, 16)
    same(train(source, c, 6, start_step=10), whole[10:])
    said = capfd.readouterr().err
    assert "inside epoch 1: read past 24 records" in said and "records/s" in said
    same(train(source, c, 2, start_step=14), whole[14:])


def test_what_a_resumed_stream_has_seen_is_not_decoded(stream_dir, monkeypatch):
    """Records read past may be garbage: only a parser would notice."""
    from common.data.feed import stream as module

    source, c = stream(stream_dir, 8)
    whole = train(source, c, 7)
    numbered = module.numbered

    def spoiled(shards, files_at_once):
        seen = set(np.concatenate([b["ids"] for b in whole[:3]]))

        def spoil(index, record):
            known = tf.reduce_any(index == tf.constant(sorted(seen), tf.int64))
            return index, tf.where(known, b"garbage", record)

        return numbered(shards, files_at_once).map(spoil)

    tf = module.tf
    monkeypatch.setattr(module, "numbered", spoiled)
    same(train(source, c, 4, start_step=3), whole[3:])
    with pytest.raises(UserError, match="cannot"):
        train(source, c, 1, start_step=2)


def test_a_damaged_stream_is_one_line(tmp_path):
    write_tfds(tmp_path)
    source, c = stream(tmp_path, 8)
    first = min(tmp_path.rglob("*train.tfrecord*"))
    first.write_bytes(first.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"cannot read tfds:tiny: .*prepare the set again"):
        train(source, c, 7)
    first.unlink()
    with pytest.raises(UserError, match="cannot read tfds:tiny"):
        train(source, c, 7)


def test_fake_views_have_the_size_of_the_views():
    c = config("fake", fake_examples=20)
    c.augment.size = 10
    batch = train(open_source(c.data, "train"), c, 1)[0]
    assert batch["images"].shape == (8, 2, 10, 10, 3)
    assert (batch["images"][:, 0] != batch["images"][:, 1]).any()


def test_a_file_name_need_not_be_utf8(tmp_path):
    for i in range(4):
        name = os.path.join(os.fsencode(tmp_path), b"caf\xe9 %d.png" % i)
        Image.fromarray(picture(i, 20, 24)).save(os.fsdecode(name), "PNG")
    c = config(f"folder:{tmp_path}", batch_size=4)
    source = open_source(c.data, "train")
    assert train(source, c, 1)[0]["images"].shape == (4, 2, 12, 12, 3)
    with open(source.paths[2], "wb") as file:
        file.write(b"torn")
    with pytest.raises(UserError, match=r"cannot decode .* 2.png"):
        train(source, c, 1)


def test_stream_with_another_process_count(stream_dir, caplog):
    source, c = stream(stream_dir, 8)
    whole = train(source, c, 16)
    same(train(source, c, 2, start_step=7, saved_readers=2), whole[7:9])  # at a boundary
    assert not caplog.text
    batches = pipeline.train_batches(
        source, FeedRecipe.of(c), rows=np.arange(8), start_step=10, saved_readers=2
    )
    assert batches.position == 14 and batches.readers == 1
    same(take(batches, 2), whole[14:16])
    assert "was read by 2 process(es) and is now read by 1 process(es)" in caplog.text
    assert "rest of epoch 1 (4 of 7 steps)" in caplog.text
    assert batches.position == 16
    # from memory to a stream and back: another order, so the rest of the epoch is left out
    for before, then, settings in ((0, source, c), (2, *in_memory(stream_dir))):
        caplog.clear()
        batches = pipeline.train_batches(
            then, FeedRecipe.of(settings), rows=np.arange(8), start_step=9, saved_readers=before
        )
        assert batches.position == 14 and "in memory" in caplog.text
    with pytest.raises(UserError, match="process 0 of 3 holds 8 rows of a batch of 8"):
        train(source, c, 1, process_count=3)


def test_stream_eval(stream_dir):
    source, _ = stream(stream_dir)
    memory = open_source(config("tfds:tiny", dir=str(stream_dir)).data, "train")
    parts = evaluate(source, 28, 8, np.split(np.arange(28), 4))  # 15 each, in batches of 7
    assert [len(p) for p in parts] == [3] * 4
    batches = [b for part in parts for b in part]
    real = np.concatenate([b["mask"] for b in batches])
    ids = np.concatenate([b["ids"] for b in batches])
    labels = np.concatenate([b["labels"] for b in batches])
    assert sorted(ids[real]) == list(range(60)) and (ids[~real] == -1).all()
    np.testing.assert_array_equal(labels[real], memory.labels[ids[real]])
    assert (labels[~real] == -1).all()
    expected = np.concatenate([b["images"] for b in evaluate(memory, 60, 8, [np.arange(60)])[0]])
    images = np.concatenate([b["images"] for b in batches])
    np.testing.assert_array_equal(images[real], expected[ids[real]])
    assert (images[~real] == 0).all()


@pytest.mark.parametrize("on_corrupt", ["error", "replace"])
def test_stream_corrupt(stream_dir, on_corrupt, monkeypatch, caplog):
    from common.data.images.tensorflow_host import tf
    from common.data.sources.tfrecords import records

    source, c = stream(stream_dir, 10, on_corrupt=on_corrupt)
    whole = train(source, c, 12)
    parse = source.features.parse

    def spoiled(record):
        image, label = parse(record)
        spoil = tf.strings.length(image) == len(images[17])
        return tf.where(spoil, b"no image", image), label

    images = [
        image
        for shard in source.shards
        for image in records(shard).map(lambda record: parse(record)[0]).as_numpy_iterator()
    ]
    bad = {i for i, image in enumerate(images) if len(image) == len(images[17])}
    monkeypatch.setattr(source.features, "parse", spoiled)
    if on_corrupt == "error":
        with pytest.raises(UserError, match=r"cannot decode example \d+ of tiny .train."):
            train(source, c, 6)
        return
    found = train(source, c, 12)
    assert set(source.replaced) == bad and "replaced" in caplog.text
    for ours, plain in zip(found, whole, strict=True):
        np.testing.assert_array_equal(ours["ids"], plain["ids"])
        good = ~np.isin(ours["ids"], list(bad))
        np.testing.assert_array_equal(ours["images"][good], plain["images"][good])
        for row in np.flatnonzero(~good):  # by the next good one, with that one's label
            stand_in = next(r for r in np.roll(np.arange(10), -row) if good[r])
            assert ours["labels"][row] == plain["labels"][stand_in]
    source.replaced.clear()
    same(train(source, c, 3, start_step=9), found[9:])
