"""kNN against loops over rows, and features gathered from a sharded batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from common.evaluate import features as features_lib
from common.evaluate import knn
from common.sharding import make_mesh

CLASSES = 5


def data(n, seed, spread=1.3, d=16):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, n)
    centres = np.random.default_rng(0).normal(size=(CLASSES, d))
    return centres[labels] + spread * rng.normal(size=(n, d)) + 0.7, labels


def by_hand(train, train_labels, test, test_labels, k, temperature, center):
    """Wu et al. 2018, section 3.4, one row at a time in float64."""
    keep = [i for i in range(len(train)) if train_labels[i] >= 0]
    train, train_labels = train[keep].astype(np.float64), train_labels[keep]
    test = test.astype(np.float64)
    if center:
        mean = train.mean(0)
        train, test = train - mean, test - mean
    right = total = 0
    for query, label in zip(test, test_labels, strict=True):
        if label < 0:
            continue
        cosines = [
            row @ query / np.sqrt((row @ row) * (query @ query)) if row.any() else 0.0
            for row in train
        ]
        votes = [0.0] * CLASSES
        for i in sorted(range(len(train)), key=lambda i: -cosines[i])[:k]:
            votes[train_labels[i]] += np.exp(cosines[i] / temperature)
        right += int(np.argmax(votes) == label)
        total += 1
    return right / total


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (7, 0.1), (30, 0.03), (300, 1.0)])
def test_top1_equals_a_loop(center, k, temperature, monkeypatch):
    monkeypatch.setattr(knn, "_TILE", 32 * 100)  # several blocks of training rows, too
    train, train_labels = data(330, 1)
    test, test_labels = data(90, 2)
    train_labels[::11] = -1
    test_labels[::9] = -1
    args = (train, train_labels, test, test_labels)
    got = knn.knn_top1(*args, CLASSES, k, temperature, center, chunk=32)
    want = by_hand(*args, k, temperature, center)
    assert got == pytest.approx(want, abs=1e-9)
    assert 0.3 < want < 0.98  # neither chance nor saturated: a wrong rule would show


def test_centering_and_weights_matter_here():
    """On this data the options change the answer, so the test above can tell them apart."""
    train, train_labels = data(330, 1)
    test, test_labels = data(90, 2)
    results = {
        (center, k, t): by_hand(train, train_labels, test, test_labels, k, t, center)
        for center in (False, True)
        for k, t in ((1, 0.1), (30, 0.03), (300, 1.0))
    }
    assert len(set(results.values())) >= 5


@pytest.mark.parametrize("chunk", [7, 1024])
@pytest.mark.parametrize("tile", [1, 2**27])
@pytest.mark.parametrize("k", [20, 150])  # 150 reaches down to negative similarities
@pytest.mark.parametrize("center", [False, True])
def test_neighbours_equal_a_full_sort_for_any_block_size(chunk, tile, k, center, monkeypatch):
    monkeypatch.setattr(knn, "_TILE", tile)
    train, _ = data(203, 3)
    queries, _ = data(50, 4)
    indices, similarities = knn.neighbours(train, queries, k, center, chunk)
    shift = train.mean(0) if center else 0
    train, queries = (
        (x - shift) / np.linalg.norm(x - shift, axis=1, keepdims=True) for x in (train, queries)
    )
    cosines = queries @ train.T
    order = np.argsort(-cosines, axis=1)[:, :k]
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_allclose(similarities, np.take_along_axis(cosines, order, 1), atol=1e-6)


def test_raw_pixels_as_uint8_images():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (120, 6, 6, 3), dtype=np.uint8)
    labels = rng.integers(0, CLASSES, 120)
    noisy = np.clip(images.astype(int) + rng.integers(-30, 31, images.shape), 0, 255)
    args = (images, labels, noisy.astype(np.uint8), labels)
    assert knn.knn_top1(*args, CLASSES, k=1) == 1.0
    flat = [x.reshape(120, -1) / 255 if x.ndim == 4 else x for x in args]
    got = knn.knn_top1(*args, CLASSES, k=12, center=True)
    assert got == pytest.approx(by_hand(*flat, 12, 0.1, True), abs=1e-9)


def test_unlabelled_rows_never_vote_nor_shift_the_centre():
    train, train_labels = data(100, 5)
    test, test_labels = data(40, 6)
    args = (test, test_labels, CLASSES, 10, 0.1, True)
    want = knn.knn_top1(train, train_labels, *args)
    # Copies of the queries would be everybody's nearest; far rows would move the mean.
    more = np.concatenate([test, train + 100, train])
    labels = np.concatenate([np.full(140, -1), train_labels])
    assert knn.knn_top1(more, labels, *args) == want
    assert knn.knn_top1(more, np.where(labels < 0, 0, labels), *args) != want


def test_default_k():
    assert [knn.default_k(n) for n in (5, 10, 999, 2000, 50_000)] == [1, 1, 99, 200, 200]


def test_bad_input():
    x, y = data(20, 7)
    none = np.full(20, -1)
    with pytest.raises(UserError, match="none of the 20 training rows has a label"):
        knn.knn_top1(x, none, x, y, CLASSES)
    with pytest.raises(UserError, match="none of the 20 test rows has a label"):
        knn.knn_top1(x, y, x, none, CLASSES)
    with pytest.raises(UserError, match="k=21 neighbours among 20"):
        knn.knn_top1(x, y, x, y, CLASSES, k=21)
    with pytest.raises(UserError, match=r"kNN temperature=0: it must be above 0 \(0.1 is usual"):
        knn.knn_top1(x, y, x, y, CLASSES, temperature=0)
    with pytest.raises(UserError, match="4 features and training rows 16"):
        knn.neighbours(x, x[:, :4], 3)


@pytest.mark.parametrize("devices", [1, 4])
def test_extract_drops_the_padding_and_orders_by_id(devices):
    mesh = make_mesh(jax.devices()[:devices])
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (21, 4, 4, 3), dtype=np.uint8)
    labels = rng.integers(-1, CLASSES, 21).astype(np.int32)
    ids = rng.permutation(100)[:21].astype(np.int32)
    batches = []
    for start in range(0, 21, 8):
        rows = np.arange(start, start + 8)
        real = rows < 21
        rows = np.where(real, rows, 0)  # padding repeats a real row: only the mask tells
        names = {"images": images, "labels": labels, "ids": ids}
        batches.append({name: x[rows] for name, x in names.items()} | {"mask": real})
    weights = rng.normal(size=(48, 5)).astype(np.float32)
    traces = []

    def encode(weights, images):
        traces.append(images.shape)
        return images.reshape(len(images), -1).astype(jnp.float32) @ weights

    jitted = features_lib.jit_encoder(encode, mesh)
    for _ in range(2):
        with jax.transfer_guard("disallow"):
            placed = jax.device_put(weights, features_lib.replicated(mesh))
            got = features_lib.extract(functools.partial(jitted, placed), batches, mesh)
    assert traces == [(8, 4, 4, 3)]  # one compile for both evaluations
    order = np.argsort(ids)
    want = images.reshape(21, -1).astype(np.float64) @ weights
    np.testing.assert_allclose(got[0], want[order], rtol=1e-4)
    np.testing.assert_array_equal(got[1], labels[order])
    np.testing.assert_array_equal(got[2], ids[order])


def test_extract_of_nothing():
    with pytest.raises(ValueError, match="empty"):
        features_lib.extract(lambda x: x, [], make_mesh(jax.devices()[:1]))


def test_knn_makes_no_implicit_transfer():
    x, y = data(60, 8)
    with jax.transfer_guard("disallow"):
        knn.knn_top1(x, y, x, y, CLASSES, k=3, center=True)


# 60: more than a device of 8 holds
@pytest.mark.parametrize(("metric", "k"), [("cosine", 60), ("euclidean", 9)])
def test_neighbours_on_many_devices_are_those_on_one(metric, k, monkeypatch):
    monkeypatch.setattr(knn, "_TILE", 500)  # several blocks on each device
    train, _ = data(203, 3)
    train[100:150] = train[50:100]  # equal rows keep their order, too
    queries, _ = data(30, 4)
    found = [
        knn.neighbours(train, queries, k, False, 16, metric, make_mesh(jax.devices()[:n]))
        for n in (1, 2, 8)
    ]
    for indices, similarities in found[1:]:
        np.testing.assert_array_equal(indices, found[0][0])
        np.testing.assert_allclose(similarities, found[0][1], atol=1e-6)


def test_euclidean_distance_by_hand():
    train, labels = data(150, 5)
    queries, wanted = data(40, 6)
    distances = np.sqrt(((queries[:, None] - train[None]) ** 2).sum(-1))
    order = np.argsort(distances, axis=1)[:, :20]
    indices, similarities = knn.neighbours(train, queries, 20, metric="euclidean")
    np.testing.assert_array_equal(indices, order)
    spread = ((train - train.mean(0)) ** 2).sum(1).mean()
    want = -(np.take_along_axis(distances, order, 1) ** 2) / 2 / spread
    np.testing.assert_allclose(similarities, want, atol=1e-5)
    votes = np.stack([(np.exp(want / 0.2) * (labels[order] == c)).sum(1) for c in range(CLASSES)])
    got = knn.knn_scores(train, labels, queries, wanted, CLASSES, 20, 0.2, metric="euclidean")
    assert got["top1"] == (votes.argmax(0) == wanted).mean()
    # scale and place mean nothing
    moved = knn.neighbours(5 * train + 9, 5 * queries + 9, 20, metric="euclidean")
    np.testing.assert_allclose(moved[1], similarities, atol=1e-5)


def test_top5_counts_only_classes_with_votes():
    train, queries = np.eye(8), np.eye(8)
    labels = np.arange(8)
    args = (train, labels, queries, (labels + 1) % 8, 8)
    got = knn.knn_scores(*args, k=8, temperature=1.0)
    # all others tie behind the first: the classes 0, 1, ... come next, so 5, 6, 7 miss theirs
    hits = [(c + 1) % 8 in [c, *[x for x in range(8) if x != c][:4]] for c in range(8)]
    assert got["top1"] == 0 and got["top5"] == np.mean(hits) and got["num_test"] == 8
    assert knn.knn_scores(*args, k=1)["top5"] == 0
