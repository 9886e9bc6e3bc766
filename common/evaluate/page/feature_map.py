"""A map of features in two dimensions: t-SNE, and a colour for each class."""

import dataclasses
import math

import numpy as np

# Twenty distinguishable colours, on white and on near-black.
PALETTE = (
    "#4c78d8", "#f28e2b", "#3ba55a", "#e0474c", "#9461c7", "#a0673f", "#e377c2", "#8a8f98",
    "#b8a818", "#1fb0c9", "#8fb4f5", "#c4560a", "#8fd08a", "#f59a9a", "#c9aee8", "#6b7a0f",
    "#f2b6d8", "#0f7d6c", "#d9b380", "#5a4fcf",
)  # fmt: skip
UNLABELLED = "#8a8f98"
_PCA = 50  # t-SNE gets at most this many principal components, as its authors do
_PERPLEXITY = 30.0
_FEW = 10  # images; t-SNE needs neighbourhoods
_ALL_PICTURED = 300  # points; so many pictures may overlap
_PICTURE = 40  # side of a picture on the map, of 1,000, where there are more


@dataclasses.dataclass(frozen=True)
class Entry:
    """A class in the legend, and how many images it has; `label` is -1 for those without one."""

    name: str
    label: int
    colour: str
    count: int


@dataclasses.dataclass(frozen=True)
class Map:
    """What the page draws of n images.

    Attributes:
        points: `(x, y, colour, label)` of each; x in [10, 990], y in [10, height - 10].
        height: of the drawing.
        names: of each.
        class_names: of the labels 0, 1, ...
        legend: the classes that occur.
        collapsed: whether all features are equal.
        pictured: the points that show their image at once, see `pictured`.
        picture: the side of those images.
        spread: of the features: about 1 where they fill the sphere, 0 where they are equal; see
            `method.embedding_metrics`.
        agreement: see `same_class`.
    """

    points: list[tuple[float, float, str, int]]
    height: int
    names: list[str]
    class_names: tuple[str, ...]
    legend: list[Entry]
    pictured: list[int]
    picture: int
    collapsed: bool
    spread: float
    agreement: tuple[float, float] | None

    @property
    def distinct(self) -> bool:
        """Whether each class has a colour of its own."""
        return sum(entry.label >= 0 for entry in self.legend) <= len(PALETTE)


def make(
    features: np.ndarray,
    labels: np.ndarray,
    nearest: np.ndarray | None,
    names: list[str],
    class_names: tuple[str, ...],
    seed: int,
    labels_of_all: np.ndarray | None = None,
) -> Map:
    """Makes a map.

    Args:
        features: `[n, d]`, any real type.
        labels: int `[n]`, -1 where unlabelled.
        nearest: int `[n]`, the row of the features nearest to each; None for a single row.
        names: of the images.
        class_names: of the labels 0, 1, ...
        seed: of t-SNE.
        labels_of_all: of all images, where the map has some of them; the legend counts them.
    """
    xy = project(features, seed)
    xy = 10 + 980 * (xy - xy.min(0) if len(xy) > 1 else xy)
    colours, legend = colour(labels, class_names, labels_of_all)
    side = picture_side(len(xy))
    unit = features.astype(np.float64)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    return Map(
        points=[
            (round(float(x), 1), round(float(y), 1), c, int(label))
            for (x, y), c, label in zip(xy, colours, labels, strict=True)
        ],
        height=max(300, math.ceil(xy[:, 1].max()) + 10),
        names=names,
        class_names=class_names,
        legend=legend,
        pictured=pictured(xy, side),
        picture=side,
        collapsed=bool(len(xy) > 1 and np.ptp(xy) == 0),
        spread=float(unit.std(0).mean() * math.sqrt(unit.shape[1])),
        agreement=None if nearest is None else same_class(nearest, labels),
    )


