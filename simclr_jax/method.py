"""SimCLR (Chen et al. 2020): two views of an image attract, all other images of the batch repel."""

import math
from typing import Any, ClassVar

import jax
from ml_collections import ConfigDict

from common.contrast import check_temperature
from common.errors import UserError, one_of
from common.method import Method, embedding_metrics, stream
from common.setup import Setup, TrainState
from simclr_jax.loss import nt_xent_with_metrics

LOSSES = ("nt_xent", "dcl")


class SimCLR(Method):
    """SimCLR v1; its state is a `TrainState`."""

    MEANINGS: ClassVar = {
        "loss": "nt_xent (SimCLR) | dcl (decoupled: an image's other view is not in the denominator)",
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
                # The gradient is that of so many times the loss, and the loss that is logged that of
                # the paper (eq. 1). The authors' code adds the two halves of eq. 1 instead of
                # averaging them: 2.
                "loss_scale": 1.0,
            }
        )

    def __init__(self, setup: Setup) -> None:
        """Raises a `UserError` for an unknown loss, a temperature or scale that is not positive."""
        super().__init__(setup)
        one_of("simclr.loss", setup.config.loss, LOSSES)
        check_temperature(setup.config.temperature, "simclr.temperature")
        if setup.training and not 0 < (scale := setup.config.loss_scale) < math.inf:
            raise UserError(
                f"simclr.loss_scale={scale}: expected a finite number above 0, 1 for the paper's "
                "equation or 2 for the authors' code"
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
            loss, metrics = nt_xent_with_metrics(
                embeddings.reshape(b, views, -1),
                temperature=config.temperature,
                decoupled=config.loss == "dcl",
                mesh=setup.mesh,
            )
            metrics |= {"loss": loss} | embedding_metrics(features, embeddings)
            return config.loss_scale * loss, (stats, features, metrics)

        grads, (stats, features, metrics) = jax.grad(loss_fn, has_aux=True)(state.params)
        state, more = setup.next_state(state, grads, stats, features, batch["labels"])
        return state, metrics | more
