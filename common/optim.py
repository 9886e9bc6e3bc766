"""The optimizer section -> learning-rate schedule and optax transformation.

Every update rule is optax's own; this file only chooses, scales by the global batch, and sets the
masks that the published recipes need.
"""

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import optax

from common.config import one_of_field
from common.errors import UserError

FORMS = '"10 epochs", "500 steps", "5 %" (of the whole run), or a whole number of steps'
_DURATION = re.compile(r"\s*(\d*\.?\d+(?:e[+-]?\d+)?)\s*(epochs?|steps?|%)?\s*", re.IGNORECASE)


def steps_of(
    duration: str | float, steps_per_epoch: int, total: int | None = None, name: str = "duration"
) -> int:
    """Turns a duration into a number of steps, to the nearest; only 0 becomes 0.

    Args:
        duration: "10 epochs", "500 steps", "5 %", or a whole number (of steps).
        steps_per_epoch: steps in one epoch, >= 1.
        total: steps of the whole run, for "%"; None where a percentage makes no sense.
        name: the config field, for the error.

    Returns:
        The number of steps, >= 0.

    Raises:
        UserError: if the text has none of these forms.
    """
    text = str(duration)
    match = _DURATION.fullmatch(text)
    if isinstance(duration, bool) or not match:
        raise UserError(f'{name}="{text}" is not a duration: write {FORMS}')
    value, unit = float(match[1]), (match[2] or "").lower()
    if unit.startswith("epoch"):
        steps = value * steps_per_epoch
    elif unit == "%":
        if total is None:
            raise UserError(
                f'{name}="{text}" is a percentage, not possible here: use epochs or steps'
            )
        steps = value / 100 * total
    else:
        steps = value
        if value != int(value):
            raise UserError(f'{name}="{text}" is not a whole number of steps: write {FORMS}')
    # The small term makes 0.35 % of 1000, in floating point 3.4999999999999996, round as 3.5 does.
    return max(1, math.floor(steps + 0.5 + 1e-9)) if steps > 0 else 0


def peak_learning_rate(c: ml_collections.ConfigDict, batch_size: int) -> float:
    """Returns the learning rate after warm-up: that of the section, scaled by the global batch."""
    one_of_field("optimizer.scaling", c.scaling)
    factor = {"linear": batch_size / 256, "sqrt": math.sqrt(batch_size), "none": 1.0}
    return c.learning_rate * factor[c.scaling]


def learning_rate_schedule(
    c: ml_collections.ConfigDict, batch_size: int, total_steps: int, steps_per_epoch: int
) -> optax.Schedule:
    """Returns the learning rate as a function of the number of updates done before.

    With w = warm-up steps, T = total_steps and p = learning_rate x (batch_size / 256 |
    sqrt(batch_size) | 1), the update that follows t earlier ones uses

        t < w:              p (t + 1) / (w + 1)
        t >= w, cosine:     p / 2 (1 + cos(pi (t - w) / (T - w)))
        t >= w, step:       p decay_rate ** (how many of decay_at are <= t)
        t >= w, constant:   p

    so the first update (t = 0) already changes the parameters, p is reached at t = w, and the
    cosine would be 0 at t = T, one step after the last. SimCLR's code warms up with p t / w, and
    its first update changes nothing; MoCo's takes the cosine of the epoch, not of the step.

    Args:
        c: the optimizer section, see `common/fields.py`.
        batch_size: images in the global batch.
        total_steps: updates in the whole run.
        steps_per_epoch: updates in one epoch.

    Raises:
        UserError: on an unknown name, a malformed duration, or a warm-up longer than the run.
    """
    one_of_field("optimizer.schedule", c.schedule)
    peak = peak_learning_rate(c, batch_size)
    warmup = steps_of(c.warmup, steps_per_epoch, total_steps, "optimizer.warmup")
    if warmup > total_steps:
        raise UserError(
            f'optimizer.warmup="{c.warmup}" is {warmup} steps, the whole run only {total_steps}: '
            'shorten it, --config.optimizer.warmup="5 %", or train for longer'
        )
    after = optax.constant_schedule(peak)
    if c.schedule == "cosine" and total_steps > warmup:
        after = optax.cosine_decay_schedule(peak, total_steps - warmup)
    elif c.schedule == "step":
        boundaries: dict[int, float] = {}
        for at in c.decay_at:
            at = at if isinstance(at, str) else f"{at} epochs"
            step = steps_of(at, steps_per_epoch, total_steps, "optimizer.decay_at")
            step = max(step - warmup, 0)  # join_schedules counts from the end of the warm-up
            boundaries[step] = boundaries.get(step, 1.0) * c.decay_rate
        after = optax.piecewise_constant_schedule(peak, boundaries)
    if not warmup:
        return after
    ramp = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([ramp, after], [warmup])


