"""Augmentation: each operation against PIL, NumPy or TensorFlow's own, and the distributions."""

import colorsys
import dataclasses
import functools
import io

import jax
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage, stats

from common.config import section
from common.data.augment import device_ops, draws, on_device, pixel_ops, presets, resize
from common.data.augment import on_host as ah
from common.data.augment.colour import jitter_steps
from common.errors import UserError

tf = ah.tf
IDS = np.arange(20_000)


def recipe(preset="simclr", size=32, **fields):
    return dataclasses.replace(presets.resolve(section("augment", preset=preset), size), **fields)


def noise(n=6, height=32, width=32, seed=0):
    """uint8 [n, h, w, 3], smooth enough to look like photographs."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (n, height, width, 3)).astype(np.float64)
    smooth = ndimage.gaussian_filter(pixels, (0, 1, 1, 0))
    low, high = smooth.min(), smooth.max()
    return ((smooth - low) / (high - low) * 255).astype(np.uint8)


def planes(images):
    """uint8 [n, h, w, 3] -> float32 [n, 3, h, w] in [0, 1]."""
    return np.moveaxis(images, 3, 1).astype(np.float32) / 255


MODULES = {"host": pixel_ops, "device": device_ops}


class Ops:
    """The image operations of the host or of the device, on NumPy arrays."""

    def __init__(self, on):
        self.on = on

    def __getattr__(self, name):
        def call(*arguments):
            arrays = [x for x in arguments if isinstance(x, np.ndarray)]
            rest = tuple(None if isinstance(x, np.ndarray) else x for x in arguments)
            return np.asarray(compiled(self.on, name, rest)(*arrays))

        return call


@functools.cache
def compiled(on, name, arguments):
    """An operation of the arrays that stand in for the Nones among its arguments."""
    function = getattr(MODULES[on], name)

    def call(*arrays):
        left = iter(arrays)
        return function(*(next(left) if x is None else x for x in arguments))

    return jax.jit(call) if on == "device" else lambda *x: call(*map(tf.constant, x))


@functools.cache  # for `compiled`, which knows them by their identity
def steps_of(a, on):
    return jitter_steps(a, MODULES[on])


@pytest.fixture(params=["host", "device"])
def ops(request):
    return Ops(request.param)


def pixels(x):
    """The way back, as floats in [0, 255]."""
    return np.moveaxis(np.asarray(x), 1, 3) * 255


# ---------------------------------------------------------------- presets


def test_presets_have_the_published_values():
    simclr, v1, v2 = recipe("simclr", 224), recipe("moco_v1", 224), recipe("moco_v2", 224)
    cifar = recipe("cifar")

    def colour(a):
        return (a.jitter, a.brightness, a.contrast, a.saturation, a.hue, a.grey)

    assert colour(simclr) == (0.8, 0.8, 0.8, 0.8, 0.2, 0.2)
    assert colour(cifar) == (0.8, 0.4, 0.4, 0.4, 0.1, 0.2)
    assert colour(v1) == (1.0, 0.4, 0.4, 0.4, 0.4, 0.2)
    assert colour(v2) == (0.8, 0.4, 0.4, 0.4, 0.1, 0.2)
    for a, area in ((simclr, 0.08), (cifar, 0.08), (v1, 0.2), (v2, 0.2)):
        assert (a.area_min, a.area_max) == (area, 1.0)
        assert (a.ratio_min, a.ratio_max) == (3 / 4, 4 / 3) and a.flip == 0.5
        assert a.solarise == a.rotate == 0
    assert [a.blur for a in (simclr, cifar, v1, v2)] == [0.5, 0, 0, 0.5]
    assert (simclr.sigma_min, simclr.sigma_max, v2.sigma_min, v2.sigma_max) == (0.1, 2, 0.1, 2)
    assert [a.grey_first for a in (simclr, cifar, v1, v2)] == [False, False, True, False]
    assert [a.crop for a in (simclr, cifar, v1, v2)] == ["tf", "tf", "torch", "torch"]
    assert [a.color_style for a in (simclr, cifar, v1, v2)] == ["tf", "tf", "pil", "pil"]
    assert {a.brightness_style for a in (simclr, cifar, v1, v2)} == {"multiply"}
    assert {a.solarise_threshold for a in (simclr, cifar, v1, v2)} == {0.5}
    for a in (simclr, cifar):
        assert (a.interpolation, a.antialias, a.kernel) == ("bicubic", False, "tf")
        assert (a.mean, a.std) == ((0, 0, 0), (1, 1, 1))
    for a in (v1, v2):
        assert (a.interpolation, a.antialias, a.kernel) == ("bilinear", True, "pil")
        assert (a.mean, a.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_overrides_and_strength():
    config = section("augment")
    config.strength, config.hue, config.blur, config.size = 0.5, 0.3, 0.0, 20
    config.mean = (0.1, 0.2, 0.3)
    a = presets.resolve(config, 32)
    assert (a.brightness, a.contrast, a.saturation, a.hue) == (0.4, 0.4, 0.4, 0.3)
    assert (a.blur, a.size, a.grey, a.mean) == (0.0, 20, 0.2, (0.1, 0.2, 0.3))
    with pytest.raises(TypeError):
        config.flip = "often"
    config.lock()
    with pytest.raises(AttributeError, match="brightness"):
        config.brightnes = 0.1


def test_second_view_falls_back_to_the_first():
    from ml_collections import ConfigDict

    config = ConfigDict({"augment": section("augment", preset="cifar")})
    config.augment_view2 = section("augment_view2")
    config.augment.grey = 0.1

    def views():
        return presets.resolve_views(config.augment, config.augment_view2, 32)

    first, second = views()
    assert first == second and first.grey == 0.1
    config.augment_view2.solarise = 0.2
    first, second = views()
    assert second == dataclasses.replace(first, solarise=0.2) and first.solarise == 0
    config.augment_view2.preset = "moco_v2"
    assert views()[1].crop == "torch"
    # one network sees both views, so they share what it subtracts and divides by
    assert views()[1].mean == first.mean == (0, 0, 0)
    config.augment_view2.std = (0.2, 0.2, 0.2)
    with pytest.raises(UserError, match=r"augment_view2.std .*both views. Set augment.std"):
        views()
    config.augment_view2.std = None
    config.augment_view2.size = 16
    with pytest.raises(UserError, match="sizes 32 and 16"):
        views()


def test_bad_presets_and_ranges():
    with pytest.raises(UserError, match=r"'simlcr'.*moco_v2.*Did you mean 'simclr'"):
        recipe("simlcr")
    bad = dict(
        flip=1.1, jitter=-0.1, area_min=0.0, area_max=1.2, ratio_min=0.0, ratio_max=0.5, hue=0.6,
        sigma_min=0.0, sigma_max=0.05, size=0, crop="tv", interpolation="area", std=(1.0, 1.0, 0.0),
        mean=(1.0,), rotate_degrees=200.0, solarise_threshold=2.0, brightness=-1.0, kernel="cv",
    )  # fmt: skip
    for field, value in bad.items():
        config = section("augment")
        config[field] = value
        with pytest.raises(UserError, match=rf"augment\.{field}=.* is not allowed; expected "):
            presets.resolve(config, 32)
    config = section("augment")
    config.strength = -1.0
    with pytest.raises(UserError, match=r"augment.strength is -1.0; expected a number"):
        presets.resolve(config, 32)
    with pytest.raises(UserError, match=r"unknown field augment.flips.*'flip'"):
        presets.resolve({"preset": "simclr", "flips": 0.5}, 32)


# ---------------------------------------------------------------- crop and resize

BOXES = [
    [0, 0, 32, 40], [3, 5, 20, 11], [10, 1, 7, 30], [1, 2, 31, 38], [30, 38, 2, 2], [4, 4, 24, 24],
]  # fmt: skip


def crop_resize(ops, images, a, flips=None):
    flips = np.zeros(len(images)) if flips is None else flips
    boxes, flips = np.array(BOXES, np.float32), np.array(flips, np.float32)
    return pixels(ops.crop_resize(planes(images), boxes, flips, a))


@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
@pytest.mark.parametrize("antialias", [False, True])
def test_crop_resize_equals_tensorflow(ops, kind, antialias):
    images = noise(6, 32, 40)
    found = crop_resize(ops, images, recipe(size=24, interpolation=kind, antialias=antialias))
    for image, (y, x, h, w), ours in zip(images, BOXES, found, strict=True):
        crop = image[y : y + h, x : x + w].astype(np.float32)
        expected = tf.image.resize(crop, [24, 24], method=kind, antialias=antialias).numpy()
        # TensorFlow looks the bicubic kernel up in a table of 1024 entries.
        assert np.abs(ours - expected).max() < (0.6 if kind == "bicubic" else 0.01)


@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
def test_crop_resize_equals_pil(ops, kind):
    images = noise(6, 32, 40)
    found = crop_resize(ops, images, recipe(size=24, interpolation=kind, antialias=True))
    method = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}[kind]
    for image, (y, x, h, w), ours in zip(images, BOXES, found, strict=True):
        crop = Image.fromarray(image[y : y + h, x : x + w])
        expected = np.asarray(crop.resize((24, 24), method), np.float64)
        assert np.abs(np.clip(ours, 0, 255) - expected).max() < 1.1  # PIL rounds twice


def test_flip_is_left_right(ops):
    a, images = recipe(size=24), noise(6, 32, 40)
    plain = crop_resize(ops, images, a)
    flipped = crop_resize(ops, images, a, [1, 0, 1, 0, 1, 1])
    np.testing.assert_allclose(flipped[[1, 3]], plain[[1, 3]], atol=1e-3)
    np.testing.assert_allclose(flipped[[0, 2, 4, 5]], plain[[0, 2, 4, 5]][:, :, ::-1], atol=1e-3)


# ---------------------------------------------------------------- colour

FACTORS = np.array([0.2, 0.6, 1.0, 1.3, 1.8, 0.0], np.float32)


def per_image(op, x):
    return np.stack([op(image, f) for image, f in zip(x, FACTORS, strict=True)])


def test_tensorflow_style_colour(ops):
    images = noise()
    x, nhwc = planes(images), images.astype(np.float32) / 255
    cases = {
        ops.adjust_contrast: tf.image.adjust_contrast,
        ops.adjust_saturation: tf.image.adjust_saturation,
    }
    for ours, theirs in cases.items():
        expected = per_image(lambda i, f, op=theirs: np.clip(op(i, f), 0, 1), nhwc) * 255
        np.testing.assert_allclose(pixels(ours(x, FACTORS, "tf")), expected, atol=0.01)
    bright = np.clip(nhwc * FACTORS[:, None, None, None], 0, 1) * 255
    found = ops.adjust_brightness(x, FACTORS, "multiply")
    np.testing.assert_allclose(pixels(found), bright, atol=0.01)
    shifted = np.clip(nhwc + FACTORS[:, None, None, None] - 0.8, 0, 1) * 255
    found = ops.adjust_brightness(x, FACTORS - 0.8, "add")
    np.testing.assert_allclose(pixels(found), shifted, atol=0.01)
    grey = tf.image.rgb_to_grayscale(nhwc).numpy() * 255
    np.testing.assert_allclose(pixels(ops.greyscale(x, "tf")), grey, atol=0.02)


def test_pil_style_colour(ops):
    images = noise()
    x = planes(images)
    cases = {
        ops.adjust_brightness: (ImageEnhance.Brightness, "multiply"),
        ops.adjust_contrast: (ImageEnhance.Contrast, "pil"),
        ops.adjust_saturation: (ImageEnhance.Color, "pil"),
    }
    for ours, (theirs, style) in cases.items():
        expected = per_image(
            lambda i, f, op=theirs: np.asarray(op(Image.fromarray(i)).enhance(float(f))), images
        )
        found = pixels(ours(x, FACTORS, style))
        assert np.abs(found - expected).max() < 2.01  # PIL works on whole numbers
        assert np.abs(found - expected).mean() < 0.7
    grey = np.stack([np.asarray(Image.fromarray(i).convert("L")) for i in images])
    assert np.abs(pixels(ops.greyscale(x, "pil"))[..., 0] - grey).max() < 1.01


def test_hue(ops):
    images = noise(6, 6, 6)
    images[0, 0] = [[0, 0, 0], [255, 255, 255], [9, 9, 9], [255, 0, 0], [0, 255, 0], [0, 0, 255]]
    shifts = np.array([-0.5, -0.2, 0.0, 0.1, 0.37, 0.5], np.float32)
    found = pixels(ops.adjust_hue(planes(images), shifts))
    for image, shift, ours in zip(images, shifts, found, strict=True):
        for pixel, value in zip(image.reshape(-1, 3) / 255, ours.reshape(-1, 3), strict=True):
            h, s, v = colorsys.rgb_to_hsv(*pixel)
            expected = np.array(colorsys.hsv_to_rgb((h + shift) % 1.0, s, v)) * 255
            np.testing.assert_allclose(value, expected, atol=0.01)


@pytest.mark.parametrize("style", ["tf", "pil"])
def test_jitter_follows_each_images_own_order(ops, style):
    a = recipe(color_style=style)
    images = noise(5)
    orders = np.array([[0, 1, 2, 3], [3, 2, 1, 0], [4, 4, 4, 4], [1, 3, 0, 2], [2, 0, 3, 1]])
    rng = np.random.default_rng(1)
    factors = rng.uniform(0.3, 1.7, (5, 4)).astype(np.float32)
    factors[:, 3] = rng.uniform(-0.2, 0.2, 5)
    x = planes(images)
    found = ops.jitter(x, orders, factors, steps_of(a, ops.on))
    steps = (
        lambda v, f: ops.adjust_brightness(v, f, "multiply"),
        lambda v, f: ops.adjust_contrast(v, f, style),
        lambda v, f: ops.adjust_saturation(v, f, style),
        ops.adjust_hue,
        lambda v, f: v,
    )
    for i in range(5):
        value = x[i : i + 1]
        for op in orders[i]:
            value = steps[op](value, factors[i : i + 1, min(op, 3)])
            assert 0 <= value.min() and value.max() <= 1
        np.testing.assert_allclose(found[i], value[0], atol=1e-6)
    other = ops.jitter(x, orders[[1, 1, 2, 3, 4]], factors, steps_of(a, ops.on))
    assert np.abs(found[0] - other[0]).max() > 0.02


# ---------------------------------------------------------------- blur, solarise, rotate, grey


def test_blur_as_simclr(ops):
    """Kernel of size // 10 taps made odd, zeros outside: three taps at 32 pixels."""
    images, sigma = noise(4), np.array([0.1, 0.7, 0.0, 2.0], np.float32)
    found = pixels(ops.blur(planes(images), sigma, recipe()))
    for image, s, ours in zip(images, sigma, found, strict=True):
        taps = np.exp(-(np.arange(-1, 2) ** 2) / (2 * max(s, 1e-3) ** 2))
        expected = image.astype(np.float64)
        for axis in (0, 1):
            expected = ndimage.convolve1d(expected, taps / taps.sum(), axis, mode="constant")
        np.testing.assert_allclose(ours, expected, atol=0.01)
    one_tap = ops.blur(planes(images), sigma, recipe(size=19))
    np.testing.assert_array_equal(one_tap, planes(images))


