"""Neighbours, odd ones out and near-duplicates, against NumPy and pictures made by hand."""

import io

import numpy as np
import pytest
from PIL import Image

from common.evaluate import clusters, duplicates, structure


def unit_rows(n, d, seed=0):
    rows = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("n", [2, 3, 11, 40])
def test_neighbours_and_oddness_by_brute_force(n):
    rows = unit_rows(n, 6) * 3
    found = structure.of_features(rows, seed=0)
    cosines = unit_rows(n, 6).astype(np.float64)
    cosines = cosines @ cosines.T
    mean = 1 - cosines[~np.eye(n, dtype=bool)].mean()
    np.fill_diagonal(cosines, -2)
    k = min(10, n - 1)
    np.testing.assert_array_equal(found.neighbours, np.argsort(-cosines, axis=1)[:, :k])
    ranked = -np.sort(-cosines, axis=1)[:, :k]
    np.testing.assert_allclose(found.cosines, ranked, atol=1e-5)
    np.testing.assert_allclose(found.oddness, 1 - ranked[:, -1], atol=1e-5)
    assert found.distance == pytest.approx(mean, abs=1e-6)


def test_the_odd_one_is_odd_and_so_is_a_pair_of_it():
    rows = unit_rows(60, 8) * 0.1 + np.eye(8, dtype=np.float32)[0]
    rows[[7, 33]] = np.eye(8)[3]  # nearest to each other
    found = structure.of_features(rows, 0)
    assert set(np.argsort(-found.oddness)[:2]) == {7, 33}
    assert found.cosines[7, 0] == pytest.approx(1) and not found.collapsed


def test_equal_rows_are_their_own_neighbours_nowhere():
    found = structure.of_features(np.ones((30, 4), np.float32), 0)
    assert (found.neighbours != np.arange(30)[:, None]).all() and found.collapsed
    assert all(len(set(row)) == 10 for row in found.neighbours.tolist())
    np.testing.assert_allclose(found.oddness, 0, atol=1e-6)
    alone = structure.of_features(np.ones((1, 4)), 0)
    assert alone.neighbours.shape == (1, 0) and alone.oddness.tolist() == [0]


def test_of_too_many_images_some_are_compared():
    rows = unit_rows(50, 6)
    found = structure.of_features(rows, 0, most=20)
    assert found.rows.tolist() == [i * 50 // 20 for i in range(20)]
    assert set(found.neighbours.ravel()) <= set(found.rows)
    among = structure.of_features(rows[found.rows], 0)
    np.testing.assert_array_equal(found.neighbours, found.rows[among.neighbours])
    wide = found.spread_out(found.oddness, 50, np.nan)
    np.testing.assert_array_equal(wide[found.rows], found.oddness)
    assert np.isnan(wide).sum() == 30


def scene(seed):
    """A photograph's likeness: smooth, of many colours, uint8 [96, 96, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((96, 96), Image.Resampling.BICUBIC))


def again(image, quality=50, side=96):
    """The image as a JPEG of another size, opened at the size of the others."""
    buffer = io.BytesIO()
    Image.fromarray(image).resize((side, side)).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer).resize((96, 96)))


def planted():
    """20 scenes and four copies of the first ones, in an order of their own: images, features."""
    images = [scene(i) for i in range(20)]
    images += [images[0], again(images[1]), again(images[2], 90, 60), images[3][:, ::-1], images[0]]
    features = unit_rows(20, 16, 5)
    rng = np.random.default_rng(9)
    copies = features[[0, 1, 2, 3, 0]] + 0.01 * rng.normal(size=(5, 16)).astype(np.float32)
    return np.stack(images), np.concatenate([features, copies])


def found_in(images, features):
    small = duplicates.small_pictures(images)
    return duplicates.find(features, structure.of_features(features, 0), lambda rows: small[rows])


def test_planted_copies_are_found_and_nothing_else():
    images, features = planted()
    groups = found_in(images, features)
    rows = sorted(group.rows.tolist() for group in groups)
    assert rows == [[0, 20, 24], [1, 21], [2, 22], [3, 23]]
    by_first = {group.rows[0]: group for group in groups}
    assert by_first[0].differences.tolist() == [0, 0, 0]
    assert [by_first[i].mirrored.tolist() for i in (1, 2, 3)] == [[0, 0], [0, 0], [0, 1]]
    assert 0 < by_first[1].differences[1] < duplicates.DIFFERENCE
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for group in groups:
        np.testing.assert_allclose(group.cosines, unit[group.rows] @ unit[group.rows[0]], atol=1e-5)
    least = [group.differences[1:].min() for group in groups]
    assert least == sorted(least)


def test_neither_features_nor_pixels_alone_make_a_duplicate():
    images, features = planted()
    images[20] = scene(77)  # another photograph of the same thing
    features[21] = -features[21]  # an encoder that does not recognise the copy
    rows = sorted(group.rows.tolist() for group in found_in(images, features))
    assert rows == [[0, 24], [2, 22], [3, 23]]


def test_copies_are_found_where_the_encoder_has_collapsed():
    images, _ = planted()
    groups = found_in(images[:8].repeat(2, axis=0), np.ones((16, 4), np.float32))
    assert [0, 1] in [group.rows.tolist() for group in groups]
    assert all(len(set(group.rows // 2)) == 1 for group in groups)


def test_many_copies_of_one_image_are_one_group():
    images = np.broadcast_to(scene(0), (40, 96, 96, 3))
    (group,) = found_in(images, np.broadcast_to(unit_rows(1, 8), (40, 8)))
    assert group.rows.tolist() == list(range(40)) and group.count == 40


def test_difference_by_hand():
    rng = np.random.default_rng(0)
    a = rng.uniform(0, 255, (3, 8, 8, 3)).astype(np.float32)
    b = np.stack([a[0] + 5, a[1, :, ::-1] - 3, a[0]])
    apart, mirrored = duplicates.difference(a, b)
    assert apart[:2] == pytest.approx([5 / a[0].std(), 3 / a[1].std()], rel=1e-5)
    assert apart[2] > 0.5 and mirrored[:2].tolist() == [False, True]
    blank = np.full((1, 8, 8, 3), 250.0)
    assert duplicates.difference(blank, blank - 2)[0] == pytest.approx(2 / 10)


def test_components_by_hand():
    edges = np.array([[5, 9], [1, 2], [9, 7], [2, 4], [7, 5]])
    found = sorted(part.tolist() for part in duplicates.connected(edges))
    assert found == [[1, 2, 4], [5, 7, 9]]
    assert duplicates.connected(np.zeros((0, 2), int)) == []


def test_many_images_are_in_six_clusters_or_more():
    """Three blobs: of few images the three, of many the best of six and more, or what is given."""
    rows = np.eye(3, 8)[np.arange(240) % 3] + unit_rows(240, 8) * 0.1
    assert len(structure.of_features(rows[:90], 0).clusters.centres) == 3
    many = structure.of_features(rows, 0)
    assert len(many.clusters.centres) >= 6
    np.testing.assert_array_equal(
        many.clusters.labels, clusters.cluster(rows, 0, ks=(6, 8, 10, 12, 16, 20)).labels
    )
    assert len(structure.of_features(rows, 0, k=3).clusters.centres) == 3
