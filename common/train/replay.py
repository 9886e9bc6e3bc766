"""`--mode=replay`: the step that stopped a run, taken again from the checkpoint before it."""

import dataclasses
import json
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from common.data.feed import pipeline, resident
from common.data.feed.recipe import FeedRecipe
from common.data.sources.opening import open_source
from common.errors import UserError, first_line
from common.evaluate.pretrained import read_config
from common.method import Method, Setup, make_setup, root_keys
from common.optim import steps_of
from common.run import console, files
from common.run.checkpoint import Checkpoints
from common.sharding import local_rows, make_mesh, replicated, state_shardings, to_global
from common.train import dispatch, resume_from
from common.train.divergence import FOLDER, SkipNonFinite, not_finite
from common.train.first_state import init_state
from common.train.step import compile_step


def replay(workdir: str, methods: Mapping[str, Callable[[Setup], Method]]) -> dict[str, Any]:
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
    workdir = files.path(workdir)
    folder = workdir / FOLDER
    records = list(folder.glob("step_*.json")) if folder.is_dir() else []
    if not records:
        raise UserError(f"nothing to replay: no {folder}/step_N.json, so this run did not diverge")
    steps = [json.loads(path.read_text()) for path in records]
    record = max(steps, key=lambda r: r["step"])
    step, begin = record["step"], record["checkpoint"] or 0

    config, mesh = read_config(workdir, methods), make_mesh()
    with Checkpoints(workdir, None, read_only=True) as checkpoints:
        if begin and begin not in checkpoints.all_steps():  # known before minutes of compiling
            raise UserError(f"the checkpoint of step {begin} in {workdir} is gone: no replay")
    source = open_source(config.data, "train")
    per_epoch = pipeline.steps_per_epoch(source, config.batch_size)
    total = steps_of(config.duration, per_epoch, name="duration")
    make_method = methods[config.method]
    setup = make_setup(config, mesh, total, per_epoch, source.num_classes)
    method = make_method(setup)
    init_key, loop_key = root_keys(config.seed)
    abstract = jax.eval_shape(method.init, init_key)
    shardings = state_shardings(mesh, abstract)
    key = jax.jit(lambda k: k, out_shardings=replicated(mesh))(loop_key)
    data = resident.load(source, mesh) if config.data.augment_on == "device" else {}
    step_fn = compile_step(method, config, mesh, abstract, shardings, data)
    as_taken = step_fn
    if config.on_nonfinite == "skip":  # steps before the last one may have been dropped
        as_taken = compile_step(SkipNonFinite(method), config, mesh, abstract, shardings, data)

    def take() -> tuple[np.ndarray, Any]:
        ids, batch = batches.take(1)
        return ids[0], to_global(mesh, batch) | data

    progress = {"position": 0, "readers": None}
    if begin:
        with Checkpoints(workdir, None, read_only=True) as checkpoints:
            state, progress = checkpoints.restore(begin, abstract, shardings)
    else:
        state = init_state(make_method, method, setup, init_key, shardings)
        if config.resume_from:
            state = resume_from.adopt(config, epath.Path(workdir), method, state, note=False)
    batches = pipeline.train_batches(
        source,
        FeedRecipe.of(config),
        rows=local_rows(mesh, config.batch_size),
        start_step=progress["position"],
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        saved_readers=progress["readers"],
    )
    console.say(f"replaying steps {begin + 1:,} to {step:,} of {workdir} ({record['what']})")
    for _ in range(begin, step - 1):
        state, _ = as_taken(state, take()[1], key)
    ids, batch = take()
    before = not_finite(state)
    # of a loop over steps nothing would be known but where it is
    alone = dataclasses.replace(FeedRecipe.of(config), steps_per_dispatch=1)
    program = dispatch.program(method.train_step, alone, mesh)
    where = _first_nan(program, state, batch, key) if jax.process_count() == 1 else ""
    state, metrics = step_fn(state, batch, key)
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
        f"  not finite before it: {_some(before)}",
        f"  not finite after it: {_some(found['after'])}",
        f"  metrics not finite: {_some(found['metrics'])}",
    ]
    lines += [f"  first NaN: {where}"] if where else []
    console.say("\n".join(lines))
    return found


def _first_nan(program: dispatch.Step, state: Any, batch: Any, key: jax.Array) -> str:
    """Takes the step with JAX's NaN checks on; where it stopped, "" if it did not."""
    with jax.debug_nans(True):  # (infinities are meant: they mask)
        try:
            jax.block_until_ready(jax.jit(program)(state, batch, key))
        except FloatingPointError as error:
            ours = [
                f
                for f in traceback.extract_tb(error.__traceback__)
                if "site-packages" not in f.filename and f.filename != __file__
            ]
            frame = f" ({ours[-1].filename}, line {ours[-1].lineno})" if ours else ""
            return first_line(error) + frame
    return ""


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else "nothing"
