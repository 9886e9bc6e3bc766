"""The train step as one compiled program, before any data is read."""

from typing import Any

import jax

from common.method import Step
from common.sharding import replicated
from common.train import dispatch
from common.train.prepare import Prepared
from common.train.xla_options import compiler_options


def compile_step(train_step: Step, run: Prepared, data: dict | None = None) -> jax.stages.Compiled:
    """Compiles the train step once, with the part of the augmentation that the device does.

    The compiled object refuses every other shape or sharding, so that a run cannot recompile
    unseen; its analysis gives the FLOPs of the start-up summary, and all of `--mode=plan`.

    Args:
        train_step: the method's, or one that wraps it.
        run: on devices that may be described only (`jax.experimental.topologies`).
        data: with `data.augment_on="device"`, what `resident.load` gave, or its shapes.

    Returns:
        `(state, batch, key) -> (state, metrics)`. The batch is what `dispatch.batch_shapes` says;
        with `steps_per_dispatch` > 1 the metrics are the last step's, and "each" holds
        `divergence.WATCHED` of all steps.
    """
    platform = run.mesh.devices.flat[0].platform
    config = run.config
    encoder = config.model.encoder if config.tpu_compiler_options else None
    options = compiler_options(platform, encoder)
    return trace_step(train_step, run, data).lower().compile(compiler_options=options)


def trace_step(train_step: Step, run: Prepared, data: dict | None = None) -> jax.stages.Traced:
    """What `compile_step` compiles; takes what that takes.

    It can be lowered for platforms that are not there: `.lower(lowering_platforms=("cuda",))`.
    """

    def with_sharding(s: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding)

    everywhere = replicated(run.mesh)
    state = jax.tree.map(with_sharding, run.abstract, run.shardings)
    batch = dispatch.batch_shapes(run.recipe, run.mesh, data)
    key = with_sharding(jax.eval_shape(lambda: jax.random.key(0)), everywhere)
    step = jax.jit(
        dispatch.program(train_step, run.recipe, run.mesh),
        donate_argnames=("state",),
        out_shardings=(run.shardings, everywhere),
    )
    return step.trace(state, batch, key)


def cost(compiled: jax.stages.Compiled, microbatches: int = 1) -> dict[str, float]:
    """XLA's `flops` and `bytes accessed` of a compiled step, of one device.

    XLA counts the body of a loop once. With micro-batches nearly all work is in such a body, so the
    figures are multiplied: the flops are then within a few per cent, the bytes an upper bound.
    """
    found = compiled.cost_analysis() or {}
    names = ("flops", "bytes accessed")
    return {name: found[name] * microbatches for name in names if name in found}
