"""Figures without labels against oracles: loops over images, SciPy, and a singular value each."""

import itertools

import numpy as np
import pytest
from scipy.spatial import distance

from common.evaluate import label_free

SHAPES = {"n_below_d": (9, 40), "n_above_d": (40, 7), "square": (12, 12)}


def views(shape, seed=0, noise=1.5):
    """Features of two views, with a mean and columns of different scale, as an encoder has."""
    rng = np.random.default_rng(seed)
    first = (rng.normal(size=shape) + 1) * np.geomspace(1, 1e-2, shape[1])
    second = first + noise * rng.normal(size=shape) * np.geomspace(1, 1e-2, shape[1])
    return first.astype(np.float32), second.astype(np.float32)


def unit(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def rankme_by_svd(z):
    """Garrido et al. 2023, eq. 1 to 3."""
    values = np.linalg.svd(np.asarray(z, np.float64), compute_uv=False)
    p = values / np.abs(values).sum() + 1e-7
    return np.exp(-sum(x * np.log(x) for x in p))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_figures_are_those_of_the_papers(shape):
    first, second = views(shape)
    got = label_free.figures(first, second)
    a, b = unit(first), unit(second)
    n = len(a)
    positive = [((x - y) ** 2).sum() for x, y in zip(a, b, strict=True)]
    negative = [((a[i] - b[j]) ** 2).sum() for i, j in itertools.permutations(range(n), 2)]
    # as the code that Wang and Isola print: pdist, so each pair once and no image with itself
    uniformity = np.log(np.exp(-2 * distance.pdist(a, "sqeuclidean")).mean())
    agreement = np.mean([((a[i] - b) ** 2).sum(1).argmin() == i for i in range(n)])
    want = {
        "rankme": rankme_by_svd(first), "alignment": np.mean(positive),
        "alignment_ratio": np.mean(positive) / np.mean(negative), "uniformity": uniformity,
        "view_agreement": agreement,
    }  # fmt: skip
    assert 0 < agreement < 1 and 1 < want["rankme"] < min(shape)
    assert got == pytest.approx(want, rel=1e-6)
    assert label_free.figures(second, first) != pytest.approx(want, rel=1e-3)


def test_known_values():
    """Orthogonal features, one axis, opposite views, and nothing at all."""
    eye = np.eye(5, 8)
    assert label_free.rankme(3 * eye) == pytest.approx(5, rel=1e-4)
    assert label_free.uniformity(eye) == pytest.approx(-4)  # squared distance 2
    assert label_free.alignment(eye, 7 * eye) == pytest.approx(0, abs=1e-12)
    assert label_free.alignment(eye, -eye) == pytest.approx(4)
    assert label_free.view_agreement(eye, 2 * eye) == 1
    assert label_free.view_agreement(eye, -eye) == 0
    assert label_free.rankme(np.zeros((3, 4))) == 1
    assert label_free.uniformity(np.zeros((3, 4))) == pytest.approx(-4)  # of no direction: cosine 0


def test_a_collapsed_encoder_is_excellent_by_alignment_alone():
    """The same features for every image: no other figure is taken in."""
    same = np.tile(np.random.default_rng(0).normal(size=(1, 64)), (50, 1)).astype(np.float32)
    got = label_free.figures(same, same)
    assert got["alignment"] == pytest.approx(0, abs=1e-12)
    assert got["rankme"] == pytest.approx(1, abs=1e-3)
    assert got["uniformity"] == pytest.approx(0, abs=1e-9)
    assert got["view_agreement"] == pytest.approx(1 / 50)
    assert got["alignment_ratio"] == 1


def test_images_that_are_there_twice_share_the_agreement():
    """Each is as near to its double's view as to its own."""
    first, _ = views((20, 30))
    double = np.concatenate([first, first])
    assert label_free.view_agreement(double, double) == 0.5
    assert label_free.view_agreement(first, first) == 1
    assert label_free.rankme(double) == pytest.approx(label_free.rankme(first), rel=1e-4)


def test_pixels_stay_bytes_and_are_summed_exactly(monkeypatch):
    """More columns than are converted at a time."""
    rng = np.random.default_rng(1)
    first = rng.integers(0, 256, (7, 100), np.uint8)
    second = rng.integers(0, 256, (7, 100), np.uint8)
    want = label_free.figures(first.astype(np.float64), second.astype(np.float64))
    monkeypatch.setattr(label_free, "_COLUMNS", 33)
    assert label_free.figures(first, second) == pytest.approx(want, rel=1e-12)
    assert label_free.rankme(first) == pytest.approx(rankme_by_svd(first), rel=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_there_are_no_figures_of_features_that_are_not_finite(bad, where):
    pair = views((6, 5))
    pair[where][2, 3] = bad
    assert label_free.figures(*pair) == {}
