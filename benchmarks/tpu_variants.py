"""The step of a TPU config without parts that no field of a config switches, for docs/tpu.md."""

from typing import Any
from unittest import mock

from jax.sharding import Mesh

from common.models import attention
from common.plan import measure
from common.train import xla_options

FIELDS = ("xla", "row_major")


def compile_for(task: measure.Task, changes: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """`common.plan.measure.for_mesh` with changes in the code.

    Args:
        task: what to compile.
        changes: `xla`: compiler options instead of those of `xla_options.TPU_OPTIONS`; `row_major`:
            False lets XLA choose the order of a ViT's tokens in memory.
        mesh: the devices to compile for.
    """
    options = {}
    if "xla" in changes:
        options[task.config.model.encoder] = changes["xla"]
    order = attention.row_major if changes.get("row_major", True) else lambda tokens: tokens
    with (
        mock.patch.dict(xla_options.TPU_OPTIONS, options),
        mock.patch.object(attention, "row_major", order),
    ):
        return measure.for_mesh(task, mesh)