def project(features: np.ndarray, seed: int) -> np.ndarray:
    """Projects rows to the plane so that neighbours stay neighbours.

    t-SNE (van der Maaten & Hinton 2008) of unit-length features, initialised with their principal
    components. Distances between groups and the sizes of groups mean little in such a map.

    Args:
        features: `[n, d]`, any real type.
        seed: of t-SNE; the same one gives the same map.

    Returns:
        float `[n, 2]` in [0, 1], centred; all 0.5 where the rows are the same.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    rows = features.astype(np.float32).reshape(len(features), -1)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    n, d = rows.shape
    spread = np.ptp(rows, axis=0).max()
    if n < 2 or spread < 1e-6:  # a collapsed encoder, up to rounding
        return np.full((n, 2), 0.5)
    k = min(_PCA, n, d)
    rows = PCA(k, svd_solver="full", random_state=seed).fit_transform(rows)
    if n < _FEW or k < 2:
        xy = np.pad(rows, ((0, 0), (0, 2)))[:, :2]
    else:
        perplexity = min(_PERPLEXITY, (n - 1) / 3)
        tsne = TSNE(perplexity=perplexity, init="pca", random_state=seed)
        with threadpool_limits(1):  # a fixed order of sums: the same map on any number of cores
            xy = tsne.fit_transform(rows)
    middle = (xy.max(0) + xy.min(0)) / 2
    return 0.5 + (xy - middle) / max(np.ptp(xy, axis=0).max(), 1e-12)


def picture_side(n: int) -> int:
    """Side of the pictures on a map of n points, of its 1,000."""
    return max(_PICTURE, min(110, round(700 / math.sqrt(n)))) if n <= _ALL_PICTURED else _PICTURE


def pictured(xy: np.ndarray, side: int) -> list[int]:
    """Chooses the points that show their image instead of a dot.

    Of few points all do. Of many each one does whose picture covers none that was chosen before:
    all where points are sparse, and some where they are dense.

    Args:
        xy: `[n, 2]`, in random order.
        side: of a picture.
    """
    if len(xy) <= _ALL_PICTURED:
        return list(range(len(xy)))
    chosen: list[int] = []
    places = np.empty((len(xy), 2))
    for i, place in enumerate(xy):
        taken = places[: len(chosen)]
        if (np.abs(taken - place).max(1, initial=0) >= side).all():
            places[len(chosen)] = place
            chosen.append(i)
    return chosen


def colour(
    labels: np.ndarray, class_names: tuple[str, ...], labels_of_all: np.ndarray | None = None
) -> tuple[list[str], list[Entry]]:
    """Assigns a colour to each point, and an entry in the legend to each class.

    Args:
        labels: int `[n]`, -1 where unlabelled.
        class_names: of the labels 0, 1, ...
        labels_of_all: see `make`.

    Returns:
        The colour of each point, and the legend of the classes that occur. Up to 20 classes get
        the colours of `PALETTE`; more of them run around the colour wheel in their order.
    """
    present = np.unique(labels)
    counted = labels if labels_of_all is None else labels_of_all
    counts = [(counted == c).sum() for c in present]
    classes = [int(c) for c in present if c >= 0]
    colours = dict(zip(classes, PALETTE, strict=False))
    if len(classes) > len(PALETTE):
        # not all of the wheel: the first and the last class must not look alike
        colours = {c: f"hsl({i * 320 // len(classes)} 70% 55%)" for i, c in enumerate(classes)}
    colours[-1] = UNLABELLED
    legend = [
        Entry(class_names[c] if c >= 0 else "no label", int(c), colours[int(c)], int(count))
        for c, count in zip(present, counts, strict=True)
    ]
    legend.sort(key=lambda entry: (entry.label < 0, entry.label))
    return [colours[int(c)] for c in labels], legend


def same_class(nearest: np.ndarray, labels: np.ndarray) -> tuple[float, float] | None:
    """How often the nearest other point has the class of a point, and how often a random one has.

    Args:
        nearest: int `[n]`, the row of each point's nearest neighbour.
        labels: int `[n]`, -1 where unlabelled, which does not count.

    Returns:
        Both fractions in [0, 1], or None with fewer than two labelled points.
    """
    known = labels >= 0
    n = int(known.sum())
    if n < 2:
        return None
    counts = np.unique(labels[known], return_counts=True)[1].astype(np.float64)
    near = float((labels == labels[nearest])[known].mean())
    return near, float((counts * (counts - 1)).sum() / (n * (n - 1)))
