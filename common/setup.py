"""What a method is built from, and the parts of a train step that are the same for every method."""

import dataclasses
from typing import Any, TypeVar

import flax
import jax
import jax.numpy as jnp
import optax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from common import optim
from common.config import section
from common.data.augment import presets
from common.models import encoder, heads, microbatch, probe


@flax.struct.dataclass
class TrainState:
    """What changes during a run; a method that has more than this adds fields in a subclass.

    Attributes:
        step: int32 scalar, updates done.
        params: a dictionary; the encoder is under "backbone".
        batch_stats: running statistics of the same network.
        opt_state: of `Setup.tx`.
        probe: `ProbeState`, None without labels.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    probe: Any


State = TypeVar("State", bound=TrainState)


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a method closes over: everything that is decided before the first step.

    Attributes:
        config: the method's own section, e.g. `config.simclr`.
        batch_size: images of the global batch.
        image_size: side of the images of evaluation, in pixels; `augment.size` may give the views
            another.
        mesh: the devices.
        network: encoder and projection head, and a predictor if the method has one.
        tx: the optimiser.
        schedule: its learning rate by step.
        probe: the online linear probe.
        mean: of the images, one value a channel, in [0, 1].
        std: likewise.
        total_steps: of the run.
        steps_per_epoch: of the run.
        microbatches: parts of a batch, see `common/models/microbatch.py`.
        initial: `(params, batch_stats)` to start from, whole or without the head.
        training: False if only the network and the scaling of images are used.
        workdir: of the run, for files of a method; None where there is none.
    """

    config: ConfigDict
    batch_size: int
    image_size: int
    mesh: Mesh
    network: heads.Network
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    probe: probe.Probe
    mean: tuple[float, ...]
    std: tuple[float, ...]
    total_steps: int
    steps_per_epoch: int
    microbatches: int = 1
    initial: Any = None
    training: bool = True
    workdir: epath.Path | None = None

    def init(self, network_key: jax.Array, probe_key: jax.Array) -> TrainState:
        """The state before the first step, of a method that adds no field to it."""
        params, batch_stats = self.init_network(network_key)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=batch_stats,
            opt_state=self.tx.init(params),
            probe=self.probe.init(probe_key, self.network.backbone.feature_dim),
        )

    def init_network(self, key: jax.Array) -> tuple[Any, Any]:
        """Returns `(params, batch_stats)`: those of `initial`, and drawn what is not there."""
        size = self.image_size
        variables = self.network.init(key, jnp.zeros((1, size, size, 3)), train=False)
        params, batch_stats = self.initial or ({}, {})
        return variables["params"] | params, variables.get("batch_stats", {}) | batch_stats

    def scale(self, images: jax.Array) -> jax.Array:
        """uint8 `[..., h, w, 3]` to [0, 1], then standardised if the preset has mean and std."""
        return encoder.scale(images, self.mean, self.std, self.network.backbone.dtype)

    def forward(
        self, params: Any, batch_stats: Any, images: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array, Any]:
        """Training forward pass of encoder and head.

        Args:
            params: of the network.
            batch_stats: likewise.
            images: uint8 `[b, h, w, c]`.
            key: of this pass alone, see `stream`; used by an encoder with draws of its own.

        Returns:
            `(features [b, d], embeddings [b, dim], new batch_stats)`.
        """
        network, parts = self.network, self.microbatches
        keys = jax.random.split(key, len(images)) if network.backbone.is_random else None
        if parts > 1 and network.backbone.has_batch_norm:
            groups = network.backbone.bn_groups // (parts * self.mesh.size)
            network = network.with_groups(groups)

        def encode(params: Any, batch_stats: Any, rows: tuple) -> tuple:
            images, keys = rows
            return _training(network, "features", params, batch_stats, self.scale(images), keys)

        part, stats = (
            {k: x for k, x in tree.items() if k == "backbone"} for tree in (params, batch_stats)
        )
        rows = images, keys
        if parts == 1:
            features, new = encode(part, stats, rows)
        else:
            features, new = microbatch.forward(
                encode, part, stats, rows, parts=parts, mesh=self.mesh
            )
        embeddings, batch_stats = self.apply("project", params, batch_stats | new, features)
        return features, embeddings, batch_stats

    def apply(self, part: str, params: Any, batch_stats: Any, x: jax.Array) -> tuple:
        """`(output, new batch_stats)` of a training pass of a part: "project" or "predict"."""
        return _training(self.network, part, params, batch_stats, x)

    def encode(self, params: Any, batch_stats: Any, images: jax.Array, layer: str) -> jax.Array:
        """Eval-mode features of uint8 images."""
        variables = {"params": params, "batch_stats": batch_stats}
        features: Any = self.network.apply(variables, self.scale(images), layer, method="encode")
        return features

    def next_state(
        self,
        state: State,
        grads: Any,
        batch_stats: Any,
        features: jax.Array,
        labels: jax.Array,
        **fields: Any,
    ) -> tuple[State, dict[str, jax.Array]]:
        """The end of every train step: one update of the optimiser, one of the online probe.

        Args:
            state: of step t.
            grads: of the loss, a tree like `state.params`.
            batch_stats: that the forward pass left.
            features: `[b * views, d]`, the views of an image one after the other. The probe learns
                from them; they get no gradient from it.
            labels: int32 `[b]`, -1: none.
            **fields: those that a method's own state has beside `TrainState`'s.

        Returns:
            The state of step t+1, and the metrics of optimiser and probe.
        """
        with jax.named_scope("update"):  # the parts that benchmarks/trace.py tells apart
            updates, opt_state = self.tx.update(grads, state.opt_state, state.params)
            metrics = {
                "gradient_norm": optax.tree.norm(optim.trained(grads, self.network.frozen)),
                "parameter_norm": optax.tree.norm(state.params),
                "learning_rate": self.schedule(state.step),
            }
            if watched := self.network.backbone.watched:
                of_layer = grads["backbone"][watched]
                metrics[f"gradient_norm_{watched}"] = optax.tree.norm(of_layer)
            params = optax.apply_updates(state.params, updates)
        with jax.named_scope("probe"):
            labels = jnp.repeat(labels, len(features) // len(labels))
            probe_state, probe_metrics = self.probe.update(state.probe, features, labels)
        state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            probe=probe_state,
            **fields,
        )
        return state, metrics | probe_metrics


