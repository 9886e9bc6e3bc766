"""Memory that the losses and their gradients need besides their arguments.

    python -m benchmarks.loss_memory

XLA's own analysis of the compiled program for one device of this machine; nothing is run.
"""

import jax
import jax.numpy as jnp

from common.queue import Queue, slots
from moco_jax.loss import info_nce
from simclr_jax.loss import nt_xent

DIM = 128


def mib(loss, *shapes) -> tuple[float, float]:
    """MiB of the arguments, and the peak besides them."""
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    found = jax.jit(jax.grad(loss, (0, 1))).lower(*arguments).compile().memory_analysis()
    return found.argument_size_in_bytes / 2**20, found.temp_size_in_bytes / 2**20


def main() -> None:
    """Prints a Markdown table."""
    print("| batch | SimCLR: arguments | beside | MoCo, K = 65,536: arguments | beside |")
    print("| --: | --: | --: | --: | --: |")
    for n in (256, 1024, 4096):
        simclr = mib(nt_xent, (n, DIM), (n, DIM))

        def moco_loss(queries, keys, queue):
            return info_nce(queries, keys, Queue(queue), length=65536, step=0)[0]

        moco = mib(moco_loss, (n, DIM), (n, DIM), (slots(65536, n), n, DIM))
        print(f"| {n:,} | " + " | ".join(f"{x:.2f} MiB" for x in simclr + moco) + " |", flush=True)


if __name__ == "__main__":
    main()
