"""A trained run, opened for evaluation: its config, its encoder, its data."""

import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from common import config as configs
from common.data.feed import survey
from common.data.images.decoding import AUTO, UPPER_8
from common.data.sources import held_out
from common.data.sources.base import Source
from common.data.sources.opening import open_source, with_splits
from common.errors import UserError
from common.evaluate import accuracy, batches, features
from common.evaluate.features import Features
from common.method import Method, root_keys
from common.run import console, files, saved_config
from common.run.checkpoint import Checkpoints
from common.setup import Setup, make_encoder_setup
from common.sharding import make_mesh, replicated, state_shardings
from common.train import by_number


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """The encoder of a run, and the data to evaluate it on.

    Attributes:
        config: of the run, its `data` section updated from `settings`.
        settings: of the evaluation, see `common/eval_fields.py`.
        workdir: of the run.
        mesh: the devices.
        method: built from `config`, without a probe.
        state: of the checkpoint; only `step`, `params` and `batch_stats` are filled.
        step: of the checkpoint; 0 for an untrained encoder and for raw pixels.
        value_range: of the run's own data.
        trained_on: the split of the run's training where the train split here is its
            `data.bank_split`; else "".
    """

    config: ConfigDict
    settings: ConfigDict
    workdir: epath.Path
    mesh: Mesh
    method: Method
    state: Any
    step: int
    value_range: str = UPPER_8
    trained_on: str = ""

    @property
    def subject(self) -> str:
        """What is evaluated, for a sentence."""
        return {
            "trained": f"the {'supervised ' * self.method.supervised}encoder after step "
            f"{self.step:,}",
            "untrained": "the untrained encoder",
            "pixels": "raw pixels",
        }[self.settings.features]

    @property
    def image_size(self) -> int:
        """Side of the images, in pixels: `settings.image_size`, or the run's."""
        size: int = self.settings.image_size or self.config.data.image_size
        return size

    def open(self, role: str, quiet: bool = False) -> Source:
        """Opens the source of a role ("train" or "test"), and prints a summary of it.

        For data other than the run's own, the first split opened decides the value range.

        Raises:
            UserError: no such split, or an error of `open_source`.
        """
        data = self.config.data
        if not data[f"{role}_split"]:
            raise UserError(
                f"no {role} split: the run of {self.workdir} named none, so give "
                f"--eval.{role}_split=NAME"
            )
        try:
            source = open_source(data, role)
        except UserError as error:
            raise UserError(in_eval(str(error))) from error
        if data.value_range == AUTO:
            data.value_range, lines = survey.decide_value_range(data, source, self.value_range)
            for line in lines:
                console.say(in_eval(line))
        if not quiet:
            say_summary(source)
        return source

    def open_labelled(self, role: str) -> Source:
        """As `open`, for a mode that needs labels."""
        source = self.open(role)
        if role == "test":
            data = self.config.data
            accuracy.warn_of_overlap(data.train_split, data.test_split)
        if not source.num_classes:
            raise UserError(
                f"{source.name} ({source.split}) has no labels, and this mode needs some: give "
                "labelled data, e.g. --eval.source=folder:PATH with a folder for each class (and "
                "--eval.labels if they are hidden); or label a few images, which --mode=suggest "
                "chooses, and all others by --mode=label"
            )
        return source

    def batches(
        self, source: Source, batch_size: int, keep: np.ndarray | None = None
    ) -> Iterator[tuple[jax.Array, jax.Array]]:
        """Crops and flips of the run with their labels, see `batches.batches`."""
        s = self.settings
        return batches.batches(
            source, self.config, self.mesh, batch_size, s.seed, keep,
            image_size=s.image_size, area_min=s.area_min,
        )  # fmt: skip

    def extract(self, source: Source, limit: int = 0, encode: Callable | None = None) -> Features:
        """Features of un-augmented images (raw pixels with `settings.features="pixels"`).

        Args:
            source: any split.
            limit: at most this many examples, evenly spaced; 0 for all.
            encode: makes features of global images; None is `encoder`.
        """
        return features.of_source(
            encode or self.encoder,
            source,
            self.mesh,
            self.settings.batch_size or self.config.batch_size,
            self.image_size,
            limit,
        )

    @functools.cached_property
    def encoder(self) -> Callable[[jax.Array], jax.Array]:
        """Global uint8 images `[b, h, w, 3]` -> features `[b, d]` of `settings.layer`, compiled."""
        if self.settings.features == "pixels":
            return features.jit_encoder(features.flatten_pixels, self.mesh)
        encode = functools.partial(self.method.encode, layer=self.settings.layer)
        return functools.partial(features.jit_encoder(encode, self.mesh), self.state)


def say_summary(source: Source) -> None:
    """Says what was opened, where there is something to say of how it was read."""
    if source.account:
        console.say(in_eval("\n  ".join(source.summary())))


def in_eval(text: str) -> str:
    """A message about `config.data`, with the flags of an evaluation in place of its fields."""
    text = re.sub(
        r"(?<![\w.-])(--config\.)?data\.(source|labels|train_split|test_split|value_range)",
        r"--eval.\2",
        text,
    )
    return re.sub(r"(?<![\w-])(config\.)?data\.dir\b", "--eval.data_dir", text)


