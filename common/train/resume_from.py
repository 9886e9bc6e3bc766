"""`config.resume_from`: a new run that starts from the weights of another one."""

import json
from typing import Any

import jax
import numpy as np
from etils import epath

from common.errors import UserError, first_line
from common.method import Method
from common.models import vit, vit_variants
from common.run import console, digests, files, saved_config
from common.run.checkpoint import Checkpoints
from common.setup import Setup
from common.train import weights

FILE = "resumed_from.json"


def adopt(
    text: str,
    workdir: epath.Path,
    method: Method,
    state: Any,
    *,
    optimizer: bool = False,
    note: bool = True,
) -> Any:
    """Puts into a new run's state the arrays of another run that have the same name and shape.

    The step, and with it the learning rate, starts at 0. The optimiser's state starts anew unless
    `optimizer`. What was taken and what was not is said, and noted in
    `<workdir>/resumed_from.json`, which also pins the step for a run that is started again before
    its first checkpoint.

    Args:
        text: `config.resume_from`: "DIR" (the newest checkpoint) or "DIR@STEP".
        workdir: of the new run.
        method: derives what the other run did not have, see `Method.adopted`.
        state: as `method.init` made it, on the devices.
        optimizer: `config.resume_optimizer`: take the optimiser's state too.
        note: False neither says nor writes anything.

    Returns:
        The state, sharded as before.

    Raises:
        UserError: no such checkpoint, a damaged one, one of which nothing fits, or a ViT with
            another number of heads or other fixed positions.
    """
    directory, step = source_of(text, workdir)
    differences = _not_in_shapes(directory, method.setup)
    arrays = _read(directory, step)
    names, leaves = digests.names(state), jax.tree.leaves(state)
    taken, missed = [], {}
    for i, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
        found = arrays.get(name)
        reason = _reason(name, leaf, found, names, optimizer)
        if name.split("/")[0] in method.FIXED:
            reason = "this run's own"
        if reason or found is None:
            missed[name] = reason
            continue
        taken.append(name)
        host = found.astype(leaf.dtype)
        leaves[i] = jax.make_array_from_callback(leaf.shape, leaf.sharding, host.__getitem__)
    if not any(name.startswith("params/backbone/") for name in taken):
        name = next((n for n in missed if n.startswith("params/backbone/")), "params")
        raise UserError(
            f"nothing of {directory} (step {step}) fits this network: {name} is "
            f"{missed.get(name, 'missing')}; give the model settings of that run's config.json"
        )
    state = jax.tree.unflatten(jax.tree.structure(state), leaves)
    state, derived = method.adopted(state, set(taken))
    if note:
        unused = sorted(set(arrays) - set(names))
        _note(workdir, directory, step, taken, missed, unused, derived)
        for line in differences:
            console.say(line)
    return state


def source_of(text: str, workdir: epath.Path) -> tuple[epath.Path, int]:
    """(directory, step) of "DIR" or "DIR@STEP".

    Raises:
        UserError: if it is the workdir itself, or there is no such checkpoint.
    """
    path, at, number = text.rpartition("@")
    # a directory may itself have a name that ends in "@3"
    if not (at and number.isdigit()) or (files.path(text) / "checkpoints").is_dir():
        path, number = text, ""
    directory = files.path(path)
    if directory == workdir:
        raise UserError(
            f"resume_from={text} is the workdir itself: leave it out to continue that run, or "
            "give a new --workdir"
        )
    if not (directory / "checkpoints").is_dir():
        raise UserError(f"resume_from={text}: no checkpoints in {path}, expected a run's workdir")
    if not number and (workdir / FILE).exists():
        number = json.loads((workdir / FILE).read_text())["step"]
    with Checkpoints(directory, None, read_only=True) as checkpoints:
        steps = checkpoints.all_steps()
    step = int(number) if number else max(steps, default=0)
    if step not in steps:
        known = ", ".join(map(str, steps)) or "none"
        raise UserError(f"resume_from={text}: no checkpoint of step {step}; there are: {known}")
    return directory, step


