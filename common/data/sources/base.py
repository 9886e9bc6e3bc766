"""What every source of images has: a size, labels, and `read`."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from common.data.images.decoding import DEFAULT, Decoding


@dataclasses.dataclass
class Source:
    """A labelled or unlabelled set of images with random access.

    Attributes:
        name, split: for messages.
        kind: what `fetch` returns: "pixels" (uint8 [b, h, w, 3]), "encoded" (object [b] of bytes),
          "path" (object [b] of bytes), "views" (pixels that are not augmented), or "stream" (no
          random access; see `feed/stream.py`).
        num_examples: >= 1.
        num_classes: 0 when unlabelled.
        class_names: of length num_classes, or empty when the classes have no names.
        labels: int32 [num_examples], -1 unlabelled; None when that takes reading the images.
        image_shape: (h, w) when all images share it, else None.
        on_corrupt: "error" or "replace".
        decoding: how files become pixels.
        replaced: id of a corrupt image -> id of the image that replaces it.
        seen_good: ids that a search for corrupt images decoded; not decoded again.
        listing: changes when examples are added, removed or renamed, even if their number stays.
        account: lines that explain how the dataset was read where there was a choice.
    """

    name: str
    split: str
    kind: str
    num_examples: int
    num_classes: int
    class_names: tuple[str, ...]
    labels: np.ndarray | None
    image_shape: tuple[int, int] | None = None
    on_corrupt: str = "error"
    decoding: Decoding = DEFAULT
    replaced: dict[int, int] = dataclasses.field(default_factory=dict)
    seen_good: set[int] = dataclasses.field(default_factory=set)
    account: tuple[str, ...] = ()

    def read(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images (as `kind` says) and int32 labels of the examples [b]; nothing is replaced."""
        raise NotImplementedError

    def fetch(self, ids: np.ndarray) -> np.ndarray:
        """Images of the examples [b], as `kind` says; corrupt ones, once known, are replaced."""
        return self.read(self.stand_ins(ids))[0]

    def views(self, ids: np.ndarray, size: int) -> np.ndarray:
        """Of kind "views": uint8 [b, size, size, 3], of another size than `image_shape`."""
        raise NotImplementedError

    def in_order(self) -> Iterator[tuple[int, bytes, int]]:
        """Of kind "stream": one pass over (id, encoded image, label), nothing decoded."""
        raise NotImplementedError

    def labels_of(self, ids: np.ndarray) -> np.ndarray:
        """int32 labels of the examples [b], of a source that knows them without its images."""
        assert self.labels is not None
        return self.labels[ids]

    def stand_ins(self, ids: np.ndarray) -> np.ndarray:
        """The ids, with those of corrupt examples replaced."""
        if not self.replaced:
            return ids
        return np.array([self.replaced.get(int(i), int(i)) for i in ids], np.int64)

    def describe(self, index: int) -> str:
        """Names one example in an error message."""
        return f"example {index} of {self.name} ({self.split})"

    def names(self, ids: np.ndarray) -> np.ndarray:
        """Names of examples [b] for files that may be shared: no path outside the dataset."""
        return np.array([str(i) for i in ids])

    def summary(self) -> tuple[str, ...]:
        """What this is, in a line, and the account of how it was read."""
        labels = "no labels"
        if self.num_classes:
            labels = f"{self.num_classes:,} class{'es' * (self.num_classes > 1)}"
        text = f"{self.name} ({self.split}): {self.num_examples:,} images, {labels}"
        return text, *self.account

    @property
    def listing(self) -> str:
        return ""

    @property
    def shape(self) -> tuple[int, int]:
        """`image_shape` of a source whose images share one."""
        assert self.image_shape, f"the images of {self.name} have no common shape"
        return self.image_shape

    @property
    def corrupt_count(self) -> int:
        """How many corrupt images have been replaced so far."""
        return len(self.replaced)


@dataclasses.dataclass(kw_only=True)
class ArraySource(Source):
    """Images in memory: pixels [n, h, w, 3], or encoded bytes [n]."""

    images: np.ndarray

    def read(self, ids):
        return self.images[ids], self.labels_of(ids)


def listed(names: list[str], noun: str, verb: str, most: int = 5) -> str:
    """E.g. "; 2 damaged images left out: a, b": the first names only, "" if there are none."""
    if not names:
        return ""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    plural = "s" if len(names) > 1 else ""
    return f"; {len(names):,} {noun}{plural} {verb}: {', '.join(names[:most])}{more}"


def to_rgb(images: np.ndarray) -> np.ndarray:
    """Repeats the one channel of grey images: [..., h, w, 1] -> [..., h, w, 3]."""
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images
