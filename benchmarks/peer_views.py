"""SimCLR's two views as in other code bases: Pillow alone, and torchvision in a DataLoader.

The strength is that of `config.augment.preset = "simclr"`. Peers differ in the blur: torchvision's
`GaussianBlur` is a convolution with 23 x 23 taps, while lightly, solo-learn and MoCo use Pillow's,
which consists of box filters, between torchvision's transforms.
"""

import functools
import io
import pathlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

WORKERS = 2


def pil_view(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """One view as in Chen et al. 2020, appendix A, at strength 1."""
    width, height = image.size
    for _ in range(10):
        target = width * height * rng.uniform(0.08, 1)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(target * ratio)), round(np.sqrt(target / ratio))
        if w <= width and h <= height:
            break
    else:
        w, h = width, height
    left, top = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
    box = (left, top, left + w, top + h)
    view = image.resize((size, size), Image.BICUBIC, box=box)
    if rng.random() < 0.5:
        view = view.transpose(Image.FLIP_LEFT_RIGHT)
    if rng.random() < 0.8:
        view = pil_jitter(view, rng)
    if rng.random() < 0.2:
        view = view.convert("L").convert("RGB")
    if rng.random() < 0.5:
        view = view.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2)))
    return view


def pil_jitter(view: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast and saturation 0.8, hue 0.2, in random order."""
    for kind in rng.permutation(4):
        if kind == 3:
            hue, saturation, value = view.convert("HSV").split()
            turned = np.asarray(hue) + np.uint8(int(rng.uniform(-0.2, 0.2) * 255) % 256)
            view = Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")
        else:
            enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[kind]
            view = enhance(view).enhance(rng.uniform(0.2, 1.8))
    return view


def pil_pair(data: bytes, size: int) -> int:
    """Makes two views; returns only a number."""
    image, rng = Image.open(io.BytesIO(data)).convert("RGB"), np.random.default_rng()
    return sum(int(np.asarray(pil_view(image, size, rng))[0, 0, 0]) for _ in range(2))


def pillow_blur(image: Image.Image) -> Image.Image:
    """The blur of lightly and solo-learn."""
    return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2)))


@functools.cache
def torch_transform(size: int, pillow: bool) -> Callable:
    """One view by torchvision, on Pillow's images; with `pillow` the blur is Pillow's."""
    from torchvision import transforms as t

    jitter = t.RandomApply([t.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8)
    blur = pillow_blur if pillow else t.GaussianBlur(size // 20 * 2 + 1, (0.1, 2))
    crop = t.RandomResizedCrop(size, (0.08, 1), interpolation=t.InterpolationMode.BICUBIC)
    flip, grey = t.RandomHorizontalFlip(), t.RandomGrayscale(0.2)
    return t.Compose([crop, flip, jitter, grey, t.RandomApply([blur], p=0.5), t.ToTensor()])


class Pairs:
    """A dataset for torch: two views of each file, repeated without end."""

    def __init__(self, files: list[pathlib.Path], size: int, pillow: bool, length: int) -> None:
        self.files, self.size, self.pillow, self.length = files, size, pillow, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        transform = torch_transform(self.size, self.pillow)
        with Image.open(self.files[index % len(self.files)]) as image:
            pixels = image.convert("RGB")
        return transform(pixels), transform(pixels)


def torch_batches(
    files: list[pathlib.Path], size: int, batch_size: int, pillow: bool
) -> Iterator[Any]:
    """Endless batches of pairs from a DataLoader with two processes of one thread each."""
    from torch.utils.data import DataLoader

    pairs = Pairs(files, size, pillow, length=10**9 // batch_size * batch_size)
    # "spawn": this process has threads of TensorFlow and JAX, which a fork would break
    return iter(DataLoader(pairs, batch_size, num_workers=WORKERS, multiprocessing_context="spawn"))
