"""MoCo v3 (Chen et al. 2021): a momentum encoder and a predictor, the batch instead of a queue."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from common import momentum
from common.contrast import check_temperature
from common.errors import UserError
from common.models.heads import ProjectionHead
from common.momentum import MomentumState
from common.setup import Setup
from moco_jax.momentum import MomentumMethod
from moco_jax.v3_loss import batch_info_nce


class MoCoV3(MomentumMethod):
    """MoCo v3 (algorithm 1); its state is a `MomentumState`.

    Both views are queries, through the predictor, and keys, without it. The momentum encoder is
    updated before it makes the keys, as in the authors' code; the algorithm has it at the end.
    """

    pairs = ((0, 1), (1, 0))
    key_views = (0, 1)

    MEANINGS: ClassVar = {
        "temperature": "of the loss: similarities are divided by it; 0.2 for ViTs, 1.0 for ResNets",
        "momentum": "of the key encoder's parameters in the first step",
        "momentum_schedule": "cosine (from momentum to 1 over the run) | constant",
        "predictor_layers": "number of linear layers of the predictor; 0 = none",
        "predictor_hidden": "width of its hidden layers",
        "predictor_norm": "whether batch norm follows its last layer: yes for ViTs, no for ResNets",
    }

    @staticmethod
    def default_config() -> ConfigDict:
        """`config.moco_v3`; the defaults are the authors' for ViTs."""
        return ConfigDict(
            {
                "temperature": 0.2,
                "momentum": 0.99,
                "momentum_schedule": "cosine",
                "predictor_layers": 2,
                "predictor_hidden": 4096,
                "predictor_norm": True,
            }
        )

    def __init__(self, setup: Setup) -> None:
        """Raises a `UserError` for a value out of its range."""
        c = setup.config
        momentum.check("moco_v3.momentum", c.momentum)
        check_temperature(c.temperature, "moco_v3.temperature")
        if c.momentum_schedule not in ("cosine", "constant"):
            raise UserError(
                f"moco_v3.momentum_schedule={c.momentum_schedule!r}: choose cosine or constant"
            )
        if c.predictor_layers < 0 or c.predictor_hidden < 1:
            raise UserError(
                f"moco_v3.predictor_layers={c.predictor_layers} and predictor_hidden="
                f"{c.predictor_hidden}: expected 0 or more layers, of a width of 1 or more"
            )
        super().__init__(dataclasses.replace(setup, network=_with_predictor(setup)))
        self.chance = 1 / setup.batch_size  # of guessing a query's key

    def init(self, key: jax.Array) -> MomentumState:
        """See `Method.init`. The momentum encoder starts as a copy of encoder and head."""
        return MomentumState(**momentum.started(super().init(key)))

    def momentum(self, step: jax.Array) -> jax.Array:
        """See `MomentumMethod.momentum`: on a cosine to 1, as in the authors' code."""
        c = self.setup.config
        if c.momentum_schedule == "constant":
            return jnp.asarray(c.momentum)
        return momentum.cosine(step, self.setup.total_steps, c.momentum, 1)

    def contrast(
        self, queries: jax.Array, keys: jax.Array, state: MomentumState, direction: int
    ) -> tuple:
        """See `MomentumMethod.contrast`: the keys of the other images are the negatives."""
        del state, direction
        temperature, mesh = self.setup.config.temperature, self.setup.mesh
        return batch_info_nce(queries, keys, temperature=temperature, mesh=mesh)


def _with_predictor(setup: Setup) -> Any:
    """The network, and a predictor from embeddings to embeddings, as in the authors' code."""
    c, head = setup.config, setup.network.head
    if not c.predictor_layers:
        return setup.network
    predictor = ProjectionHead(
        kind="moco_v3",
        layers=c.predictor_layers,
        hidden=c.predictor_hidden,
        dim=head.dim,
        bn_groups=head.bn_groups,
        dtype=head.dtype,
        init_as=head.init_as,
        last_norm=c.predictor_norm,
    )
    return setup.network.clone(predictor=predictor)
