"""Splits whose examples are known by their features, and a run that is evaluated on them.

The encoder hands on the first pixels of an image, so that every row of features names its example.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax
import jax
import numpy as np
import opened_run
import tiny
from etils import epath

from common.data.sources import fake
from common.data.sources.fake import FakeSource
from common.evaluate.pretrained import Pretrained
from common.sharding import make_mesh

# Splits of several sizes; none is a multiple of the batch of 16, so that there is padding.
SIZES = {"train": 57, "test": 31, "other": 42, "large": 330}
CLASSES, WIDTH = 3, 6


class FirstPixels:
    """A method whose features are the first numbers of an image; behind the head, others."""

    supervised = False

    def encode(self, state, images, layer="backbone"):
        start = {"backbone": 0, "head1": WIDTH}[layer]
        pixels = images.reshape(len(images), -1)[:, start : start + WIDTH]
        return pixels.astype(np.float32) * state.params["scale"]


@flax.struct.dataclass
class State:
    """What the modes read of a state."""

    params: dict
    batch_stats: dict


@dataclasses.dataclass
class Split(FakeSource):
    """Random images, other ones in each split."""

    def views(self, ids, size):
        rng = np.random.default_rng(SIZES[self.split])
        return rng.integers(0, 256, (self.num_examples, size, size, 3), np.uint8)[
            ids % self.num_examples
        ]


def split(name):
    """Of the train, test, ... split: random labels, some unknown."""
    n = SIZES[name]
    labels = np.random.default_rng(n).integers(-1, CLASSES, n).astype(np.int32)
    return Split(
        name="fake", split=name, kind="views", num_examples=n, num_classes=CLASSES,
        class_names=tuple("abc"), labels=labels, image_shape=(8, 8),
    )  # fmt: skip


def table(name, first=0):
    """Features `[n, WIDTH]` of all examples of a split, by hand, and their labels."""
    source = split(name)
    images = source.views(np.arange(source.num_examples), 8)
    flat = images.reshape(len(images), -1)[:, first : first + WIDTH]
    return flat.astype(np.float32) / 256, source.labels


def ids_of(features):
    """Which examples of the train split rows of features are of."""
    known = {row.tobytes(): i for i, row in enumerate(table("train")[0])}
    assert len(known) == SIZES["train"]
    return np.array([known[row.tobytes()] for row in np.asarray(features, np.float32)])


def labelled(name):
    return np.flatnonzero(table(name)[1] >= 0)


def top1(classifier, name):
    """Of the labelled examples of a split."""
    features, labels = (x[labelled(name)] for x in table(name))
    return ((features @ classifier.kernel + classifier.bias).argmax(1) == labels).mean()


@functools.cache
def _pretrained() -> Pretrained:
    """On two devices; its encoder compiles once for all tests."""
    c = tiny.config("simclr", data__source="fake")
    state = State({"scale": np.float32(1 / 256)}, {})
    mesh = make_mesh(jax.devices()[:2])
    return Pretrained(c, opened_run.config(), None, mesh, FirstPixels(), state, 7)


def run_on_them(monkeypatch: Any, workdir: Any) -> Callable[..., Pretrained]:
    """Makes `fake` the splits above; returns `opened(train="train", **settings)`."""
    monkeypatch.setattr(fake, "open_fake", lambda config, name: split(name))
    first = _pretrained()

    def opened(train: str = "train", **changes: Any) -> Pretrained:
        c = first.config.copy_and_resolve_references()
        c.data.train_split = train
        settings = opened_run.config(**changes)
        run = dataclasses.replace(first, config=c, settings=settings, workdir=epath.Path(workdir))
        if settings.layer == "backbone":
            run.__dict__["encoder"] = first.encoder
        return run

    return opened
