"""MoCo v1 and v2 (He et al. 2020; Chen et al. 2020c): momentum encoder and queue of keys."""

import logging
from typing import Any, ClassVar

import flax
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from common.contrast import normalize
from common.errors import UserError
from common.method import Setup, embedding_metrics, stream
from moco_jax import queue as queues
from moco_jax.loss import info_nce
from moco_jax.momentum import MomentumMethod, MomentumState
from moco_jax.shuffle import shuffle, unshuffle


@flax.struct.dataclass
class MoCoState(MomentumState):
    """The state of a run, with the momentum encoder and its keys."""

    queue: queues.Queue


class MoCo(MomentumMethod):
    """MoCo v1 and v2."""

    MEANINGS: ClassVar = {
        "temperature": "of the loss: similarities are divided by it; 0.2 in v2, 0.07 in v1",
        "queue_length": "keys in the queue, which are the negatives",
        "momentum": "of the key encoder's parameters",
        "symmetric": "both views are queries once and keys once, and the two losses are added",
    }

    @staticmethod
    def default_config() -> ConfigDict:
        """`config.moco`."""
        return ConfigDict(
            {
                "temperature": 0.2,  # v2; 0.07 in v1
                "queue_length": 65536,
                "momentum": 0.999,  # of the key encoder's parameters
                # Both views are queries once and keys once, and the two losses are added, as in
                # the authors' CIFAR-10 notebook.
                "symmetric": False,
            }
        )

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        moco = setup.config
        if not 0 <= moco.momentum < 1:
            raise UserError(f"moco.momentum={moco.momentum}: expected 0 <= momentum < 1")
        if setup.training:
            _warn_of_doubtful(setup)
        self.chance = 1 / (1 + moco.queue_length)  # of guessing a query's key
        self.rows = setup.batch_size * (2 if moco.symmetric else 1)

    def init(self, key: jax.Array) -> MoCoState:
        """See `Method.init`. The key encoder starts as a copy of the query encoder."""
        network_key, probe_key, queue_key = jax.random.split(key, 3)
        start = self.setup.init(network_key, probe_key)
        length, dim = self.setup.config.queue_length, self.setup.network.head.dim
        queue = queues.init(queue_key, length, self.rows, dim)
        return MoCoState(**self.started(start), queue=queue)

    def train_step(self, state: MoCoState, batch: dict, key: jax.Array) -> tuple:
        """See `Method.train_step`. Order: EMA, keys, loss against the old queue, enqueue."""
        setup, moco = self.setup, self.setup.config
        # (shuffling BN deals rows in a fixed order, and there is none without batch norm)
        groups = setup.network.head.bn_groups if setup.network.has_batch_norm else 1
        images = batch["images"]
        # (query view, key view)
        pairs = ((0, 1), (1, 0)) if moco.symmetric else ((0, 1),)

        key_params = self.averaged(state, moco.momentum)
        key_stats, keys = state.key_batch_stats, []
        for _, view in pairs:
            shuffled = shuffle(images[:, view], groups, setup.mesh)
            draws = stream(key, state.step, f"key{view}")  # drop path, where there is any
            _, embeddings, key_stats = setup.forward(key_params, key_stats, shuffled, draws)
            # unit length already here: these rows enter the queue
            keys.append(jax.lax.stop_gradient(normalize(unshuffle(embeddings, groups, setup.mesh))))

        def loss_fn(params: Any) -> tuple:
            stats, losses, metrics, seen, queries = state.batch_stats, [], [], [], []
            for (view, _), key_embeddings in zip(pairs, keys, strict=True):
                draws = stream(key, state.step, f"query{view}")
                f, q, stats = setup.forward(params, stats, images[:, view], draws)
                loss, scores = info_nce(
                    q,
                    key_embeddings,
                    state.queue,
                    length=moco.queue_length,
                    step=state.step,
                    temperature=moco.temperature,
                    mesh=setup.mesh,
                )
                losses.append(loss)
                metrics.append(scores)
                seen.append(f)
                queries.append(q)
            # means over the directions; the loss itself is their sum
            scores = jax.tree.map(lambda *x: sum(x) / len(x), *metrics)
            features = jnp.stack(seen, 1).reshape(-1, f.shape[-1])
            scores |= embedding_metrics(features, jnp.stack(queries, 1).reshape(-1, q.shape[-1]))
            return sum(losses), (stats, features, scores)

        (loss, (stats, features, metrics)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params
        )
        # [b, directions, d] -> rows: an image's keys stay on its device
        new_keys = jnp.stack(keys, 1).reshape(self.rows, -1)
        state, more = setup.next_state(
            state,
            grads,
            stats,
            features,
            batch["labels"],
            key_params=key_params,
            key_batch_stats=key_stats,
            queue=queues.push(state.queue, new_keys, state.step),
        )
        return state, {"loss": loss} | metrics | more


def _warn_of_doubtful(setup: Setup) -> None:
    """Settings that are legal and hardly what the user means."""
    if setup.network.has_batch_norm and setup.network.head.bn_groups == 1:
        logging.warning(
            "bn_groups=1: a query and its key see the same batch statistics, which lets the "
            "network cheat (He et al. 2020, section 3.3); use 8 or more groups"
        )
    length, images = setup.config.queue_length, setup.steps_per_epoch * setup.batch_size
    if length >= images + setup.batch_size:
        logging.warning(
            "moco.queue_length=%d is longer than an epoch, of %d images: earlier keys of an image "
            "are among its negatives; use less than %d", length, images, images,
        )  # fmt: skip
