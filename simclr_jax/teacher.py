"""The teacher of a student: the file that `distil.teacher` names, and the copy that a run keeps.

A run reads the file once. From then on it has its own copy, `<workdir>/teacher.safetensors`, and
needs the file no more: it may be moved, deleted, or hold another network.
"""

import dataclasses
import logging
from typing import Any

import jax
import numpy as np
from etils import epath

from common.errors import UserError
from common.models import classifier, finetuned
from common.models.classifier import Classifier
from common.run import files, saved_config
from common.run.workdir import has_trained

FIELD = "distil.teacher"
KEPT = "teacher.safetensors"


def named(text: str, workdir: epath.Path | None) -> str:
    """The file that the config of a run names as its teacher.

    Args:
        text: `distil.teacher`: a file, or a workdir that has exactly one.
        workdir: of the run, if it has one.

    Returns:
        The file. Of a run that has begun it is the one in its config.json wherever the text means
        the same network: the same path, the workdir that the path is in, or a file with the same
        arrays, classes and scaling of images. Any other file makes it the run of another config.

    Raises:
        UserError: nothing is there, several are, or it is no fine-tuned network.
    """
    saved = _began(workdir)
    if saved is None or workdir is None:
        return str(finetuned.find(text, FIELD))
    kept, began, given = _network(readable(saved, workdir)), files.path(saved), files.path(text)
    if began not in (given, given / finetuned.FOLDER / began.name):
        path = finetuned.find(text, FIELD)
        return str(began if _network(path) == kept else path)
    if began.exists() and not _is(began, kept):
        logging.warning(
            "%s holds another network than when this run began: it goes on with the teacher that "
            "it began with, %s", began, workdir / KEPT,
        )  # fmt: skip
    return str(began)


def readable(text: str, workdir: epath.Path | None) -> epath.Path:
    """Where a run reads its teacher: its own copy, or the file that `named` gave.

    Raises:
        UserError: a run that has begun has lost its copy, or it is damaged.
    """
    saved = _began(workdir)
    if saved is None or workdir is None:
        return epath.Path(text)
    path, found = workdir / KEPT, "is gone"
    advice = f"put the file that it began with, {saved}, in its place"
    if path.exists():
        try:
            classifier.describe(path)
            return path
        except UserError as error:
            found = f"is damaged ({error})"
    raise UserError(f"the copy of this run's teacher, {path}, {found}: {advice}")


def keep(workdir: epath.Path, teacher: Classifier, arrays: Any) -> None:
    """Writes the copy of a run that begins."""
    if jax.process_index() == 0 and not has_trained(workdir):  # a replay begins again
        classifier.save(workdir / KEPT, teacher, arrays)


def check_arrays(arrays: Any, teacher: Classifier, path: epath.Path) -> None:
    """Raises a `UserError` if the arrays of a checkpoint are not those of the teacher's file."""
    if classifier.digest(jax.device_get(arrays)) != teacher.info["digest"]:
        raise UserError(
            f"{path} is not the network that taught this run so far: put the file that it began "
            "with in its place, or train again in another --workdir"
        )


def check_size(teacher: Classifier, size: int, path: str) -> None:
    """Raises a `UserError` for views that the teacher cannot take, before any is made."""
    advice = f"set augment.size={teacher.image_size}, or give another distil.teacher"
    if teacher.config.model.encoder == "vit" and size != teacher.image_size:
        raise UserError(
            f"the teacher {path} is a ViT for images of {teacher.image_size} pixels, and the views "
            f"have {size}: {advice}"
        )
    try:
        images = jax.ShapeDtypeStruct((1, size, size, 3), np.uint8)
        jax.eval_shape(teacher.logits, teacher.shapes(), images)
    except UserError as error:
        at_fault = str(error).partition(": set data.image_size")[0]
        raise UserError(
            f"the teacher {path} cannot take views of {size} pixels ({at_fault}): {advice}"
        ) from error


def _began(workdir: epath.Path | None) -> str | None:
    """The file with which a run began; one that took no step may begin with another."""
    if workdir is None or not (workdir / saved_config.FILE).exists() or not has_trained(workdir):
        return None
    saved: str | None = saved_config.read(workdir).get("distil", {}).get("teacher")
    return saved


def _network(path: epath.Path) -> Classifier:
    return _bare(classifier.describe(path))


def _bare(found: Classifier) -> Classifier:
    """All that decides on the logits; of the arrays their digest."""
    return dataclasses.replace(found, info={"digest": found.info["digest"]})


def _is(path: epath.Path, network: Classifier) -> bool:
    """Whether a file, of whatever kind it is by now, has this network."""
    try:
        return _network(path) == network
    except UserError:
        return False
