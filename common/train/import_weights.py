"""`--mode=import`: a workdir of the weights that another program has trained."""

import datetime
import shlex
import sys
from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from common import config as configs
from common.errors import UserError
from common.method import Method
from common.optim import steps_of
from common.run import console, jsonl
from common.run.checkpoint import Checkpoints
from common.run.workdir import claim
from common.setup import Setup
from common.sharding import make_mesh
from common.train.first_state import with_weights
from common.train.position import Position
from common.train.prepare import Extent, completed, prepare
from common.train.weights import load_weights

# A schedule is built, and no step of it is taken; a warm-up of many epochs has to fit in.
_EXTENT = Extent(total_steps=10**6, steps_per_epoch=1)


def import_weights(
    make_method: Callable[[Setup], Method], config: ConfigDict, workdir: str | epath.PathLike
) -> dict[str, Any]:
    """`--mode=import`: a workdir whose checkpoint of step 0 holds the weights of `init_from`.

    Every mode of evaluation opens it, and training with the same config starts in it.

    Args:
        make_method: class of the method.
        config: of the network and the data; `init_from` names the weights.
        workdir: new or empty.

    Returns:
        What was added to `<workdir>/results.jsonl`.

    Raises:
        UserError: no `init_from`, weights that cannot be read or do not fit, or a workdir that is
            in use.
    """
    if not config.init_from:
        raise UserError(
            "--mode=import needs the weights: --config.init_from=FILE, or the workdir of a run"
        )
    config = completed(make_method, config)
    whole = config.copy_and_resolve_references()
    whole.microbatch = 0  # nothing of the state depends on it, and it need not fit these devices
    run = prepare(make_method, whole, make_mesh(), extent=_EXTENT, training=False)
    weights = load_weights(config.init_from)
    state, taken = with_weights(run, weights)
    with (
        claim(workdir, config) as (workdir, _),
        Checkpoints(workdir, config.checkpoint.keep) as checkpoints,
    ):
        if checkpoints.all_steps():
            raise UserError(f"{workdir} has checkpoints already: give a new --workdir")
        checkpoints.save(0, state, Position().as_record())
    record = {
        "mode": "import",
        "init_from": config.init_from,
        "sha256": weights.digest,
        "head": "head" in taken,
        "predictor": "predictor" in taken,
        "notes": list(weights.notes),
        "unused": list(weights.unused),
        "method": config.method,
        "command": shlex.join(sys.argv),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if jax.process_index() == 0:
        jsonl.append(workdir / jsonl.RESULTS, record)
    shorter = " and a shorter optimizer.warmup" if _warms_up_too_long(config) else ""
    console.result(
        f"{workdir} holds the weights as step 0: evaluate them, e.g. --mode=knn "
        f"--workdir={workdir}, or train from them with the same --config{shorter}."
    )
    return record


def _warms_up_too_long(config: ConfigDict) -> bool:
    """Whether the warm-up is longer than the run, however many steps an epoch has."""
    if configs.is_open("duration", config.duration):
        return False
    for per_epoch in (1, 10**6):
        total = steps_of(config.duration, per_epoch)
        if steps_of(config.optimizer.warmup, per_epoch, total) <= total:
            return False
    return True
