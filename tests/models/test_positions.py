"""Position tables against their formula in other terms, and resizing against what it must keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.models import positions

RNG = np.random.default_rng(0)
RESIZED = jax.jit(positions.resized, static_argnums=(1, 2))


@pytest.mark.parametrize(("rows", "columns", "width"), [(14, 14, 384), (2, 7, 16)])
def test_the_fixed_table_is_that_of_moco_v3(rows, columns, width):
    """Place r, c, j: powers of one rotation e^(i w_j), of the row first; imaginary part first."""
    got = positions.sincos(rows, columns, width, token=False)
    assert got.shape == (1, rows * columns, width) and got.dtype == np.float64
    quarter = width // 4
    turns = np.exp(1j * np.exp(-np.log(10000) * 4 * np.arange(quarter) / width))
    got = got.reshape(rows, columns, 4, quarter)
    for r in range(rows):
        for c in range(columns):
            want = [(turns**r).imag, (turns**r).real, (turns**c).imag, (turns**c).real]
            np.testing.assert_allclose(got[r, c], want, rtol=0, atol=1e-12)


def test_the_row_of_a_class_token_is_zero_and_comes_first():
    with_token = positions.sincos(2, 3, 8, token=True)
    assert with_token.shape == (1, 7, 8)
    np.testing.assert_array_equal(with_token[:, 0], 0)
    np.testing.assert_array_equal(with_token[:, 1:], positions.sincos(2, 3, 8, token=False))


@pytest.mark.parametrize("prefix", [0, 1])
def test_a_table_for_the_same_grid_is_not_touched(prefix):
    table = jnp.asarray(RNG.normal(size=(1, prefix + 9, 4)), jnp.float32)
    assert positions.resized(table, (3, 3), prefix) is table


@pytest.mark.parametrize("grid", [(2, 7), (8, 3), (5, 5), (1, 1)])
def test_resizing_keeps_the_class_token_and_a_constant(grid):
    first, constant = RNG.normal(size=(2, 6)).astype(np.float32)
    table = np.concatenate([first[None], np.tile(constant, (16, 1))])[None]
    got = RESIZED(jnp.asarray(table), grid, 1)
    assert got.shape == (1, 1 + grid[0] * grid[1], 6)
    np.testing.assert_array_equal(got[0, 0], first)
    np.testing.assert_allclose(got[0, 1:], np.tile(constant, (grid[0] * grid[1], 1)), rtol=1e-5)


@pytest.mark.parametrize("grid", [(24, 12), (6, 24), (12, 6)])
def test_resizing_maps_a_ramp_to_the_ramp(grid):
    """Pixel centres: place i of n is at (i + 1/2) m / n - 1/2 of m. Its edges are repeated."""
    side, (rows, columns) = 12, grid
    ramp = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), -1)
    table = jnp.asarray(ramp.reshape(1, -1, 2), jnp.float32)
    got = np.asarray(RESIZED(table, grid, 0)).reshape(rows, columns, 2)
    r, c = ((np.arange(n) + 0.5) * side / n - 0.5 for n in grid)
    want = np.stack(np.meshgrid(r, c, indexing="ij"), -1)
    # The kernel reaches two places to either side, of the larger of both grids.
    far = [2 * max(1, side / n) for n in grid]
    inside = (far[0] <= r) & (r <= side - 1 - far[0]), (far[1] <= c) & (c <= side - 1 - far[1])
    assert all(x.any() for x in inside)
    np.testing.assert_allclose(got[np.ix_(*inside)], want[np.ix_(*inside)], rtol=0, atol=1e-4)


@pytest.mark.torch
@pytest.mark.parametrize(("side", "grid"), [(14, (24, 24)), (14, (7, 10)), (4, (4, 9))])
def test_resizing_is_pytorchs_antialiased_bicubic(side, grid):
    import torch

    table = RNG.normal(size=(1, 1 + side * side, 8)).astype(np.float32)
    images = torch.tensor(table[:, 1:].reshape(1, side, side, 8)).permute(0, 3, 1, 2)
    want = torch.nn.functional.interpolate(images, grid, mode="bicubic", antialias=True)
    want = want.permute(0, 2, 3, 1).reshape(-1, 8).numpy()
    got = RESIZED(jnp.asarray(table), grid, 1)
    np.testing.assert_array_equal(got[0, 0], table[0, 0])
    np.testing.assert_allclose(got[0, 1:], want, rtol=0, atol=2e-5)
