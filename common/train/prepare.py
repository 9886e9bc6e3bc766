"""What is decided before the first step: data, method, schedules, shapes and shardings."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from common import config as configs
from common.data.feed import pipeline, resident, survey
from common.data.feed.batches import Batches
from common.data.feed.recipe import FeedRecipe
from common.data.sources.base import Source
from common.data.sources.opening import open_source, with_splits
from common.errors import UserError
from common.method import Method, root_keys
from common.optim import steps_of
from common.run import console
from common.setup import Setup, make_setup
from common.sharding import local_rows, replicated, state_shardings
from common.train import by_number
from common.train.position import Position


@dataclasses.dataclass(frozen=True)
class Extent:
    """What a training step depends on of the data: schedules, and the width of the probe.

    Attributes:
        total_steps: of the run.
        steps_per_epoch: full batches in the dataset.
        num_classes: 0 without labels.
    """

    total_steps: int
    steps_per_epoch: int
    num_classes: int = 0

    @classmethod
    def of(cls, config: ConfigDict, source: Source) -> "Extent":
        """Of a run on a dataset.

        Raises:
            UserError: a batch larger than the dataset, a duration that is none.
        """
        per_epoch = pipeline.steps_per_epoch(source, config.batch_size)
        total = steps_of(config.duration, per_epoch, name="duration")
        if total < 1:
            raise UserError(
                f'duration="{config.duration}" is no step at all: expected 1 step or more'
            )
        return cls(total, per_epoch, source.num_classes)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run that is decided and has no state yet.

    Attributes:
        config: of the run; what could be "auto" is decided.
        mesh: the devices, which may be described only.
        make_method: class of the method.
        method: what it made of `setup`.
        setup: network, optimiser and probe.
        extent: of the run.
        recipe: how its batches are made.
        abstract: the state's shapes.
        shardings: a tree like it.
        data: the training split; None where only its size is known.
    """

    config: ConfigDict
    mesh: Mesh
    make_method: Callable[[Setup], Method]
    method: Method
    setup: Setup
    extent: Extent
    recipe: FeedRecipe
    abstract: Any
    shardings: Any
    data: Source | None = None

    @property
    def source(self) -> Source:
        """The training split, of a run whose data is at hand."""
        assert self.data is not None
        return self.data

    @property
    def init_key(self) -> jax.Array:
        """The key of `Method.init`."""
        return root_keys(self.config.seed)[0]

    @functools.cached_property
    def root_key(self) -> jax.Array:
        """The key of all steps, on every device."""
        # not device_put: it refuses typed keys when there are several processes
        spread = jax.jit(lambda key: key, out_shardings=replicated(self.mesh))
        return spread(root_keys(self.config.seed)[1])


def prepare(
    make_method: Callable[[Setup], Method],
    config: ConfigDict,
    mesh: Mesh,
    source: Source | None = None,
    *,
    extent: Extent | None = None,
    training: bool = True,
    workdir: epath.Path | None = None,
) -> Prepared:
    """Resolves a config once, for training, replay, plan and import alike.

    Args:
        make_method: class of the method, e.g. `simclr_jax.method.SimCLR`.
        config: from a file in `configs/`, or of a run.
        mesh: the devices.
        source: of the training split; without it and `extent` it is opened, and what there is to
            say of it is said.
        extent: where the data is not at hand.
        training: False: no step is taken, so that nothing is said of what only matters to one.
        workdir: of the run, where there is one.

    Raises:
        UserError: for a mistake in the config or the data.
    """
    config = completed(make_method, config, workdir)
    configs.check(config)
    if extent is None and source is None:
        config = config.copy_and_resolve_references()
        config.data = with_splits(config.data)
        source = open_source(config.data, "train")
        config.data.value_range, seen = survey.decide_value_range(config.data, source)
        for line in seen:
            console.say(line)
    given = config
    config = by_number.decide(config, source.num_examples if source else None, mesh.size)
    configs.check(config)
    if config is not given and source is not None and source.num_examples < by_number.FEW:
        console.say(
            f"{source.num_examples} images are few to learn from: expect little, or start from "
            "published weights (init_from)"
        )
    if extent is None:
        assert source is not None
        local_rows(mesh, config.batch_size)  # refuses a batch that cannot be split
        extent = Extent.of(config, source)
    recipe = FeedRecipe.of(config)
    setup = make_setup(
        config, mesh, extent.total_steps, extent.steps_per_epoch, extent.num_classes,
        recipe.views[0],
    )  # fmt: skip
    setup = dataclasses.replace(setup, training=training, workdir=workdir)
    method = make_method(setup)
    if training and config.views not in method.VIEWS:
        raise UserError(
            f"views={config.views} and method {config.method}, which takes "
            f"{' or '.join(map(str, method.VIEWS))} of each image: set views={method.VIEWS[0]}"
        )
    # touches no device: they may be busy with a run, or not be there
    abstract = jax.eval_shape(method.init, jax.eval_shape(lambda: jax.random.key(0)))
    shardings = state_shardings(mesh, abstract)
    return Prepared(
        config,
        mesh,
        make_method,
        method,
        method.setup,
        extent,
        recipe,
        abstract,
        shardings,
        source,
    )


def completed(
    make_method: Callable[[Setup], Method], config: ConfigDict, workdir: epath.Path | None = None
) -> ConfigDict:
    """`Method.complete` of a class; a function that makes a method completes nothing."""
    complete = getattr(make_method, "complete", None)
    return complete(config, workdir) if complete else config


def open_evaluation(data: ConfigDict, train: Source) -> tuple[Source, Source | None]:
    """The split whose images vote in kNN, and the test split; None if `data.test_split` is empty.

    Args:
        data: section of the config.
        train: the training split, which votes where `data.bank_split` is empty.

    Raises:
        UserError: if a split is named but missing, or empty.
    """
    test = None
    if data.test_split:
        try:
            test = open_source(data, "test")
        except UserError as error:
            raise UserError(
                f"{str(error).rstrip('.')}. (Set data.test_split='' to train without a test set: "
                "no kNN then.)"
            ) from error
    return open_source(data, "bank") if data.bank_split else train, test


def resident_data(run: Prepared) -> dict[str, jax.Array]:
    """The dataset in device memory, where all augmentation runs there; else {}."""
    on_device = run.config.data.augment_on == "device"
    return resident.load(run.source, run.mesh) if on_device else {}


def batches_from(run: Prepared, position: Position) -> Batches:
    """The batches of a run, from where it stands."""
    return pipeline.train_batches(
        run.source,
        run.recipe,
        rows=local_rows(run.mesh, run.config.batch_size),
        start_step=position.position,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        saved_readers=position.readers,
    )
