"""Which examples are chosen: as many of each class, by seed, and always the same ones."""

import numpy as np
import pytest

from common.data import pipeline, sources, subset
from common.errors import UserError


def labels(sizes, unlabelled=7):
    made = np.concatenate([np.repeat(np.arange(len(sizes)), sizes), np.full(unlabelled, -1)])
    return np.random.default_rng(0).permutation(made).astype(np.int32)


def per_class(y, ids):
    return np.bincount(y[ids], minlength=y.max() + 1).tolist()


def test_a_fraction_has_as_many_of_each_class():
    y = labels([50, 50, 50, 50])
    ids = subset.balanced(y, 0.1, 4, seed=0)
    assert per_class(y, ids) == [5, 5, 5, 5]
    assert len(set(ids)) == len(ids) and (np.diff(ids) > 0).all()
    # classes of other sizes: an equal number, of a small one all it has
    y = labels([80, 60, 3])
    assert per_class(y, subset.balanced(y, 0.5, 3, seed=0)) == [24, 24, 3]
    assert per_class(y, subset.balanced(y, 1.0, 3, seed=0)) == [80, 60, 3]


def test_the_seed_decides_and_a_small_fraction_is_part_of_a_large_one():
    y = labels([50, 50])
    small, large = (subset.balanced(y, f, 2, seed=3) for f in (0.1, 0.4))
    assert set(small) < set(large)
    np.testing.assert_array_equal(small, subset.balanced(y, 0.1, 2, seed=3))
    assert set(small) != set(subset.balanced(y, 0.1, 2, seed=4))


def test_less_than_one_image_a_class():
    y = labels([50, 50])
    with pytest.raises(UserError, match=r"less than one image a class: choose at least 0\.02"):
        subset.balanced(y, 0.004, 2, seed=0)
    for fraction in (0.0, -1.0, 1.5):
        with pytest.raises(UserError, match="more than 0, at most 1"):
            subset.balanced(y, fraction, 2, seed=0)


def test_held_out_is_the_same_share_of_each_class_and_leaves_some():
    y = labels([100, 40, 2, 1])
    ids = subset.held_out(y, 0.1, seed=0)
    assert per_class(y, ids) == [10, 4, 1, 0]
    assert set(ids) != set(subset.held_out(y, 0.1, seed=1))
    # not the examples that a fraction of the labels takes
    assert set(ids) != set(subset.balanced(y, 0.1, 4, seed=0))
    with pytest.raises(UserError, match="a held-out share of 1: choose between 0 and 1"):
        subset.held_out(y, 1.0, seed=0)
    with pytest.raises(UserError, match="no class has two"):
        subset.held_out(labels([1, 1]), 0.5, seed=0)


def test_selected_examples_are_those_of_the_source():
    c = sources.default_config("embedded")
    base = sources.open_source(c, "test")
    ids = np.array([1999, 3, 700])
    part = subset.select(base, ids)
    images, found = part.read(np.array([2, 0, 2]))
    np.testing.assert_array_equal(images, base.images[[700, 1999, 700]])
    np.testing.assert_array_equal(found, base.labels[[700, 1999, 700]])
    np.testing.assert_array_equal(subset.labels_of(part), base.labels[ids])
    assert (part.num_examples, part.num_classes) == (3, 10)
    assert part.describe(0) == base.describe(1999)


@pytest.mark.slow
def test_a_streamed_set_is_selected_into_memory(tmp_path):
    from test_pipeline import config, write_tfds

    write_tfds(tmp_path)
    c = config("tfds:tiny", 8, dir=str(tmp_path))
    memory = sources.open_source(c.data, "train")
    c.data.cache_gib = 0.0
    stream = sources.open_source(c.data, "train")
    assert stream.kind == "stream" and stream.labels is None
    np.testing.assert_array_equal(subset.labels_of(stream), memory.labels)
    ids = np.array([40, 2, 13])
    part = subset.select(stream, ids)
    (got,) = pipeline.eval_batches(part, 3, 8, np.arange(3))
    (want,) = pipeline.eval_batches(subset.select(memory, ids), 3, 8, np.arange(3))
    np.testing.assert_array_equal(got["images"], want["images"])
    np.testing.assert_array_equal(got["labels"], memory.labels[ids])
