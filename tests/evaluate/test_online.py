"""The evaluator of a run: which examples it uses, and its scores against an oracle."""

import logging
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny
from test_knn import by_hand

from common.data.sources.base import ArraySource
from common.errors import UserError
from common.evaluate import online
from common.evaluate.online import Evaluator
from common.models import probe as probes
from common.sharding import make_mesh

N, CLASSES = 50, 3


class Pixels:
    """A method whose encoder is one fixed matrix."""

    matrix = np.random.default_rng(0).normal(size=(8 * 8 * 3, 6)).astype(np.float32)

    def encode(self, state, images, layer="backbone"):
        return images.reshape(len(images), -1).astype(np.float32) / 255 @ self.matrix


class State:
    """What the evaluator reads of a state."""

    def __init__(self, probe):
        self.probe = probe


jax.tree_util.register_pytree_node(State, lambda s: ((s.probe,), None), lambda _, x: State(*x))


def source(n, seed, labels=None, split="train"):
    """Noisy pictures of three classes, sorted by label, as a folder is."""
    rng = np.random.default_rng(seed)
    known = np.sort(rng.integers(0, CLASSES, n)).astype(np.int32)
    kinds = np.random.default_rng(9).integers(0, 256, (CLASSES, 8, 8, 3))
    images = np.clip(kinds[known] / 3 + rng.integers(0, 171, (n, 8, 8, 3)), 0, 255)
    return ArraySource(
        name="kinds", split=split, kind="pixels", num_examples=n, num_classes=CLASSES,
        class_names=("a", "b", "c"), labels=known if labels is None else labels,
        image_shape=(8, 8), images=images.astype(np.uint8),
    )  # fmt: skip


