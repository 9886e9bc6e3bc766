"""Random images: everything but the data can be timed with them."""

import dataclasses
import functools

import numpy as np
from ml_collections import ConfigDict

from common.data.order import hash64
from common.data.sources.base import Source
from common.errors import UserError

POOL = 64  # images


@dataclasses.dataclass
class FakeSource(Source):
    """A small pool of random images, seen again and again."""

    def read(self, ids):
        assert self.image_shape is not None
        return self.views(ids, self.image_shape[0]), self.labels_of(ids % self.num_examples)

    def views(self, ids: np.ndarray, size: int) -> np.ndarray:
        """The images as views of another size than `image_shape`: other random pixels."""
        pool = _random_images(self.split == "train", min(self.num_examples, POOL), size)
        return pool[ids % len(pool)]


@functools.lru_cache(maxsize=4)
def _random_images(stream: int, count: int, size: int) -> np.ndarray:
    words = hash64(stream, np.arange(count * size * size * 3 // 8 + 1))
    return words.view(np.uint8)[: count * size * size * 3].reshape(count, size, size, 3)


def open_fake(config: ConfigDict, split: str) -> Source:
    """Opens a dataset of random images, `data.source="fake"`."""
    n, classes, size = config.fake_examples, config.fake_classes, config.image_size
    if n < 1 or classes < 0:
        raise UserError(
            f"data.fake_examples is {n} and data.fake_classes {classes}; expected at least 1 and 0."
        )
    labels = np.arange(n, dtype=np.int32) % classes if classes else np.full(n, -1, np.int32)
    return FakeSource(
        name="fake", split=split, kind="views", num_examples=n, num_classes=classes,
        class_names=tuple(f"class {i}" for i in range(classes)), labels=labels,
        image_shape=(size, size),
    )  # fmt: skip
