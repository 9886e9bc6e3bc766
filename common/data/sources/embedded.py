"""Fashion-MNIST, which ships with this code: 10,000 + 2,000 images of 28 x 28."""

import pathlib

import numpy as np

from common.data.sources.base import ArraySource, Source, to_rgb
from common.errors import UserError


def open_embedded(split: str) -> Source:
    """Opens the training or the test split, `data.source="embedded"`."""
    if split not in ("train", "test"):
        raise UserError(f"the embedded dataset has no split {split!r}; expected train or test.")
    archive = pathlib.Path(__file__).with_name("fashion_mnist.npz")
    with np.load(archive, allow_pickle=False) as arrays:
        images = to_rgb(arrays[f"{split}_images"][..., None])
        labels = arrays[f"{split}_labels"].astype(np.int32)
        names = tuple(str(name) for name in arrays["class_names"])
    return ArraySource(
        name="fashion_mnist", split=split, kind="pixels", num_examples=len(images),
        num_classes=len(names), class_names=names, labels=labels, image_shape=images.shape[1:3],
        images=images,
    )  # fmt: skip
