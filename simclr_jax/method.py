"""SimCLR (Chen et al. 2020): two views of an image attract, all other images of the batch repel.

With a memory (Chen et al. 2020b, SimCLR v2) those of past batches repel too.
With `simclr.loss=supcon` the images of a class attract too (Khosla et al. 2020): supervised.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
from ml_collections import ConfigDict

from common import momentum
from common import queue as queues
from common.contrast import check_temperature, normalize
from common.errors import UserError, one_of
from common.method import Method, embedding_metrics, stream
from common.momentum import QueueState
from common.setup import Setup, TrainState
from simclr_jax.loss import nt_xent_with_metrics
from simclr_jax.memory_loss import memory_nt_xent_with_metrics
from simclr_jax.supcon import supcon_with_metrics

LOSSES = ("nt_xent", "dcl", "supcon")


class SimCLR(Method):
    """SimCLR v1 and v2; its state is a `TrainState`, with a memory a `QueueState`.

    With a memory a row is contrasted with a momentum encoder's embeddings: of the batch, its other
    view among them, and of past ones, which the memory holds as they were before the step. It
    begins empty: MoCo's queue begins with random vectors because a query needs negatives, and here
    the batch has some, so no row has to be told from noise.
    """

    MEANINGS: ClassVar = {
        "loss": "nt_xent (SimCLR) | dcl (the other view is not in the denominator) | supcon "
        "(supervised: the other images of its class are positives too, L_out)",
        "temperature": "of the loss: similarities are divided by it",
        "loss_scale": "factor on the loss before its gradient is taken: 1 in SimCLR's paper, 2 in "
        "its authors' code",
        "memory_length": "past keys of a momentum encoder that are negatives too, beside its keys "
        "of the batch: 65536 in SimCLR v2; 0 = no memory, and no momentum encoder",
        "memory_momentum": "of the memory's encoder",
    }

    @staticmethod
    def default_config() -> ConfigDict:
        """`config.simclr`."""
        return ConfigDict(
            {
                "loss": "nt_xent",
                # Chen et al. 2020, table 5: 0.1 is best on ImageNet, 0.5 on CIFAR-10 (B.9).
                "temperature": 0.1,
                # The loss that is logged is that of the paper, and the gradient so many times its
                # gradient. SimCLR's authors' code adds the two halves of eq. 1 instead of averaging
                # them: 2.
                "loss_scale": 1.0,
                # Chen et al. 2020b, appendix: 64 K keys and 0.999, "according to" MoCo.
                "memory_length": 0,
                "memory_momentum": 0.999,
            }
        )

    def __init__(self, setup: Setup) -> None:
        """Raises a `UserError` for a field that is wrong, or a loss that lacks its labels."""
        super().__init__(setup)
        c = setup.config
        one_of("simclr.loss", c.loss, LOSSES)
        check_temperature(c.temperature, "simclr.temperature")
        if setup.training and not 0 < c.loss_scale < math.inf:
            raise UserError(
                f"simclr.loss_scale={c.loss_scale}: expected a finite number above 0, 1 for the "
                "paper's equation or 2 for the authors' code"
            )
        self.supervised = c.loss == "supcon"
        if self.supervised and setup.training and not setup.probe.num_classes:
            raise UserError(
                "simclr.loss=supcon learns from labels, and the training split has none: give "
                "labelled data (data.source, data.labels), or set simclr.loss=nt_xent"
            )
        if c.memory_length < 0:
            raise UserError(
                f"simclr.memory_length={c.memory_length}: expected 0 for no memory, or a number of "
                "keys such as 65536"
            )
        if self.supervised and c.memory_length:
            raise UserError(
                f"simclr.memory_length={c.memory_length} with simclr.loss=supcon: the memory holds "
                "no labels, and images of a row's class would be its negatives; set one of the two"
            )
        momentum.check("simclr.memory_momentum", c.memory_momentum)
        self.rows = 2 * setup.batch_size  # of the batch, and of the memory, a step
        if setup.training and c.memory_length:
            name = "simclr.memory_length"
            momentum.warn_of_long_queue(name, c.memory_length, self.rows, setup)
        self.chance = 1 / (self.rows - 1 + c.memory_length)  # of guessing an image's other view

    @property
    def notes(self) -> Mapping[str, str]:
        """See `Method.notes`: another loss than the default, and the memory."""
        c = self.setup.config
        parts = [] if c.loss == "nt_xent" else [c.loss]
        if c.memory_length:
            parts.append(
                f"a memory of {c.memory_length:,} keys of a momentum encoder, m "
                f"{c.memory_momentum:g}"
            )
        return {"contrast": ", ".join(parts)} if parts else {}

    def init(self, key: jax.Array) -> TrainState:
        """See `Method.init`. The memory is empty, its encoder a copy of the encoder."""
        start, length = super().init(key), self.setup.config.memory_length
        if not length:
            return start
        queue = queues.empty(length, self.rows, self.setup.network.head.dim)
        return QueueState(**momentum.started(start), queue=queue)

    def adopted(self, state: Any, taken: set[str]) -> tuple[Any, list[str]]:
        """See `Method.adopted`: the memory's encoder is a copy of weights of a run without one."""
        return momentum.adopted(state, taken) if self.setup.config.memory_length else (state, [])

    def train_step(self, state: Any, batch: dict, key: jax.Array) -> tuple[Any, dict]:
        """See `Method.train_step`. Both views of an image go through the network together.

        So they do through the memory's encoder, whose batch norm sees the batch too: the statistics
        are its own, and not averaged. It is updated before it makes keys, as in MoCo.

        Of the metrics "loss" is that of the paper whatever `loss_scale` is, and "gradient_norm" is
        of the gradient that the optimiser gets, which is `loss_scale` times that of "loss".
        """
        setup, config = self.setup, self.setup.config
        b, views, *shape = batch["images"].shape
        # [b, 2, ...] -> [2b, ...] keeps an image's views on one device; view-major order would
        # cost an all-to-all
        images = batch["images"].reshape(b * views, *shape)
        draws = stream(key, state.step, "encoder")  # drop path, where there is any
        keys, fields = None, dict[str, Any]()
        if config.memory_length:
            keys, fields = self.remembered(state, images, stream(key, state.step, "memory"))

        def loss_fn(params: Any) -> tuple:
            features, embeddings, stats = setup.forward(params, state.batch_stats, images, draws)
            z = embeddings.reshape(b, views, -1)
            loss, metrics = self._loss(z, batch["labels"], state, keys)
            metrics |= {"loss": loss} | embedding_metrics(features, embeddings)
            return config.loss_scale * loss, (stats, features, metrics)

        grads, (stats, features, metrics) = jax.grad(loss_fn, has_aux=True)(state.params)
        state, more = setup.next_state(state, grads, stats, features, batch["labels"], **fields)
        return state, metrics | more

    def remembered(
        self, state: Any, images: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, dict[str, Any]]:
        """The momentum encoder's keys of a batch, and the next state's fields that have them.

        Args:
            state: before the step.
            images: uint8 `[2 b, h, w, c]`, both views.
            key: of the momentum encoder's pass.

        Returns:
            The keys `[2 b, dim]`; momentum encoder and memory after the step.
        """
        setup, config = self.setup, self.setup.config
        params = momentum.averaged(state, config.memory_momentum, setup.network.frozen)
        _, keys, stats = setup.forward(params, state.key_batch_stats, images, key)
        queue = queues.push(state.queue, normalize(keys), state.step)
        return keys, {"key_params": params, "key_batch_stats": stats, "queue": queue}

    def _loss(
        self, z: jax.Array, labels: jax.Array, state: Any, keys: jax.Array | None
    ) -> tuple[jax.Array, dict]:
        """Loss and metrics of embeddings `[b, 2, dim]`; only supcon reads the labels `[b]`."""
        config, mesh = self.setup.config, self.setup.mesh
        if self.supervised:
            return supcon_with_metrics(z, labels, config.temperature, mesh=mesh)
        decoupled = config.loss == "dcl"
        if keys is None:
            return nt_xent_with_metrics(z, config.temperature, decoupled=decoupled, mesh=mesh)
        return memory_nt_xent_with_metrics(
            z, keys.reshape(z.shape), state.queue, config.temperature,
            length=config.memory_length, step=state.step, decoupled=decoupled, mesh=mesh,
        )  # fmt: skip