def test_blur_as_pil(ops):
    images, sigma = noise(4), np.array([0.3, 0.7, 1.5, 2.0], np.float32)
    found = pixels(ops.blur(planes(images), sigma, recipe("moco_v2")))
    for image, s, ours in zip(images, sigma, found, strict=True):
        expected = ndimage.gaussian_filter(
            image.astype(np.float64), (s, s, 0), mode="nearest", truncate=8
        )
        np.testing.assert_allclose(ours, expected, atol=0.1)


def quiet(size=32, **fields):
    """A recipe in which nothing happens but `fields`."""
    off = dict(flip=0.0, jitter=0.0, grey=0.0, blur=0.0, area_min=1.0, ratio_min=1.0, ratio_max=1.0)
    return recipe(size=size, **(off | fields))


def run(images, a, ids=None, epoch=0, seed=0, on="host"):
    ids = np.arange(len(images)) if ids is None else ids
    parameters, _ = draws.draw_views((a, a), seed, epoch, ids, images.shape[1:3])
    if on == "device":
        made = jax.jit(lambda x, p: on_device.augment_pixels(x, p, (a, a)))
        return np.asarray(on_device.to_bytes(made(images, parameters)))
    return ah.augment_pixels(tf.constant(images), tf.constant(parameters), (a, a)).numpy()