def _training(
    network: heads.Network, part: str, params: Any, batch_stats: Any, *inputs: Any
) -> tuple[Any, Any]:
    """`(output, new batch_stats)` of a method of the network, in training."""
    variables = {"params": params, "batch_stats": batch_stats}
    output, new = network.apply(variables, *inputs, method=part, mutable=["batch_stats"])
    return output, new.get("batch_stats", {})


def make_setup(
    config: ConfigDict,
    mesh: Mesh,
    total_steps: int,
    steps_per_epoch: int,
    num_classes: int,
    view: presets.Augmentation | None = None,
) -> Setup:
    """Builds network, optimiser and probe of a resolved config.

    Args:
        config: of the run.
        mesh: the devices.
        total_steps: of the run.
        steps_per_epoch: full batches in the dataset.
        num_classes: of the probe; 0 without labels.
        view: the augmentation of view 1, whose mean and std scale the images; None: resolved here.

    Raises:
        UserError: from the builders, for a value that none of them knows, or for micro-batches
            that do not fit the mesh.
    """
    view = view or presets.resolve(config.augment, config.data.image_size)
    network = heads.make_network(config, view.size)
    tx, schedule = optim.make_optimizer(
        config.optimizer, config.batch_size, total_steps, steps_per_epoch, network.frozen
    )
    return Setup(
        config=config[config.method],
        batch_size=config.batch_size,
        image_size=config.data.image_size,
        mesh=mesh,
        network=network,
        tx=tx,
        schedule=schedule,
        probe=probe.make_probe(config.probe, num_classes, total_steps),
        mean=view.mean,
        std=view.std,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        microbatches=microbatch.count(
            config.batch_size,
            config.microbatch,
            config.model.bn_groups if network.backbone.has_batch_norm else None,
            mesh.size,
        ),
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
