"""Mixup and CutMix against NumPy, and the loss of mixed labels by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_linear import softmax

from common.evaluate import finetune, mixing

HEIGHT, WIDTH, N = 7, 10, 4000


def drawn(mixup, cutmix):
    keys = jax.random.split(jax.random.key(1), N)
    draw = jax.jit(jax.vmap(lambda key: mixing.draw(key, mixup, cutmix, HEIGHT, WIDTH)))
    return np.asarray(draw(keys))


def box(rng, keep):
    """CutMix by slices: the share of each pixel that an image keeps."""
    side = np.sqrt(1 - keep)
    pixels = np.ones((HEIGHT, WIDTH))
    places = []
    for length in (HEIGHT, WIDTH):
        size, centre = int(side * length), rng.integers(0, length)
        start = centre - size // 2
        places.append(slice(max(start, 0), max(start + size, 0)))
    pixels[tuple(places)] = 0
    return pixels


def same_distribution(a, b):
    """The largest distance of two cumulative distributions, of 4,000 values each."""
    points = np.union1d(a, b)
    at = [np.searchsorted(np.sort(x), points, side="right") / len(x) for x in (a, b)]
    return np.abs(at[0] - at[1]).max() < 0.04  # 1.6 sqrt(2 / 4000): of equal ones 1 in 100 is above


def test_mixup_keeps_the_same_share_of_every_pixel():
    found = drawn(0.8, 0.0)
    assert (np.ptp(found, axis=(1, 2)) == 0).all()
    want = np.random.default_rng(0).beta(0.8, 0.8, N)
    assert same_distribution(found[:, 0, 0], want)
    assert not same_distribution(found[:, 0, 0], np.random.default_rng(0).beta(2.0, 2.0, N))


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_cutmix_keeps_all_outside_a_box(alpha):
    found, rng = drawn(0.0, alpha), np.random.default_rng(0)
    assert set(np.unique(found)) == {0.0, 1.0}
    rows, columns = found.min(2) == 0, found.min(1) == 0
    np.testing.assert_array_equal(found == 0, rows[:, :, None] & columns[:, None])
    for edge in (rows, columns):  # connected
        assert (np.abs(np.diff(edge.astype(int), axis=1)).sum(1) <= 2).all()
    want = np.stack([box(rng, keep) for keep in rng.beta(alpha, alpha, N)])
    assert same_distribution((found == 0).sum((1, 2)), (want == 0).sum((1, 2)))
    np.testing.assert_allclose(found.mean(0), want.mean(0), atol=0.04)  # where the box lies


def test_with_both_either_is_drawn_for_half_of_the_batches():
    found = drawn(0.8, 1.0)
    cut = np.isin(found, (0, 1)).all((1, 2))
    assert cut.mean() == pytest.approx(0.5, abs=0.03)
    assert (np.ptp(found[~cut], axis=(1, 2)) == 0).all()


def test_an_image_is_mixed_with_that_from_the_other_end():
    images = np.random.default_rng(0).normal(size=(5, 2, 3, 3)).astype(np.float32)
    keep = np.random.default_rng(1).uniform(size=(2, 3)).astype(np.float32)
    got = mixing.mix(jnp.asarray(images), jnp.asarray(keep))
    for i in range(5):
        share = keep[:, :, None]
        want = share * images[i] + (1 - share) * images[4 - i]
        np.testing.assert_allclose(got[i], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("own", [None, 0.7])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_mixed_and_smoothed_labels(own, smoothing):
    """Rows without a label do not count, nor those mixed with one."""
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(6, 4)), np.array([0, 3, -1, 1, 2, 2])
    losses = []
    for i, row in enumerate(np.log(softmax(logits))):
        shares = [(labels[i], 1.0)]
        if own is not None:
            shares = [(labels[i], own), (labels[5 - i], 1 - own)]
        if all(label >= 0 for label, _ in shares):
            of_labels = sum(share * row[label] for label, share in shares)
            losses.append(-(1 - smoothing) * of_labels - smoothing * row.mean())
    assert len(losses) == (5 if own is None else 4)
    share = None if own is None else jnp.float32(own)
    got = finetune._loss(jnp.asarray(logits), jnp.asarray(labels), share, smoothing)
    assert float(got) == pytest.approx(np.mean(losses), rel=1e-5)
