"""What all versions of MoCo share: a second encoder whose parameters are a moving average."""

import dataclasses
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from common.method import Method, TrainState


@flax.struct.dataclass
class MomentumState(TrainState):
    """The state of a run with a momentum encoder.

    Attributes:
        key_params: encoder and head that make the keys; the average of `params` over the steps.
        key_batch_stats: running statistics of their own passes.
    """

    key_params: Any
    key_batch_stats: Any


class MomentumMethod(Method):
    """A method with a momentum encoder, which starts as a copy of the encoder."""

    key_parts = ("backbone", "head")  # the momentum encoder has no predictor

    def key_tree(self, tree: Any) -> Any:
        """A copy of the part of `params` or `batch_stats` that the momentum encoder has."""
        return jax.tree.map(jnp.copy, {k: x for k, x in tree.items() if k in self.key_parts})

    def started(self, start: TrainState) -> dict[str, Any]:
        """Fields of the first `MomentumState`, from a `TrainState`."""
        fields = {field.name: getattr(start, field.name) for field in dataclasses.fields(start)}
        return fields | {
            "key_params": self.key_tree(start.params),
            "key_batch_stats": self.key_tree(start.batch_stats),
        }

    def adopted(self, state: Any, taken: set[str]) -> tuple[Any, list[str]]:
        """Without a momentum encoder in that run, the key encoder is a copy of its weights."""
        if any(name.startswith("key_params/") for name in taken):
            return state, []
        names = ["key_params", "key_batch_stats"]
        copies = map(self.key_tree, (state.params, state.batch_stats))
        return dataclasses.replace(state, **dict(zip(names, copies, strict=True))), names

    @jax.named_scope("update")
    def averaged(self, state: Any, momentum: float | jax.Array) -> Any:
        """The momentum encoder's parameters after one update with the encoder's of this step."""
        params = {k: x for k, x in state.params.items() if k in self.key_parts}
        return optax.incremental_update(params, state.key_params, 1 - momentum)
