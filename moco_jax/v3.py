"""MoCo v3 (Chen et al. 2021): a momentum encoder and a predictor, the batch instead of a queue."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from common.errors import UserError
from common.method import Setup, embedding_metrics, stream
from common.models.heads import ProjectionHead
from moco_jax.momentum import MomentumMethod, MomentumState
from moco_jax.v3_loss import batch_info_nce


class MoCoV3(MomentumMethod):
    """MoCo v3; its state is a `MomentumState`."""

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
        if not 0 <= c.momentum < 1:
            raise UserError(f"moco_v3.momentum={c.momentum}: expected 0 <= momentum < 1")
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
        """See `Method.init`. The key encoder starts as a copy of encoder and head."""
        return MomentumState(**self.started(super().init(key)))

    def train_step(self, state: MomentumState, batch: dict, key: jax.Array) -> tuple:
        """See `Method.train_step`; Chen et al. 2021, algorithm 1.

        Both views are queries and keys, each in a pass of its own, so that batch statistics are of
        one view. The keys' encoder is updated before it makes the keys, with the parameters that
        made the queries.
        """
        setup, c = self.setup, self.setup.config
        images = batch["images"]
        key_params = self.averaged(state, self.momentum(state.step))
        keys, key_stats = [], state.key_batch_stats
        for view in (0, 1):
            draws = stream(key, state.step, f"key{view}")
            _, k, key_stats = setup.forward(key_params, key_stats, images[:, view], draws)
            keys.append(jax.lax.stop_gradient(k))

        def loss_fn(params: Any) -> tuple:
            stats, losses, metrics, seen, projected = state.batch_stats, [], [], [], []
            for view in (0, 1):
                draws = stream(key, state.step, f"query{view}")
                f, z, stats = setup.forward(params, stats, images[:, view], draws)
                q = z
                if setup.network.predictor is not None:
                    q, stats = setup.apply("predict", params, stats, z)
                loss, scores = batch_info_nce(
                    q, keys[1 - view], temperature=c.temperature, mesh=setup.mesh
                )
                losses.append(loss)
                metrics.append(scores)
                seen.append(f)
                projected.append(z)
            # means over the directions; the loss itself is their sum
            scores = jax.tree.map(lambda *x: sum(x) / len(x), *metrics)
            features = jnp.stack(seen, 1).reshape(-1, f.shape[-1])
            scores |= embedding_metrics(features, jnp.stack(projected, 1).reshape(-1, z.shape[-1]))
            return sum(losses), (stats, features, scores)

        (loss, (stats, features, metrics)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params
        )
        state, more = setup.next_state(
            state,
            grads,
            stats,
            features,
            batch["labels"],
            key_params=key_params,
            key_batch_stats=key_stats,
        )
        return state, {"loss": loss} | metrics | more

    def momentum(self, step: jax.Array) -> jax.Array:
        """Of the update in step t = 0, 1, ... of T: `1 - (1 - m) (1 + cos(pi t / T)) / 2`."""
        m = self.setup.config.momentum
        if self.setup.config.momentum_schedule == "constant":
            return jnp.asarray(m)
        fraction = step / self.setup.total_steps
        return 1 - (1 - m) * (1 + jnp.cos(math.pi * fraction)) / 2


def _with_predictor(setup: Setup) -> Any:
    """The network, and a predictor from embeddings to embeddings (section 4.1, and the code)."""
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
