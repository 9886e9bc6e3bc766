"""Augmentation in JAX as a whole: against the host's, on any number of devices, in pieces.

The single operations meet their oracles in `test_augment.py`, which runs them on both.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny
from test_augment import noise, quiet, recipe, run

from common.data.augment import draws, presets
from common.data.augment import on_device as module
from common.data.augment import on_host as ah
from common.data.feed import pipeline
from common.data.feed.recipe import FeedRecipe
from common.data.order import order
from common.data.sources.base import ArraySource
from common.plan import collectives
from common.sharding import batch_sharding, make_mesh, to_global
from common.train import dispatch

tf = ah.tf


def drawn(images, pair, seed=0, epoch=0):
    return draws.draw_views(pair, seed, epoch, np.arange(len(images)), images.shape[1:3])[0]


@functools.cache
def program(function, pair, devices=1):
    """The jitted views of `function`, and the mesh."""
    mesh = make_mesh(jax.devices()[:devices])
    made = functools.partial(module.views, function, augmentations=pair, mesh=mesh)
    return jax.jit(made, out_shardings=batch_sharding(mesh)), mesh


def on_device(function, images, parameters, pair, devices=1):
    """Views uint8 [b, 2, s, s, 3]."""
    views, mesh = program(function, pair, devices)
    return np.asarray(views(*to_global(mesh, (images, parameters))))


@pytest.mark.parametrize("preset", ["simclr", "moco_v2"])
def test_the_device_makes_the_views_of_the_host(preset):
    images, a = noise(24, 40, 36), recipe(preset, 32, solarise=0.3)
    found = on_device(module.augment_pixels, images, drawn(images, (a, a)), (a, a))
    want = run(images, a).astype(int)
    assert found.shape == (24, 2, 32, 32, 3) and found.dtype == np.uint8
    # Sums in another order: a level at a rounding edge; more where solarise or hue turns over.
    differing = np.abs(found - want)
    assert (differing > 0).mean() < 1e-3 and (differing > 1).mean() < 1e-4
    assert want.std() > 10


@pytest.mark.optimised
def test_devices_and_pieces_change_nothing(monkeypatch):
    """16 images on 1 device and on 8, at once and in pieces of 4; nothing is sent.

    Before they are rounded to bytes, in which a rounding edge would hide or exaggerate.
    """
    images, a = noise(16, 20, 20), recipe("simclr", 24, solarise=0.3)
    parameters, function = drawn(images, (a, a)), module.augment_pixels
    monkeypatch.setattr(module, "to_bytes", lambda x: x)
    made = []
    for devices, piece in ((1, 2**27), (8, 2**27), (1, 5 * 2 * 3 * 24**2)):
        monkeypatch.setattr(module, "PIECE", piece)
        program.cache_clear()
        views, mesh = program(function, (a, a), devices)
        rows = to_global(mesh, (images, parameters))
        compiled = views.lower(*rows).compile()
        made.append(np.asarray(compiled(*rows)))
        assert not collectives.read(compiled.as_text(), devices)
        assert (" while(" in compiled.as_text()) == (piece < 2**27)
    program.cache_clear()
    assert made[0].dtype == np.float32 and 0 <= made[0].min() and made[0].max() <= 1
    for other in made[1:]:
        np.testing.assert_allclose(other, made[0], rtol=0, atol=1e-6)


def test_an_image_has_its_views_wherever_it_stands():
    """Keys are of the example, not of the row."""
    images, a = noise(24, 40, 36), recipe("moco_v2", 32, solarise=0.3)
    place = np.random.default_rng(0).permutation(24)
    parameters, _ = draws.draw_views((a, a), 0, 0, place, (40, 36))
    function = module.augment_pixels
    found = on_device(function, images[place], parameters, (a, a))
    want = on_device(function, images, drawn(images, (a, a)), (a, a))
    np.testing.assert_array_equal(found, want[place])
    assert (want[:, 0] != want[:, 1]).any(axis=(1, 2, 3)).all()


def test_views_may_differ_and_colour_alone_leaves_the_crop():
    images, pair = noise(8), (recipe("cifar"), quiet())
    parameters = drawn(images, pair)
    found = on_device(module.augment_pixels, images, parameters, pair)
    np.testing.assert_array_equal(found[:, 1], images)
    assert (found[:, 0] != images).any(axis=(1, 2, 3)).all()
    # of views that are cropped already, the second part: nothing more for view 2
    views = np.stack([images, images[::-1]], axis=1)
    found = on_device(module.augment_colour, views, parameters, pair)
    np.testing.assert_array_equal(found[:, 1], images[::-1])


def test_crop_on_the_host_and_colour_on_the_device():
    """Nothing but the rounding of the crop lies between this and all on the host."""
    images, a = noise(24, 40, 36), recipe("moco_v2", 32)
    parameters, crop = drawn(images, (a, a)), presets.crop_only(a)
    assert crop == dataclasses.replace(a, jitter=0.0, grey=0.0, blur=0.0)
    cropped = ah.augment_pixels(tf.constant(images), tf.constant(parameters), (crop, crop))
    found = on_device(module.augment_colour, cropped.numpy(), parameters, (a, a))
    differing = np.abs(found.astype(int) - run(images, a))
    assert differing.mean() < 0.6 and np.quantile(differing, 0.999) <= 4


def test_colour_alone_where_the_crop_needs_no_rounding():
    images, a = noise(24), quiet(jitter=1.0, grey=0.5, blur=0.5)
    views = np.stack([images, images], axis=1)
    found = on_device(module.augment_colour, views, drawn(images, (a, a)), (a, a))
    assert (np.abs(found.astype(int) - run(images, a)) > 1).mean() < 1e-4


@pytest.mark.parametrize(("augment_on", "least"), [("device", 0.3), ("both", 1.0), ("host", 0.3)])
def test_views_to_look_at_are_those_of_the_first_batch(augment_on, least):
    """On the host: what it makes of the same examples. (Crops of whole images need no rounding.)"""
    changes = {"area_min": least, "ratio_min": 1.0, "ratio_max": 1.0, "flip": 0.5, "grey": 0.5}
    c = tiny.config(
        "simclr", batch_size=8, data__image_size=32, data__augment_on=augment_on, seed=3,
        augment__preset="cifar", **{f"augment__{name}": value for name, value in changes.items()},
    )  # fmt: skip
    images = noise(20)
    source = ArraySource(
        name="noise", split="train", kind="pixels", num_examples=20, num_classes=0, class_names=(),
        labels=np.full(20, -1, np.int32), image_shape=(32, 32), images=images,
    )  # fmt: skip
    batches = pipeline.train_batches(source, FeedRecipe.of(c), rows=np.arange(8))
    ids, views = dispatch.first_views(FeedRecipe.of(c), source, batches)
    np.testing.assert_array_equal(ids, order(3, 0, 20)[:8])
    want = run(images[ids], FeedRecipe.of(c).views[0], ids, seed=3).astype(int)
    assert views.shape == want.shape and views.dtype == np.uint8
    assert (np.abs(views - want) > 1).mean() < 1e-3
    assert (np.abs(views - images[ids][:, None].astype(int)) > 8).mean() > 0.3