def evaluator(bank, test, devices=4, **changes):
    c = tiny.config("simclr", **changes)
    probe = probes.make_probe(c.probe, CLASSES, 8)
    return Evaluator(
        c.evaluate, make_mesh(jax.devices()[:devices]), Pixels(), probe, bank, test,
        batch_size=c.batch_size, image_size=c.data.image_size,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("devices", "k", "temperature", "center"),
    [(1, 0, 0.1, False), (4, 0, 0.1, False), (4, 0, 0.1, True), (4, 9, 0.01, False)],
    ids=["one_device", "defaults", "center", "k_and_temperature"],
)
def test_scores_are_those_of_an_oracle(devices, k, temperature, center):
    """kNN of features and of raw pixels, by default k = n / 10; the probe's accuracy on test."""
    bank, test = source(N, 1), source(21, 2)
    score = evaluator(
        bank, test, devices,
        evaluate__knn_k=k, evaluate__knn_temperature=temperature, evaluate__knn_center=center,
    )  # fmt: skip
    k = k or N // 10
    state = score.probe.init(jax.random.key(0), 6)
    rng = np.random.default_rng(5)
    params = {"kernel": rng.normal(size=(6, CLASSES)), "bias": rng.normal(size=CLASSES)}
    state = state.replace(
        params=jax.tree.map(np.float32, params),
        mean=rng.normal(size=6).astype(np.float32),
        var=rng.uniform(1, 9, 6).astype(np.float32),
    )
    got = score(State(state))
    flat = [s.images.reshape(s.num_examples, -1).astype(np.float64) for s in (bank, test)]
    features = [x / 255 @ Pixels.matrix for x in flat]
    want, other = (
        by_hand(features[0], bank.labels, features[1], test.labels, k, temperature, c)
        for c in (center, not center)
    )
    assert got["knn_top1"] == pytest.approx(want, abs=1e-9)
    assert 0.4 < want < 1 and want != other
    want = by_hand(flat[0], bank.labels, flat[1], test.labels, k, temperature, center)
    assert score.raw_pixels() == {"knn_top1_raw_pixels": pytest.approx(want, abs=1e-9)}
    inputs = (features[1] - state.mean) / np.sqrt(state.var + 1e-6) / np.sqrt(6)
    logits = inputs @ params["kernel"] + params["bias"]
    assert got["probe_test_top1"] == pytest.approx((logits.argmax(1) == test.labels).mean())


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("batch", [0, 6])
def test_a_bank_of_some_examples_has_all_classes_on_any_hardware(devices, batch):
    score = evaluator(
        source(N, 1), source(21, 2), devices, batch_size=8, evaluate__knn_examples=9,
        evaluate__batch_size=batch,
    )  # fmt: skip
    bank, queries = score._both(lambda images: Pixels().encode(None, images), score.test)
    assert len(queries[0]) == 21
    np.testing.assert_array_equal(bank[2], np.arange(9) * N // 9)
    assert set(bank[1]) == set(range(CLASSES))


def test_a_split_without_labels_of_a_set_with_classes(caplog):
    """STL10's unlabelled images, or ImageNet's test set: no score, and a warning."""
    none = np.full(N, -1, np.int32)
    for bank, test in ((source(N, 1, none), source(21, 2)), (source(N, 1), source(N, 2, none))):
        score = evaluator(bank, test)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert score.raw_pixels() == {} and score(State(None)) == {}
        assert "has no labels" in caplog.text and "data.bank_split" in caplog.text


@pytest.mark.parametrize("center", [False, True])
def test_the_picture_shows_the_neighbours_that_vote(center, monkeypatch):
    """Those of an oracle, each with its label, beside test images spread over the classes."""
    bank, test = source(N, 1), source(21, 2)
    score = evaluator(bank, test, evaluate__knn_center=center)
    drawn = []
    monkeypatch.setattr(
        online.pictures, "nearest_neighbours", lambda *args, title: drawn.append((*args, title))
    )
    assert score.draw_neighbours(State(None), "here", "before training", rows=3, columns=4)
    shown, found, labels, neighbour_labels, names, path, title = drawn[0]
    rows = [0, 10, 20]
    np.testing.assert_array_equal(shown, test.images[rows])
    np.testing.assert_array_equal(labels, test.labels[rows])
    features, queries = (
        s.images.reshape(s.num_examples, -1) / 255.0 @ Pixels.matrix for s in (bank, test)
    )
    mean = features.mean(0) * center
    unit, queries = (
        x / np.linalg.norm(x, axis=1, keepdims=True) for x in (features - mean, queries - mean)
    )
    nearest = np.argsort(-queries[rows] @ unit.T, axis=1)[:, :4]
    np.testing.assert_array_equal(found, bank.images[nearest])
    np.testing.assert_array_equal(neighbour_labels, bank.labels[nearest])
    assert (names, path) == (("a", "b", "c"), "here")
    assert title == "Nearest neighbours by the features before training"


def test_features_of_the_scores_are_kept_for_one_picture(monkeypatch):
    """The picture is the same, and nothing is encoded again; after it nothing is kept."""
    score, drawn, encoded = evaluator(source(N, 1), source(21, 2)), [], []
    real = online.features.of_source

    def counted(*args):
        encoded.append(args[1].num_examples)
        return real(*args)

    monkeypatch.setattr(online.features, "of_source", counted)
    monkeypatch.setattr(
        online.pictures, "nearest_neighbours", lambda *args, title: drawn.append(args)
    )
    assert score(State(None)) == score(State(None), keep=True)
    assert encoded == [N, 21] * 2
    assert score.draw_neighbours(State(None), "here") and encoded == [N, 21] * 2
    assert score.draw_neighbours(State(None), "here") and encoded == [N, 21] * 3
    for got, want in zip(*drawn, strict=True):
        np.testing.assert_array_equal(got, want)
    score(State(None), keep=True)
    score.test = None
    assert not score.draw_neighbours(State(None), "here") and score._kept is None
    score.test = source(21, 2)
    score(State(None), keep=True)
    score(State(None))
    assert score._kept is None


@pytest.mark.parametrize("missing", ["test", "classes"])
def test_nothing_is_scored_without_a_test_split_or_classes(missing, monkeypatch):
    bank, test = source(N, 1), source(21, 2)
    bank.num_classes *= missing != "classes"
    score = evaluator(bank, None if missing == "test" else test)
    monkeypatch.setattr(online.features, "of_source", None)  # nothing is encoded either
    assert score(State(None)) == score.raw_pixels() == {}


@pytest.mark.parametrize("streamed", ["bank", "test"])
def test_no_picture_of_images_that_cannot_be_read_again(streamed):
    splits = {"bank": source(N, 1), "test": source(21, 2)}
    splits[streamed].kind = "stream"
    assert not evaluator(**splits).draw_neighbours(State(None), "here")
    assert not evaluator(splits["bank"], None).draw_neighbours(State(None), "here")


@pytest.mark.parametrize(
    ("k", "limit", "labels", "test", "refused"),
    [
        (20, 0, True, True, False),
        (21, 0, True, True, True),
        (11, 10, True, True, True),
        (21, 0, False, True, False),  # nobody votes
        (21, 0, True, False, False),
    ],
)
def test_more_neighbours_than_images_are_refused_where_they_would_vote(
    k, limit, labels, test, refused
):
    c = tiny.config("simclr", evaluate__knn_k=k, evaluate__knn_examples=limit)
    bank = source(20, 0)
    bank.num_classes *= labels
    arguments = c.evaluate, bank, source(8, 1) if test else None
    if not refused:
        Evaluator.check(*arguments)
        return
    with pytest.raises(UserError, match=rf"evaluate\.knn_k={k} is more than the {limit or 20} im"):
        Evaluator.check(*arguments)


@pytest.mark.parametrize(
    ("bank", "test", "warned"),
    [("train", "train", True), ("train[:80%]", "train[80%:]", False),
     ("train", "train[:10]", True), ("a", "train", False)],
)  # fmt: skip
def test_scores_of_images_that_vote_are_warned_of(bank, test, warned, caplog):
    c = tiny.config("simclr").evaluate
    bank = source(9, 1, split=bank)
    Evaluator.check(c, bank, source(9, 2, split=test))
    assert ("share images: what is scored was seen" in caplog.text) == warned
    caplog.clear()
    bank.num_classes = 0  # what is measured without labels is of the test images too
    Evaluator.check(c, bank, source(9, 2, split=test))
    assert ("share images: what is scored was seen" in caplog.text) == warned
    caplog.clear()
    Evaluator.check(c, bank, None)
    assert not caplog.text


def test_scores_of_training_images_are_warned_of_where_another_split_votes(caplog):
    c = tiny.config("simclr", evaluate__label_free_examples=0)
    train, bank, test = (source(9, i, split=x) for i, x in enumerate(("a[:5]", "b", "a")))
    run = SimpleNamespace(
        config=c, data=train, mesh=make_mesh(jax.devices()[:1]), method=Pixels(), recipe=None,
        setup=SimpleNamespace(probe=None),
    )  # fmt: skip
    online.make_evaluator(run, bank, test)
    assert "the splits a[:5] and a share images" in caplog.text
    caplog.clear()
    online.make_evaluator(run, train, test)
    assert caplog.text.count("share images") == 1
