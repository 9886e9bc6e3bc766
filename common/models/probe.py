"""Online linear probe: a classifier trained alongside the encoder, without affecting it.

It has its own state and its own optax transformation, so that neither the encoder's gradient norm
nor its clipping sees it, and `stop_gradient` keeps the labels out of the representation.
"""

import dataclasses
from typing import Any

import flax
import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax import lax

from common.config import one_of_field
from common.errors import UserError

DECAY = 0.9  # of the running statistics, as in the encoder's batch norm
EPSILON = 1e-6  # of the variance: only a collapsed feature comes near it


@flax.struct.dataclass
class ProbeState:
    """Weights, optimiser state, and the running statistics that standardise the features."""

    params: Any  # {"kernel": [d, c], "bias": [c]}
    opt_state: Any
    mean: jax.Array  # [d]
    var: jax.Array  # [d]
    updates: jax.Array  # int32, how many batches the statistics have seen


def make_probe(c: ml_collections.ConfigDict, num_classes: int, total_steps: int) -> "Probe":
    """Builds the probe of the probe section `c`; with `num_classes=0` it does nothing.

    Raises:
        UserError: for an unknown schedule, or a learning rate that is negative or not finite.
    """
    one_of_field("probe.schedule", c.schedule)
    rate = c.learning_rate
    if not 0 <= rate < float("inf"):
        raise UserError(f"probe.learning_rate={rate}: expected a finite number, 0 or more")
    if c.schedule == "cosine":
        rate = optax.cosine_decay_schedule(rate, max(1, total_steps))
    return Probe(num_classes, optax.sgd(rate, momentum=c.momentum))


@dataclasses.dataclass(frozen=True)
class Probe:
    """A linear softmax classifier on standardised features.

    Features are standardised as by a batch norm without scale and bias: batch statistics in
    training (over all rows, labelled or not), running ones in `predict`. Each feature is then
    divided by sqrt(d). The norm of a row is thereby about 1 whatever the encoder's scale and
    width, the curvature of the loss at most about 1/2, and one learning rate fits them all.
    Without it the best rate moves with the square of the feature scale, which in a contrastive run
    drifts by an order of magnitude.

    Attributes:
        num_classes: classes; 0 switches the probe off (its state is None, it reports nothing).
        tx: optax transformation of its own parameters.
    """

    num_classes: int
    tx: optax.GradientTransformation

    def init(self, key: jax.Array, feature_dim: int) -> ProbeState | None:
        """Returns the state for features of width `feature_dim`, or None when switched off.

        The problem is convex, so the weights start at zero and `key` is not used.
        """
        del key
        if not self.num_classes:
            return None
        params = {
            "kernel": jnp.zeros((feature_dim, self.num_classes)),
            "bias": jnp.zeros((self.num_classes,)),
        }
        return ProbeState(
            params=params,
            opt_state=self.tx.init(params),
            mean=jnp.zeros((feature_dim,)),
            var=jnp.ones((feature_dim,)),
            updates=jnp.zeros((), jnp.int32),
        )

    def update(
        self, state: ProbeState | None, features: jax.Array, labels: jax.Array
    ) -> tuple[ProbeState | None, dict[str, jax.Array]]:
        """Makes one step of the probe; no gradient reaches `features`.

        Args:
            state: the probe's state, or None when switched off.
            features: `[n, d]`, any float type and scale.
            labels: int `[n]` in [0, num_classes), -1 where unlabelled (such rows are left out;
                with no labelled row at all the gradient is zero).

        Returns:
            The new state, and `probe_loss` and `probe_top1` (in [0, 1]) before the step, means
            over the labelled rows (0 if there is none). `{}` when switched off.
        """
        if state is None:
            return None, {}
        features = lax.stop_gradient(_at_least_float32(features))
        mean, var = features.mean(0), features.var(0)
        inputs = _standardise(features, mean, var)
        labelled = labels >= 0
        count = jnp.maximum(labelled.sum(), 1).astype(inputs.dtype)
        targets = jnp.where(labelled, labels, 0)

        def loss_fn(params):
            logits = _linear(params, inputs)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            return jnp.where(labelled, losses, 0).sum() / count, logits

        (loss, logits), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = self.tx.update(grads, state.opt_state, state.params)
        hits = (logits.argmax(-1) == targets) & labelled
        # A plain mean of the first batches, then an exponential one: right from the first step on.
        seen = state.updates.astype(mean.dtype)
        decay = jnp.minimum(DECAY, seen / (seen + 1))
        state = ProbeState(
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            mean=(decay * state.mean + (1 - decay) * mean).astype(state.mean.dtype),
            var=(decay * state.var + (1 - decay) * var).astype(state.var.dtype),
            updates=state.updates + 1,
        )
        metrics = {"probe_loss": loss, "probe_top1": hits.sum().astype(loss.dtype) / count}
        return state, lax.stop_gradient(metrics)

    def predict(self, state: ProbeState, features: jax.Array) -> jax.Array:
        """Returns logits `[n, num_classes]` for features `[n, d]`, from the running statistics."""
        features = _at_least_float32(features)
        return _linear(state.params, _standardise(features, state.mean, state.var))


def _at_least_float32(x: jax.Array) -> jax.Array:
    return jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))


def _standardise(features: jax.Array, mean: jax.Array, var: jax.Array) -> jax.Array:
    scale = lax.rsqrt(var + EPSILON) * features.shape[-1] ** -0.5
    return (features - mean[None]) * scale[None]


def _linear(params: dict[str, jax.Array], inputs: jax.Array) -> jax.Array:
    logits = jnp.matmul(inputs, params["kernel"], precision="highest")
    return logits + params["bias"][None]
