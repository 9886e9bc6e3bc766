"""Figures of features that need no label: RankMe, alignment, uniformity, agreement of two views.

All take the features of two augmented views of the same held-out images, row i of both being image
i. They are computed in float64 from inner products between images, so that memory is O(n^2)
whatever d is, and raw pixels stay uint8.
"""

import numpy as np

_COLUMNS = 4096  # converted to float64 at a time
_ROUNDING = 1e-12  # cosines that differ by no more are a tie
_EPSILON = 1e-7  # of RankMe, eq. 1


def figures(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Returns all of them by the name they have in the log; {} for features that are not finite.

    Args:
        first: `[n, d]` features of view 1 of n >= 2 images, any real type.
        second: `[n, d]` of view 2.
    """
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return {}
    own, pairs = _products(first, first), _cosines(first, second)  # the costly part, once
    return {
        "view_agreement": _view_agreement(pairs),
        "alignment_ratio": _alignment_ratio(pairs),
        "rankme": _rankme(own, len(first), first.shape[1]),
        "uniformity": _uniformity(_normalised(own, first, first)),
        "alignment": _alignment(pairs),
    }


def rankme(features: np.ndarray) -> float:
    """Returns exp of the entropy of the singular values, in [1, min(n, d)]: an effective rank.

    Garrido et al., "RankMe: Assessing the Downstream Performance of Pretrained Self-Supervised
    Representations by Their Rank", ICML 2023, eq. 1 to 3: p_k = s_k / sum(s) + 1e-7.

    Args:
        features: `[n, d]`, neither centred nor normalised; 1 if all are 0.
    """
    return _rankme(_products(features, features), *features.shape)


def _rankme(products: np.ndarray, n: int, d: int) -> float:
    """Of Z Z^T, whose eigenvalues are the squares of the singular values."""
    squares = np.linalg.eigvalsh(products)[-min(n, d) :]
    # below this an eigenvalue is rounding, whose square root would not be small
    squares = np.where(squares > max(n, d) * np.finfo(float).eps * squares.max(), squares, 0)
    values = np.sqrt(squares)
    if not values.any():
        return 1.0
    p = values / values.sum() + _EPSILON
    return float(np.exp(-(p * np.log(p)).sum()))


def alignment(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the mean squared distance of two views of an image on the unit sphere, in [0, 4].

    Wang and Isola, "Understanding Contrastive Representation Learning through Alignment and
    Uniformity on the Hypersphere", ICML 2020, section 4.1.1 with alpha = 2.

    Args:
        first, second: as in `figures`.
    """
    return _alignment(_cosines(first, second))


def _alignment(cosines: np.ndarray) -> float:
    return float(2 - 2 * np.diagonal(cosines).mean())


def uniformity(features: np.ndarray) -> float:
    """Returns log mean exp(-2 r^2) over pairs of distinct images at distance r on the sphere.

    Wang and Isola 2020, section 4.1.2 with t = 2. In [-8, 0]: 0 if all features have one
    direction, near -4 if directions are spread evenly in many dimensions.

    Args:
        features: `[n, d]`, n >= 2.
    """
    return _uniformity(_cosines(features, features))


def _uniformity(cosines: np.ndarray) -> float:
    pairs = cosines[np.triu_indices(len(cosines), 1)]
    return float(np.log(np.exp(-2 * (2 - 2 * pairs)).mean()))


def alignment_ratio(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the alignment over the same mean for views of two images; 1 if all are one point.

    Near 0 the views of an image lie close together compared with those of different images, near 1
    they do not. Alignment alone is at its best for an encoder that maps everything to one point.

    Args:
        first, second: as in `figures`.
    """
    return _alignment_ratio(_cosines(first, second))


def _alignment_ratio(cosines: np.ndarray) -> float:
    n, own = len(cosines), np.diagonal(cosines)
    others = 2 - 2 * (cosines.sum() - own.sum()) / (n * (n - 1))
    return float((2 - 2 * own.mean()) / others) if others > _ROUNDING else 1.0


def view_agreement(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the share of images whose view 1 has, of all views 2, its own as the nearest.

    By cosine similarity, as kNN. Of k views that are equally near, each counts 1 / k, so that
    features which are all the same agree in 1 / n.

    Args:
        first, second: as in `figures`.
    """
    return _view_agreement(_cosines(first, second))


def _view_agreement(cosines: np.ndarray) -> float:
    nearest = cosines >= cosines.max(1, keepdims=True) - _ROUNDING
    return float((np.diagonal(nearest) / nearest.sum(1)).mean())


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine similarities `[n, m]`; 0 for a row that is 0."""
    return _normalised(_products(a, b), a, b)


def _normalised(products: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    lengths = (np.sqrt(np.maximum(_squares(x), 1e-300)) for x in (a, b))
    return products / np.multiply.outer(*lengths)


def _products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Inner products `[n, m]`."""
    out = np.zeros((len(a), len(b)))
    for part in _columns(a.shape[1]):
        out += a[:, part].astype(np.float64) @ b[:, part].astype(np.float64).T
    return out


def _squares(a: np.ndarray) -> np.ndarray:
    """Squared lengths `[n]`."""
    return sum(
        (np.square(a[:, part].astype(np.float64)).sum(1) for part in _columns(a.shape[1])),
        np.zeros(len(a)),
    )


def _columns(d: int) -> list[slice]:
    return [slice(start, start + _COLUMNS) for start in range(0, d, _COLUMNS)]
