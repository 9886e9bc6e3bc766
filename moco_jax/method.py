"""MoCo v1 and v2 (He et al. 2020; Chen et al. 2020c): momentum encoder and queue of keys."""

import logging
import math
from typing import Any, ClassVar

import jax
from ml_collections import ConfigDict

from common import momentum
from common import queue as queues
from common.contrast import check_temperature, normalize
from common.errors import UserError
from common.momentum import QueueState
from common.setup import Setup
from moco_jax.loss import info_nce
from moco_jax.momentum import MomentumMethod, by_image
from moco_jax.shuffle import shuffle, unshuffle


class MoCo(MomentumMethod):
    """MoCo v1 and v2, and v2+ (symmetric, as in solo-learn); its state is a `QueueState`."""

    MEANINGS: ClassVar = {
        "temperature": "of the loss: similarities are divided by it; 0.2 in v2, 0.07 in v1",
        "queue_length": "keys in the queue, which are the negatives; 0 = by the number of images, "
        "at most half of them",
        "momentum": "of the key encoder's parameters; with momentum_end that of the first step",
        "momentum_end": "its value at the end of the run, reached on a cosine; 0 = it is constant",
        "symmetric": "both views are queries once and keys once, and the two losses are added",
        "queue_per_view": "with symmetric: a queue of queue_length keys for each view; a query "
        "meets that of the other view",
        "loss_scale": "factor on the loss before its gradient is taken; with symmetric, 0.5 trains "
        "on the mean of the two losses",
    }

    @staticmethod
    def default_config() -> ConfigDict:
        """`config.moco`."""
        return ConfigDict(
            {
                "temperature": 0.2,  # v2; 0.07 in v1
                "queue_length": 65536,
                "momentum": 0.999,  # of the key encoder's parameters
                "momentum_end": 0.0,
                # Both views are queries once and keys once, and the two losses are added, as in
                # the authors' CIFAR-10 notebook.
                "symmetric": False,
                "queue_per_view": False,
                # The gradient is that of so many times the loss; what is logged is the loss.
                "loss_scale": 1.0,
            }
        )

    def __init__(self, setup: Setup) -> None:
        """Raises a `UserError` for a value out of its range."""
        super().__init__(setup)
        moco = setup.config
        check_temperature(moco.temperature, "moco.temperature")
        momentum.check("moco.momentum", moco.momentum)
        if moco.momentum_end and not moco.momentum <= moco.momentum_end <= 1:
            raise UserError(
                f"moco.momentum_end={moco.momentum_end}: expected moco.momentum={moco.momentum} or "
                "more, up to 1, or 0 for one that is constant"
            )
        if moco.queue_per_view and not moco.symmetric:
            raise UserError(
                "moco.queue_per_view needs the keys of both views: set moco.symmetric=True too"
            )
        if setup.training and not 0 < moco.loss_scale < math.inf:
            raise UserError(
                f"moco.loss_scale={moco.loss_scale}: expected a finite number above 0, 1 for the "
                "sum of the directions or 0.5 for the mean of two"
            )
        self.loss_scale = moco.loss_scale
        queues.slots(moco.queue_length, setup.batch_size)  # refuses a length below 1
        self.chance = 1 / (1 + moco.queue_length)  # of guessing a query's key
        if moco.symmetric:
            self.pairs, self.key_views = ((0, 1), (1, 0)), (1, 0)
        self.rows = setup.batch_size * len(self.pairs)  # of the queue, a step
        # of both queues together, which are one array
        self.length = moco.queue_length * (len(self.pairs) if moco.queue_per_view else 1)
        if setup.training:
            # of one queue, where each view has its own
            rows = setup.batch_size if moco.queue_per_view else self.rows
            _warn_of_doubtful(setup, moco.queue_length, rows)

    def init(self, key: jax.Array) -> QueueState:
        """See `Method.init`. The key encoder starts as a copy of the query encoder."""
        network_key, probe_key, queue_key = jax.random.split(key, 3)
        start = self.setup.init(network_key, probe_key)
        queue = queues.init(queue_key, self.length, self.rows, self.setup.network.head.dim)
        return QueueState(**momentum.started(start), queue=queue)

    def momentum(self, step: jax.Array) -> float | jax.Array:
        """See `MomentumMethod.momentum`."""
        moco = self.setup.config
        if not moco.momentum_end:
            return moco.momentum
        return momentum.cosine(step, self.setup.total_steps, moco.momentum, moco.momentum_end)

    def make_keys(self, params: Any, batch_stats: Any, images: jax.Array, key: jax.Array) -> tuple:
        """See `MomentumMethod.make_keys`: with shuffling BN, and of unit length, for the queue."""
        mesh, network = self.setup.mesh, self.setup.network
        # (shuffling BN deals rows in a fixed order, and there is none without batch norm)
        groups = network.head.bn_groups if network.has_batch_norm else 1
        images = shuffle(images, groups, mesh)
        keys, batch_stats = super().make_keys(params, batch_stats, images, key)
        return normalize(unshuffle(keys, groups, mesh)), batch_stats

    def contrast(
        self, queries: jax.Array, keys: jax.Array, state: QueueState, direction: int
    ) -> tuple:
        """See `MomentumMethod.contrast`: the queue is that of before the step."""
        moco, queue = self.setup.config, state.queue
        if moco.queue_per_view:
            queue = queues.every(queue, direction, len(self.pairs))
        return info_nce(
            queries,
            keys,
            queue,
            length=moco.queue_length,
            step=state.step,
            temperature=moco.temperature,
            mesh=self.setup.mesh,
        )

    def next_fields(self, state: QueueState, keys: list[jax.Array]) -> dict[str, Any]:
        """See `MomentumMethod.next_fields`: the queue, with the keys of both directions."""
        return {"queue": queues.push(state.queue, by_image(keys), state.step)}


def _warn_of_doubtful(setup: Setup, length: int, rows: int) -> None:
    """Settings that are legal and hardly what the user means."""
    if setup.network.has_batch_norm and setup.network.head.bn_groups == 1:
        logging.warning(
            "bn_groups=1: a query and its key see the same batch statistics, which can let the "
            "network cheat (He et al. 2020, section 3.3); 8 groups or more rule it out"
        )
    momentum.warn_of_long_queue("moco.queue_length", length, rows, setup)
