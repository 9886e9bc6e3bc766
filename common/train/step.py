"""The train step as one compiled program, before any data is read."""

from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from common.data.feed.recipe import FeedRecipe
from common.method import Method
from common.sharding import replicated
from common.train import dispatch
from common.train.xla_options import compiler_options


def compile_step(
    method: Method,
    config: ConfigDict,
    mesh: Mesh,
    abstract: Any,
    shardings: Any,
    data: dict | None = None,
) -> jax.stages.Compiled:
    """Compiles the train step once, with what of the augmentation runs on the device before it.

    The compiled object refuses every other shape or sharding, so that a run cannot recompile
    unseen; its analysis gives the FLOPs of the start-up summary, and all of `--mode=plan`.

    Args:
        method: gives `train_step`.
        config: for the batch.
        mesh: the device mesh; its devices may be described only (`jax.experimental.topologies`).
        abstract: the state's `jax.eval_shape`.
        shardings: the state's, from `state_shardings`.
        data: with `data.augment_on="device"`, what `resident.load` gave, or its shapes.

    Returns:
        `(state, batch, key) -> (state, metrics)`. The batch is what `dispatch.batch_shapes` says;
        with `steps_per_dispatch` > 1 the metrics are the last step's, and "each" holds
        `divergence.WATCHED` of all steps.
    """

    traced = trace_step(method, config, mesh, abstract, shardings, data)
    options = compiler_options(mesh.devices.flat[0].platform, config.tpu_compiler_options)
    return traced.lower().compile(compiler_options=options)


def trace_step(
    method: Method,
    config: ConfigDict,
    mesh: Mesh,
    abstract: Any,
    shardings: Any,
    data: dict | None = None,
) -> jax.stages.Traced:
    """What `compile_step` compiles; takes what that takes.

    It can be lowered for platforms that are not there: `.lower(lowering_platforms=("cuda",))`.
    """

    def place(s: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding)

    recipe = FeedRecipe.of(config)
    batch = dispatch.batch_shapes(recipe, mesh, data)
    key = place(jax.eval_shape(lambda: jax.random.key(0)), replicated(mesh))
    step = jax.jit(
        dispatch.program(method.train_step, recipe, mesh),
        donate_argnames=("state",),
        out_shardings=(shardings, replicated(mesh)),
    )
    return step.trace(jax.tree.map(place, abstract, shardings), batch, key)


def cost(compiled: jax.stages.Compiled, microbatches: int = 1) -> dict[str, float]:
    """XLA's `flops` and `bytes accessed` of a compiled step, of one device.

    XLA counts the body of a loop once. With micro-batches nearly all work is in such a body, so the
    figures are multiplied: the flops are then within some per cent, the bytes an upper bound.
    """
    found = compiled.cost_analysis() or {}
    names = ("flops", "bytes accessed")
    return {name: found[name] * microbatches for name in names if name in found}
