"""Pairs (one photograph, two views) a second: this input pipeline, PIL and torchvision.

    python -m benchmarks.input_pipeline [--images=64] [--rounds=5] [--size=224] [--preset=simclr]

JPEGs of 500 x 375 are made from gradients and noise. Every contestant makes two views of each, in
turns and repeatedly; the results are medians of one run and their ratios.

    host      all operations in TensorFlow on the host (`data.augment_on="host"`)
    both      the host's part when colour and blur run on the device ("both")
    device    the device's part of it, in JAX on this machine's first device
    resident  "device": all operations in JAX, on images of 32 pixels in device memory
    PIL       SimCLR's transform in PIL with two processes, written here; they return only a number
    torch     torchvision's transforms in a DataLoader with two processes, where it is installed
    peers     the same with Pillow's blur instead of torchvision's, as in lightly and solo-learn

With --train, the demo (embedded images, its small network) is also trained for that many steps
with each `data.augment_on`.
"""

import argparse
import functools
import importlib.util
import io
import multiprocessing
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from benchmarks import peer_views
from common.config import section
from common.data.sources.opening import open_source

WIDTH, HEIGHT = 500, 375
AHEAD = 8  # batches not counted: tf.data and a DataLoader prefetch


def photographs(count: int) -> list[bytes]:
    """JPEGs that compress about as photographs do: smooth colours, edges and noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
    files = []
    for _ in range(count):
        waves = [
            np.sin(x * a + y * b + c) for a, b, c in rng.uniform(-0.05, 0.05, (3, 3)) * [1, 1, 60]
        ]
        blocks = rng.normal(0, 20, (HEIGHT // 25, WIDTH // 25, 3)).repeat(25, 0).repeat(25, 1)
        image = 128 + 60 * np.stack(waves, axis=-1) + blocks + rng.normal(0, 8, blocks.shape)
        out = io.BytesIO()
        Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
        files.append(out.getvalue())
    return files


def pipeline(directory: str, n: int, size: int, preset: str, where: str) -> Callable[[], float]:
    """Pairs a second of the input pipeline, after its prefetched batches."""
    from common.data.feed import pipeline
    from common.data.feed.recipe import FeedRecipe

    config = settings(size, preset, where, f"folder:{directory}", n)
    source = open_source(config.data, "train")
    b = config.batch_size

    def once() -> float:
        return rate(pipeline.train_batches(source, FeedRecipe.of(config), rows=np.arange(b)), n, b)

    return once


def rate(batches: Iterator, n: int, b: int) -> float:
    """Pairs a second of an iterator over batches of b, for about 2 n pairs."""
    for _ in range(AHEAD):
        next(batches)
    steps = max(1, 2 * n // b)
    begin = time.perf_counter()
    for _ in range(steps):
        next(batches)
    return steps * b / (time.perf_counter() - begin)


def batch_size(n: int) -> int:
    """Batch size of all contestants that make batches."""
    return min(8, n)


def settings(size: int, preset: str, where: str, source: str, n: int):
    """The part of a config that the pipeline reads."""
    from ml_collections import ConfigDict

    config = ConfigDict({"seed": 0, "batch_size": batch_size(n), "steps_per_dispatch": 1})
    config.data = section("data", source=source, image_size=size)
    config.data.augment_on = where
    config.augment = section("augment", preset=preset)
    config.augment_view2 = section("augment_view2")
    return config


def device(size: int, preset: str, where: str, n: int) -> Callable[[], float]:
    """Pairs a second of the device's part of the augmentation, on random pixels."""
    import jax

    from common.data.augment import draws, on_device
    from common.data.feed.recipe import FeedRecipe
    from common.sharding import make_mesh, to_global

    pair = FeedRecipe.of(settings(size, preset, where, "fake", n)).views
    rng, mesh = np.random.default_rng(0), make_mesh(jax.devices()[:1])
    shape = (n, 2, size, size, 3) if where == "both" else (n, size, size, 3)
    function = on_device.augment_colour
    function = function if where == "both" else on_device.augment_pixels
    batch = to_global(mesh, {
        "images": rng.integers(0, 256, shape, np.uint8),
        "parameters": draws.draw_views(pair, 0, 0, np.arange(n), (size, size))[0],
    })  # fmt: skip
    views = functools.partial(on_device.views, function, augmentations=pair, mesh=mesh)
    program = jax.jit(views)

    def once() -> float:
        begin = time.perf_counter()
        jax.block_until_ready(program(batch["images"], batch["parameters"]))
        return n / (time.perf_counter() - begin)

    return once


def trained(where: str, steps: int) -> float:
    """Pairs a second of the demo's training, end to end."""
    from common.evaluate.online import make_evaluator
    from common.train.loop import train
    from configs import simclr_demo
    from simclr_jax.method import SimCLR

    config = simclr_demo.get_config()
    config.duration, config.log_every, config.optimizer.warmup = f"{steps} steps", 5, "0 steps"
    config.data.test_split, config.data.augment_on = "", where
    config.checkpoint.every, config.evaluate.pictures = "0 steps", False
    with tempfile.TemporaryDirectory() as workdir:
        return train(SimCLR, config, workdir, make_evaluator)["images_per_second"]


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--preset", default="simclr")
    parser.add_argument("--train", type=int, default=0, help="steps, for each `data.augment_on`")
    options = parser.parse_args()
    n, size, preset = options.images, options.size, options.preset
    files = photographs(n)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory, context.Pool(peer_views.WORKERS) as pool:
        folder = pathlib.Path(directory, "train")
        folder.mkdir()
        for i, data in enumerate(files):
            (folder / f"{i}.jpg").write_bytes(data)

        def pil() -> float:
            begin = time.perf_counter()
            work = functools.partial(peer_views.pil_pair, size=size)
            pairs = len(list(pool.imap_unordered(work, files, chunksize=4)))
            return pairs / (time.perf_counter() - begin)

        def torch(pillow: bool) -> Callable[[], float]:
            b = batch_size(n)
            batches = peer_views.torch_batches(sorted(folder.iterdir()), size, b, pillow)
            return lambda: rate(batches, n, b)

        contestants = {
            "host": pipeline(directory, n, size, preset, "host"),
            "both": pipeline(directory, n, size, preset, "both"),
            "device": device(size, preset, "both", min(32, n)),
            "resident": device(32, "cifar", "device", 512),
            "PIL": pil,
        }
        if importlib.util.find_spec("torchvision"):
            contestants |= {"torch": torch(pillow=False), "peers": torch(pillow=True)}
        for work in contestants.values():  # compiles, imports, fills caches
            work()
        rates = {name: [] for name in contestants}
        for _ in range(options.rounds):
            for name, work in contestants.items():
                rates[name].append(work())
        contestants.clear()  # ends the processes of the DataLoaders
    medians = {name: statistics.median(values) for name, values in rates.items()}
    mean = sum(map(len, files)) / n / 1000
    print(f"{n} JPEGs of {WIDTH} x {HEIGHT} ({mean:.0f} kB), two views of {size} px, {preset}, "
          f"{os.cpu_count()} cores, medians of {options.rounds}")  # fmt: skip
    base = "torch" if "torch" in medians else "PIL"
    print(f"{'':10}{'pairs/s':>10}{'x ' + base:>10}{'x host':>10}")
    for name, value in medians.items():
        print(
            f"{name:10}{value:10,.0f}{value / medians[base]:10.2f}{value / medians['host']:10.2f}"
        )
    if options.train:
        for where in ("host", "both", "device"):
            print(f"the demo, end to end, {where}: {trained(where, options.train):,.0f} pairs/s")


if __name__ == "__main__":
    main()
