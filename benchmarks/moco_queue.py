"""MoCo's loss and queue against the length of the queue.

    python -m benchmarks.moco_queue [--lengths=4096,16384,65536,262144]

One step of the part that depends on the queue: value and gradient of InfoNCE, and the push. Times
are on one device, in turns with the usual code, a `[length, d]` array and one matrix of logits.
Memory and traffic are for one of many devices, from programs that are only compiled.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import side_by_side
from common import queue as queues
from common.contrast import normalize
from common.plan import collectives
from common.sharding import batch_sharding, make_mesh, replicated, state_shardings
from moco_jax.loss import info_nce

BATCH, DIM, TEMPERATURE = 256, 128, 0.2


def usual(queries, keys, queue, step):
    """As in the authors' code: all logits, cross-entropy with label 0, a pointer that wraps."""

    def loss(queries):
        q, k = normalize(queries), normalize(keys)
        exact = functools.partial(jnp.matmul, precision="highest")
        positive = jnp.sum(q * k, axis=1, keepdims=True)
        logits = jnp.concatenate([positive, exact(q, queue.T)], axis=1) / TEMPERATURE
        return (jax.nn.logsumexp(logits, axis=1) - logits[:, 0]).mean()

    value, gradient = jax.value_and_grad(loss)(queries)
    start = (step * BATCH) % queue.shape[0]
    return value, gradient, jax.lax.dynamic_update_slice(queue, normalize(keys), (start, 0))


def ours(queries, keys, queue, step, *, length, mesh=None):
    """As in `moco_jax/method.py`."""
    run = functools.partial(info_nce, length=length, step=step, temperature=TEMPERATURE, mesh=mesh)
    value, gradient = jax.value_and_grad(lambda q: run(q, keys, queue)[0])(queries)
    return value, gradient, queues.push(queue, normalize(keys), step)


def times(length: int, repeats: int) -> list[list]:
    """Rows of the table for one length."""
    rng = np.random.default_rng(0)
    queries, keys = (rng.normal(size=(BATCH, DIM)).astype(np.float32) for _ in range(2))
    queue = normalize(jnp.asarray(rng.normal(size=(length, DIM)), jnp.float32))
    slots = queues.Queue(keys=queue.reshape(-1, BATCH, DIM))
    kinds = {"usual": (usual, queue), "ours": (functools.partial(ours, length=length), slots)}
    steps, programs = {}, {}
    for name, (step, held) in kinds.items():
        steps[name] = jax.jit(step, donate_argnames="queue").lower(queries, keys, held, 3).compile()
        state = [held]

        def program(step=steps[name], state=state):  # the queue is updated in place
            value, gradient, state[0] = step(queries, keys, state[0], 3)
            return value, gradient

        programs[name] = program
    taken = side_by_side.seconds(programs, repeats)
    return [
        [f"{length:,}", name, side_by_side.milliseconds(taken[name]),
         f"{side_by_side.ratio(taken[name], taken['usual']):.2f}",
         f"{steps[name].memory_analysis().temp_size_in_bytes / 1e6:.1f}"]
        for name in kinds
    ]  # fmt: skip


def memory(length: int, devices: int) -> list:
    """A row: the part of the queue on a device, and the bytes it receives."""
    mesh = make_mesh(jax.devices()[:devices])
    rows = jax.ShapeDtypeStruct((BATCH, DIM), jnp.float32, sharding=batch_sharding(mesh))
    queue = jax.eval_shape(lambda key: queues.init(key, length, BATCH, DIM), jax.random.key(0))
    places = state_shardings(mesh, queue)
    queue = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), queue, places
    )
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    step = jax.jit(
        functools.partial(ours, length=length, mesh=mesh),
        donate_argnames="queue",
        out_shardings=(replicated(mesh), NamedSharding(mesh, PartitionSpec("data")), places),
    )
    step = step.lower(rows, rows, queue, number).compile()
    held, found = 4 * queue.keys.size // devices, step.memory_analysis()
    moved = sum(c.bytes for c in collectives.read(step.as_text(), devices) if c.group > 1)
    return [
        f"{length:,}", devices, f"{held / 1e6:.1f}", f"{found.temp_size_in_bytes / 1e6:.1f}",
        f"{moved / 1e3:.0f}",
    ]  # fmt: skip


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    integers = lambda text: [int(x) for x in text.split(",")]  # noqa: E731
    parser.add_argument("--lengths", type=integers, default=[4096, 16_384, 65_536, 262_144])
    parser.add_argument("--repeats", type=int, default=9)
    flags = parser.parse_args()
    side_by_side.devices()
    side_by_side.show(
        f"MoCo: loss, gradient and push of {BATCH} keys on one device",
        ["queue", "", "ms, median (range)", "of usual", "temporaries MB"],
        [row for length in flags.lengths for row in times(length, flags.repeats)],
    )
    side_by_side.show(
        "The same over devices, compiled",
        ["queue", "devices", "queue MB a device", "temporaries MB a device", "received kB"],
        [memory(length, n) for length in flags.lengths for n in (1, 8) if n <= jax.device_count()],
    )


if __name__ == "__main__":
    main()
