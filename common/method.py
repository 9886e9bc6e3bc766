"""The seam between the training loop and a method, and the pieces every method needs.

A method is a package with a class that has the three functions of `Method`, a state dataclass, and
a config. `common` never asks which one runs.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from common import optim
from common.config import section
from common.data.augment import presets
from common.models import heads, microbatch, probe


class Method(Protocol):
    """What the loop calls.

    States are `flax.struct.dataclass`es of arrays with the fields `step`, `params` (a dictionary
    with the encoder under "backbone"), `batch_stats`, and `probe` (None without labels).
    """

    def init(self, key: jax.Array) -> Any:
        """The state before the first step; pure, jitted by the loop with its final shardings."""

    def train_step(self, state: Any, batch: dict, key: jax.Array) -> tuple[Any, dict]:
        """One update; pure, jitted once by the loop, which donates `state`.

        Args:
            state: of step t.
            batch: `images` uint8 `[b, 2, h, w, c]`, `labels` int32 `[b]` (-1: none).
            key: root key of the run; fold in `state.step`, then a stream of one's own.

        Returns:
            The state of step t+1 and float scalars, "loss" among them.
        """

    def encode(self, state: Any, images: jax.Array, layer: str = "backbone") -> jax.Array:
        """Features `[b, d]` of uint8 `images [b, h, w, c]`, in eval mode.

        Nothing of the state is used but `params` and `batch_stats`: evaluation restores no more.
        """


def root_keys(seed: int) -> tuple[jax.Array, jax.Array]:
    """The keys of a run: of `init`, and of all its steps."""
    init_key, loop_key = jax.random.split(jax.random.key(seed))
    return init_key, loop_key


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a method closes over: everything that is decided before the first step."""

    config: ConfigDict
    mesh: Mesh
    network: heads.Network
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    probe: probe.Probe
    mean: tuple[float, ...]
    std: tuple[float, ...]
    total_steps: int  # of the run
    steps_per_epoch: int
    microbatches: int = 1  # parts of a batch, see `common/models/microbatch.py`
    initial: Any = None  # (params, batch_stats) to start from, whole or without the head
    training: bool = True  # False: nothing but network and scale of images is used

    def init_network(self, key: jax.Array) -> tuple[Any, Any]:
        """Returns `(params, batch_stats)`: those of `initial`, and drawn what is not there."""
        size = self.config.data.image_size
        variables = self.network.init(key, jnp.zeros((1, size, size, 3)), train=False)
        params, batch_stats = self.initial or ({}, {})
        return variables["params"] | params, variables["batch_stats"] | batch_stats

    def scale(self, images: jax.Array) -> jax.Array:
        """uint8 `[..., h, w, 3]` to [0, 1], then standardised if the preset has mean and std."""
        kind = jnp.promote_types(self.network.backbone.dtype, jnp.float32)
        mean, std = (
            jnp.asarray(v, kind).reshape((1,) * (images.ndim - 1) + (3,))
            for v in (self.mean, self.std)
        )
        return (images.astype(kind) / 255 - mean) / std

    def forward(self, params: Any, batch_stats: Any, images: jax.Array) -> tuple:
        """Training forward pass of uint8 images: `(features, embeddings, new batch_stats)`."""
        network, parts = self.network, self.microbatches
        if parts > 1:
            groups = network.backbone.bn_groups // (parts * self.mesh.size)
            network = network.with_groups(groups)

        def apply(params: Any, batch_stats: Any, images: jax.Array) -> tuple:
            (features, embeddings), new = network.apply(
                {"params": params, "batch_stats": batch_stats},
                self.scale(images),
                train=True,
                mutable=["batch_stats"],
            )
            return features, embeddings, new["batch_stats"]

        if parts == 1:
            return apply(params, batch_stats, images)
        return microbatch.forward(apply, params, batch_stats, images, parts=parts, mesh=self.mesh)

    def encode(self, params: Any, batch_stats: Any, images: jax.Array, layer: str) -> jax.Array:
        """Eval-mode features of uint8 images."""
        variables = {"params": params, "batch_stats": batch_stats}
        return self.network.apply(variables, self.scale(images), layer, method="encode")

    @jax.named_scope("update")  # the parts that benchmarks/trace.py tells apart
    def update(self, state: Any, grads: Any) -> tuple[Any, Any, dict]:
        """One optimiser step: `(params, opt_state, metrics)`."""
        updates, opt_state = self.tx.update(grads, state.opt_state, state.params)
        metrics = {
            "gradient_norm": optax.tree.norm(grads),
            "parameter_norm": optax.tree.norm(state.params),
            "learning_rate": self.schedule(state.step),
        }
        return optax.apply_updates(state.params, updates), opt_state, metrics

    def init_probe(self, key: jax.Array) -> Any:
        """The probe's state; None without labels."""
        return self.probe.init(key, self.network.backbone.feature_dim)

    @jax.named_scope("probe")
    def update_probe(self, state: Any, features: jax.Array, labels: jax.Array) -> tuple[Any, dict]:
        """One step of the online probe on `features [n, d]`, which get no gradient from it."""
        return self.probe.update(state, features, labels)


@jax.named_scope("loss")
def embedding_metrics(features: jax.Array, embeddings: jax.Array) -> dict[str, jax.Array]:
    """Signs of collapse: mean length of the embeddings, spread of the features.

    `feature_std` is the standard deviation over the batch of each coordinate of the unit-length
    features, averaged over coordinates and scaled by sqrt(d): about 1 for features that fill
    the sphere, 0 for collapsed ones (after Chen & He 2021, section 4.1).
    """
    norms = jnp.linalg.norm(embeddings, axis=-1)
    unit = features / jnp.maximum(jnp.linalg.norm(features, axis=-1, keepdims=True), 1e-12)
    return {
        "embedding_norm": norms.mean(),
        "feature_std": unit.std(0).mean() * jnp.sqrt(features.shape[-1]),
    }


def make_setup(
    config: ConfigDict, mesh: Mesh, total_steps: int, steps_per_epoch: int, num_classes: int
) -> Setup:
    """Builds network, optimiser and probe of a resolved config.

    Raises:
        UserError: from the builders, for a value that none of them knows, or for micro-batches
            that do not fit the mesh.
    """
    tx, schedule = optim.make_optimizer(config, total_steps, steps_per_epoch)
    augmentation = presets.resolve(config.augment, config.data.image_size)
    return Setup(
        config=config,
        mesh=mesh,
        network=heads.make_network(config),
        tx=tx,
        schedule=schedule,
        probe=probe.make_probe(config, num_classes, total_steps),
        mean=augmentation.mean,
        std=augmentation.std,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        microbatches=microbatch.count(config, mesh.size),
    )


def make_encoder_setup(config: ConfigDict, mesh: Mesh) -> Setup:
    """A `Setup` of which only the network and the scale of images are used.

    What decides a training step (the optimiser and its schedule, micro-batches, the probe) is left
    out, so that no way in which a run was trained keeps its encoder from being used on other
    devices and in other modes.

    Raises:
        UserError: from the builders of the network, for a value that they do not know.
    """
    config = config.copy_and_resolve_references()
    config.microbatch = 0
    config.optimizer, config.probe = section("optimizer"), section("probe")
    return dataclasses.replace(make_setup(config, mesh, 1, 1, num_classes=0), training=False)
