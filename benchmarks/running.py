"""A config's train step, compiled for one device and ready to be called repeatedly."""

from typing import Any

import jax
from ml_collections import ConfigDict

from common.data.feed import pipeline, resident
from common.data.feed.recipe import FeedRecipe
from common.data.sources.opening import open_source
from common.sharding import local_rows, make_mesh, to_global
from common.train.first_state import draw_state
from common.train.prepare import Extent, prepare
from common.train.step import compile_step, trace_step
from main import METHODS

# Of the run and of an epoch, and classes: for the schedule and the probe.
EXTENT = Extent(total_steps=100, steps_per_epoch=10, num_classes=10)


class Running:
    """Step, state and data of a run on one device; a dispatch is what it is in the training loop.

    Args:
        c: of the run.
        device: default the first.

    Attributes:
        method: of the run.
        state: the newest; a dispatch donates it.
        compiled: the step.
    """

    def __init__(self, c: ConfigDict, device: jax.Device | None = None) -> None:
        self.config, self.mesh = c, make_mesh([device or jax.devices()[0]])
        source = open_source(c.data, "train")
        on_device = c.data.augment_on == "device"
        self.data = resident.load(source, self.mesh) if on_device else {}
        rows = local_rows(self.mesh, c.batch_size)
        self.batches = pipeline.train_batches(source, FeedRecipe.of(c), rows=rows)
        run = prepare(METHODS[c.method], c, self.mesh, extent=EXTENT)
        self.method, self.key = run.method, run.root_key
        self.compiled = compile_step(run.method.train_step, run, self.data)
        self.state = draw_state(run)

    def dispatch(self) -> dict[str, Any]:
        """Makes `steps_per_dispatch` steps; returns the metrics of the last without waiting."""
        _, batch = self.batches.take(self.config.steps_per_dispatch)
        batch = to_global(self.mesh, batch) | self.data
        with jax.transfer_guard("disallow"):
            self.state, metrics = self.compiled(self.state, batch, self.key)
        return metrics


def traced(c: ConfigDict, device: jax.Device | None = None) -> jax.stages.Traced:
    """The step that `Running` compiles for random images, before it is lowered for a platform."""
    mesh, data = make_mesh([device or jax.devices()[0]]), {}
    if c.data.augment_on == "device":
        size = c.data.image_size
        data = resident.shapes_of(c.data.fake_examples, (size, size))
    run = prepare(METHODS[c.method], c, mesh, extent=EXTENT)
    return trace_step(run.method.train_step, run, data)


def flops(c: ConfigDict) -> float | None:
    """Floating-point operations of a step, as XLA counts them for a CPU before it compiles.

    After compiling, calls of libraries are counted differently on each platform, and on a GPU not
    at all. None where `JAX_PLATFORMS` excludes CPUs.
    """
    try:
        device = jax.devices("cpu")[0]
    except RuntimeError:
        return None
    return (traced(c, device).lower().cost_analysis() or {}).get("flops")
