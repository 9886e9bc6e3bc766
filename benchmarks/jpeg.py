"""The cost of `data.jpeg="exact"` and the error of "fast", compared with Pillow.

    python -m benchmarks.jpeg [--folder=PATH] [--images=64] [--rounds=9] [--size=224]

JPEGs are those of `benchmarks.input_pipeline`, or from a folder. The decoder alone is measured in
CPU time, both settings in turns for each file; the input pipeline (host's part, "both") in pairs a
second. Ratios are medians of the quotient within a round. Errors are in levels of 255, over all
pixels.
"""

import argparse
import io
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from benchmarks.input_pipeline import photographs, rate, settings
from common.data.sources.opening import open_source


def in_turn(decoders: dict[str, Callable], files: list[bytes]) -> dict[str, float]:
    """CPU seconds of each decoder for all files."""
    total = dict.fromkeys(decoders, 0.0)
    for data in files:
        for kind, decode in decoders.items():
            begin = time.process_time()
            decode(data)
            total[kind] += time.process_time() - begin
    return total


def difference(files: list[bytes], decode: Callable) -> tuple[int, np.ndarray]:
    """The largest difference from Pillow's pixels, and the mean of each channel."""
    worst, total, pixels = 0, np.zeros(3), 0
    for data in files:
        want = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
        off = decode(data).astype(int) - want
        worst, total = max(worst, int(np.abs(off).max())), total + off.sum((0, 1))
        pixels += off[..., 0].size
    return worst, total / pixels


def measured(files: list[bytes], rounds: int, size: int) -> dict[str, dict]:
    """By name of the decoder: seconds an image, pairs a second, and the difference."""
    import tensorflow as tf

    from common.data.feed import pipeline
    from common.data.feed.recipe import FeedRecipe
    from common.data.images.decoding import Decoding

    def decoder(kind: str) -> Callable[[bytes], np.ndarray]:
        method = Decoding(jpeg=kind).dct_method
        return lambda data: tf.io.decode_jpeg(data, channels=3, dct_method=method).numpy()

    kinds = ("fast", "exact")
    decoders = {kind: decoder(kind) for kind in kinds}
    in_turn(decoders, files[:1])
    rounds_of = [in_turn(decoders, files) for _ in range(rounds)]
    times = {kind: [taken[kind] for taken in rounds_of] for kind in kinds}
    pairs = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        for i, data in enumerate(files):
            (pathlib.Path(folder) / f"{i:05}.jpg").write_bytes(data)
        batches = {}
        for kind in kinds:
            config = settings(size, "simclr", "both", f"folder:{folder}", len(files))
            config.data.jpeg = kind
            source = open_source(config.data, "train")
            rows = np.arange(config.batch_size)
            batches[kind] = pipeline.train_batches(source, FeedRecipe.of(config), rows=rows)
            next(batches[kind])  # traces
        for _ in range(rounds):
            for kind in kinds:
                pairs[kind].append(rate(batches[kind], len(files), len(rows)))
    found = {}
    for kind in kinds:
        worst, mean = difference(files, decoders[kind])
        ratio = zip(times[kind], times["fast"], strict=True)
        slower = zip(pairs["fast"], pairs[kind], strict=True)
        found[kind] = {
            "ms": 1000 * statistics.median(times[kind]) / len(files),
            "of_fast": statistics.median(a / b for a, b in ratio),
            "pairs": statistics.median(pairs[kind]),
            "pair_of_fast": statistics.median(a / b for a, b in slower),
            "worst": worst,
            "mean": mean,
        }
    return found


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default="")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--size", type=int, default=224)
    options = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if options.folder:
        paths = sorted(pathlib.Path(options.folder).rglob("*.jpg"))
        paths = paths[:: max(1, len(paths) // options.images)][: options.images]
        files = [path.read_bytes() for path in paths]
    else:
        files = photographs(options.images)
    print(f"{len(files)} JPEGs, mean {np.mean([*map(len, files)]) / 1000:.0f} kB, "
          f"{os.cpu_count()} cores, medians of {options.rounds}")  # fmt: skip
    print(f"{'':8}{'ms':>8}{'x fast':>8}{'pairs/s':>9}{'x fast':>8}{'worst':>7}   mean of R, G, B")
    for kind, x in measured(files, options.rounds, options.size).items():
        mean = ", ".join(f"{m:+.2f}" for m in x["mean"])
        print(f"{kind:8}{x['ms']:8.2f}{x['of_fast']:8.3f}{x['pairs']:9.0f}"
              f"{x['pair_of_fast']:8.3f}{x['worst']:7}   {mean}")  # fmt: skip


if __name__ == "__main__":
    main()