def load(
    workdir: str | os.PathLike,
    settings: ConfigDict,
    methods: Mapping[str, Callable[[Setup], Method]],
    mesh: Mesh | None = None,
) -> Pretrained:
    """Opens the run of a workdir.

    Args:
        workdir: of a run, finished or not.
        settings: from `common.config.eval_config()`.
        methods: by name, e.g. `{"simclr": SimCLR}`.
        mesh: default all devices.

    Raises:
        UserError: no run or no such checkpoint there, an unknown method or field.
    """
    workdir = files.path(workdir)
    configs.one_of_field("eval.features", settings.features)
    # of weights that were imported nobody has decided anything yet
    config = by_number.decide(saved_config.load(workdir, methods), None)
    value_range = config.data.value_range
    with config.unlocked():
        d = config.data
        other = set_source(settings, d, settings.source or d.source)
        d.on_corrupt = settings.on_corrupt or d.on_corrupt
        d.dir = settings.data_dir or d.dir
        if other and held_out.decided(d.train_split, d.test_split):
            # by the number of images of the run's own data
            d.train_split = d.test_split = AUTO
        d.shrink = max(d.shrink, settings.image_size) if d.shrink else 0
        own = bool(d.bank_split) and not (settings.train_split or other)
        trained_on = str(d.train_split) if own else ""
        d.train_split = settings.train_split or d.bank_split or d.train_split
        d.bank_split = ""  # "train" is the split that votes here
        # that a run had no test split means nothing for other data
        d.test_split = settings.test_split or d.test_split or ("test" if other else "")
        with contextlib.suppress(UserError):  # `open` raises it, where there is anything to open
            d.update(with_splits(d))
    mesh = mesh or make_mesh()
    method = methods[config.method](make_encoder_setup(config, mesh))
    state, step = None, 0
    if settings.features == "trained":
        state, step = _restore(workdir, method, mesh, settings.step)
    elif settings.features == "untrained":
        state = untrained(method, config.seed, mesh)
    opened = Pretrained(
        config, settings, workdir, mesh, method, state, step, value_range, trained_on
    )
    _check_image_size(opened)
    return opened


def _check_image_size(opened: Pretrained) -> None:
    """Raises a `UserError` for images that the encoder cannot take, before any is read."""
    size = opened.settings.image_size
    if size < 0:
        raise UserError(f"eval.image_size={size}: expected a side in pixels, or 0 for the run's")
    if size and opened.settings.features != "pixels":
        images = jax.ShapeDtypeStruct((1, size, size, 3), np.uint8)
        try:
            jax.eval_shape(opened.method.encode, opened.state, images)
        except UserError as error:
            at_fault = str(error).partition(": set data.image_size")[0]
            raise UserError(
                f"eval.image_size={size} does not suit the encoder: {at_fault}"
            ) from error


def set_source(settings: ConfigDict, data: ConfigDict, source: str) -> bool:
    """Sets `source` in the section `data` of a run, and how it is read.

    The run's own data are read as in training, whatever path leads to them; other data get their
    own labels and value range. `settings` can give both.

    Returns:
        Whether these are other data than the run's own.
    """
    own = canonical(source) == canonical(data.source)
    if not own and data.value_range != UPPER_8:
        data.value_range = AUTO
    data.value_range = settings.value_range or data.value_range
    data.labels = settings.labels or (data.labels if own else "auto")
    data.source = source
    return not own


def canonical(source: str) -> str:
    """One name for a source: a folder has many paths."""
    kind, colon, path = source.partition(":")
    if kind not in ("folder", "shards") or files.is_remote(path):
        return source.rstrip("/")
    return kind + colon + os.path.realpath(files.path(path))


def untrained(method: Method, seed: int, mesh: Mesh) -> Any:
    """The state from which a run with this seed starts."""
    init_key, _ = root_keys(seed)
    shardings = state_shardings(mesh, jax.eval_shape(method.init, init_key))
    return jax.jit(method.init, out_shardings=shardings)(init_key)


def _restore(workdir: epath.Path, method: Method, mesh: Mesh, step: int) -> tuple[Any, int]:
    """The encoder's part of the state at `step` (0: the newest), and that step."""
    abstract = jax.eval_shape(method.init, jax.random.key(0))
    names = ("step", "params", "batch_stats")
    target = {name: getattr(abstract, name) for name in names}
    shardings = jax.tree.map(lambda _: replicated(mesh), target)
    with Checkpoints(workdir, keep=None, read_only=True) as checkpoints:
        steps = checkpoints.all_steps()
        if not steps:
            raise UserError(f"{workdir} has no checkpoint yet: train first")
        step = step or steps[-1]
        if step not in steps:
            raise UserError(
                f"{workdir} has no checkpoint of step {step}: choose one of "
                f"{', '.join(map(str, steps))}, or 0 for the newest"
            )
        found = checkpoints.restore_part(step, target, shardings)
    nothing = {f.name: None for f in dataclasses.fields(abstract)}
    return dataclasses.replace(abstract, **(nothing | found)), step
