"""SimCLR (Chen et al. 2020): two views of an image attract, all other images of the batch repel.

With `simclr.loss=supcon` the images of a class attract too (Khosla et al. 2020): supervised.
"""

import math
from typing import Any, ClassVar

import jax
from ml_collections import ConfigDict

from common.contrast import check_temperature
from common.errors import UserError, one_of
from common.method import Method, embedding_metrics, stream
from common.setup import Setup, TrainState
from simclr_jax.loss import nt_xent_with_metrics
from simclr_jax.supcon import supcon_with_metrics

LOSSES = ("nt_xent", "dcl", "supcon")


class SimCLR(Method):
    """SimCLR v1; its state is a `TrainState`."""

    MEANINGS: ClassVar = {
        "loss": "nt_xent (SimCLR) | dcl (the other view is not in the denominator) | supcon "
        "(supervised: the other images of its class are positives too, L_out)",
        "temperature": "of the loss: similarities are divided by it",
        "loss_scale": "factor on the loss before its gradient is taken: 1 in SimCLR's paper, 2 in "
        "its authors' code",
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
            }
        )

    def __init__(self, setup: Setup) -> None:
        """Raises a `UserError` for a field that is wrong, or a loss that lacks its labels."""
        super().__init__(setup)
        one_of("simclr.loss", setup.config.loss, LOSSES)
        check_temperature(setup.config.temperature, "simclr.temperature")
        if setup.training and not 0 < (scale := setup.config.loss_scale) < math.inf:
            raise UserError(
                f"simclr.loss_scale={scale}: expected a finite number above 0, 1 for the paper's "
                "equation or 2 for the authors' code"
            )
        self.supervised = setup.config.loss == "supcon"
        if self.supervised and setup.training and not setup.probe.num_classes:
            raise UserError(
                "simclr.loss=supcon learns from labels, and the training split has none: give "
                "labelled data (data.source, data.labels), or set simclr.loss=nt_xent"
            )
        self.chance = 1 / (2 * setup.batch_size - 1)  # of guessing an image's other view

    def train_step(self, state: TrainState, batch: dict, key: jax.Array) -> tuple[TrainState, dict]:
        """See `Method.train_step`. Both views of an image go through the network together.

        Of the metrics "loss" is that of the paper whatever `loss_scale` is, and "gradient_norm" is
        of the gradient that the optimiser gets, which is `loss_scale` times that of "loss".
        """
        setup, config = self.setup, self.setup.config
        b, views, *shape = batch["images"].shape
        # [b, 2, ...] -> [2b, ...] keeps an image's views on one device; view-major order would
        # cost an all-to-all
        images = batch["images"].reshape(b * views, *shape)
        draws = stream(key, state.step, "encoder")  # drop path, where there is any

        def loss_fn(params: Any) -> tuple:
            features, embeddings, stats = setup.forward(params, state.batch_stats, images, draws)
            loss, metrics = self._loss(embeddings.reshape(b, views, -1), batch["labels"])
            metrics |= {"loss": loss} | embedding_metrics(features, embeddings)
            return config.loss_scale * loss, (stats, features, metrics)

        grads, (stats, features, metrics) = jax.grad(loss_fn, has_aux=True)(state.params)
        state, more = setup.next_state(state, grads, stats, features, batch["labels"])
        return state, metrics | more

    def _loss(self, z: jax.Array, labels: jax.Array) -> tuple[jax.Array, dict]:
        """Loss and metrics of embeddings `[b, 2, dim]`; only supcon reads the labels `[b]`."""
        temperature, mesh = self.setup.config.temperature, self.setup.mesh
        if self.supervised:
            return supcon_with_metrics(z, labels, temperature, mesh=mesh)
        decoupled = self.setup.config.loss == "dcl"
        return nt_xent_with_metrics(z, temperature, decoupled=decoupled, mesh=mesh)
