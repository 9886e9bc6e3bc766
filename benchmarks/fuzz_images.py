"""Damaged image files of every kind through the `folder:` source: no crash, no hang.

    python -m benchmarks.fuzz_images --files=10000 [--seed=0]

Each file is a valid one with a few bytes flipped, cut, copied, zeroed or exchanged.
One epoch of training views and one of evaluation images are read with
`data.on_corrupt="replace"`; a JSON line says how many files loaded and how many were replaced.
"""

import argparse
import faulthandler
import io
import json
import os
import pathlib
import sys
import tempfile
import time

import numpy as np
from PIL import Image

from common.data.sources.opening import open_source

PER_FOLDER = 500  # so that few files are read again because of a bad one
SECONDS = 600  # without a batch: a hang


def originals(rng: np.random.Generator) -> list[tuple[str, bytes]]:
    """(suffix, bytes) of small images of every kind."""
    small = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
    rgb = small.resize((40, 30), Image.BICUBIC)
    more = {"save_all": True, "append_images": [rgb.rotate(180)]}
    wide = Image.fromarray((np.arange(1200).reshape(30, 40) * 50).astype(np.uint16))
    exif, found = Image.Exif(), []
    exif[0x0112] = 6  # an orientation
    for suffix, kind, image, options in (
        ("jpg", "JPEG", rgb, {}),
        ("jpg", "JPEG", rgb, {"progressive": True}),
        ("jpg", "JPEG", rgb.convert("L"), {}),
        ("jpg", "JPEG", rgb, {"exif": exif}),
        ("jpg", "JPEG", rgb.convert("CMYK"), {}),
        ("png", "PNG", rgb, {}),
        ("png", "PNG", rgb.convert("P"), {}),
        ("png", "PNG", rgb.convert("RGBA"), {}),
        ("png", "PNG", rgb, {"exif": exif}),
        ("png", "PNG", wide, {}),
        ("png", "PNG", rgb, more),
        ("gif", "GIF", rgb, more),
        ("bmp", "BMP", rgb, {}),
        ("webp", "WEBP", rgb, {}),
        ("webp", "WEBP", rgb, more),
        ("tiff", "TIFF", rgb, {}),
        ("tiff", "TIFF", wide, {"exif": exif}),
        ("ppm", "PPM", rgb, {}),
    ):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        found.append((suffix, buffer.getvalue()))
    return found


def mutate(data: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    """A damaged copy, with one to four faults."""
    out = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        if not out:
            break
        at, length = int(rng.integers(len(out))), int(rng.integers(1, 40))
        header = int(rng.integers(min(len(out), 64)))
        kind = rng.integers(8)
        if kind == 0:
            out[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            out[header] = int(rng.integers(256))
        elif kind == 2:
            del out[at:]
        elif kind == 3:
            out[at : at + length] = bytes(length)
        elif kind == 4:
            out[at:at] = out[header : header + length]
        elif kind == 5:
            del out[at : at + length]
        elif kind == 6:
            out[at : at + length] = rng.bytes(length)
        else:
            other = others[int(rng.integers(len(others)))]
            out = bytearray(other[: len(other) // 2]) + out[len(out) // 2 :]
    return bytes(out)


def read(folder: pathlib.Path, count: int) -> int:
    """Reads every image of a folder twice; returns how many had to be replaced."""
    from common.config import base_config
    from common.data.feed import feed, pipeline
    from common.data.feed.recipe import FeedRecipe
    from main import METHODS

    c = base_config("simclr", METHODS["simclr"].default_config())
    c.data.source, c.data.on_corrupt = f"folder:{folder}", "replace"
    c.data.image_size, c.batch_size, c.data.exif_rotation = 16, 20, True
    source = open_source(c.data, "train")
    assert source.num_examples == count
    batches = pipeline.train_batches(source, FeedRecipe.of(c), rows=np.arange(20))
    for _ in range(count // 20):
        faulthandler.dump_traceback_later(SECONDS, exit=True)  # restarted for each batch
        batch = next(batches)
        assert batch["images"].shape == (20, 2, 16, 16, 3)
    plan = [np.arange(i, i + 20) for i in range(0, count, 20)]
    evaluated = 0
    for images, _ in feed.eval_feed(source, plan, 16):
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        evaluated += len(images)
    assert evaluated == count
    return source.corrupt_count


def fuzz(files: int, seed: int) -> dict:
    """Writes and reads `files` files; returns the counts."""
    rng, begin, replaced, done = np.random.default_rng(seed), time.monotonic(), 0, 0
    good = originals(rng)
    while done < files:
        count = min(PER_FOLDER, files - done)
        with tempfile.TemporaryDirectory() as scratch:
            folder = pathlib.Path(scratch)
            for i in range(count):
                suffix, data = good[int(rng.integers(len(good)))]
                # one in twenty stays valid, so that a replacement can always be found
                data = data if i % 20 == 0 else mutate(data, [d for _, d in good], rng)
                (folder / f"{i:04}.{suffix}").write_bytes(data)
            replaced += read(folder, count)
        done += count
        print(f"\r{done:,} files, {replaced:,} replaced", end="", file=sys.stderr, flush=True)
    faulthandler.cancel_dump_traceback_later()
    print(file=sys.stderr)
    return {
        "files": done,
        "loaded": done - replaced,
        "replaced": replaced,
        "seconds": round(time.monotonic() - begin, 1),
    }


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=10_000, help="a multiple of 20")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    print(json.dumps(fuzz(options.files, options.seed)))


if __name__ == "__main__":
    main()
