"""The state that a run starts from when `config.init_from` names weights."""

import dataclasses
import datetime
import logging
import shlex
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from common import config as configs
from common.data.augment.presets import IMAGENET_MEAN, IMAGENET_STD
from common.errors import UserError
from common.method import Method, Setup, make_setup, root_keys
from common.optim import steps_of
from common.run import console, jsonl
from common.run.checkpoint import Checkpoints
from common.run.workdir import claim
from common.sharding import make_mesh, replicated, state_shardings
from common.train.weights import Weights, fit, load_weights

# A schedule is built, and no step of it is taken; a warm-up of many epochs has to fit in.
_STEPS, _PER_EPOCH = 10**6, 1


def init_state(
    make_method: Callable[[Setup], Method],
    method: Method,
    setup: Setup,
    key: jax.Array,
    shardings: Any,
) -> Any:
    """The state before the first step, with the weights of `config.init_from` if it names any.

    A momentum encoder starts as a copy of the encoder, as the method has it; a projection head is
    taken over where kind and sizes agree, and drawn otherwise.

    Args:
        make_method: class of the method.
        method: what it made of `setup`.
        setup: of the run.
        key: of `Method.init`.
        shardings: of the state.

    Raises:
        UserError: weights that cannot be read or do not fit.
    """
    path = setup.config.init_from
    if not path:
        return jax.jit(method.init, out_shardings=shardings)(key)
    return _init_from(load_weights(path), make_method, setup, key, shardings)[0]


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
        UserError: as `init_state`, no `init_from`, or a workdir that is in use.
    """
    configs.check(config)
    if not config.init_from:
        raise UserError(
            "--mode=import needs the weights: --config.init_from=FILE, or the workdir of a run"
        )
    whole = config.copy_and_resolve_references()
    whole.microbatch = 0  # nothing of the state depends on it, and it need not fit these devices
    setup = make_setup(whole, make_mesh(), _STEPS, _PER_EPOCH, num_classes=0)
    setup = dataclasses.replace(setup, training=False)
    key, _ = root_keys(config.seed)
    shardings = state_shardings(setup.mesh, jax.eval_shape(make_method(setup).init, key))
    weights = load_weights(config.init_from)
    state, with_head = _init_from(weights, make_method, setup, key, shardings)
    with (
        claim(workdir, config) as (workdir, _),
        Checkpoints(workdir, config.checkpoint.keep) as checkpoints,
    ):
        if checkpoints.all_steps():
            raise UserError(f"{workdir} has checkpoints already: give a new --workdir")
        checkpoints.save(0, state, {"position": 0, "readers": None, "results": {}, "seconds": 0.0})
    record = {
        "mode": "import",
        "init_from": config.init_from,
        "sha256": weights.digest,
        "head": with_head,
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
    for per_epoch in (1, 10**6):
        total = steps_of(config.duration, per_epoch)
        if steps_of(config.optimizer.warmup, per_epoch, total) <= total:
            return False
    return True


def _init_from(
    weights: Weights,
    make_method: Callable[[Setup], Method],
    setup: Setup,
    key: jax.Array,
    shardings: Any,
) -> tuple[Any, bool]:
    """`(state, whether its head comes from the weights)`."""
    params, batch_stats, with_head = fit(weights, *jax.eval_shape(setup.init_network, key))
    _check_scale(weights, setup)
    head = "encoder and projection head" if with_head else "encoder; the projection head is random"
    unused = weights.unused
    if weights.head is not None and not with_head:
        unused = ("its projection head (of another kind or size)", *unused)
    left = f"; not used: {', '.join(unused[:6])}" if unused else ""
    more = f" and {len(unused) - 6} more" if len(unused) > 6 else ""
    console.say(f"initial weights: {weights.path}: {head}{left}{more}")

    def init(key: jax.Array, initial: Any) -> Any:
        return make_method(dataclasses.replace(setup, initial=initial)).init(key)

    place = replicated(setup.mesh)  # an argument: closed over, it would be part of the program
    initial = jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, place, lambda index: x[index]),
        (params, batch_stats),
    )
    return jax.jit(init, out_shardings=shardings)(key, initial), with_head


def _check_scale(weights: Weights, setup: Setup) -> None:
    """The network has to see its images scaled as when it was trained."""
    for name, usual in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
        ours, theirs = getattr(setup, name), weights.metadata.get(name)
        if theirs is None:
            if not np.allclose(ours, usual, atol=1e-3):
                logging.warning(
                    "%s does not say how its images were scaled; torchvision's and MoCo's have the "
                    "%s %s, this config %s: see config.augment.%s",
                    weights.path, name, usual, tuple(ours), name,
                )  # fmt: skip
        elif np.shape(theirs) != (3,) or not np.allclose(ours, theirs, atol=1e-6):
            raise UserError(
                f"{weights.path} was trained on images with the {name} {tuple(theirs)} and the "
                f"config has {tuple(ours)}: give --config.augment.{name}="
                f"'({', '.join(map(str, theirs))})'"
            )
