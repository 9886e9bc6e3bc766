"""Fine-tuning: every layer of a pretrained network, on labels (Chen et al. 2020, B.5).

The network is the encoder and, as in SimCLR v2 (Chen et al. 2020b, section 2), the first layers of
its projection head; a new linear classifier goes on top. Batch norms run in training mode over the
global batch and update their running statistics. Parameters that pretraining keeps frozen (MoCo
v3's patches) are trained like all others, as in the authors' fine-tuning.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from common.evaluate import mixing
from common.evaluate.finetune_recipe import SGD, Recipe
from common.method import stream
from common.models import classifier
from common.models.heads import Network
from common.run.console import Progress
from common.run.writer import NonFiniteLossError
from common.setup import Setup
from common.sharding import batch_sharding, replicated
from common.train.xla_options import compiler_options

_IN_FLIGHT = 2  # steps the host may run ahead of the device


@flax.struct.dataclass
class Finetuned:
    """A network with a classifier, and the state of its optimiser."""

    step: jax.Array  # int32 scalar, updates done
    params: Any  # {"network": {"backbone": ..., "head": ...}, "classifier": {"kernel", "bias"}}
    batch_stats: Any
    opt_state: Any


class Finetuner:
    """Compiled steps of one network.

    Args:
        setup: from `make_encoder_setup`.
        layer: what the classifier reads: "backbone", "head1" ..., "projection".
        num_classes: c.
        tx: the optimiser, see `finetune_recipe.optimizer`.
        recipe: of which drop path, label smoothing, mixup and CutMix are used here.
        seed: of what these draw.

    Raises:
        UserError: for a layer that the network does not have.
    """

    def __init__(
        self,
        setup: Setup,
        layer: str,
        num_classes: int,
        tx: optax.GradientTransformation,
        recipe: Recipe = SGD,
        seed: int = 0,
    ) -> None:
        # one BN group divides any batch, and no label leaks through it
        network = _with_drop_path(setup.network.with_groups(1), recipe.drop_path)
        self.setup = dataclasses.replace(setup, network=network)
        self.recipe, self.seed = recipe, seed
        self.layer, self.num_classes, self.tx, self.mesh = layer, num_classes, tx, setup.mesh
        network.depth_of(layer)
        everywhere, rows = replicated(self.mesh), batch_sharding(self.mesh)
        options = compiler_options(self.mesh.devices.flat[0].platform)
        self.step: Callable = jax.jit(
            self._step, donate_argnums=0, out_shardings=(everywhere, everywhere),
            in_shardings=(everywhere, rows, rows), compiler_options=options,
        )  # fmt: skip
        self.logits: Callable = jax.jit(
            self._logits, out_shardings=everywhere, compiler_options=options
        )

    def init(self, params: Any, batch_stats: Any) -> Finetuned:
        """Starts from the arrays of a network, which are copied; the classifier starts at zero."""
        network = self.setup.network
        params = classifier.start(network, self.layer, self.num_classes, params)
        stats = classifier.used(batch_stats, network.depth_of(self.layer))
        # copied on the host: a step donates its state, and the caller keeps these arrays
        start = np.zeros((), np.int32), params, stats
        host = jax.tree.map(np.array, jax.device_get(start))
        step, params, batch_stats = jax.device_put(host, replicated(self.mesh))
        opt_state = jax.jit(self.tx.init, out_shardings=replicated(self.mesh))(params)
        return Finetuned(step, params, batch_stats, opt_state)

    def _step(
        self, state: Finetuned, images: jax.Array, labels: jax.Array
    ) -> tuple[Finetuned, jax.Array]:
        """One update on uint8 images `[b, h, w, 3]`, labels int32 `[b]` (-1: none); the loss."""
        key = jax.random.key(self.seed)
        network, inputs, own = self.setup.network, self.setup.scale(images), None
        if self.recipe.mixes:
            draw, (height, width) = stream(key, state.step, "mix"), images.shape[1:3]
            keep = mixing.draw(draw, self.recipe.mixup, self.recipe.cutmix, height, width)
            inputs, own = mixing.mix(inputs, keep), keep.mean()
        keys = None
        if network.backbone.is_random:
            keys = jax.random.split(stream(key, state.step, "drop_path"), len(images))

        def loss_fn(params: Any) -> tuple:
            features, new = network.apply(
                {"params": params["network"], "batch_stats": state.batch_stats},
                inputs, self.layer, True, keys, method="encode", mutable=["batch_stats"],
            )  # fmt: skip
            logits = classifier.linear(params["classifier"], features)
            loss = _loss(logits, labels, own, self.recipe.label_smoothing)
            return loss, new.get("batch_stats", {})  # not there without batch norm

        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = self.tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return Finetuned(state.step + 1, params, stats, opt_state), loss

    def _logits(self, state: Finetuned, images: jax.Array) -> jax.Array:
        """Eval-mode logits `[b, c]` of uint8 images."""
        network = state.params["network"]
        features = self.setup.encode(network, state.batch_stats, images, self.layer)
        return classifier.linear(state.params["classifier"], features)

    def train(
        self,
        state: Finetuned,
        batches: Iterable[tuple[jax.Array, jax.Array]],
        steps: int,
        batch_size: int,
    ) -> Finetuned:
        """Takes `steps` steps on `(images, labels)`, with a progress line; `state` is donated.

        Raises:
            NonFiniteLossError: when the loss is NaN or infinite.
        """
        progress = Progress(steps, False if jax.process_index() else None)
        in_flight: collections.deque[jax.Array] = collections.deque()
        begin = None
        for step, (images, labels) in zip(range(steps), batches, strict=False):
            state, loss = self.step(state, images, labels)
            in_flight.append(loss)
            while len(in_flight) > (_IN_FLIGHT if step + 1 < steps else 0):
                value = float(in_flight.popleft())
                done, begin = step + 1 - len(in_flight), begin or time.monotonic()
                if not np.isfinite(value):
                    raise NonFiniteLossError(
                        f"the loss of fine-tuning is {value} at step {done}: try a smaller "
                        "--eval.finetune.learning_rate"
                    )
                each = (time.monotonic() - begin) / max(done - 1, 1)  # without compiling
                rate = {} if done < 2 else {
                    "images_per_second": batch_size / each, "seconds_input": 0, "seconds_step": 1
                }  # fmt: skip
                eta = each * (steps - done) if done > 1 else None
                progress.show(done, None, {"loss": value}, rate, eta)
        progress.close()
        return state


def _loss(
    logits: jax.Array, labels: jax.Array, own: jax.Array | None, smoothing: float
) -> jax.Array:
    """Mean cross-entropy of the rows with a label (where rows are mixed, with two).

    Args:
        logits: `[b, c]`.
        labels: int32 `[b]`, -1: none.
        own: share of a row's own label, scalar; the rest is its partner's. None: not mixed.
        smoothing: share of the target spread over all classes (Szegedy et al. 2016, section 7).
    """
    known, classes = labels >= 0, jnp.where(labels >= 0, labels, 0)
    if own is None and not smoothing:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, classes)
    else:
        targets = jax.nn.one_hot(classes, logits.shape[-1], dtype=logits.dtype)
        if own is not None:
            known, own = known & known[::-1], own.astype(logits.dtype)
            targets = own * targets + (1 - own) * targets[::-1]
        losses = optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, smoothing))
    return jnp.where(known, losses, 0).sum() / jnp.maximum(known.sum(), 1)


def _with_drop_path(network: Network, rate: float) -> Network:
    """The same network with another drop path, whatever it was pretrained with."""
    encoder: Any = network.backbone
    if not hasattr(encoder, "drop_path"):
        return network
    return network.clone(backbone=encoder.clone(drop_path=rate))