def test_nothing_on_is_the_identity(ops):
    images = noise()
    np.testing.assert_array_equal(run(images, quiet(), on=ops.on)[:, 0], images)
    np.testing.assert_array_equal(run(images, quiet(color_style="pil"), on=ops.on)[:, 1], images)


def test_solarise_and_grey(ops):
    images = noise()
    found = run(images, quiet(solarise=1.0, solarise_threshold=128 / 255), on=ops.on)
    for image, ours in zip(images, found[:, 0], strict=True):
        expected = np.asarray(ImageOps.solarize(Image.fromarray(image), 128))
        np.testing.assert_array_equal(ours, expected)
    found = run(images, quiet(grey=1.0, color_style="pil"), on=ops.on)
    for image, ours in zip(images, found[:, 0], strict=True):
        expected = np.asarray(Image.fromarray(image).convert("L").convert("RGB"), np.int64)
        assert np.abs(ours - expected).max() <= 1
    # Grey first, then jitter: a grey image stays grey whatever the jitter does.
    both = run(images, quiet(grey=1.0, grey_first=True, jitter=1.0), on=ops.on)
    assert (both.max(-1) - both.min(-1)).max() <= 1
    assert np.abs(both[:, 0].astype(int) - both[:, 1]).max() > 20


ORDERS = [("host", p, first) for p in ("simclr", "moco_v2") for first in (False, True)]


