"""Where `--mode=finetune` leaves its network: `<workdir>/finetuned/NAME.safetensors`.

A fine-tuning of the same recipe replaces its own file. No other one does: it gets a number behind
its name, or, if the user chose the name, is refused before it trains.
"""

import dataclasses
import itertools
import logging
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from common import version
from common.data.augment import presets
from common.errors import UserError
from common.evaluate.pretrained import Pretrained
from common.models import classifier
from common.models.classifier import SECTIONS, SUFFIX, Classifier
from common.models.finetuned import FOLDER
from common.run import digests
from common.sharding import first_process


@dataclasses.dataclass(frozen=True)
class Place:
    """A file that is free for one fine-tuning.

    Attributes:
        classifier: what will be in it; `info` says how it was made.
        path: of the file.
    """

    classifier: Classifier
    path: epath.Path

    def write(self, arrays: Any, found: Mapping[str, Any]) -> epath.Path | None:
        """Writes the file on process 0; returns its path, or None if that was not possible.

        The hours of a fine-tuning should not be lost to a full disk: its accuracy is still
        reported.

        Args:
            arrays: of the classifier, replicated over the devices.
            found: for `info`, what was measured.
        """
        if jax.process_index() != 0:
            return self.path
        info = {**self.classifier.info, **found, **version.fields()}
        whole = dataclasses.replace(self.classifier, info=info)
        # another fine-tuning may have ended meanwhile
        name = self.path.name.removesuffix(SUFFIX)
        path = _free(self.path.parent, name, self.classifier)
        try:
            classifier.save(path, whole, jax.device_get(arrays))
        except OSError as error:
            logging.warning("cannot write %s (%s)", path, error.strerror or error)
            return None
        return path


def reserve(opened: Pretrained, classes: tuple[str, ...], how: Mapping[str, Any]) -> Place | None:
    """Decides on the file before the training; None with `eval.finetune.save=False`.

    Args:
        opened: the run.
        classes: their names.
        how: what decides the result beside the run: recipe, epochs, batch size.

    Raises:
        UserError: for a name that is none, or that another fine-tuning has; or if the folder cannot
            be made.
    """
    c = opened.settings.finetune
    chosen = c.name.removesuffix(SUFFIX)
    if not c.save:
        if chosen:
            raise UserError(
                f"eval.finetune.name={c.name} names a file and eval.finetune.save=False writes "
                "none: leave one of them out"
            )
        return None
    if chosen.startswith(".") or "/" in chosen or "\\" in chosen:
        raise UserError(
            f"eval.finetune.name={c.name!r} is no name of a file in WORKDIR/{FOLDER}: expected one "
            "without slashes or a dot in front"
        )
    new = describe(opened, classes, how)
    folder, refusal = opened.workdir / FOLDER, None
    path = folder / f"{chosen}{SUFFIX}"
    if jax.process_index() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not chosen:
                path = _free(folder, default_name(opened.settings), new)
            elif not _may_replace(path, new):
                refusal = UserError(
                    f"{path} is of another fine-tuning: give another --eval.finetune.name, or "
                    "remove it"
                )
        except OSError as error:
            reason = error.strerror or error
            refusal = UserError(
                f"cannot write to {folder} ({reason}): make room for the network, or give "
                "--eval.finetune.save=False to have its accuracy only"
            )
    # process 0 decides for all
    if first_process(refusal is not None):
        raise refusal or UserError(f"process 0 cannot use {folder}: see its message")
    return Place(new, path)


def default_name(settings: ConfigDict) -> str:
    """Fraction, seed and layer, e.g. "1pct_seed0_head1"."""
    fraction = f"{100 * settings.finetune.fraction:g}pct"
    scratch = ["untrained"] if settings.features == "untrained" else []
    return "_".join([fraction, f"seed{settings.seed}", settings.layer, *scratch])


def describe(opened: Pretrained, classes: tuple[str, ...], how: Mapping[str, Any]) -> Classifier:
    """What a fine-tuning of a run makes, before it is made. All processes call this."""
    config, s = opened.config, opened.settings
    view = presets.resolve(config.augment, config.data.image_size)
    start = {"params": opened.state.params, "batch_stats": opened.state.batch_stats}
    return Classifier(
        config=ConfigDict({name: config[name] for name in SECTIONS}),
        view_size=view.size,
        layer=s.layer,
        mean=view.mean,
        std=view.std,
        image_size=opened.image_size,
        classes=classes,
        info={
            "run": str(opened.workdir),
            "start": digests.of_json(digests.of_state(start)),
            "method": config.method,
            "run_seed": config.seed,
            "checkpoint_step": opened.step,
            "features": s.features,
            "source": config.data.source,
            "train_split": config.data.train_split,
            "fraction": s.finetune.fraction,
            "seed": s.seed,
            "area_min": s.area_min,
            **how,
        },
    )


def _free(folder: epath.Path, name: str, new: Classifier) -> epath.Path:
    """The first of `NAME`, `NAME_2` ... that is not there, or of the same recipe."""
    numbered = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(2)))
    paths = (folder / f"{name}{SUFFIX}" for name in numbered)
    return next(path for path in paths if _may_replace(path, new))


def _may_replace(path: epath.Path, new: Classifier) -> bool:
    """Whether there is no file, or one that the same fine-tuning of the same run has made."""
    if not path.exists():
        return True
    try:
        old = classifier.describe(path)
    except UserError:
        return False  # something else, and not ours to delete
    asked = {k: x for k, x in new.info.items() if k != "run"}  # a workdir may move
    return (
        old.info.items() >= asked.items()
        and all(
            getattr(old, field.name) == getattr(new, field.name)
            for field in dataclasses.fields(Classifier)
            if field.name not in ("info", "config")
        )
        and old.config.to_dict() == new.config.to_dict()
    )
