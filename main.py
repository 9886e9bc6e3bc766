"""Pretrains an image encoder: `python main.py --config=configs/simclr_demo.py --workdir=DIR`."""

import logging
import os
import sys

import jax
from absl import app, flags
from ml_collections import config_flags

from common import command_line, distributed
from common.data import shards
from common.errors import UserError
from common.evaluate import modes, settings
from common.metrics import NonFiniteLossError
from common.plan.plan import plan
from common.preemption import EXIT_STATUS, PreemptedError
from common.replay import replay
from common.train import train
from moco_jax.method import MoCo
from simclr_jax.method import SimCLR

METHODS = {"simclr": SimCLR, "moco": MoCo}

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, e.g. configs/simclr_demo.py, or with :smoke behind it."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and pictures go.")
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "plan", "prepare", "replay", *modes.MODES],
    "plan: only compile the train step and say what it costs; prepare: write the data as shards; "
    "replay: take the step again at which the run of --workdir diverged; the others evaluate the "
    "run that --workdir holds.",
)
_EVAL = config_flags.DEFINE_config_dict(
    "eval", settings.default_config(), "How to evaluate, e.g. --eval.knn.k=20."
)
_TOPOLOGY = flags.DEFINE_list(
    "topology", [], "With --mode=plan: TPU slices to plan for, e.g. v5e:4x8,v4:4x4x4."
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "One process a host of a pod: join the others first."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "HOST:PORT,COUNT,INDEX: the same where JAX cannot find that out by itself."
)
_CACHE = flags.DEFINE_string(
    "compile_cache",
    os.path.join(os.path.expanduser("~"), ".cache", "jax_contrastive"),
    "Compiled programs are kept here, so that the next start is quick; '' = nowhere.",
)


def main(argv: list[str]) -> None:
    """Reads the flags, starts the devices, does what --mode says."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}: options are --config.NAME=VALUE")
    logging.getLogger().setLevel(logging.WARNING)
    if _DISTRIBUTED.value or _COORDINATOR.value:
        distributed.start(_COORDINATOR.value)
    if _CACHE.value:
        jax.config.update("jax_compilation_cache_dir", _CACHE.value)
    if not _WORKDIR.value and _MODE.value != "plan":
        raise UserError("--workdir is missing: say where the results are to go, or are")
    config = _CONFIG.value
    if _MODE.value in ("replay", *modes.MODES):
        if config is not None:
            raise UserError(
                f"--mode={_MODE.value} takes the config from the workdir: leave --config out; "
                "what can be changed are --eval.NAME=VALUE"
            )
        if _MODE.value == "replay":
            replay(_WORKDIR.value, METHODS)
        else:
            modes.run(_MODE.value, _WORKDIR.value, _EVAL.value, METHODS)
        return
    if config is None:
        raise UserError("--config is missing: give a file, e.g. --config=configs/simclr_demo.py")
    method = config.get("method")
    if method not in METHODS:
        raise UserError(f"method={method!r} is unknown: choose one of {', '.join(METHODS)}")
    if _MODE.value == "plan":
        plan(METHODS[method], config, _TOPOLOGY.value)
    elif _MODE.value == "prepare":
        shards.prepare(config, _WORKDIR.value)
    else:
        train(METHODS[method], config, _WORKDIR.value)


def run() -> None:
    """`app.run`, with a user's mistake as one line and no stack trace."""
    try:
        app.run(main, flags_parser=command_line.parse)
    except PreemptedError as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_STATUS)
    except (UserError, NonFiniteLossError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if not command_line.is_of_the_disk(error):
            raise
        sys.exit(f"error: {error}: make room or mend the disk, then give the same command again")


if __name__ == "__main__":
    run()