@pytest.mark.parametrize(
    ("ops", "preset", "grey_first"),
    [*ORDERS, ("device", "simclr", True), ("device", "moco_v2", False)],
    indirect=["ops"],
)
def test_operations_come_in_the_documented_order(ops, preset, grey_first):
    """Crop, rotate, jitter and grey (or the other way round), clip, blur, solarise, round."""
    on = dict(rotate=1.0, jitter=1.0, grey=1.0, blur=1.0, solarise=1.0)
    images, a = noise(8, 48, 40), recipe(preset, grey_first=grey_first, **on)
    parameters, _ = draws.draw_views((a, a), 3, 0, np.arange(8), (48, 40))
    p = parameters[:, 0]
    x = ops.crop_resize(planes(images), p[:, draws.BOX], p[:, draws.FLIP], a)
    if preset == "moco_v2":  # as PIL, which holds bytes
        x = np.clip(x, 0, 1)
    x = ops.rotate(x, p[:, draws.ANGLE])
    steps = [
        lambda x: ops.jitter(x, p[:, draws.ORDER], p[:, draws.FACTORS], steps_of(a, ops.on)),
        lambda x: np.broadcast_to(ops.greyscale(x, a.color_style), x.shape),
    ]
    for step in reversed(steps) if grey_first else steps:
        x = step(x)
    x = ops.blur(np.clip(x, 0, 1), p[:, draws.SIGMA], a)
    x = np.where(x >= 0.5, 1 - x, x)
    want = np.clip(pixels(x), 0, 255)
    found = run(images, a, seed=3, on=ops.on)[:, 0]
    assert np.mean(np.abs(found - want) > 1) < 1e-3  # a value at the threshold may turn
    assert want.std() > 10


