"""The seam between the training loop and a method, and the pieces every method needs.

A method is a package with a subclass of `Method`: a state, a train step, and a section of the
config. `common` never asks which one runs.
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from etils import epath
from ml_collections import ConfigDict

from common.setup import Setup, TrainState

Step = Callable[[Any, dict, jax.Array], tuple[Any, dict]]  # as `Method.train_step`


@dataclasses.dataclass(frozen=True)
class Classification:
    """Classes that the network of a method tells apart itself, because another one taught it.

    Attributes:
        classes: their names; "0", "1" ... where nobody named them.
        student: `(state, features [n, d] of the backbone) -> logits [n, c]`, in eval mode.
        teacher: `(state, uint8 images [n, h, w, 3]) -> logits [n, c]`; no step changes it.
    """

    classes: tuple[str, ...]
    student: Callable[[Any, jax.Array], jax.Array]
    teacher: Callable[[Any, jax.Array], jax.Array]


class Method(Protocol):
    """All that training and evaluation ask of a method, which inherits the defaults from here.

    Attributes:
        MEANINGS: what each field of the method's section is for, by name; `main.py -h` shows it.
        VIEWS: numbers of views of an image that its train step can take.
        FIXED: fields of its state that are never those of another run, see `placed`.
        setup: what the method was built from.
        chance: accuracy of guessing in the contrastive task: at or below it, nothing has been
            learned; None: there is no such task.
        classification: of a network that is trained to classify; None of all others.
        supervised: whether training reads the images' labels, apart from the probe's: summaries
            and evaluations then say so.
    """

    MEANINGS: ClassVar[Mapping[str, str]] = {}
    VIEWS: ClassVar[tuple[int, ...]] = (2,)
    FIXED: ClassVar[tuple[str, ...]] = ()
    setup: Setup
    chance: float | None = None
    classification: Classification | None = None
    supervised: bool = False

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    @staticmethod
    def default_config() -> ConfigDict:
        """The method's section of the config, which has the method's name."""
        return ConfigDict()

    @classmethod
    def adapt(cls, config: ConfigDict) -> None:
        """Turns the config of another method into one of this one, before flags change it.

        Of a method that `--mode` names; the others are named by their config files.
        """
        raise TypeError(f"{cls.__name__} is named by a config file, and not by --mode")

    @classmethod
    def complete(cls, config: ConfigDict, workdir: epath.Path | None = None) -> ConfigDict:
        """The config with what follows from files that it names, when flags have changed it.

        Args:
            config: of the run.
            workdir: of the run, which may have begun; None where there is none.
        """
        del workdir
        return config

    @property
    def notes(self) -> Mapping[str, str]:
        """What the start-up summary says of it beside its name, by the name of the line."""
        return {}

    def init(self, key: jax.Array) -> TrainState:
        """The state before the first step; pure, jitted by the loop with its final shardings."""
        return self.setup.init(*jax.random.split(key))

    def placed(self, state: Any) -> Any:
        """The first state of a run, with what is read from files in its fields `FIXED`."""
        return state

    def resumed(self, state: Any) -> Any:
        """The state of a checkpoint, before the run goes on.

        Raises:
            UserError: a file of the method does not belong to it.
        """
        return state

    def train_step(self, state: Any, batch: dict, key: jax.Array) -> tuple[Any, dict]:
        """One update; pure, jitted once by the loop, which donates `state`.

        Args:
            state: of step t.
            batch: `images` uint8 `[b, views, h, w, c]`, `labels` int32 `[b]` (-1: none).
            key: root key of the run; `stream` makes that of a use in this step.

        Returns:
            The state of step t+1 and float scalars, "loss" among them.
        """
        ...

    def encode(self, state: Any, images: jax.Array, layer: str = "backbone") -> jax.Array:
        """Features `[b, d]` of uint8 `images [b, h, w, c]`, in eval mode.

        Nothing of the state is used but `params` and `batch_stats`: evaluation restores no more.
        """
        return self.setup.encode(state.params, state.batch_stats, images, layer)

    def adopted(self, state: Any, taken: set[str]) -> tuple[Any, list[str]]:
        """Derives the fields that another run, whose arrays the state now has, did not have.

        Args:
            state: of a new run with `config.resume_from`.
            taken: names of the arrays that come from the other run, e.g. "params/head/...".

        Returns:
            The state, and the names of the fields derived.
        """
        del taken
        return state, []

    def finish(
        self, config: ConfigDict, state: Any, workdir: epath.Path, info: dict[str, Any]
    ) -> None:
        """Writes what a run leaves beside its checkpoints.

        Args:
            config: of the run.
            state: after the last step.
            workdir: of the run.
            info: of the run, for what is written: its scores among others.
        """
        del config, state, workdir, info


def stream(key: jax.Array, step: jax.Array, name: str) -> jax.Array:
    """The key of one use of randomness in one step, e.g. "query": no other use gets it.

    Args:
        key: of all steps of the run.
        step: int32 scalar.
        name: of the use.
    """
    return jax.random.fold_in(jax.random.fold_in(key, step), zlib.crc32(name.encode()) >> 1)


def root_keys(seed: int) -> tuple[jax.Array, jax.Array]:
    """The keys of a run: of `init`, and of all its steps."""
    init_key, loop_key = jax.random.split(jax.random.key(seed))
    return init_key, loop_key


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
