"""Evaluation of a dataset too large for memory: labels are hidden instead of leaving rows out."""

import io
import itertools

import jax
import numpy as np
import pytest
from known_splits import run_on_them
from PIL import Image
from test_sources import write_tfds

from common.data.feed import pipeline
from common.data.sources import subset
from common.errors import UserError
from common.evaluate import finetune, finetune_mode, linear, linear_mode
from common.evaluate.pretrained import Pretrained

N = 60  # of three classes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    write_tfds(root, examples=N, shards=2)
    return root


@pytest.fixture
def opened(folder, monkeypatch, tmp_path):
    """`opened(cache_gib=0.0, **settings)`: a run on the set, streamed or in memory."""
    inner = run_on_them(monkeypatch, tmp_path)

    def opened(cache_gib=0.0, **changes):
        run = inner(**changes)
        run.config.data.update(source="tfds:tiny", dir=str(folder), cache_gib=cache_gib)
        return run

    return opened


@pytest.fixture
def ids(monkeypatch):
    """Indices into their source of all examples of training batches, batch by batch."""
    seen, inner = [], pipeline.Batches.take

    def spied(self, steps):
        ids, batch = inner(self, steps)
        seen.extend(ids)
        return ids, batch

    monkeypatch.setattr(pipeline.Batches, "take", spied)
    return seen


def test_a_selection_of_a_streamed_set_holds_its_images_and_labels(opened):
    """In the order asked for; encoded, and here decoded by another library."""
    stream, memory = opened().open("train"), opened(cache_gib=1.0).open("train")
    assert stream.kind == "stream" and stream.labels is None
    np.testing.assert_array_equal(subset.labels_of(stream), memory.labels)
    ids = np.array([40, 0, 59, 13])
    images, labels = subset.select(stream, ids).read(np.arange(4))
    np.testing.assert_array_equal(labels, memory.labels[ids])
    pixels = [np.asarray(Image.open(io.BytesIO(image))) for image in images]
    np.testing.assert_array_equal(pixels, memory.images[ids])


def labels_of(pairs, steps):
    return np.concatenate([jax.device_get(y) for _, y in itertools.islice(pairs, steps)])


class Tuner:
    """Replaces `Finetuner`, and records the labels it is given."""

    def __init__(self, *_):
        pass

    def init(self, *_):
        return None

    def train(self, state, pairs, steps, batch_size):
        Tuner.labels = labels_of(pairs, steps)

    def logits(self, state, images):
        return jax.numpy.zeros((len(images), 3))


@pytest.mark.parametrize(("fraction", "hidden"), [(0.8, True), (0.4, False)])
def test_finetune_hides_the_labels_it_may_not_use(opened, ids, monkeypatch, fraction, hidden):
    """Above half of the dataset all of it is read; below, the chosen images are kept in memory."""
    monkeypatch.setattr(finetune, "Finetuner", Tuner)
    run = opened(finetune__fraction=fraction, finetune__epochs=2, finetune__batch_size=10)
    everything = opened(cache_gib=1.0).open("train").labels
    chosen = subset.balanced(everything, fraction, 3, seed=0)
    metrics, _ = finetune_mode.run(run)
    assert metrics["num_train"] == len(chosen) == fraction * N
    places = np.concatenate(ids)
    if hidden:
        assert sorted(places) == sorted([*range(N)] * 2)  # two epochs of all images
        want = np.where(np.isin(places, chosen), everything[places], -1)
        assert np.mean(want < 0) == pytest.approx(1 - fraction)
    else:
        want = everything[chosen[places]]
    np.testing.assert_array_equal(Tuner.labels, want)


def test_images_are_not_mixed_where_most_labels_are_hidden(opened, monkeypatch):
    monkeypatch.setattr(finetune, "Finetuner", Tuner)
    mixing = {"finetune__mixup": 0.8, "finetune__epochs": 1}
    with pytest.raises(UserError, match=r"mixup=0.8 and cutmix=0.0 need two labelled images"):
        finetune_mode.run(opened(finetune__fraction=0.8, **mixing))
    for fraction in (0.4, 1.0):  # in memory, and none hidden
        assert finetune_mode.run(opened(finetune__fraction=fraction, **mixing))[0]["mixup"] == 0.8


def test_linear_eval_hides_the_labels_of_held_out_images(opened, ids, monkeypatch):
    """And of those that have none: here every seventh, as the features were extracted."""
    given, inner = [], Pretrained.extract

    def fit(pairs, steps, candidates, size, classes, mean, *_):
        given.append((labels_of(pairs, steps), np.concatenate(ids)))
        ids.clear()
        found = linear.Classifier(np.zeros((len(mean), classes)), np.zeros(classes))
        return [found] * len(candidates)

    def extract(self, source, *args, **options):
        features, labels, places = inner(self, source, *args, **options)
        return features, np.where(places % 7 == 0, -1, labels), places

    monkeypatch.setattr(linear, "fit", fit)
    monkeypatch.setattr(Pretrained, "extract", extract)
    run = opened(linear__variant="augmented", linear__epochs=2, linear__batch_size=20)
    labels = np.where(np.arange(N) % 7 == 0, -1, opened(cache_gib=1.0).open("train").labels)
    linear_mode.run(run)
    known = np.flatnonzero(labels >= 0)
    held = known[subset.held_out(labels[known], 0.1, seed=0)]
    (first, first_ids), (second, second_ids) = given
    want = np.where(np.isin(first_ids, held), -1, labels[first_ids])
    np.testing.assert_array_equal(first, want)
    np.testing.assert_array_equal(second, labels[second_ids])
    assert sorted(first_ids) == sorted(second_ids) == sorted([*range(N)] * 2)
    assert len(held) and (first < 0).sum() == 2 * (len(held) + N - len(known))