def test_rotate(ops):
    images = noise()
    quarter = np.full(6, np.pi / 2, np.float32)
    expected = np.rot90(images, axes=(1, 2))
    np.testing.assert_allclose(pixels(ops.rotate(planes(images), quarter)), expected, atol=0.05)
    angle = np.full(6, np.deg2rad(20), np.float32)
    found = pixels(ops.rotate(planes(images), angle))
    for image, ours in zip(images, found, strict=True):
        theirs = np.asarray(Image.fromarray(image).rotate(20, Image.BILINEAR), np.float64)
        assert np.abs(ours - theirs)[6:-6, 6:-6].max() < 1.5
    assert (found[:, 0, 0] == 0).all()
    a = quiet(rotate=0.5, rotate_degrees=30.0)
    angles = np.rad2deg(draws.view_parameters(a, 0, 0, IDS, 0)[:, draws.ANGLE])
    share(angles != 0, 0.5)
    assert stats.kstest(angles[angles != 0], stats.uniform(-30, 60).cdf).pvalue > 1e-3


# ---------------------------------------------------------------- distributions


def share(events, probability):
    """The events' frequency lies within 4 standard deviations of the probability."""
    n = len(events)
    spread = np.sqrt(n * probability * (1 - probability))
    assert abs(np.sum(events) - n * probability) <= 4 * spread, (np.mean(events), probability)


