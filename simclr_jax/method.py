"""SimCLR (Chen et al. 2020): two views of an image attract, all other images of the batch repel."""

from typing import Any, ClassVar

import flax
import jax
from ml_collections import ConfigDict

from common.method import Setup, embedding_metrics
from simclr_jax.loss import nt_xent_with_metrics


@flax.struct.dataclass
class SimCLRState:
    """Everything that changes during a run."""

    step: jax.Array  # int32 scalar
    params: Any
    batch_stats: Any
    opt_state: Any
    probe: Any  # ProbeState, or None without labels


class SimCLR:
    """The `common.method.Method` of SimCLR."""

    # of the fields of its section, for `main.py -h`
    MEANINGS: ClassVar = {"temperature": "of the loss: similarities are divided by it"}

    @staticmethod
    def default_config() -> ConfigDict:
        """`config.simclr`."""
        # Chen et al. 2020, table 5: 0.1 is best on ImageNet, 0.5 on CIFAR-10 (B.9).
        return ConfigDict({"temperature": 0.1})

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.chance = 1 / (2 * setup.config.batch_size - 1)  # of guessing an image's other view

    def init(self, key: jax.Array) -> SimCLRState:
        """See `Method.init`."""
        network_key, probe_key = jax.random.split(key)
        params, batch_stats = self.setup.init_network(network_key)
        return SimCLRState(
            step=jax.numpy.zeros((), jax.numpy.int32),
            params=params,
            batch_stats=batch_stats,
            opt_state=self.setup.tx.init(params),
            probe=self.setup.init_probe(probe_key),
        )

    def train_step(self, state: SimCLRState, batch: dict, key: jax.Array) -> tuple:
        """See `Method.train_step`. Both views of an image go through the network together."""
        del key  # nothing in this step is random: the views come augmented
        setup = self.setup
        b, views, *shape = batch["images"].shape
        # [b, 2, ...] -> [2b, ...] keeps an image's views on one device; view-major order would
        # cost an all-to-all
        images = batch["images"].reshape(b * views, *shape)

        def loss_fn(params: Any) -> tuple:
            features, embeddings, stats = setup.forward(params, state.batch_stats, images)
            loss, metrics = nt_xent_with_metrics(
                embeddings.reshape(b, views, -1),
                temperature=setup.config.simclr.temperature,
                mesh=setup.mesh,
            )
            return loss, (stats, features, metrics | embedding_metrics(features, embeddings))

        (loss, (stats, features, metrics)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params
        )
        params, opt_state, update_metrics = setup.update(state, grads)
        labels = jax.numpy.repeat(batch["labels"], views)
        probe, probe_metrics = setup.update_probe(state.probe, features, labels)
        state = SimCLRState(
            step=state.step + 1,
            params=params,
            batch_stats=stats,
            opt_state=opt_state,
            probe=probe,
        )
        return state, {"loss": loss} | metrics | update_metrics | probe_metrics

    def encode(self, state: SimCLRState, images: jax.Array, layer: str = "backbone") -> jax.Array:
        """See `Method.encode`."""
        return self.setup.encode(state.params, state.batch_stats, images, layer)