def _not_in_shapes(directory: epath.Path, setup: Setup | None) -> list[str]:
    """What differs between two runs though their arrays have the same names and shapes, in words.

    Raises:
        UserError: the number of heads, or the grid of fixed positions: the same arrays would be
            another function.
    """
    if setup is None or not (directory / saved_config.FILE).exists():
        return []
    _, views, theirs = weights.views_and_encoder(directory)
    ours = setup.network.backbone
    if isinstance(ours, vit.ViT) and theirs and theirs.width == ours.width:
        vit_variants.check_heads(theirs.heads, ours.heads, ours.width, str(directory))
        if theirs.positions == ours.positions == "sincos":
            there, here = (e.image_size // e.patch for e in (theirs, ours))
            vit_variants.check_grid(there, here, str(directory))
    scales = (views.mean, views.std), (setup.mean, setup.std)
    if np.allclose(*scales, atol=1e-6):
        return []
    said = [f"mean {tuple(mean)} and std {tuple(std)}" for mean, std in scales]
    return [f"  its images were scaled with {said[0]}, here with {said[1]} (config.augment)"]


def _read(directory: epath.Path, step: int) -> dict[str, np.ndarray]:
    with Checkpoints(directory, None, read_only=True) as checkpoints:
        try:
            return checkpoints.read(step)[0]
        except MemoryError:
            raise
        except Exception as error:  # whatever a reader makes of damaged files
            raise UserError(
                f"the checkpoint of step {step} in {directory} is damaged ({first_line(error)}): "
                "name another one with resume_from=DIR@STEP"
            ) from error


def _reason(
    name: str, leaf: jax.Array, found: np.ndarray | None, names: list[str], optimizer: bool
) -> str:
    """Why an array is not taken; "" if it is."""
    if name == "step":
        return "starts at 0"
    if name.startswith("opt_state/"):
        if not optimizer:
            return "not asked for (resume_optimizer)"
        # AdamW counts for its bias correction; a schedule counts the steps of this run
        if name.endswith("/count") and not any(n.startswith(name[:-5] + "mu/") for n in names):
            return "starts at 0"
    if found is None:
        return "not in that run"
    if found.shape != leaf.shape:
        return f"{list(found.shape)} there and {list(leaf.shape)} here"
    return ""


def _note(
    workdir: epath.Path,
    directory: epath.Path,
    step: int,
    taken: list[str],
    missed: dict[str, str],
    unused: list[str],
    derived: list[str],
) -> None:
    """Says and writes down what was done."""
    missed = {n: r for n, r in missed.items() if n.split("/")[0] not in derived}
    if jax.process_index() == 0:
        record = {
            "directory": str(directory),
            "step": step,
            "taken": taken,
            "not_taken": missed,
            "derived": derived,
            "not_used": unused,
        }
        files.write_text(workdir / FILE, json.dumps(record, indent=2) + "\n")
    lines = [f"weights of {directory} after step {step:,}: {_fields(taken)}"]
    lines += [f"  derived from them: {', '.join(derived)}"] if derived else []
    reasons: dict[str, list[str]] = {}
    for name, reason in missed.items():
        reasons.setdefault(reason, []).append(name)
    lines += [f"  not restored: {_fields(names)}: {why}" for why, names in reasons.items()]
    lines += [f"  not used of that run: {_fields(unused)}"] if unused else []
    console.say("\n".join(lines))


def _fields(names: list[str]) -> str:
    """A few names, or how many arrays of which fields."""
    if len(names) <= 3:
        return ", ".join(names)
    counts: dict[str, int] = {}
    for name in names:
        field = "/".join(name.split("/")[:2]) if name.startswith("params/") else name.split("/")[0]
        counts[field] = counts.get(field, 0) + 1
    return ", ".join(f"{field} ({n} arrays)" for field, n in counts.items())