def test_probabilities_and_strengths():
    for view in (0, 1):
        a = recipe("simclr", 224, solarise=0.3)
        p = draws.view_parameters(a, 3, 1, IDS, view)
        jittered = p[:, draws.ORDER][:, 0] < 4
        share(p[:, draws.FLIP], 0.5)
        share(jittered, 0.8)
        share(p[:, draws.GREY], 0.2)
        share(p[:, draws.SIGMA] > 0, 0.5)
        share(p[:, draws.SOLARISE], 0.3)
        sigma = p[:, draws.SIGMA][p[:, draws.SIGMA] > 0]
        ranges = [(0.2, 1.8)] * 3 + [(-0.2, 0.2)]
        samples = [*p[:, draws.FACTORS].T, sigma]
        for values, (low, high) in zip(samples, [*ranges, (0.1, 2.0)], strict=True):
            assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 1e-3
        orders = p[jittered][:, draws.ORDER] @ [64, 16, 4, 1]
        counts = np.unique(orders, return_counts=True)[1]
        assert len(counts) == 24 and stats.chisquare(counts).pvalue > 1e-3
        # "Whether" and "how much" are drawn apart, and so are all the others.
        columns = np.stack([p[:, draws.FLIP], jittered, *p[:, draws.FACTORS].T, p[:, draws.GREY],
                            p[:, draws.SIGMA] > 0, p[:, draws.SOLARISE]])  # fmt: skip
        correlation = np.corrcoef(columns) - np.eye(len(columns))
        assert np.abs(correlation).max() < 4.5 / np.sqrt(len(IDS))
        within = np.corrcoef(p[p[:, draws.SIGMA] > 0][:, [draws.SIGMA, 10, 11]].T) - np.eye(3)
        assert np.abs(within).max() < 0.05
    nothing = draws.view_parameters(quiet(), 0, 0, IDS, 0)
    assert (nothing[:, draws.ORDER] == 4).all() and (nothing[:, draws.FLIP] == 0).all()
    add = draws.view_parameters(recipe(brightness_style="add"), 0, 0, IDS, 0)
    assert stats.kstest(add[:, 10], stats.uniform(-0.8, 1.6).cdf).pvalue > 1e-3
    strong = draws.view_parameters(recipe(contrast=1.5), 0, 0, IDS, 0)
    assert stats.kstest(strong[:, 11], stats.uniform(0, 2.5).cdf).pvalue > 1e-3


def kernel_boxes(a, height, width, n):
    """TensorFlow's own sampler."""

    def box(seed):
        begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
            [height, width, 3], tf.constant([[[0.0, 0.0, 1.0, 1.0]]]), seed, 0.1,
            (a.ratio_min, a.ratio_max), (a.area_min, a.area_max), 100)  # fmt: skip
        return tf.concat([begin[:2], size[:2]], 0)

    seeds = tf.stack([tf.range(n), tf.range(n) * 7 + 1], axis=1)
    return tf.function(lambda s: tf.map_fn(box, s, fn_output_signature=tf.int32))(seeds).numpy()


def torch_boxes(a, height, width, n):
    """`RandomResizedCrop` as torchvision's documentation describes it, one try after another."""
    rng = np.random.default_rng(5)
    boxes = []
    for _ in range(n):
        for _ in range(10):
            area = height * width * rng.uniform(a.area_min, a.area_max)
            ratio = np.exp(rng.uniform(np.log(a.ratio_min), np.log(a.ratio_max)))
            w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                y, x = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
                break
        else:
            if width / height < a.ratio_min:
                w, h = width, round(width / a.ratio_min)
            elif width / height > a.ratio_max:
                w, h = round(height * a.ratio_max), height
            else:
                w, h = width, height
            y, x = (height - h) // 2, (width - w) // 2
        boxes.append((y, x, h, w))
    return np.array(boxes)


def same_distribution(found, expected, height, width):
    """Area, ratio and place of two samples of boxes, by the Kolmogorov-Smirnov test."""
    for boxes in (found, expected):
        assert (boxes >= 0).all() and (boxes[:, 2:] >= 1).all()
        assert (boxes[:, :2] + boxes[:, 2:] <= [height, width]).all()

    def views(b):
        yield from (b[:, 2] * b[:, 3], b[:, 3] / b[:, 2], b[:, 0], b[:, 1], b[:, 2], b[:, 3])
        yield (b[:, 0] + 0.5) / (height - b[:, 2] + 1)

    for ours, theirs in zip(views(found), views(expected), strict=True):
        assert stats.ks_2samp(ours, theirs).pvalue > 1e-3


@pytest.mark.parametrize("height, width", [(32, 32), (60, 110)])
@pytest.mark.parametrize("area_min", [0.08, 0.6])
def test_tf_crop_distribution(height, width, area_min):
    a = recipe("simclr", area_min=area_min)
    found = draws.crop_boxes(a, height, width, 0, 0, IDS[:6000], 0)
    same_distribution(found, kernel_boxes(a, height, width, 6000), height, width)
    if area_min == 0.08:  # the published behaviour: the object covered is at least 10 %
        assert 0.099 < (found[:, 2] * found[:, 3]).min() / (height * width) < 0.13


