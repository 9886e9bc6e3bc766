"""The training loop, one for every method."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from common import config as configs
from common.data.feed import pipeline, resident, survey
from common.data.feed.recipe import FeedRecipe
from common.data.sources.base import Source
from common.data.sources.opening import open_source
from common.errors import UserError
from common.evaluate.online import Evaluator
from common.method import Method, Setup, make_setup, root_keys
from common.optim import steps_of
from common.run import console, files
from common.run.checkpoint import Checkpoints
from common.run.workdir import as_begun, claim, moved_from, note_changes
from common.run.writer import MetricsWriter
from common.sharding import local_rows, make_mesh, replicated, state_shardings, to_global
from common.train import resume_from, summary
from common.train.dispatch import spans
from common.train.divergence import SkipNonFinite, Watch
from common.train.first_state import init_state
from common.train.preemption import PreemptedError, Preemption
from common.train.profiling import Profile
from common.train.step import compile_step

# Programs the host may have handed to the device: each holds a batch in its memory.
IN_FLIGHT = 2


def train(
    make_method: Callable[[Setup], Method],
    config: ConfigDict,
    workdir: str | epath.PathLike,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Trains, or continues the run that `workdir` holds, to the end.

    Args:
        make_method: class of the method, e.g. `simclr_jax.method.SimCLR`.
        config: from a file in `configs/`.
        workdir: where everything is written; local or e.g. `gs://...`.
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
    config = as_begun(config, workdir)
    configs.check(config)
    profile = Profile(config.profile, workdir)
    mesh = mesh or make_mesh()
    rows = local_rows(mesh, config.batch_size)
    train_source = open_source(config.data, "train")
    value_range, seen = survey.decide_value_range(config.data, train_source)
    config = config.copy_and_resolve_references()
    config.data.value_range = value_range
    for line in seen:
        console.say(line)
    test_source = summary.open_test(config)
    bank_source = train_source
    if config.data.bank_split:
        bank_source = open_source(config.data, "bank")
    Evaluator.check(config, bank_source, test_source)
    recipe = FeedRecipe.of(config)
    per_epoch = pipeline.steps_per_epoch(train_source, config.batch_size)
    total = steps_of(config.duration, per_epoch, name="duration")
    if total < 1:
        raise UserError(f'duration="{config.duration}" is no step at all: expected 1 step or more')
    every = {
        name: steps_of(config[name].every, per_epoch, total, name=f"{name}.every")
        for name in ("checkpoint", "evaluate")
    }
    keep_every = steps_of(
        config.checkpoint.keep_every, per_epoch, total, name="checkpoint.keep_every"
    )
    setup = make_setup(config, mesh, total, per_epoch, train_source.num_classes)
    method = make_method(setup)
    init_key, loop_key = root_keys(config.seed)
    abstract = jax.eval_shape(method.init, init_key)
    shardings = state_shardings(mesh, abstract)
    # not device_put: it refuses typed keys when there are several processes
    root_key = jax.jit(lambda k: k, out_shardings=replicated(mesh))(loop_key)

    keep = config.checkpoint
    with (
        claim(workdir, config) as (workdir, lock),
        Checkpoints(workdir, keep.keep, every=keep_every, best=keep.keep_best) as checkpoints,
    ):
        moved, ended = moved_from(config, workdir), checkpoints.latest_step == total
        noted = (checkpoints.progress(step) for step in reversed(checkpoints.all_steps()) if step)
        # before minutes of compiling, and before arrays of other shapes seem to be damaged
        if (moved or not ended) and (known := next(filter(None, noted), None)):
            same_data(known, train_source, moved)
        if ended and (result := summary.finished(workdir)):
            note_changes(config, workdir)
            return result
        if config.resume_from and not checkpoints.latest_step:
            resume_from.source_of(config.resume_from, workdir)  # known before minutes of compiling
        data = resident.load(train_source, mesh) if config.data.augment_on == "device" else {}
        stepped = SkipNonFinite(method) if config.on_nonfinite == "skip" else method
        step_fn = compile_step(stepped, config, mesh, abstract, shardings, data)
        # (step 0 is what `--mode=import` left: weights, which init_from reads, and no run yet)
        if checkpoints.latest_step and (found := checkpoints.restore_newest(abstract, shardings)):
            start, state, progress = found
        else:
            start = 0
            state = init_state(make_method, method, setup, init_key, shardings)
            if config.resume_from:
                state = resume_from.adopt(config, workdir, method, state)
            progress = {"position": 0, "readers": None, "results": {}, "seconds": 0.0}
        note_changes(config, workdir)
        evaluator = Evaluator(config, mesh, method, setup.probe, bank_source, test_source)
        summary.start_up(
            config, workdir, mesh, setup, state, step_fn, train_source, test_source, start, total,
            per_epoch,
        )  # fmt: skip
        batches = pipeline.train_batches(
            train_source,
            recipe,
            rows=rows,
            start_step=progress["position"],
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            saved_readers=progress["readers"],
        )
        watch = Watch(config, workdir, method, total, progress.get("skipped", 0))
        watch.saved = start or None
        writer = MetricsWriter(
            workdir,
            start,
            total,
            config.batch_size,
            per_epoch,
            config.log_every,
            extra=watch.counts,
            stop_at_nonfinite=config.on_nonfinite == "stop",
        )
        with writer, Preemption() as preemption, contextlib.closing(profile):
            results = progress["results"]
            if not start:
                with writer.pause():
                    results = summary.baselines(evaluator, state)
                    if results:
                        writer.write_now(0, {"knn_top1": results["knn_top1_at_init"]} | results)
                    if config.evaluate.pictures:
                        summary.draw_pairs(config, train_source, workdir)
            loop_begin = time.perf_counter()

            def now(step: int) -> dict[str, Any]:
                # one step alone cannot be told from its compilation, so there all of it counts
                alone = config.batch_size * (step - start) / (time.perf_counter() - loop_begin)
                rate = writer.images_per_second or progress.get("images_per_second") or alone
                return {
                    "position": batches.position,
                    "readers": batches.readers,
                    "num_examples": train_source.num_examples,
                    "listing": train_source.listing,
                    "results": dict(results),  # orbax writes it later
                    "skipped": watch.skipped,
                    "images_per_second": rate,
                    "seconds": progress["seconds"] + time.perf_counter() - begin,
                }

            if progress.get("scores_due"):
                with writer.pause():
                    if scores := evaluator(state):
                        writer.write_now(start, scores)
                        results |= scores

            def due(step: int) -> bool:
                evaluated_or_saved = any(n and step % n == 0 for n in every.values())
                return evaluated_or_saved or writer.due(step) or profile.edge(step)

            dispatches = spans(start, total, config.steps_per_dispatch, due)
            for first, step in dispatches:
                with writer.waiting():
                    ids, batch = batches.take(step - first + 1)
                batch = to_global(mesh, batch) | data
                with profile.step(first), jax.transfer_guard("disallow"):
                    state, metrics = step_fn(state, batch, root_key)
                profile.after(step, state)
                watch.took(first, metrics, ids)
                watch.settle(1 if writer.due(first - 1) else IN_FLIGHT, state)
                writer.flush()  # scalars of the step before: the device has its next work
                if writer.due(step):
                    writer.write(step, metrics)
                    checkpoints.check()  # a full disk shows now, not at the next one
                last, told = step == total, preemption.after()
                save = told or last or (every["checkpoint"] and step % every["checkpoint"] == 0)
                evaluate = last or (every["evaluate"] and step % every["evaluate"] == 0)
                if not (save or evaluate):
                    continue
                watch.settle(0, state)  # never save what came out of a bad step
                with writer.pause(wait_for=state):
                    if save:
                        watch.check_state(step, state, ids[-1])
                    # Scores first: a kill in between must not lose the line that belongs here.
                    # A run that was told to stop has no time for them: the next start makes them.
                    if evaluate and not told and (scores := evaluator(state)):
                        writer.write_now(step, scores)
                        results |= scores
                    if save:
                        if lock:
                            lock.check()
                        progress_now = now(step) | {"scores_due": bool(evaluate and told)}
                        checkpoints.save(step, state, progress_now)
                        watch.saved = step
                    if told:
                        checkpoints.wait()
                        raise PreemptedError(
                            f"told to stop: step {step:,} of {total:,} is saved in {workdir}, and "
                            "the same command carries on",
                            preemption.number,
                        )
            if start < total:
                progress = progress_now
        checkpoints.wait()
        dataset = f"{train_source.name} ({train_source.split})"
        return summary.finish(config, workdir, evaluator, state, progress, dataset, total)


def same_data(progress: dict[str, Any], source: Source, moved: str = "") -> None:
    """Refuses to go on with a data set that has changed: orders and schedules follow its examples.

    Args:
        progress: of the checkpoint.
        source: of the training split.
        moved: where the data was, if that is another place than now.

    Raises:
        UserError: saying both sizes, or that files have other names.
    """
    n = progress["num_examples"]
    if n != source.num_examples:
        raise UserError(
            f"{source.name} ({source.split}) has {source.num_examples} images, and had {n} when "
            "this run began: restore the data, or give another --workdir"
        )
    listing = progress.get("listing")  # older runs of shards have none
    if moved and not listing:
        raise UserError(
            f"the data of this run was {moved}, and it did not note its files, so that nobody can "
            "tell whether these are the same: give data.source as it was, or another --workdir"
        )
    if listing and source.listing != listing:
        raise UserError(
            f"{source.name} ({source.split}) has {n} images as before, but files were renamed, or "
            "added and removed, since this run began: restore the data, or give another --workdir"
        )
