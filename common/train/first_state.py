"""The state that a start begins from: a checkpoint's, drawn, or with the weights of elsewhere."""

import dataclasses
from typing import Any

import jax
import numpy as np
from etils import epath

from common.errors import UserError
from common.run import console
from common.run.checkpoint import Checkpoints
from common.run.saved_config import moved_from
from common.setup import Setup
from common.sharding import replicated
from common.train import resume_from
from common.train.position import Position
from common.train.prepare import Prepared
from common.train.weights import Weights, fit, load_weights


def check_start(
    run: Prepared, checkpoints: Checkpoints, workdir: epath.Path, scored: str = ""
) -> bool:
    """Refuses what a start cannot go on from, before minutes of compiling.

    Also before arrays of other shapes would seem to be damaged.

    Args:
        run: what is trained.
        checkpoints: of the workdir.
        workdir: of the run.
        scored: `listing_of` the images that it is scored by now.

    Returns:
        Whether the run has ended: its last step is saved.

    Raises:
        UserError: the dataset is another one than when the run began, or `config.resume_from`
            names no checkpoint.
    """
    moved = moved_from(run.config, workdir)
    ended = checkpoints.latest_step == run.extent.total_steps
    if moved or not ended:
        saved = (checkpoints.position(step) for step in reversed(checkpoints.all_steps()) if step)
        if known := next(filter(None, saved), None):
            Position.of(known).check_same_data(run.source, moved)
            Position.of(known).check_same_scored(scored)
    # (step 0 is what `--mode=import` left: weights, which init_from reads, and no run yet)
    if run.config.resume_from and not checkpoints.latest_step:
        resume_from.source_of(run.config.resume_from, workdir)
    return ended


def first_state(
    run: Prepared,
    checkpoints: Checkpoints,
    workdir: epath.Path,
    *,
    at: int | None = None,
    note: bool = True,
) -> tuple[int, Any, Position]:
    """The state that a start begins from, on the devices of `run.shardings`.

    Of a checkpoint if there is one; else drawn, with the weights of `config.init_from` or of the
    run that `config.resume_from` names.

    Args:
        run: what is trained.
        checkpoints: of the workdir.
        workdir: of the run.
        at: step of the checkpoint, 0 for none; None: the newest good one.
        note: False neither says nor writes what `resume_from` took.

    Returns:
        `(step, state, position)`.

    Raises:
        UserError: no checkpoint is good, or weights cannot be read or do not fit.
    """
    if at:
        return at, *_restored(run, checkpoints.restore(at, run.abstract, run.shardings))
    newest = checkpoints.latest_step if at is None else 0
    if newest and (found := checkpoints.restore_newest(run.abstract, run.shardings)):
        return found[0], *_restored(run, found[1:])
    state = draw_state(run)
    if run.config.resume_from:
        state = resume_from.adopt(
            run.config.resume_from, workdir, run.method, state,
            optimizer=run.config.resume_optimizer, note=note,
        )  # fmt: skip
    return 0, run.method.placed(state), Position()


def _restored(run: Prepared, found: tuple[Any, dict[str, Any]]) -> tuple[Any, Position]:
    return run.method.resumed(found[0]), Position.of(found[1])


def draw_state(run: Prepared) -> Any:
    """The state before the first step, with the weights of `config.init_from` if it names any.

    A momentum encoder starts as a copy of the encoder, as the method has it; a projection head is
    taken over where kind and sizes agree, and drawn otherwise.

    Raises:
        UserError: weights that cannot be read or do not fit.
    """
    if not run.config.init_from:
        return jax.jit(run.method.init, out_shardings=run.shardings)(run.init_key)
    return with_weights(run, load_weights(run.config.init_from))[0]


def with_weights(run: Prepared, weights: Weights) -> tuple[Any, set[str]]:
    """`(state, the parts of the network that come from the weights)`."""
    setup = run.setup
    shapes, stats_shapes = jax.eval_shape(setup.init_network, run.init_key)
    params, batch_stats, _ = fit(weights, shapes, stats_shapes, setup.network.backbone)
    _check_scale(weights, setup)
    head = _parts_in_words(set(params), set(shapes))
    unused = weights.unused
    for part, name in (("predictor", "predictor"), ("head", "projection head")):
        if getattr(weights, part) is not None and part not in params:
            unused = (f"its {name} (of another kind or size)", *unused)
    left = f"; not used: {', '.join(unused[:6])}" if unused else ""
    more = f" and {len(unused) - 6} more" if len(unused) > 6 else ""
    console.say(f"initial weights: {weights.path}: {head}{left}{more}")
    for note in weights.notes:
        console.say(f"  {note}")

    def init(key: jax.Array, initial: Any) -> Any:
        return run.make_method(dataclasses.replace(setup, initial=initial)).init(key)

    place = replicated(setup.mesh)  # an argument: closed over, it would be part of the program
    initial = jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, place, lambda index: x[index]),
        (params, batch_stats),
    )
    return jax.jit(init, out_shardings=run.shardings)(run.init_key, initial), set(params)


def _parts_in_words(taken: set[str], wanted: set[str]) -> str:
    """Which parts of the network come from the weights, and which are drawn."""
    names = {"backbone": "encoder", "head": "projection head", "predictor": "predictor"}
    found = [name for part, name in names.items() if part in taken]
    drawn = [f"the {name}" for part, name in names.items() if part in wanted - taken]
    text = ", ".join(found[:-1]) + (" and " if found[1:] else "") + found[-1]
    are = "is" if len(drawn) == 1 else "are"
    return f"{text}; {' and '.join(drawn)} {are} random" if drawn else text


def _check_scale(weights: Weights, setup: Setup) -> None:
    """The network has to see its images scaled as when it was trained."""
    unknown = [name for name in ("mean", "std") if weights.metadata.get(name) is None]
    if unknown:
        console.say(
            f"  it does not say how its images were scaled; here {' and '.join(unknown)} are "
            f"{' and '.join(str(tuple(getattr(setup, name))) for name in unknown)}: "
            f"config.augment.{unknown[0]} must fit (docs/export.md#import)"
        )
    for name in ("mean", "std"):
        if name in unknown:
            continue
        ours, theirs = getattr(setup, name), weights.metadata[name]
        if np.shape(theirs) != (3,) or not np.allclose(ours, theirs, atol=1e-6):
            raise UserError(
                f"{weights.path} was trained on images with the {name} {tuple(theirs)} and the "
                f"config has {tuple(ours)}: give --config.augment.{name}="
                f"'({', '.join(map(str, theirs))})'"
            )