@pytest.mark.parametrize("height, width", [(32, 32), (60, 110), (20, 200)])
def test_torch_crop_distribution(height, width):
    a = recipe("moco_v2")
    expected = torch_boxes(a, height, width, 6000)
    found = draws.crop_boxes(a, height, width, 0, 0, IDS[:6000], 1)
    same_distribution(found, expected, height, width)
    # The same draws in TensorFlow, for images whose size is known late, give the same boxes.
    u = draws.crop_draws(0, 0, IDS[:500], 1)
    box = tf.function(lambda v: ah.draw_box(a, tf.constant(height), tf.constant(width), v))
    late = np.stack([box(row) for row in u])
    assert np.mean((late == found[:500]).all(axis=1)) > 0.99  # float32 rounds now and then


# ---------------------------------------------------------------- keys


def test_uniforms_are_uniform_and_keyed():
    u = draws.uniforms(0, 0, IDS, 0, 0, 8)
    assert u.dtype == np.float32 and 0 <= u.min() and u.max() < 1
    assert stats.kstest(u.ravel(), "uniform").pvalue > 1e-3
    assert stats.chisquare(np.histogram2d(u[:, 0], u[:, 1], bins=16)[0].ravel()).pvalue > 1e-3
    for other in (
        draws.uniforms(1, 0, IDS, 0, 0, 8), draws.uniforms(0, 1, IDS, 0, 0, 8),
        draws.uniforms(0, 0, IDS, 1, 0, 8), draws.uniforms(0, 0, IDS + 1, 0, 0, 8),
        draws.uniforms(0, 0, IDS, 0, 1, 8),
    ):  # fmt: skip
        assert abs(np.corrcoef(u.ravel(), other.ravel())[0, 1]) < 4 / np.sqrt(u.size)
    np.testing.assert_array_equal(draws.uniforms(0, 0, IDS[5:9], 0, 2, 3), u[5:9, 2:5])


