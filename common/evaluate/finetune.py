"""Fine-tuning: every layer of a pretrained network, on labels (Chen et al. 2020, B.5).

The network is the encoder and, as in SimCLR v2 (Chen et al. 2020b, section 2), the first layers of
its projection head; a new linear classifier goes on top. Batch norms run in training mode over the
global batch and update their running statistics.
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

from common import optim
from common.config import section
from common.method import Setup
from common.run.console import Progress
from common.run.writer import NonFiniteLossError
from common.sharding import batch_sharding, replicated
from common.train.xla_options import compiler_options

_IN_FLIGHT = 2  # steps the host may run ahead of the device


@flax.struct.dataclass
class Finetuned:
    """A network with a classifier, and the state of its optimiser."""

    params: Any  # {"network": {"backbone": ..., "head": ...}, "classifier": {"kernel", "bias"}}
    batch_stats: Any
    opt_state: Any


def optimizer(
    learning_rate: float, weight_decay: float, batch_size: int, steps: int
) -> optax.GradientTransformation:
    """SGD with Nesterov momentum 0.9 and a cosine schedule without warm-up."""
    c = section("optimizer")
    c.update(
        name="sgd", learning_rate=learning_rate, scaling="linear", weight_decay=weight_decay,
        momentum=0.9, nesterov=True, schedule="cosine",
    )  # fmt: skip
    return optim.make_optimizer(c, batch_size, steps, steps)[0]


class Finetuner:
    """Compiled steps of one network.

    Args:
        setup: from `make_encoder_setup`.
        layer: what the classifier reads: "backbone", "head1" ..., "projection".
        num_classes: c.
        tx: the optimiser, see `optimizer`.

    Raises:
        UserError: for a layer that the network does not have.
    """

    def __init__(
        self,
        setup: Setup,
        layer: str,
        num_classes: int,
        tx: optax.GradientTransformation,
    ) -> None:
        # one BN group divides any batch, and no label leaks through it
        self.setup = dataclasses.replace(setup, network=setup.network.with_groups(1))
        self.layer, self.num_classes, self.tx, self.mesh = layer, num_classes, tx, setup.mesh
        self.depth = self.setup.network.depth_of(layer)
        everywhere, rows = replicated(self.mesh), batch_sharding(self.mesh)
        options = compiler_options(self.mesh.devices.flat[0].platform, tpu=False)
        self.step: Callable = jax.jit(
            self._step, donate_argnums=0, out_shardings=(everywhere, everywhere),
            in_shardings=(everywhere, rows, rows), compiler_options=options,
        )  # fmt: skip
        self.logits: Callable = jax.jit(
            self._logits, out_shardings=everywhere, compiler_options=options
        )

    def init(self, params: Any, batch_stats: Any) -> Finetuned:
        """Starts from the arrays of a network, which are copied; the classifier starts at zero."""
        dim = self.setup.network.backbone.feature_dim
        if self.depth:
            dim = params["head"][f"dense{self.depth}"]["kernel"].shape[-1]
        params = {
            "network": self._used(params),
            "classifier": {
                "kernel": np.zeros((dim, self.num_classes), np.float32),
                "bias": np.zeros(self.num_classes, np.float32),
            },
        }
        # copied on the host: a step donates its state, and the caller keeps these arrays
        host = jax.tree.map(np.array, jax.device_get((params, self._used(batch_stats))))
        params, batch_stats = jax.device_put(host, replicated(self.mesh))
        opt_state = jax.jit(self.tx.init, out_shardings=replicated(self.mesh))(params)
        return Finetuned(params, batch_stats, opt_state)

    def _used(self, tree: Any) -> dict[str, Any]:
        """Without the layers of the head above the classifier."""
        names = [f"{kind}{i + 1}" for i in range(self.depth) for kind in ("dense", "bn")]
        head = {name: v for name, v in tree.get("head", {}).items() if name in names}
        return {k: x for k, x in tree.items() if k == "backbone"} | ({"head": head} if head else {})

    def _step(
        self, state: Finetuned, images: jax.Array, labels: jax.Array
    ) -> tuple[Finetuned, jax.Array]:
        """One update on uint8 images `[b, h, w, 3]`, labels int32 `[b]` (-1: none); the loss."""

        def loss_fn(params: Any) -> tuple:
            features, new = self.setup.network.apply(
                {"params": params["network"], "batch_stats": state.batch_stats},
                self.setup.scale(images), self.layer, True,
                method="encode", mutable=["batch_stats"],
            )  # fmt: skip
            known = labels >= 0
            losses = optax.softmax_cross_entropy_with_integer_labels(
                _classify(params["classifier"], features), jnp.where(known, labels, 0)
            )
            loss = jnp.where(known, losses, 0).sum() / jnp.maximum(known.sum(), 1)
            return loss, new.get("batch_stats", {})  # none, where no layer has batch norm

        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = self.tx.update(grads, state.opt_state, state.params)
        return Finetuned(optax.apply_updates(state.params, updates), stats, opt_state), loss

    def _logits(self, state: Finetuned, images: jax.Array) -> jax.Array:
        """Eval-mode logits `[b, c]` of uint8 images."""
        network = state.params["network"]
        features = self.setup.encode(network, state.batch_stats, images, self.layer)
        return _classify(state.params["classifier"], features)

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


def _classify(params: dict[str, jax.Array], features: jax.Array) -> jax.Array:
    logits = jnp.matmul(features, params["kernel"], precision="highest")
    return logits + params["bias"][None]
