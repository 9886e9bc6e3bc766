"""MoCo v1 and v2 (He et al. 2020; Chen et al. 2020c): momentum encoder and queue of keys."""

import logging
from typing import Any, ClassVar

import flax
import jax
from ml_collections import ConfigDict

from common.contrast import check_temperature, normalize
from common.errors import UserError
from common.setup import Setup
from moco_jax import queue as queues
from moco_jax.loss import info_nce
from moco_jax.momentum import MomentumMethod, MomentumState, by_image
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
        check_temperature(moco.temperature, "moco.temperature")
        if not 0 <= moco.momentum < 1:
            raise UserError(f"moco.momentum={moco.momentum}: expected 0 <= momentum < 1")
        if setup.training:
            _warn_of_doubtful(setup)
        self.chance = 1 / (1 + moco.queue_length)  # of guessing a query's key
        if moco.symmetric:
            self.pairs, self.key_views = ((0, 1), (1, 0)), (1, 0)
        self.rows = setup.batch_size * len(self.pairs)  # of the queue, a step

    def init(self, key: jax.Array) -> MoCoState:
        """See `Method.init`. The key encoder starts as a copy of the query encoder."""
        network_key, probe_key, queue_key = jax.random.split(key, 3)
        start = self.setup.init(network_key, probe_key)
        length, dim = self.setup.config.queue_length, self.setup.network.head.dim
        queue = queues.init(queue_key, length, self.rows, dim)
        return MoCoState(**self.started(start), queue=queue)

    def momentum(self, step: jax.Array) -> float:
        """See `MomentumMethod.momentum`."""
        del step
        return self.setup.config.momentum

    def make_keys(self, params: Any, batch_stats: Any, images: jax.Array, key: jax.Array) -> tuple:
        """See `MomentumMethod.make_keys`: with shuffling BN, and of unit length, for the queue."""
        mesh, network = self.setup.mesh, self.setup.network
        # (shuffling BN deals rows in a fixed order, and there is none without batch norm)
        groups = network.head.bn_groups if network.has_batch_norm else 1
        images = shuffle(images, groups, mesh)
        keys, batch_stats = super().make_keys(params, batch_stats, images, key)
        return normalize(unshuffle(keys, groups, mesh)), batch_stats

    def contrast(self, queries: jax.Array, keys: jax.Array, state: MoCoState) -> tuple:
        """See `MomentumMethod.contrast`: the queue is that of before the step."""
        moco = self.setup.config
        return info_nce(
            queries,
            keys,
            state.queue,
            length=moco.queue_length,
            step=state.step,
            temperature=moco.temperature,
            mesh=self.setup.mesh,
        )

    def next_fields(self, state: MoCoState, keys: list[jax.Array]) -> dict[str, Any]:
        """See `MomentumMethod.kept`: the queue, with the keys of both directions."""
        return {"queue": queues.push(state.queue, by_image(keys), state.step)}


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