def test_draws_are_pinned():
    """Literal numbers, and SplitMix64 in plain integers: a change here changes every run."""
    u = draws.uniforms(7, 3, np.array([0, 41]), 1, 0, 3)
    pinned = [[3616793, 7019710, 11227476], [16724025, 15411231, 15682550]]
    np.testing.assert_array_equal((u * 2**24).astype(int), pinned)
    golden, full = 0x9E3779B97F4A7C15, 2**64 - 1

    def mix(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & full
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & full
        return x ^ (x >> 31)

    for row, index in enumerate((0, 41)):
        key = 0
        for word in (2, 7, 3, 1, index):  # the stream of views, seed, epoch, view, id
            key = mix(((key + golden) & full) ^ mix((word + golden) & full))
        by_hand = [mix((key + (slot + 1) * golden) & full) >> 40 for slot in range(3)]
        assert by_hand == pinned[row]


def test_each_image_has_its_own_draws():
    same = np.repeat(noise(1), 64, axis=0)
    views = run(same, recipe("simclr", 32))
    flat = views.reshape(128, -1)
    assert len(np.unique(flat, axis=0)) == 128
    blurred = run(same, quiet(blur=1.0))
    assert len(np.unique(blurred.reshape(128, -1), axis=0)) > 100  # a sigma of its own for each
    flips = [
        (run(same, quiet(flip=0.5), epoch=epoch)[:, :, 0, 0] == same[0, 0, 0]).all(-1)
        for epoch in (0, 1)
    ]
    assert 30 < flips[0].sum() < 98
    assert 10 < (flips[0] != flips[1]).sum() < 118  # drawn anew in each epoch
    assert 10 < (flips[0][:, 0] != flips[0][:, 1]).sum() < 54  # and for each view
    repeated = run(same, recipe("simclr", 32), ids=np.zeros(64, int))
    assert (repeated == repeated[:1]).all()
    assert (repeated[:, 0] != repeated[:, 1]).any()
    assert (run(same, recipe("simclr", 32), epoch=1) != views).any(axis=(1, 2, 3, 4)).all()


def test_views_may_differ():
    images = noise(8)
    first, second = recipe("cifar"), quiet()
    parameters, _ = draws.draw_views((first, second), 0, 0, np.arange(8), (32, 32))
    views = ah.augment_pixels(tf.constant(images), tf.constant(parameters), (first, second)).numpy()
    np.testing.assert_array_equal(views[:, 1], images)
    np.testing.assert_array_equal(views[:, 0], run(images, first)[:, 0])


# ---------------------------------------------------------------- encoded images


def encode(image, kind, **options):
    out = io.BytesIO()
    Image.fromarray(image).save(out, kind, **options)
    return out.getvalue()


@functools.cache  # a graph takes two seconds
def of_encoded(a, whole=False):
    """Both views of an encoded image, from its draws."""
    return tf.function(lambda d, p, c: ah.augment_encoded(d, p, c, (a, a), whole=whole))


PLAIN = {"jitter": 0.0, "grey": 0.0, "blur": 0.0}  # so that resizing shows


@pytest.mark.parametrize(
    "a",
    [
        recipe("moco_v1"),
        recipe("moco_v2"),
        *(recipe("moco_v2", interpolation=kind, antialias=antialias, **PLAIN)
          for kind in ("bilinear", "bicubic") for antialias in (False, True)),
    ],
)  # fmt: skip
def test_png_equals_pixels(a):
    """Two ways to the same views: one image at a time with `tf.image.resize`, and in a batch."""
    images = noise(12, 80, 104)
    ids = np.arange(12) + 100
    batch = run(images, a, ids=ids, seed=5)
    parameters, crops = draws.draw_views((a, a), 5, 0, ids, None)
    single = of_encoded(a)
    for i, image in enumerate(images):
        views = single(tf.constant(encode(image, "PNG")), parameters[i], crops[i]).numpy()
        assert np.abs(views.astype(int) - batch[i]).max() <= 1


@pytest.mark.parametrize("preset", [pytest.param("simclr", marks=pytest.mark.slow), "moco_v2"])
def test_jpeg_window_equals_whole(preset):
    """Decoding only what both crops cover gives what decoding everything gives."""
    images, a = noise(12, 90, 120), recipe(preset, 32)
    parameters, crops = draws.draw_views((a, a), 5, 0, np.arange(12), None)
    part, full = of_encoded(a), of_encoded(a, whole=True)
    for i, image in enumerate(images):
        data = tf.constant(encode(image, "JPEG", quality=90, subsampling=2 * (i % 2)))
        found = part(data, parameters[i], crops[i]).numpy().astype(int)
        assert np.abs(found - full(data, parameters[i], crops[i]).numpy()).max() <= 1


def test_simclr_crop_of_encoded_images():
    a = recipe("simclr")
    u = draws.crop_draws(0, 0, IDS[:3000], 0)
    box = tf.function(lambda v: ah.draw_box(a, tf.constant(60), tf.constant(110), v))
    found = np.stack([box(row) for row in tf.constant(u)])
    same_distribution(found, draws.crop_boxes(a, 60, 110, 0, 0, IDS[:6000], 0), 60, 110)


@pytest.mark.parametrize("height, width, size", [(90, 120, 72), (40, 30, 30), (30, 30, 60)])
@pytest.mark.parametrize("ops", ["host", "numpy"])
def test_centre(height, width, size, ops):
    image = noise(1, height, width)[0]
    shorter = round(size / 0.875) if size > 64 else size
    if ops == "host":
        found = ah.centre(tf.constant(image), shorter, size).numpy()
    else:
        found = resize.centre(image[None], size)[0]
    scale = shorter / min(height, width)
    tall, wide = round(height * scale), round(width * scale)
    resized = np.asarray(Image.fromarray(image).resize((wide, tall), Image.BILINEAR))
    y, x = (tall - size) // 2, (wide - size) // 2
    expected = resized[y : y + size, x : x + size].astype(int)
    assert found.shape == (size, size, 3) and np.abs(found - expected).max() <= 1


def test_graph_and_eager_agree():
    images, a = noise(5), recipe("simclr", solarise=0.2, rotate=0.5)
    parameters, _ = draws.draw_views((a, a), 0, 0, np.arange(5), (32, 32))
    op = tf.function(lambda x, p: ah.augment_pixels(x, p, (a, a)))
    graph = op(tf.constant(images), tf.constant(parameters)).numpy().astype(int)
    assert np.abs(graph - run(images, a)).max() <= 1
