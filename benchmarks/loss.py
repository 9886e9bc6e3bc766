"""NT-Xent, streamed, against full logits: time by tile size, memory by devices; DCL and SupCon.

    python -m benchmarks.loss [--rows=1024,8192,16384] [--blocks=256,512,1024,2048]

Times are for value and gradient, in turns, on one device; full logits are the obvious code (one
matrix, a mask, logsumexp), and `optax.losses.ntxent`. Memory is what the compiler reserves besides
arguments and results, for programs that are only compiled, up to 2N = 131,072, where full logits
would take 69 GB. Simulated devices share one CPU, so they are not timed.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import side_by_side
from common.contrast import BLOCK_SIZE, normalize
from common.plan import collectives
from common.sharding import batch_sharding, make_mesh
from simclr_jax.loss import nt_xent_with_metrics
from simclr_jax.supcon import supcon_with_metrics

DIM, TEMPERATURE, CLASSES = 128, 0.1, 10
OPTAX_ROWS = 1024  # it materialises the products [2n, 2n, d] before summing them
LIMIT = 4e9  # bytes: programs that take more are compiled but not run
MEMORY_ROWS, DEVICES = (8192, 32_768, 131_072), (1, 2, 4, 8)


def full_logits(z: jax.Array) -> jax.Array:
    """`nt_xent` of `z [n, 2, d]` with its 2n x 2n matrix."""
    n = z.shape[0]
    rows = normalize(z).reshape(2 * n, -1)
    logits = jnp.matmul(rows, rows.T, precision="highest") / TEMPERATURE
    index = jnp.arange(2 * n)
    logits = jnp.where(index[:, None] == index[None], -jnp.inf, logits)
    positive = jnp.take_along_axis(logits, (index ^ 1)[:, None], 1)[:, 0]
    return (jax.nn.logsumexp(logits, axis=1) - positive).mean()


def optax_logits(z: jax.Array) -> jax.Array:
    """The same by `optax`."""
    return optax.losses.ntxent(
        z.reshape(-1, z.shape[2]), jnp.repeat(jnp.arange(z.shape[0]), 2), TEMPERATURE
    )


def streamed(z: jax.Array, block: int, mesh: jax.sharding.Mesh | None = None) -> jax.Array:
    """Ours."""
    return nt_xent_with_metrics(z, TEMPERATURE, mesh=mesh, block_size=block)[0]


def dcl(z: jax.Array) -> jax.Array:
    """DCL in tiles of the default size."""
    return nt_xent_with_metrics(z, TEMPERATURE, decoupled=True)[0]


def supcon(z: jax.Array) -> jax.Array:
    """SupCon likewise, of classes of equal size."""
    labels = jnp.arange(z.shape[0], dtype=jnp.int32) % CLASSES
    return supcon_with_metrics(z, labels, TEMPERATURE)[0]


def compiled(loss, rows, sharding=None):
    """Value and gradient for 2N = rows."""
    z = jax.ShapeDtypeStruct((rows // 2, 2, DIM), jnp.float32, sharding=sharding)
    return jax.jit(jax.value_and_grad(loss)).lower(z).compile()


def times(rows: int, blocks: list[int], repeats: int) -> list[list]:
    """Rows of the table for one N."""
    losses = {"full logits": full_logits}
    if rows <= OPTAX_ROWS:
        losses["optax ntxent"] = optax_logits
    losses |= {f"streamed, {b}": functools.partial(streamed, block=b) for b in blocks if b <= rows}
    losses |= {f"DCL, {BLOCK_SIZE}": dcl, f"SupCon, {BLOCK_SIZE}": supcon}
    z = np.random.default_rng(0).normal(size=(rows // 2, 2, DIM)).astype(np.float32)
    z = jax.device_put(z, jax.devices()[0])
    steps = {name: compiled(loss, rows) for name, loss in losses.items()}
    sizes = {name: step.memory_analysis().temp_size_in_bytes for name, step in steps.items()}
    runnable = {n: functools.partial(step, z) for n, step in steps.items() if sizes[n] < LIMIT}
    taken = side_by_side.seconds(runnable, repeats)
    full = taken.get("full logits")
    return [
        [f"{rows:,}", name,
         side_by_side.milliseconds(taken[name]) if name in taken else None,
         f"{side_by_side.ratio(taken[name], full):.2f}" if full and name in taken else None,
         f"{size / 1e6:,.0f}"]
        for name, size in sizes.items()
    ]  # fmt: skip


def memory(rows: int, devices: int) -> list:
    """A row: what a device holds and receives."""
    mesh = make_mesh(jax.devices()[:devices])
    step = compiled(
        functools.partial(streamed, block=BLOCK_SIZE, mesh=mesh), rows, batch_sharding(mesh)
    )
    size, z = step.memory_analysis().temp_size_in_bytes, 4 * rows * DIM
    tiles = 2 * 4 * BLOCK_SIZE**2
    moved = sum(c.bytes for c in collectives.read(step.as_text(), devices) if c.group > 1)
    return [
        f"{rows:,}", devices, f"{4 * rows**2 / devices / 1e6:,.0f}", f"{z / 1e6:.1f}",
        f"{size / 1e6:.1f}", f"{max(0, size - tiles) / z:.2f}", f"{moved / 1e6:.2f}",
    ]  # fmt: skip


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    integers = lambda text: [int(x) for x in text.split(",")]  # noqa: E731
    parser.add_argument("--rows", type=integers, default=[1024, 8192, 16_384])
    parser.add_argument("--blocks", type=integers, default=[256, 512, 1024, 2048])
    parser.add_argument("--repeats", type=int, default=3)
    flags = parser.parse_args()
    side_by_side.devices()
    side_by_side.show(
        "NT-Xent on one device, value and gradient",
        ["2N", "loss, tile", "ms, median (range)", "of full logits", "temporaries MB"],
        [row for rows in flags.rows for row in times(rows, flags.blocks, flags.repeats)],
    )
    side_by_side.show(
        f"NT-Xent in tiles of {BLOCK_SIZE}, compiled",
        ["2N", "devices", "full logits MB", "z MB", "temporaries MB",
         "less two tiles, in z", "received MB"],
        [memory(rows, n) for rows in MEMORY_ROWS for n in DEVICES if n <= jax.device_count()],
    )  # fmt: skip


if __name__ == "__main__":
    main()
