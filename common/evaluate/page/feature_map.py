"""Features in two dimensions, to be looked at: t-SNE, and a colour for each class."""

import numpy as np

# Twenty colours that can be told apart, on white and on near-black alike.
PALETTE = (
    "#4c78d8", "#f28e2b", "#3ba55a", "#e0474c", "#9461c7", "#a0673f", "#e377c2", "#8a8f98",
    "#b8a818", "#1fb0c9", "#8fb4f5", "#c4560a", "#8fd08a", "#f59a9a", "#c9aee8", "#6b7a0f",
    "#f2b6d8", "#0f7d6c", "#d9b380", "#5a4fcf",
)  # fmt: skip
UNLABELLED = "#8a8f98"
_PCA = 50  # t-SNE is run on so many principal components at most, as its authors do
_PERPLEXITY = 30.0
_FEW = 10  # images; t-SNE needs neighbourhoods


def place(features: np.ndarray, seed: int) -> np.ndarray:
    """Lays rows out in the plane so that neighbours stay neighbours.

    t-SNE (van der Maaten & Hinton 2008) of unit-length features, started from their principal
    components. Distances between groups and the sizes of groups mean little in such a map.

    Args:
        features: `[n, d]`, any real type.
        seed: of t-SNE; the same map each time.

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
        places = np.pad(rows, ((0, 0), (0, 2)))[:, :2]
    else:
        perplexity = min(_PERPLEXITY, (n - 1) / 3)
        tsne = TSNE(perplexity=perplexity, init="pca", random_state=seed)
        with threadpool_limits(1):  # sums in one order: the same map on any number of cores
            places = tsne.fit_transform(rows)
    middle = (places.max(0) + places.min(0)) / 2
    return 0.5 + (places - middle) / max(np.ptp(places, axis=0).max(), 1e-12)


def colour(labels: np.ndarray, class_names: tuple[str, ...]) -> tuple[list[str], list[dict]]:
    """Gives each point a colour, and each colour a line in the legend.

    Args:
        labels: int `[n]`, -1 where unlabelled.
        class_names: of the labels 0, 1, ...

    Returns:
        The colour of each point, and the legend: a `{"name", "label", "colour", "count"}` for
        each class that occurs. Up to 20 classes have the colours of `PALETTE`; of more, colours
        run around the colour circle in the order of the classes.
    """
    present, counts = np.unique(labels, return_counts=True)
    classes = [int(c) for c in present if c >= 0]
    colours = dict(zip(classes, PALETTE, strict=False))
    if len(classes) > len(PALETTE):
        # not the whole circle: the first and the last class must not look the same
        colours = {c: f"hsl({i * 320 // len(classes)} 70% 55%)" for i, c in enumerate(classes)}
    colours[-1] = UNLABELLED
    legend = [
        {
            "name": class_names[c] if c >= 0 else "no label",
            "label": int(c),
            "colour": colours[int(c)],
            "count": int(count),
        }
        for c, count in zip(present, counts, strict=True)
    ]
    legend.sort(key=lambda entry: (entry["label"] < 0, entry["label"]))
    return [colours[int(c)] for c in labels], legend


def same_class(nearest: np.ndarray, labels: np.ndarray) -> tuple[float, float] | None:
    """How often the nearest other point has the class of a point, and how often any other has.

    Args:
        nearest: int `[n]`, the place of each point's nearest neighbour.
        labels: int `[n]`, -1 where unlabelled, which does not count.

    Returns:
        Both shares in [0, 1], or None with fewer than two labelled points.
    """
    known = labels >= 0
    n = int(known.sum())
    if n < 2:
        return None
    counts = np.unique(labels[known], return_counts=True)[1].astype(np.float64)
    share = float((labels == labels[nearest])[known].mean())
    return share, float((counts * (counts - 1)).sum() / (n * (n - 1)))
