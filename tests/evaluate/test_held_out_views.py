"""Views of held-out images: which images, whose views, which draws, on any hardware."""

import io

import jax
import numpy as np
import pytest
import test_online
import tiny
from PIL import Image

from common.data.feed import pipeline
from common.data.feed.recipe import FeedRecipe
from common.data.sources.base import ArraySource
from common.evaluate import features, held_out_views, label_free
from common.evaluate.held_out_views import HeldOutViews
from common.models import probe as probes
from common.sharding import make_mesh

N = 41
PLAIN = dict.fromkeys(["jitter", "grey", "blur", "solarise"], 0.0)  # crops and flips of one colour


def one_colour(n=N, first=0, split="test"):
    """Image i is all of the colour (first + i, 255 - i, 7)."""
    colours = np.stack([first + np.arange(n), 255 - np.arange(n), np.full(n, 7)], 1)
    images = np.broadcast_to(colours[:, None, None].astype(np.uint8), (n, 12, 10, 3)).copy()
    return ArraySource(
        name="colours", split=split, kind="pixels", num_examples=n, num_classes=0, class_names=(),
        labels=np.full(n, -1, np.int32), image_shape=(12, 10), images=images,
    )  # fmt: skip


def textured(n=N):
    source = one_colour(n)
    source.images = np.random.default_rng(3).integers(0, 256, source.images.shape, np.uint8)
    return source


def recipe(views=2, seed=0, on="host", **augment):
    changes = {f"augment__{name}": value for name, value in augment.items()}
    c = tiny.config("simclr", data__augment_on=on, seed=seed, views=views, **changes)
    return FeedRecipe.of(c)


def views_of(source, recipe, devices=1, batch=16, limit=1000):
    """Views `[n, 8 * 8 * 3]` one and two, as an encoder that changes nothing gives them."""
    mesh = make_mesh(jax.devices()[:devices])
    encode = features.jit_encoder(features.flatten_pixels, mesh)
    return HeldOutViews(source, recipe, mesh, batch, limit).features(encode)


@pytest.mark.parametrize("on", ["host", "both", "device"])
@pytest.mark.parametrize(("devices", "batch", "limit"), [(1, 16, 1000), (4, 7, 19)])
def test_row_i_of_both_views_is_image_i_of_those_chosen(on, devices, batch, limit):
    """Evenly spaced ones, with padding, and nothing of the colour of another image."""
    got = views_of(one_colour(), recipe(on=on, **PLAIN), devices, batch, limit)
    n = min(limit, N)
    ids = np.arange(n) * N // n
    want = np.stack([ids, 255 - ids, np.full(n, 7)], 1)
    assert len(set(ids)) == n and 0 in ids
    for view in got:
        assert view.shape == (n, 8 * 8 * 3) and view.dtype == np.uint8
        off = view.reshape(n, -1, 3).astype(int) - want[:, None]
        assert abs(off).max() <= (0 if on == "host" else 1)


@pytest.mark.parametrize("on", ["host", "both", "device"])
def test_the_views_are_the_runs_augmentation_with_draws_of_their_own(on):
    """Those of training for seed 0, epoch 0 and the ids of the test split, whatever the seed."""
    source, given = textured(), recipe(on="host")
    batches = pipeline.planned_batches(source, given, [np.arange(N)])
    want = next(batches)["images"].reshape(N, 2, -1).astype(int)
    assert (want[:, 0] != want[:, 1]).any(1).all()
    for seed, devices in ((0, 4), (5, 1)):
        got = views_of(source, recipe(seed=seed, on=on), devices)
        for view in (0, 1):
            off = abs(got[view].astype(int) - want[:, view])
            assert off.max() == 0 if on == "host" else (off > 2).mean() < 0.01


def test_a_run_of_one_view_gets_a_second_draw_of_the_same_augmentation():
    one, two = (views_of(textured(), recipe(views=n)) for n in (1, 2))
    np.testing.assert_array_equal(one[0], two[0])
    np.testing.assert_array_equal(one[1], two[1])  # `augment_view2` is not set


def test_the_second_view_has_its_own_augmentation():
    c = tiny.config("simclr", augment_view2__solarise=1.0, augment_view2__area_min=1.0,
                    **{f"augment__{n}": x for n, x in PLAIN.items()})  # fmt: skip
    first, second = views_of(one_colour(), FeedRecipe.of(c))
    assert (first[:, 2] == 7).all() and (second[:, 2] == 7).all()  # dark: not inverted
    assert (second[:N, 1] < 128).all() and (first[:N, 1] > 128).all()


def test_files_of_a_run_whose_views_the_device_makes():
    """Images of several shapes are decoded on the host."""

    def png(array):
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "png")
        return buffer.getvalue()

    source = one_colour()
    files = np.array([png(x[: 8 + i % 4]) for i, x in enumerate(source.images)], object)
    source = ArraySource(
        name="files", split="test", kind="encoded", num_examples=N, num_classes=0, class_names=(),
        labels=source.labels, images=files,
    )  # fmt: skip
    for view in views_of(source, recipe(on="device", **PLAIN)):
        np.testing.assert_array_equal(view[:, 0], np.arange(N))


def evaluator(test, **changes):
    c = tiny.config("simclr", **changes)
    return test_online.Evaluator(
        c.evaluate, make_mesh(jax.devices()[:2]), test_online.Pixels(),
        probes.make_probe(c.probe, 3, 8), one_colour(9, first=100, split="train"), test,
        batch_size=16, image_size=8, recipe=recipe(),
    )  # fmt: skip


def test_the_evaluator_compares_views_of_the_test_split_without_labels():
    """Figures of the encoder's features and of the pixels of the same views; no kNN."""
    test = textured()
    score = evaluator(test)
    first, second = views_of(test, recipe())
    pixels = label_free.figures(first, second)
    encoded = label_free.figures(*(x / 255.0 @ test_online.Pixels.matrix for x in (first, second)))
    assert score.raw_pixels() == pytest.approx({f"{n}_raw_pixels": x for n, x in pixels.items()})
    assert score(test_online.State(None)) == pytest.approx(encoded, rel=1e-4)
    assert encoded["rankme"] < 6 < pixels["rankme"]


@pytest.mark.parametrize("left_out", ["off", "streamed", "no test", "one image"])
def test_no_figures_where_there_is_nothing_to_compare(left_out):
    test = {"no test": None, "one image": textured(1)}.get(left_out, textured())
    if left_out == "streamed":
        test.kind = "stream"
    score = evaluator(test, evaluate__label_free_examples=0 if left_out == "off" else 50)
    assert score(test_online.State(None)) == score.raw_pixels() == {}
    if left_out != "off":
        assert held_out_views.obstacle(test)


@pytest.mark.parametrize(
    ("examples", "test", "said"),
    [
        (9, None, "no images are held out from training; --config.data.test_split=auto"),
        (9, textured(1), "colours (test) has a single image"),
        (9, textured(), ""),
        (0, None, ""),
    ],
)
def test_a_run_says_once_why_it_has_no_figures(examples, test, said, capsys):
    c = tiny.config("simclr", evaluate__label_free_examples=examples)
    run = tiny.prepared(c, 1)
    made = test_online.online.make_evaluator(run, one_colour(9, split="train"), test)
    err = capsys.readouterr().err
    assert err.count("no figures without labels") == bool(said) and said in err
    assert (made._views is not None) == (not said and examples > 0)
