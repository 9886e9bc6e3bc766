"""The training loop, one for every method."""

import collections
import contextlib
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from common import config as configs
from common import report
from common.checkpoint import Checkpoints
from common.compiling import compile_step
from common.data import pipeline, resident, sources
from common.dispatch import spans
from common.errors import UserError
from common.evaluate.online import Evaluator
from common.method import Method, Setup, make_setup, root_keys
from common.metrics import MetricsWriter, NonFiniteLossError
from common.optim import steps_of
from common.preemption import PreemptedError, Preemption
from common.profiling import Profile
from common.sharding import local_rows, make_mesh, replicated, state_shardings, to_global
from common.workdir import claim

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
        PreemptedError: after SIGTERM, when the step is saved.
    """
    begin = time.perf_counter()
    configs.check(config)
    profile = Profile(config.profile, epath.Path(workdir))
    mesh = mesh or make_mesh()
    rows = local_rows(mesh, config.batch_size)
    train_source = sources.open_source(config.data, "train")
    test_source = report.open_test(config)
    bank_source = train_source
    if config.data.bank_split:
        bank_source = sources.open_source(config.data, "bank")
    per_epoch = pipeline.steps_per_epoch(train_source, config.batch_size)
    total = steps_of(config.duration, per_epoch, name="duration")
    if total < 1:
        raise UserError(f'duration="{config.duration}" is no step at all: expected 1 step or more')
    every = {
        name: steps_of(config[name].every, per_epoch, total, name=f"{name}.every")
        for name in ("checkpoint", "evaluate")
    }
    setup = make_setup(config, mesh, total, per_epoch, train_source.num_classes)
    method = make_method(setup)
    workdir = claim(workdir, config)

    init_key, loop_key = root_keys(config.seed)
    abstract = jax.eval_shape(method.init, init_key)
    shardings = state_shardings(mesh, abstract)
    # not device_put: it refuses typed keys when there are several processes
    root_key = jax.jit(lambda k: k, out_shardings=replicated(mesh))(loop_key)

    with Checkpoints(workdir, config.checkpoint.keep) as checkpoints:
        start = checkpoints.latest_step or 0
        if start == total and (summary := report.finished(workdir)):
            return summary
        data = resident.load(train_source, mesh) if config.data.augment_on == "device" else {}
        step_fn = compile_step(method, config, mesh, abstract, shardings, data)
        if start:
            state, progress = checkpoints.restore(start, abstract, shardings)
            same_data(progress, train_source)
        else:
            state = jax.jit(method.init, out_shardings=shardings)(init_key)
            progress = {"position": 0, "readers": None, "results": {}, "seconds": 0.0}
        evaluator = Evaluator(config, mesh, method, setup.probe, bank_source, test_source)
        report.start_up(
            config, workdir, mesh, setup, state, step_fn, train_source, start, total, per_epoch
        )
        batches = pipeline.train_batches(
            train_source,
            config,
            rows=rows,
            start_step=progress["position"],
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            saved_readers=progress["readers"],
        )
        writer = MetricsWriter(
            workdir, start, total, config.batch_size, per_epoch, config.log_every
        )
        with writer, Preemption() as preemption, contextlib.closing(profile):
            results = progress["results"]
            if not start:
                with writer.pause():
                    results = report.baselines(evaluator, state)
                    if results:
                        writer.write_now(0, {"knn_top1": results["knn_top1_at_init"]} | results)
                    if config.evaluate.pictures:
                        report.draw_pairs(config, train_source, workdir)
            in_flight: collections.deque = collections.deque()
            loop_begin = time.perf_counter()

            def now(step: int) -> dict[str, Any]:
                # one step alone cannot be told from its compilation, so there all of it counts
                alone = config.batch_size * (step - start) / (time.perf_counter() - loop_begin)
                rate = writer.images_per_second or progress.get("images_per_second") or alone
                return {
                    "position": batches.position,
                    "readers": batches.readers,
                    "num_examples": train_source.num_examples,
                    "results": dict(results),  # orbax writes it later
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
            for number, (first, step) in enumerate(dispatches):
                with writer.waiting():
                    batch = batches.take(step - first + 1)
                batch = to_global(mesh, batch) | data
                with profile.step(first), jax.transfer_guard("disallow"):
                    state, metrics = step_fn(state, batch, root_key)
                profile.after(step, state)
                in_flight.append((first, metrics.pop("losses", metrics["loss"])))
                allowed = 1 if writer.due(first - 1) else IN_FLIGHT
                while len(in_flight) > allowed:  # in order, so that the first bad one is named
                    check_finite(*in_flight.popleft())
                writer.flush()  # scalars of the step before: the device has its next work
                if writer.due(step):
                    writer.write(step, metrics)
                last, told = step == total, preemption.after(number)
                save = told or last or (every["checkpoint"] and step % every["checkpoint"] == 0)
                evaluate = last or (every["evaluate"] and step % every["evaluate"] == 0)
                if not (save or evaluate):
                    continue
                while in_flight:  # never save what came out of a bad step
                    check_finite(*in_flight.popleft())
                with writer.pause(wait_for=state):
                    if save and not all_finite(state):  # the loss is of what was before the step
                        raise NonFiniteLossError(diverged(step, "the state is not finite"))
                    # Scores first: a kill in between must not lose the line that belongs here.
                    # A run that was told to stop has no time for them: the next start makes them.
                    if evaluate and not told and (scores := evaluator(state)):
                        writer.write_now(step, scores)
                        results |= scores
                    if save:
                        progress_now = now(step) | {"scores_due": bool(evaluate and told)}
                        checkpoints.save(step, state, progress_now)
                    if told:
                        checkpoints.wait()
                        raise PreemptedError(
                            f"told to stop: step {step:,} of {total:,} is saved in {workdir}, and "
                            "the same command carries on"
                        )
            if start < total:
                progress = progress_now
        checkpoints.wait()
        dataset = f"{train_source.name} ({train_source.split})"
        return report.finish(config, workdir, evaluator, state, progress, dataset, total)


def same_data(progress: dict[str, Any], source: sources.Source) -> None:
    """Refuses to go on with a data set that has grown or shrunk: orders and schedules follow n.

    Raises:
        UserError: saying both sizes.
    """
    n = progress["num_examples"]
    if n != source.num_examples:
        raise UserError(
            f"{source.name} ({source.split}) has {source.num_examples} images, and had {n} when "
            "this run began: restore the data, or give another --workdir"
        )


def check_finite(step: int, loss: jax.Array) -> None:
    """Waits for the loss of `step`, or an array from there on, and stops the run at a bad one."""
    for i, value in enumerate(np.ravel(loss)):
        if not math.isfinite(value):
            raise NonFiniteLossError(diverged(step + i, f"loss is {value}"))


def diverged(step: int, what: str) -> str:
    """The message of a run that stops itself."""
    return (
        f"{what} at step {step}: the run stops, and the last good checkpoint stays; "
        "try a smaller learning rate, a longer warm-up or optimizer.clip_norm"
    )


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether no float of a tree of arrays is NaN or infinite."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.array([jnp.isfinite(x).all() for x in floats]).all()
