"""Code that depends on the platform a program is compiled for."""

from collections.abc import Callable
from typing import Any

import jax

GPUS = ("cuda", "rocm")


def on_gpu(gpu: Callable, other: Callable, *arguments: Any) -> Any:
    """Applies `gpu` to the arguments where the program is lowered for a GPU, elsewhere `other`.

    That need not be the platform it is traced on: a plan for a TPU may be made on a GPU.
    """
    return jax.lax.platform_dependent(*arguments, **dict.fromkeys(GPUS, gpu), default=other)


def on_tpu(tpu: Callable, other: Callable, *arguments: Any) -> Any:
    """Applies `tpu` to the arguments where the program is lowered for a TPU, elsewhere `other`."""
    return jax.lax.platform_dependent(*arguments, tpu=tpu, default=other)
