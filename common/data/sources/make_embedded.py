"""Rebuilds `fashion_mnist.npz`, the labelled set that ships with this code.

    apt-get download dataset-fashion-mnist        # Debian or Ubuntu; no root needed
    dpkg-deb -x dataset-fashion-mnist_*.deb extracted
    python -m common.data.sources.make_embedded extracted/usr/share/datasets/fashion-mnist

The first 10,000 training and the first 2,000 test images are kept, unchanged and in order.
"""

import argparse
import gzip
import pathlib
import struct
from typing import Any

import numpy as np

CLASS_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
TRAIN_EXAMPLES = 10_000
TEST_EXAMPLES = 2_000


def read_idx(path: pathlib.Path) -> np.ndarray:
    """Reads a gzipped IDX file of unsigned bytes (the format of MNIST).

    Args:
        path: the `.gz` file.

    Returns:
        uint8 array with the shape that the file's header states.

    Raises:
        ValueError: the header is not that of an IDX file of unsigned bytes.
    """
    data = gzip.decompress(path.read_bytes())
    zeros, kind, ndim = struct.unpack_from(">HBB", data)
    if zeros != 0 or kind != 8:
        raise ValueError(f"{path}: not an IDX file of unsigned bytes")
    shape = struct.unpack_from(f">{ndim}I", data, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def build(folder: pathlib.Path, out: pathlib.Path) -> None:
    """Writes the archive `out` from the four IDX files in `folder`."""
    arrays: dict[str, Any] = {"class_names": np.array(CLASS_NAMES)}
    splits = (("train", "train", TRAIN_EXAMPLES), ("test", "t10k", TEST_EXAMPLES))
    for split, prefix, count in splits:
        arrays[f"{split}_images"] = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")[:count]
        arrays[f"{split}_labels"] = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")[:count]
    np.savez_compressed(out, **arrays)


def main() -> None:
    """Command line: the folder with the IDX files, and where to write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, help="folder with the four *-ubyte.gz files")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path(__file__).with_name("fashion_mnist.npz")
    )
    args = parser.parse_args()
    build(args.folder, args.out)
    print(f"wrote {args.out} ({args.out.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
