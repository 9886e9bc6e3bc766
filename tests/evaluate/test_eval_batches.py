"""Crops and flips for training on labels, wherever the run augments its images."""

import io
import itertools
import sys

import jax
import numpy as np
import opened_run
import pytest
from PIL import Image
from test_resident import setting

from common.data.feed import pipeline, resident
from common.data.feed.recipe import FeedRecipe
from common.data.sources import embedded, subset
from common.data.sources.base import ArraySource
from common.data.sources.embedded import open_embedded
from common.evaluate import batches, finetune_mode, linear_mode
from common.sharding import batch_sharding, make_mesh
from common.train import summary

STEPS = 5  # of 8 images: over the end of an epoch
KEEP = np.arange(20) % 3 > 0


def run_of(augment_on, **changes):
    """The config of a run, and its images: more pixels than rounding edges."""
    c, source = setting(data__image_size=28, augment__flip=0.5, **changes)
    c.data.augment_on, c.steps_per_dispatch = augment_on, 3 if augment_on == "device" else 1
    return c, source


def of_files(n=20):
    """PNGs of two shapes."""
    rng, images = np.random.default_rng(0), np.empty(n, object)
    for i in range(n):
        file = io.BytesIO()
        pixels = rng.integers(0, 256, (24 + i % 2, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "PNG")
        images[i] = file.getvalue()
    return ArraySource(
        name="files", split="train", kind="encoded", num_examples=n, num_classes=n,
        class_names=(), labels=np.arange(n, dtype=np.int32), images=images,
    )  # fmt: skip


def made(c, source, devices=1, keep=None, seed=5):
    """Images [STEPS, 8, 28, 28, 3] and labels [STEPS, 8], and how the first ones are sharded."""
    mesh = make_mesh(jax.devices()[:devices])
    pairs = list(itertools.islice(batches.batches(source, c, mesh, 8, seed, keep), STEPS))
    for x in pairs[0]:
        assert x.sharding.is_equivalent_to(batch_sharding(mesh), x.ndim)
    images, labels = (np.stack(x) for x in zip(*jax.device_get(pairs), strict=True))
    assert images.dtype == np.uint8 and images.shape == (STEPS, 8, 28, 28, 3)
    assert labels.dtype == np.int32
    return images, labels


@pytest.mark.parametrize("part", ["all", "subset", "keep"])
@pytest.mark.parametrize("devices", [1, 8])
def test_the_device_makes_the_batches_of_the_host(devices, part):
    """Of the same examples in the same order, by the same draws."""
    found = {}
    for on in ("host", "device"):
        c, source = run_of(on)
        source.labels = np.arange(20, dtype=np.int32)  # which tell the examples
        if part == "subset":
            source = subset.select(source, np.arange(20)[::-2])
        found[on] = made(c, source, devices, KEEP if part == "keep" else None)
    np.testing.assert_array_equal(found["device"][1], found["host"][1])
    # Sums in another order, as in test_augment_device.py
    differing = np.abs(found["device"][0].astype(int) - found["host"][0])
    assert (differing > 0).mean() < 1e-3 and (differing > 1).mean() < 1e-4
    assert found["host"][0].std() > 10
    known = found["device"][1][found["device"][1] >= 0]
    want = {"all": range(20), "subset": range(1, 20, 2), "keep": np.flatnonzero(KEEP)}[part]
    assert set(known) <= set(want) and len(set(known)) > len(want) / 2


def test_views_whose_colours_the_device_makes_are_cropped_as_on_the_host():
    """With augment_on="both": the crops are the host's, byte for byte, and there is no more."""
    for source in (None, of_files()):
        found = []
        for on in ("host", "both"):
            c, pixels = run_of(on)
            found.append(made(c, source or pixels))
        for one, other in zip(*found, strict=True):
            np.testing.assert_array_equal(one, other)


def test_what_the_device_cannot_keep_is_cropped_on_the_host(monkeypatch):
    """Files, and pixels that do not fit."""
    c, pixels = run_of("device")
    monkeypatch.setattr(resident, "load", lambda *_: pytest.fail("on the device"))
    with monkeypatch.context() as patch:
        patch.setattr(resident, "obstacle", lambda *_: "too many")
        large = made(c, pixels)
    of_host = run_of("host")[0]
    for one, other in zip(large, made(of_host, pixels), strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(made(c, of_files()), made(of_host, of_files()), strict=True):
        np.testing.assert_array_equal(one, other)
    assert (c.data.augment_on, c.steps_per_dispatch) == ("device", 3)  # the run's own config


def test_pictures_of_files_for_a_run_on_images_in_device_memory():
    """`--mode=embed --eval.source=folder:...` draws pairs, all on the host."""
    found = [
        summary.some_pairs(FeedRecipe.of(run_of(on)[0]), of_files(), 6) for on in ("host", "device")
    ]
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture
def no_tensorflow(monkeypatch):
    """Other tests have imported it, so the modules that use it are made unavailable."""
    from common.data import augment, feed, images

    for room, name in ((feed, "feed"), (images, "tensorflow_host"), (augment, "on_host")):
        monkeypatch.delattr(room, name, raising=False)
        monkeypatch.setitem(sys.modules, f"{room.__name__}.{name}", None)
    for name in ("tensorflow", "tensorflow_datasets"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.slow
def test_labels_train_a_run_from_device_memory_without_tensorflow(
    tmp_path, no_tensorflow, monkeypatch
):
    """`test_main.py` does it in a process of its own."""
    inner = open_embedded

    def small(split):
        source = inner(split)
        source.images, source.labels, source.num_examples = (
            source.images[:48], source.labels[:48], 48,
        )  # fmt: skip
        return source

    monkeypatch.setattr(embedded, "open_embedded", small)
    run = opened_run.write(
        tmp_path / "run", data__source="embedded", data__augment_on="device", steps_per_dispatch=2
    )
    opened = opened_run.load(run, devices=2, linear__variant="augmented", linear__epochs=1)
    metrics, sentence = linear_mode.run(opened)
    assert metrics["variant"] == "augmented" and "crops and flips" in sentence
    assert metrics["num_train"] == 48 and 0 < metrics["num_held_out"] < 48
    metrics, _ = finetune_mode.run(opened)
    assert metrics["num_train"] == metrics["num_test"] == 48 and 0 <= metrics["top1"] <= 1
    with pytest.raises(ImportError):  # a run on the host could not
        recipe = FeedRecipe.of(run_of("host")[0])
        next(pipeline.train_batches(opened.open("train"), recipe, rows=np.arange(8)))