def kernels(params: Any) -> Any:
    """Mask that is True on matrices and convolutions, by their name, "kernel".

    Not by the number of axes: class tokens and position tables have as many as a kernel. LARS needs
    the mask twice, for the decay and for the trust ratio: optax defaults both to every parameter.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def _is_below(starts: Sequence[tuple[str, ...]], path: tuple) -> bool:
    names = tuple(key.key for key in path)
    return any(names[: len(start)] == start for start in starts)


def _adapted(unadapted: Sequence[tuple[str, ...]], params: Any) -> Any:
    """Mask that is True on what has a trust ratio: kernels, without those below `unadapted`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, kernel: kernel and not _is_below(unadapted, path), kernels(params)
    )


def trained(tree: Any, frozen: Sequence[tuple[str, ...]]) -> Any:
    """A tree like the parameters, without the leaves below the paths `frozen`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: None if _is_below(frozen, path) else x, tree
    )


def _labels(frozen: Sequence[tuple[str, ...]], params: Any) -> Any:
    """A tree like `params`: "freeze" below the paths `frozen`, else "train"."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "freeze" if _is_below(frozen, path) else "train", params
    )


def _everything(params: Any) -> Any:
    return jax.tree.map(lambda _: True, params)


def make_optimizer(
    c: ml_collections.ConfigDict,
    batch_size: int,
    total_steps: int,
    steps_per_epoch: int,
    frozen: Sequence[tuple[str, ...]] = (),
    unadapted: Sequence[tuple[str, ...]] = (),
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Builds the optax transformation and its schedule.

    sgd:   g += weight_decay p;  v = momentum v + g;  p -= lr v   (as in PyTorch)
    lars:  You et al. 2017, in the order of SimCLR's code: weight decay, then the trust ratio
           eta |p| / |g + weight_decay p|, then the learning rate, and the momentum last
    adamw: Loshchilov & Hutter 2019, decoupled weight decay times the learning rate

    Only kernels take weight decay (everything, with `decay_bn_and_bias`) and a trust ratio.
    Clipping, when on, comes first. Frozen parameters are left out of all of it: a gradient of zero
    would not keep decay from moving them, and they have no part in the norm that is clipped.

    Args:
        c: the optimizer section, see `common/fields.py`.
        batch_size: images in the global batch.
        total_steps: updates in the whole run.
        steps_per_epoch: updates in one epoch.
        frozen: paths in the parameters, e.g. `("backbone", "patches")`; all below stays as it is.
        unadapted: paths below which kernels have no trust ratio in LARS either.

    Returns:
        The transformation and the schedule (for the logs and the start-up summary).

    Raises:
        UserError: on an unknown name, a number out of its range, a malformed duration, or a warm-up
            longer than the run.
    """
    one_of_field("optimizer.name", c.name)
    for name in ("learning_rate", "weight_decay", "trust_coefficient", "clip_norm"):
        if not 0 <= c[name] < math.inf:
            raise UserError(
                f"optimizer.{name}={c[name]} is out of range: expected a finite number, 0 or more"
            )
    for name in ("momentum", "b1", "b2"):
        if not 0 <= c[name] < 1:
            raise UserError(
                f"optimizer.{name}={c[name]} is not a decay rate: expected 0 or more, "
                "and less than 1"
            )
    schedule = learning_rate_schedule(c, batch_size, total_steps, steps_per_epoch)
    decayed = _everything if c.decay_bn_and_bias else kernels
    parts = [optax.clip_by_global_norm(c.clip_norm)] if c.clip_norm else []
    if c.name == "sgd":
        if c.weight_decay:
            parts.append(optax.add_decayed_weights(c.weight_decay, mask=decayed))
        parts.append(optax.sgd(schedule, momentum=c.momentum or None, nesterov=c.nesterov))
    elif c.name == "lars":
        parts.append(
            optax.lars(
                schedule,
                weight_decay=c.weight_decay,
                weight_decay_mask=decayed,
                trust_coefficient=c.trust_coefficient,
                trust_ratio_mask=functools.partial(_adapted, tuple(unadapted)),
                momentum=c.momentum,
                nesterov=c.nesterov,
            )
        )
    else:  # adamw: `one_of_field` has refused every other name
        parts.append(
            optax.adamw(
                schedule,
                b1=c.b1,
                b2=c.b2,
                weight_decay=c.weight_decay,
                mask=decayed,
                nesterov=c.nesterov,
            )
        )
    tx = optax.chain(*parts)
    if frozen:
        labels = functools.partial(_labels, tuple(frozen))
        tx = optax.partition({"train": tx, "freeze": optax.set_to_zero()}, labels)
    return tx, schedule
