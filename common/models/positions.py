"""Position tables of vision transformers: MoCo v3's fixed one, and resizing."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def sincos(rows: int, columns: int, width: int, token: bool) -> np.ndarray:
    """The fixed 2-D table of MoCo v3's code (Chen et al. 2021, section 5).

    The first half of the width is the row: `sin(r w_j)`, then `cos(r w_j)`; the second the column;
    `w_j = 10000^(-j / (width / 4))`, j = 0 ... width / 4 - 1. The table of the same name in
    big_vision has the column first and the exponent -j / (width / 4 - 1): another table.

    Args:
        rows: patches from top to bottom.
        columns: patches from left to right.
        width: of the tokens, a multiple of 4.
        token: whether a row of zeros for a class token comes first.

    Returns:
        float64 `[1, rows * columns (+ 1), width]`.
    """
    quarter = width // 4
    w = 10000.0 ** (-np.arange(quarter) / quarter)
    r, c = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    angles = [p.reshape(-1, 1) * w[None] for p in (r, c)]
    table = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)
    return np.concatenate([np.zeros((int(token), width)), table])[None]


def resized(table: jax.Array, grid: Sequence[int], prefix: int) -> jax.Array:
    """A table for a square grid of patches, as one for another grid: bicubic, antialiased.

    As timm does when an image size differs from that of the weights.

    Args:
        table: `[1, prefix + side^2, d]`.
        grid: rows and columns of patches wanted.
        prefix: leading rows that are not resized (the class token's).

    Returns:
        `[1, prefix + rows * columns, d]`; the table itself if the grid is the same.
    """
    side = int(np.sqrt(table.shape[1] - prefix))
    if tuple(grid) == (side, side):
        return table
    first, rest = table[:, :prefix], table[:, prefix:].reshape(1, side, side, -1)
    rest = jax.image.resize(rest, (1, *grid, rest.shape[-1]), "bicubic", antialias=True)
    return jnp.concatenate([first, rest.reshape(1, -1, rest.shape[-1])], axis=1)
