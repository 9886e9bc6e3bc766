"""Augmentation in JAX as a whole: against the host's, on any number of devices, in pieces.

The single operations meet their oracles in `test_augment.py`, which runs them on both.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from test_augment import noise, quiet, recipe, run

from common.data import augment_device, draws, presets
from common.plan import collectives
from common.sharding import batch_sharding, make_mesh, to_global

STRONG = dict(solarise=0.3, rotate=0.3, grey=0.4)


def drawn(images, pair, seed=0, epoch=0):
    return draws.draw_pair(pair, seed, epoch, np.arange(len(images)), images.shape[1:3])[0]


def on_device(function, images, parameters, pair, devices=1):
    """Views uint8 [b, 2, s, s, 3], and the compiled program."""
    mesh = make_mesh(jax.devices()[:devices])
    made = functools.partial(augment_device.views, function, augmentations=pair, mesh=mesh)
    batch = to_global(mesh, {"images": images, "parameters": parameters})
    program = jax.jit(made, out_shardings=batch_sharding(mesh))
    compiled = program.lower(batch["images"], batch["parameters"]).compile()
    return np.asarray(compiled(batch["images"], batch["parameters"])), compiled


@pytest.mark.parametrize("preset", ["simclr", "moco_v2"])
def test_the_device_makes_the_views_of_the_host(preset):
    images, a = noise(24, 40, 36), recipe(preset, 32, solarise=0.3)
    found, _ = on_device(augment_device.augment_pixels, images, drawn(images, (a, a)), (a, a))
    want = run(images, a).astype(int)
    assert found.shape == (24, 2, 32, 32, 3) and found.dtype == np.uint8
    # Sums in another order: a level at a rounding edge; more where solarise or hue turns over.
    differing = np.abs(found - want)
    assert (differing > 0).mean() < 1e-3 and (differing > 1).mean() < 1e-4
    assert want.std() > 10


def test_devices_and_pieces_change_nothing(monkeypatch):
    """16 images on 1 device and on 8, at once and in pieces of 4; nothing is sent."""
    images, a = noise(16, 20, 20), recipe("simclr", 24, **STRONG)
    parameters = drawn(images, (a, a))
    function = augment_device.augment_pixels
    one, _ = on_device(function, images, parameters, (a, a))
    many, program = on_device(function, images, parameters, (a, a), 8)
    assert not collectives.read(program.as_text(), 8)
    monkeypatch.setattr(augment_device, "PIECE", 5 * 2 * 3 * 24**2)
    pieces, program = on_device(function, images, parameters, (a, a))
    assert "while" in program.as_text()
    for other in (many, pieces):
        np.testing.assert_array_equal(other, one)
    # before they are rounded to bytes
    exact = jax.jit(lambda x, p: function(x, p, (a, a)))
    parts = [exact(images[i : i + 2], parameters[i : i + 2]) for i in range(0, 16, 2)]
    np.testing.assert_allclose(np.concatenate(parts), exact(images, parameters), atol=1e-6)


def test_an_image_has_its_views_wherever_it_stands():
    """Keys are of the example, not of the row."""
    images, a = noise(8), recipe("cifar")
    place = np.array([3, 1, 7, 0, 2, 6, 5, 4])
    parameters, _ = draws.draw_pair((a, a), 0, 0, place, (32, 32))
    function = augment_device.augment_pixels
    found, _ = on_device(function, images[place], parameters, (a, a))
    want, _ = on_device(function, images, drawn(images, (a, a)), (a, a))
    np.testing.assert_array_equal(found, want[place])
    assert (want[:, 0] != want[:, 1]).any(axis=(1, 2, 3)).all()


def test_views_may_differ_and_colour_alone_leaves_the_crop():
    images, pair = noise(8), (recipe("cifar"), quiet())
    parameters = drawn(images, pair)
    found, _ = on_device(augment_device.augment_pixels, images, parameters, pair)
    np.testing.assert_array_equal(found[:, 1], images)
    assert (found[:, 0] != images).any(axis=(1, 2, 3)).all()
    # of views that are cropped already, the second part: nothing more for view 2
    views = np.stack([images, images[::-1]], axis=1)
    found, _ = on_device(augment_device.augment_colour, views, parameters, pair)
    np.testing.assert_array_equal(found[:, 1], images[::-1])


@pytest.mark.parametrize("preset", ["simclr", "moco_v2"])
def test_crop_on_the_host_and_colour_on_the_device(preset):
    """Nothing but the rounding of the crop lies between this and all on the host."""
    images, a = noise(24, 40, 36), recipe(preset, 32, antialias=True)
    parameters = drawn(images, (a, a))
    crop = presets.crop_only(a)
    assert crop == dataclasses.replace(a, jitter=0.0, grey=0.0, blur=0.0)
    cropped = run_pair(images, parameters, crop)
    found, _ = on_device(augment_device.augment_colour, cropped, parameters, (a, a))
    differing = np.abs(found.astype(int) - run(images, a))
    assert differing.mean() < 0.6 and np.quantile(differing, 0.999) <= 4
    # where nothing is lost by rounding, nothing differs
    whole = quiet(jitter=1.0, grey=0.5, blur=0.5, color_style=a.color_style)
    parameters = drawn(images := noise(24), (whole, whole))
    found, _ = on_device(
        augment_device.augment_colour, np.stack([images] * 2, 1), parameters, (whole, whole)
    )
    assert (np.abs(found.astype(int) - run(images, whole)) > 1).mean() < 1e-4


def run_pair(images, parameters, a):
    from common.data import augment_host as ah

    return ah.augment_pixels(ah.tf.constant(images), ah.tf.constant(parameters), (a, a)).numpy()
