"""The training loop, one for every method."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from common.method import Method
from common.run import files, tracking
from common.run.checkpoint import Checkpoints
from common.run.csv_copy import CsvCopy
from common.run.saved_config import note_changes
from common.run.workdir import as_begun, claim
from common.run.writer import Copy, MetricsWriter
from common.setup import Setup
from common.sharding import make_mesh, to_global
from common.train import summary
from common.train.dispatch import spans
from common.train.divergence import Watch, skip_nonfinite
from common.train.evaluator import MakeEvaluator
from common.train.first_state import check_start, first_state
from common.train.forecast import Forecast
from common.train.milestones import Due, Milestones
from common.train.position import listing_of
from common.train.preemption import Preemption
from common.train.prepare import batches_from, open_evaluation, prepare, resident_data
from common.train.profiling import Profile
from common.train.step import compile_step

# Programs the host may have handed to the device: each holds a batch in its memory.
IN_FLIGHT = 2


def train(
    make_method: Callable[[Setup], Method],
    config: ConfigDict,
    workdir: str | epath.PathLike,
    make_evaluator: MakeEvaluator,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Trains, or continues the run that `workdir` holds, to the end.

    Args:
        make_method: class of the method, e.g. `simclr_jax.method.SimCLR`.
        config: from a file in `configs/`.
        workdir: where everything is written; local or e.g. `gs://...`.
        make_evaluator: what scores the run, e.g. `common.evaluate.online.make_evaluator`; gets the
            run, the source whose images vote and the one that is scored.
        mesh: default all devices.

    Returns:
        What `<workdir>/summary.json` holds.

    Raises:
        UserError: for a mistake in the config or the data.
        NonFiniteLossError: when the loss stops being a number; the last checkpoint stays.
        PreemptedError: after SIGTERM or Ctrl-C, when the step is saved.
    """
    begin = time.perf_counter()
    workdir = files.path(workdir)
    config = config.copy_and_resolve_references()
    config.data.source = files.whole(config.data.source)
    config = as_begun(config, workdir)
    tracking.check(config.log.wandb)
    profile = Profile(config.profile, workdir)
    run = prepare(make_method, config, mesh or make_mesh(), workdir=workdir)
    config, total = run.config, run.extent.total_steps
    bank, test = open_evaluation(config.data, run.source)
    scored = listing_of(bank, test)
    evaluator = make_evaluator(run, bank, test)
    due = Due.of(config, run.extent)
    keep = config.checkpoint
    with (
        tracking.Tracker(
            config, workdir
        ) as tracker,  # may wait for uploads, and then holds no lock
        claim(workdir, config) as (workdir, lock),
        Checkpoints(workdir, keep.keep, every=due.keep_every, best=keep.keep_best) as checkpoints,
    ):
        ended = check_start(run, checkpoints, workdir, scored)
        if ended and (result := summary.finished(workdir)):
            note_changes(config, workdir)
            return result
        data = resident_data(run)
        skip = config.on_nonfinite == "skip"
        train_step = run.method.train_step
        step_fn = compile_step(skip_nonfinite(train_step) if skip else train_step, run, data)
        start, state, position = first_state(run, checkpoints, workdir)
        note_changes(config, workdir)
        summary.start_up(run, workdir, state, step_fn, test, start)
        forecast = Forecast(run, due, start)
        forecast.before(step_fn)
        batches = batches_from(run, position)
        watch = Watch(run, workdir, saved=start or None, skipped=position.skipped)
        copies: list[Copy] = [CsvCopy(workdir), tracker] if config.log.csv else [tracker]
        writer = MetricsWriter(
            workdir, start, total, config.batch_size, run.extent.steps_per_epoch, config.log_every,
            extra=watch.counts, stop_at_nonfinite=not skip, copies=copies,
        )  # fmt: skip
        with writer, Preemption() as preemption, contextlib.closing(profile):
            milestones = Milestones(
                run, workdir, due, evaluator, checkpoints, lock, writer, watch, batches,
                start=start, position=position, begin=begin, scored=scored,
            )  # fmt: skip
            milestones.before(state)
            forecast.begin()
            key = run.root_key
            ends = (due.anything, writer.due, profile.edge)
            for first, step in spans(start, total, config.steps_per_dispatch, *ends):
                with writer.waiting():
                    ids, batch = batches.take(step - first + 1)
                batch = to_global(run.mesh, batch) | data
                with profile.step(first), jax.transfer_guard("disallow"):
                    state, metrics = step_fn(state, batch, key)
                profile.after(step, state)
                watch.add(first, metrics, ids)
                watch.check_all(state, but=1 if writer.due(first - 1) else IN_FLIGHT)
                writer.flush()  # scalars of the step before: the device has its next work
                if writer.due(step):
                    writer.write(step, metrics)
                    checkpoints.check()  # a full disk shows now, not at the next one
                milestones.after(step, state, ids[-1], preemption)
                forecast.after(step, writer.images_per_second)
        checkpoints.wait()
        result = summary.finish(run, workdir, evaluator, state, milestones.position)
        tracker.finish(result, [workdir / name for name in summary.PICTURES])
        return result
