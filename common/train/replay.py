"""`--mode=replay`: the step that stopped a run, taken again from the checkpoint before it."""

import dataclasses
import json
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import numpy as np
import optax
from etils import epath

from common.data.sources.opening import open_source
from common.errors import UserError, first_line
from common.method import Method, Step
from common.run import console, files, saved_config
from common.run.checkpoint import Checkpoints
from common.setup import Setup
from common.sharding import make_mesh, to_global
from common.train import dispatch
from common.train.divergence import FOLDER, not_finite, skip_nonfinite
from common.train.first_state import first_state
from common.train.prepare import batches_from, prepare, resident_data
from common.train.step import compile_step

# Their frames say nothing of where a NaN came from in the method.
_LIBRARIES = tuple(module.__path__[0] for module in (jax, flax, optax))


def replay(
    workdir: str | epath.PathLike, methods: Mapping[str, Callable[[Setup], Method]]
) -> dict[str, Any]:
    """Takes the steps from the last checkpoint to the newest one in `<workdir>/nonfinite/`.

    Nothing is written. On the same hardware the numbers are those of the run.

    Args:
        workdir: of a run that stopped because something was not finite.
        methods: by name.

    Returns:
        `step`, `same_batch` (it has the examples that were noted), `before` and `after` (names of
        the arrays of the state that are not finite), `metrics` (those that are not), `where` (the
        operation that made the first NaN, as far as JAX can tell).

    Raises:
        UserError: if there is nothing to replay, or its checkpoint is gone.
    """
    folder = files.path(workdir) / FOLDER
    records = list(folder.glob("step_*.json")) if folder.is_dir() else []
    if not records:
        raise UserError(f"nothing to replay: no {folder}/step_N.json, so this run did not diverge")
    steps = [json.loads(path.read_text()) for path in records]
    record = max(steps, key=lambda r: r["step"])
    step, begin = record["step"], record["checkpoint"] or 0

    config, mesh = saved_config.load(folder.parent, methods), make_mesh()
    with Checkpoints(workdir, None, read_only=True) as checkpoints:
        if begin and begin not in checkpoints.all_steps():  # known before minutes of compiling
            raise UserError(f"the checkpoint of step {begin} in {workdir} is gone: no replay")
    source = open_source(config.data, "train")
    run = prepare(methods[config.method], config, mesh, source, workdir=folder.parent)
    data = resident_data(run)
    step_fn = as_taken = compile_step(run.method.train_step, run, data)
    if config.on_nonfinite == "skip":  # steps before the last one may have been dropped
        as_taken = compile_step(skip_nonfinite(run.method.train_step), run, data)

    def take() -> tuple[np.ndarray, Any]:
        ids, batch = batches.take(1)
        return ids[0], to_global(mesh, batch) | data

    with Checkpoints(workdir, None, read_only=True) as checkpoints:
        _, state, position = first_state(run, checkpoints, folder.parent, at=begin, note=False)
    batches = batches_from(run, position)
    console.say(f"replaying steps {begin + 1:,} to {step:,} of {workdir} ({record['what']})")
    for _ in range(begin, step - 1):
        state, _ = as_taken(state, take()[1], run.root_key)
    ids, batch = take()
    before = not_finite(state)
    # of a loop over steps nothing would be known but where it is
    alone = dataclasses.replace(run.recipe, steps_per_dispatch=1)
    program = dispatch.program(run.method.train_step, alone, mesh)
    where = _first_nan(program, state, batch, run.root_key) if jax.process_count() == 1 else ""
    state, metrics = step_fn(state, batch, run.root_key)
    name = f"step_{step}.process_{jax.process_index()}.npz"
    with (folder / name).open("rb") as file, np.load(file, allow_pickle=False) as noted:
        same = np.array_equal(noted["ids"], ids)
    metrics.pop("each", None)
    scalars = {k: float(v) for k, v in jax.device_get(metrics).items()}
    found = {
        "step": step,
        "same_batch": same,
        "before": before,
        "after": not_finite(state),
        "metrics": [k for k, v in scalars.items() if not np.isfinite(v)],
        "where": where,
    }
    lines = [
        f"step {step:,} on {'the batch noted' if same else 'ANOTHER batch than noted'}: loss "
        f"{scalars['loss']}, gradient norm {scalars.get('gradient_norm')}",
        f"  not finite before it: {_listed(before)}",
        f"  not finite after it: {_listed(found['after'])}",
        f"  metrics not finite: {_listed(found['metrics'])}",
    ]
    lines += [f"  first NaN: {where}"] if where else []
    console.say("\n".join(lines))
    return found


def _first_nan(program: Step, state: Any, batch: Any, key: jax.Array) -> str:
    """Takes the step with JAX's NaN checks on; where it stopped, "" if it did not."""
    with jax.debug_nans(True):  # (infinities are meant: they mask)
        try:
            jax.block_until_ready(jax.jit(program)(state, batch, key))
        except FloatingPointError as error:
            ours = [
                f
                for f in traceback.extract_tb(error.__traceback__)
                if not f.filename.startswith(_LIBRARIES) and f.filename != __file__
            ]
            frame = f" ({ours[-1].filename}, line {ours[-1].lineno})" if ours else ""
            return first_line(error) + frame
    return ""


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else "nothing"
