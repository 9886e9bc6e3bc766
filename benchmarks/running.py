"""A config's train step, compiled for one device and ready to be taken again and again."""

from typing import Any

import jax
from ml_collections import ConfigDict

from benchmarks.scaling import METHODS
from common.data.feed import pipeline, resident
from common.data.feed.recipe import FeedRecipe
from common.data.sources.opening import open_source
from common.method import Method, make_setup, root_keys
from common.sharding import local_rows, make_mesh, replicated, state_shardings, to_global
from common.train.step import compile_step, trace_step

# Of the whole run, of an epoch, and classes: they shape a schedule and a probe.
STEPS, PER_EPOCH, CLASSES = 100, 10, 10


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
        self.method, abstract, shardings = described(c, self.mesh)
        self.compiled = compile_step(self.method, c, self.mesh, abstract, shardings, self.data)
        init_key, key = root_keys(c.seed)
        self.state = jax.jit(self.method.init, out_shardings=shardings)(init_key)
        self.key = jax.device_put(key, replicated(self.mesh))

    def dispatch(self) -> dict[str, Any]:
        """Takes `steps_per_dispatch` steps; the metrics of the last, which are still being made."""
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
    method, abstract, shardings = described(c, mesh)
    return trace_step(method, c, mesh, abstract, shardings, data)


def flops(c: ConfigDict) -> float | None:
    """Floating-point operations of a step, as XLA counts them for a CPU before it compiles.

    Afterwards some are in calls of libraries, whose counting depends on the platform, and on a GPU
    JAX does not count at all. None where JAX was told to leave CPUs alone (`JAX_PLATFORMS`).
    """
    try:
        device = jax.devices("cpu")[0]
    except RuntimeError:
        return None
    return (traced(c, device).lower().cost_analysis() or {}).get("flops")


def described(c: ConfigDict, mesh: jax.sharding.Mesh) -> tuple[Method, Any, Any]:
    """The method, and the shapes and shardings of its state."""
    method = METHODS[c.method](make_setup(c, mesh, STEPS, PER_EPOCH, CLASSES))
    abstract = jax.eval_shape(method.init, root_keys(0)[0])
    return method, abstract, state_shardings(mesh, abstract)
