"""Pretrains an image encoder: `python main.py --config=configs/simclr_demo.py --workdir=DIR`."""

import logging
import os
import sys

import jax
from absl import app, flags
from ml_collections import config_flags

from common import command_line
from common.errors import UserError
from common.metrics import NonFiniteLossError
from common.train import train
from moco_jax.method import MoCo
from simclr_jax.method import SimCLR

METHODS = {"simclr": SimCLR, "moco": MoCo}

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, e.g. configs/simclr_demo.py, or with :smoke behind it."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and pictures go.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Call jax.distributed.initialize() first: one process a host of a pod."
)
_CACHE = flags.DEFINE_string(
    "compile_cache",
    os.path.join(os.path.expanduser("~"), ".cache", "jax_contrastive"),
    "Compiled programs are kept here, so that the next start is quick; '' = nowhere.",
)


def main(argv: list[str]) -> None:
    """Reads the flags, starts the devices, trains."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}: options are --config.NAME=VALUE")
    logging.getLogger().setLevel(logging.WARNING)
    if _DISTRIBUTED.value:
        jax.distributed.initialize()
    if _CACHE.value:
        jax.config.update("jax_compilation_cache_dir", _CACHE.value)
    config = _CONFIG.value
    method = config.get("method")
    if method not in METHODS:
        raise UserError(f"method={method!r} is unknown: choose one of {', '.join(METHODS)}")
    train(METHODS[method], config, _WORKDIR.value)


def run() -> None:
    """`app.run`, with a user's mistake as one line and no stack trace."""
    flags.mark_flags_as_required(["config", "workdir"])
    try:
        app.run(main, flags_parser=command_line.parse)
    except (UserError, NonFiniteLossError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run()
