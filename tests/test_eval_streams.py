"""Evaluation of a set that is too large for memory: labels are hidden instead of rows left out."""

import itertools

import jax
import numpy as np
import pytest
from known_splits import run_on_them
from test_sources import write_tfds

from common.data import pipeline, subset
from common.evaluate import finetune, finetune_mode, linear, linear_mode

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
    """Places in their source of all examples of training batches, batch by batch."""
    seen, inner = [], pipeline.train_batches

    def spied(*args, **options):
        for batch in inner(*args, **options):
            seen.append(batch["ids"])
            yield batch

    monkeypatch.setattr(pipeline, "train_batches", spied)
    return seen


def labels_of(pairs, steps):
    return np.concatenate([jax.device_get(y) for _, y in itertools.islice(pairs, steps)])


class Tuner:
    """Stands in for `Finetuner`, and notes the labels it is given."""

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
    """Above half of the set it reads all of it; below, the chosen images go into memory."""
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


def test_linear_eval_hides_the_labels_of_held_out_images(opened, ids, monkeypatch):
    given = []

    def fit(pairs, steps, candidates, size, classes, mean, *_):
        given.append((labels_of(pairs, steps), np.concatenate(ids)))
        ids.clear()
        return [linear.Classifier(np.zeros((len(mean), classes)), np.zeros(classes))] * len(
            candidates
        )

    monkeypatch.setattr(linear, "fit", fit)
    run = opened(linear__variant="augmented", linear__epochs=2, linear__batch_size=20)
    everything = opened(cache_gib=1.0).open("train").labels
    linear_mode.run(run)
    held = subset.held_out(everything, 0.1, seed=0)
    (first, first_ids), (second, second_ids) = given
    want = np.where(np.isin(first_ids, held), -1, everything[first_ids])
    np.testing.assert_array_equal(first, want)
    np.testing.assert_array_equal(second, everything[second_ids])
    assert sorted(first_ids) == sorted(second_ids) == sorted([*range(N)] * 2)
    assert (first < 0).sum() == 2 * len(held) == 12
