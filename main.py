"""Pretrains and evaluates image encoders; `python main.py -h` lists modes, flags and fields."""

from common.cli import interrupts
from common.run import quiet

if __name__ == "__main__":
    interrupts.install()  # importing the rest takes seconds
    quiet.install()

import logging
import sys

import jax
from absl import app, flags

from common import distributed
from common.cli import command_line, modes
from common.data.sources import shard_writer
from common.errors import UserError, one_of
from common.evaluate.compare_mode import compare
from common.evaluate.online import make_evaluator
from common.method import Method
from common.plan.plan import plan
from common.run import files
from common.run.writer import NonFiniteLossError
from common.train.import_weights import import_weights
from common.train.loop import train
from common.train.preemption import PreemptedError
from common.train.replay import replay
from moco_jax.method import MoCo
from moco_jax.v3 import MoCoV3
from simclr_jax.distil import Distil
from simclr_jax.method import SimCLR

METHODS: dict[str, type[Method]] = {
    "simclr": SimCLR,
    "moco": MoCo,
    "moco_v3": MoCoV3,
    "distil": Distil,
}


def main(argv: list[str], f: flags.FlagValues = flags.FLAGS) -> None:
    """Starts the devices and runs the mode."""
    logging.getLogger().setLevel(logging.WARNING)
    command_line.check(f, modes.MODES, argv[1:])
    command_line.reach_stores(f)
    if f.mode == "compare":
        compare(f.workdirs, f.workdir)
        return
    if f.distributed or f.coordinator:
        distributed.start(f.coordinator)
    if f.compile_cache and f.mode != "plan":  # a cached program cannot be analysed
        jax.config.update("jax_compilation_cache_dir", str(files.path(f.compile_cache)))
    if f.mode in modes.MODES:
        modes.run(f.mode, f.workdir, f.eval, METHODS)
        return
    if f.mode == "replay":
        replay(f.workdir, METHODS)
        return
    method = METHODS[one_of("method", f.config.get("method"), METHODS)]
    if f.mode == "plan":
        plan(method, f.config, f.topology, f.quick)
    elif f.mode == "prepare":
        shard_writer.write(f.config.data, f.workdir)
    elif f.mode == "import":
        import_weights(method, f.config, f.workdir)
    else:
        train(method, f.config, f.workdir, make_evaluator)


def run() -> None:
    """`app.run`, but a user's mistake ends in one line without a stack trace."""
    try:
        command_line.define(modes.MODES)
        app.run(main, flags_parser=lambda argv: command_line.parse(argv, methods=METHODS))
    except PreemptedError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_status)
    except (UserError, NonFiniteLossError) as error:
        sys.exit(f"error: {error}")
    except Exception as error:
        if line := files.in_one_line(error):
            sys.exit(f"error: {line}")
        raise


if __name__ == "__main__":
    run()
