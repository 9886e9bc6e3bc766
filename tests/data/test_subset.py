"""Which examples are chosen: as many of each class, by seed, and always the same ones."""

import numpy as np
import pytest

from common.config import section
from common.data.feed import pipeline
from common.data.sources import subset
from common.data.sources.base import ArraySource
from common.data.sources.opening import open_source
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
    y = labels([50, 50])  # nor where as many are taken
    assert set(subset.held_out(y, 0.1, seed=0)) != set(subset.balanced(y, 0.1, 2, seed=0))
    with pytest.raises(UserError, match="a held-out share of 1: choose between 0 and 1"):
        subset.held_out(y, 1.0, seed=0)
    with pytest.raises(UserError, match="no class has two"):
        subset.held_out(labels([1, 1]), 0.5, seed=0)


def test_an_example_is_chosen_by_its_id_whatever_others_are_labelled():
    y = labels([60, 40, 30])
    fewer = np.where(y == 0, -1, y)
    held = subset.held_out(y, 0.1, seed=0)
    np.testing.assert_array_equal(subset.held_out(fewer, 0.1, seed=0), held[y[held] > 0])
    many, few = (subset.balanced(found, 0.3, 3, seed=0) for found in (y, fewer))
    assert per_class(y, many) == [13, 13, 13] and per_class(y, few) == [0, 7, 7]
    assert set(few) < set(many)


def test_selected_examples_are_those_of_the_source():
    c = section("data")
    base = open_source(c, "test")
    ids = np.array([1999, 3, 700])
    part = subset.select(base, ids)
    images, found = part.read(np.array([2, 0, 2]))
    np.testing.assert_array_equal(images, base.images[[700, 1999, 700]])
    np.testing.assert_array_equal(found, base.labels[[700, 1999, 700]])
    np.testing.assert_array_equal(subset.labels_of(part), base.labels[ids])
    assert (part.num_examples, part.num_classes) == (3, 10)
    assert part.describe(0) == base.describe(1999)


class Unread(ArraySource):
    """Labels are known only when images are read, as those of an ArrayRecord set."""

    def __init__(self, found, read):
        images = np.arange(len(found))
        super().__init__(
            name="unread", split="train", kind="encoded", num_examples=len(found), num_classes=3,
            class_names=(), labels=None, images=images,
        )  # fmt: skip
        self.found, self.times = found, read

    def read(self, ids):
        self.times.append(len(ids))
        return self.images[ids], self.found[ids]


def test_labels_that_only_reading_tells_are_read_in_pieces(monkeypatch):
    monkeypatch.setattr(subset, "_PIECE", 4)
    found, read = labels([5, 4, 3], unlabelled=2), []
    source = Unread(found, read)
    np.testing.assert_array_equal(subset.labels_of(source), found)
    assert sum(read) == len(found) and max(read) <= 4
    ids = np.array([9, 0, 13, 4, 7])
    part = subset.select(source, ids)
    assert part.labels is None  # nothing was read for it
    np.testing.assert_array_equal(subset.labels_of(part), found[ids])
    np.testing.assert_array_equal(part.read(np.array([1, 2]))[0], [0, 13])
    assert subset.labels_of(part).dtype == np.int32


def test_fake_views_of_selected_examples_are_those_of_the_source():
    base = open_source(section("data", source="fake", image_size=8), "train")
    ids = np.array([7, 30, 2])
    part = subset.select(base, ids)
    # the second view of the last example is the first one's, as in the set itself
    np.testing.assert_array_equal(part.views(np.array([1, 2, 3]), 8), base.views(ids[[1, 2, 0]], 8))


@pytest.mark.slow
def test_a_streamed_set_is_selected_into_memory(tmp_path):
    from test_pipeline import config, write_tfds

    write_tfds(tmp_path)
    c = config("tfds:tiny", 8, dir=str(tmp_path))
    memory = open_source(c.data, "train")
    c.data.cache_gib = 0.0
    stream = open_source(c.data, "train")
    assert stream.kind == "stream" and stream.labels is None
    np.testing.assert_array_equal(subset.labels_of(stream), memory.labels)
    ids = np.array([40, 2, 13])
    part = subset.select(stream, ids)
    (got,) = pipeline.eval_batches(part, 3, 8, np.arange(3))
    (want,) = pipeline.eval_batches(subset.select(memory, ids), 3, 8, np.arange(3))
    np.testing.assert_array_equal(got["images"], want["images"])
    np.testing.assert_array_equal(got["labels"], memory.labels[ids])
