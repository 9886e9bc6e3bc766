"""One view of each image: what the first of two would have been, wherever it is made."""

import functools

import jax
import numpy as np
import pytest
import tiny
from test_pipeline import array_source, config, folder, stream, stream_dir, take
from test_resident import setting

from common.data.augment import on_device
from common.data.feed import pipeline, resident
from common.data.feed.recipe import FeedRecipe
from common.data.sources.opening import open_source
from common.errors import UserError
from common.sharding import make_mesh, to_global
from common.train import dispatch
from common.train.prepare import Extent, prepare

__all__ = ["folder", "stream_dir"]  # fixtures


def both(source, c, second, count=3):
    """Batches of two views and of one, of the same ids."""
    c.augment_view2.solarise = 0.9 if second else None
    two = FeedRecipe.of(c)
    c.augment_view2.solarise, c.views = None, 1
    one = FeedRecipe.of(c)
    assert (len(one.views), len(two.views)) == (1, 2) and one.views[0] == two.views[0]
    rows = np.arange(c.batch_size)
    return [take(pipeline.train_batches(source, r, rows=rows), count) for r in (one, two)]


@pytest.mark.slow
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("augment_on", ["host", "both"])
@pytest.mark.parametrize("kind", ["pixels", "path", "stream", "views"])
def test_one_view_is_the_first_of_two(kind, augment_on, second, folder, stream_dir):
    """`second`: view 2 has a recipe of its own. What is cropped alone is not of other pixels."""
    c = config(f"folder:{folder}", augment_on=augment_on)
    if kind == "stream":
        source, c = stream(stream_dir, augment_on=augment_on)
    elif kind == "views":
        c.data.source = "fake"
        source = open_source(c.data, "train")
    else:
        source = array_source() if kind == "pixels" else open_source(c.data, "train")
    c.views = 2
    for one, two in zip(*both(source, c, second), strict=True):
        assert one.keys() == two.keys()
        assert one["images"].shape[:2] == (c.batch_size, 1)
        for name, x in two.items():
            x = x[:, :1] if name in ("images", "parameters") else x
            np.testing.assert_array_equal(one[name], x, err_msg=name)


@pytest.mark.slow
def test_one_view_made_on_the_device_is_the_first_of_two():
    c, source = setting(augment__jitter=0.0, augment__grey=0.0)
    mesh, made = make_mesh(jax.devices()[:2]), []
    data = resident.load(source, mesh)
    for views in (1, 2):
        c.views = views
        recipe = FeedRecipe.of(c)
        _, batch = pipeline.train_batches(source, recipe, rows=np.arange(8)).take(2)
        shapes = dispatch.batch_shapes(recipe, mesh, data)
        batch = to_global(mesh, batch) | data
        assert {k: x.shape for k, x in batch.items()} == {k: x.shape for k, x in shapes.items()}
        make = functools.partial(resident.views, augmentations=recipe.views, mesh=mesh)
        images, labels = jax.jit(make)(batch, 1)
        made.append((np.asarray(images), np.asarray(labels)))
    (one, labels), (two, same_labels) = made
    assert one.shape == (8, 1, 8, 8, 3)
    np.testing.assert_array_equal(one, two[:, :1])
    np.testing.assert_array_equal(labels, same_labels)


@pytest.mark.slow
def test_one_view_is_made_in_pieces_too(monkeypatch):
    """A device that works on one image at a time gives what it gives in one go."""
    c, source = setting(augment__jitter=0.0, augment__grey=0.0)
    c.views, mesh = 1, make_mesh(jax.devices()[:1])
    recipe = FeedRecipe.of(c)
    _, batch = pipeline.train_batches(source, recipe, rows=np.arange(8)).take(1)
    images, parameters = source.fetch(np.arange(8)), batch["parameters"][:, 0]

    def made():
        function = on_device.augment_pixels
        make = lambda x, p: on_device.views(function, x, p, recipe.views, mesh)  # noqa: E731
        return np.asarray(jax.jit(make)(images, parameters))

    whole = made()
    monkeypatch.setattr(on_device, "PIECE", 3 * 8 * 8)  # one view of one image
    np.testing.assert_array_equal(made(), whole)


def test_a_second_view_that_is_not_made_is_refused():
    c = tiny.config("simclr", views=1, augment_view2__blur=0.5)
    with pytest.raises(UserError, match="is of a second view, and views=1"):
        FeedRecipe.of(c)


@pytest.mark.parametrize("method", ["simclr", "moco", "moco_v3"])
@pytest.mark.parametrize("views", [1, 3])
def test_methods_that_compare_views_take_two(method, views):
    c = tiny.config(method, views=views)
    with pytest.raises(UserError, match=f"views={views} and method {method}, which takes 2 of"):
        prepare(tiny.METHODS[method], c, make_mesh(jax.devices()[:1]), extent=Extent(8, 4))
