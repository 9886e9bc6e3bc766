"""A momentum encoder: the average of an encoder over the steps, which makes keys.

Of every version of MoCo, and of SimCLR's memory.
"""

import dataclasses
import logging
import math
from typing import Any, TypeVar

import flax
import jax
import jax.numpy as jnp
import optax

from common import queue as queues
from common.errors import UserError
from common.setup import Setup, TrainState

PARTS = ("backbone", "head")  # a momentum encoder has no predictor


@flax.struct.dataclass
class MomentumState(TrainState):
    """The state of a run with a momentum encoder.

    Attributes:
        key_params: encoder and head that make the keys; the average of `params` over the steps.
        key_batch_stats: running statistics of their own passes.
    """

    key_params: Any
    key_batch_stats: Any


@flax.struct.dataclass
class QueueState(MomentumState):
    """The state of a run with a queue of past keys, beside the momentum encoder that makes them."""

    queue: queues.Queue


State = TypeVar("State", bound=MomentumState)


def started(start: TrainState) -> dict[str, Any]:
    """Fields of the first `MomentumState`: the momentum encoder is a copy of the encoder."""
    fields = {field.name: getattr(start, field.name) for field in dataclasses.fields(start)}
    copies = map(copied, (start.params, start.batch_stats))
    return fields | dict(zip(("key_params", "key_batch_stats"), copies, strict=True))


def copied(tree: Any) -> Any:
    """A copy of the part of `params` or `batch_stats` that a momentum encoder has."""
    return jax.tree.map(jnp.copy, {k: x for k, x in tree.items() if k in PARTS})


@jax.named_scope("update")
def averaged(
    state: MomentumState, momentum: float | jax.Array, frozen: tuple[tuple[str, ...], ...]
) -> Any:
    """The momentum encoder's parameters after one update with the encoder's of this step.

    He et al. 2020 (arXiv 1911.05722), eq. 2.

    Args:
        state: before the step.
        momentum: share of the old parameters, in [0, 1].
        frozen: parameters that are not trained, see `Network.frozen`. They are left alone: a mean
            of equal numbers is off by a rounding.
    """
    params = {part: state.params[part] for part in PARTS}
    new = optax.incremental_update(params, state.key_params, 1 - momentum)
    for part, name in frozen:
        new[part] = new[part] | {name: state.key_params[part][name]}
    return new


def adopted(state: State, taken: set[str]) -> tuple[State, list[str]]:
    """As `Method.adopted`: after a run without momentum encoder it is a copy of that run's weights.

    With one it is that of the run.
    """
    if any(name.startswith("key_params/") for name in taken):
        return state, []
    names = ["key_params", "key_batch_stats"]
    copies = map(copied, (state.params, state.batch_stats))
    return dataclasses.replace(state, **dict(zip(names, copies, strict=True))), names


def cosine(step: jax.Array, total_steps: int, start: float, end: float) -> jax.Array:
    """The momentum of step t of T: `end - (end - start) (1 + cos(pi t / T)) / 2`.

    Grill et al. 2020 (arXiv 2006.07733), section 3.2; t counts the steps of the warm-up too.

    Args:
        step: t = 0, 1 ... T - 1.
        total_steps: T.
        start: in step 0.
        end: where it would be in step T.
    """
    fraction = step.astype(float) / total_steps
    return end - (end - start) * (1 + jnp.cos(math.pi * fraction)) / 2


def check(field: str, momentum: float) -> None:
    """Raises a `UserError` that names `field` unless 0 <= momentum < 1."""
    if not 0 <= momentum < 1:
        raise UserError(f"{field}={momentum}: expected 0 <= momentum < 1")


def warn_of_long_queue(field: str, length: int, rows: int, setup: Setup) -> None:
    """Warns if a queue remembers keys of the images that are contrasted with it.

    Args:
        field: of the length.
        length: of the queue.
        rows: keys that enter it in a step.
        setup: of the run.
    """
    images, keys = setup.steps_per_epoch * setup.batch_size, rows // setup.batch_size
    if length >= keys * (images + setup.batch_size):
        logging.warning(
            "%s=%d is longer than an epoch, of %d keys: earlier keys of an image are among its "
            "negatives; use less than %d", field, length, keys * images, keys * images,
        )  # fmt: skip
