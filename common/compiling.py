"""The train step as one compiled program, before any data is read."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from common.data import presets
from common.method import Method
from common.sharding import batch_sharding, replicated

# XLA options of the train step on TPU; docs/tpu.md says what each bought, and what others did not.
TPU_OPTIONS = {
    # Fast memory for each fusion, twice the default. With 65536 compiling takes twice as long.
    "xla_tpu_scoped_vmem_limit_kib": "32768",
}


def compiler_options(platform: str, config: ConfigDict) -> dict[str, str] | None:
    """What to compile a train step with; None is XLA's defaults.

    Args:
        platform: "cpu", "gpu" or "tpu".
        config: `tpu_compiler_options=False` turns all of `TPU_OPTIONS` off.
    """
    return dict(TPU_OPTIONS) if platform == "tpu" and config.tpu_compiler_options else None


def compile_step(
    method: Method, config: ConfigDict, mesh: Mesh, abstract: Any, shardings: Any
) -> jax.stages.Compiled:
    """Compiles the train step once.

    The compiled object refuses every other shape or sharding, so that a run cannot recompile
    unseen; its analysis gives the FLOPs of the start-up summary, and all of `--mode=plan`.

    Args:
        method: gives `train_step`.
        config: for the batch.
        mesh: the device mesh; its devices may be described only (`jax.experimental.topologies`).
        abstract: the state's `jax.eval_shape`.
        shardings: the state's, from `state_shardings`.
    """

    def place(s: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding)

    b, size = config.batch_size, presets.resolve_views(config)[0].size
    rows = batch_sharding(mesh)
    batch = {
        "images": jax.ShapeDtypeStruct((b, 2, size, size, 3), np.uint8, sharding=rows),
        "labels": jax.ShapeDtypeStruct((b,), np.int32, sharding=rows),
    }
    key = place(jax.eval_shape(lambda: jax.random.key(0)), replicated(mesh))
    step = jax.jit(
        method.train_step,
        donate_argnames=("state",),
        out_shardings=(shardings, replicated(mesh)),
    )
    lowered = step.lower(jax.tree.map(place, abstract, shardings), batch, key)
    options = compiler_options(mesh.devices.flat[0].platform, config)
    return lowered.compile(compiler_options=options)
