"""SIGKILL at random moments of a short run, half of them during a save, until it has ended.

    python -m benchmarks.kills --method=moco --kills=50 [--seed=0] [--out=DIR]

The run that was killed repeatedly must end with the parameters, the optimiser's state, the queue
and the log lines of an undisturbed run, to the last bit. One JSON line has the result; the exit
status is 1 if anything differs.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import sys
import tempfile
import time
import traceback

STEPS = 40


def make_config(method: str):
    """A small network on random images, with a checkpoint every second step."""
    from common.config import base_config
    from main import METHODS

    c = base_config(method, METHODS[method].default_config())
    c.batch_size = 16
    c.duration = f"{STEPS} steps"
    c.log_every = 1
    c.data.source, c.data.fake_examples, c.data.fake_classes = "fake", 64, 4
    c.data.image_size = 16
    c.data.test_split = ""
    c.model.stages, c.model.width, c.model.stem = (1,), 8, "cifar"
    c.model.bn_groups = 4
    c.head.hidden, c.head.dim = 16, 16
    c.optimizer.warmup = "5 steps"
    c.evaluate.every, c.evaluate.pictures = "0 steps", False
    c.checkpoint.every = "2 steps"
    if method == "moco":
        c.moco.queue_length = 4096
    return c


def start(method: str, workdir: pathlib.Path) -> int:
    """Continues the run in a process of its own; returns its number.

    It is forked, because importing takes longer than the run; nothing here has touched a device.
    """
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        log = os.open(f"{workdir}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        from common.evaluate.online import make_evaluator
        from common.train.loop import train
        from main import METHODS

        train(METHODS[method], make_config(method), workdir, make_evaluator)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def saving(workdir: pathlib.Path) -> bool:
    """Whether a checkpoint is half-written at this moment."""
    try:
        return any("tmp" in p.name for p in (workdir / "checkpoints").iterdir())
    except OSError:
        return False


def newest(workdir: pathlib.Path) -> int:
    """Step of the newest complete checkpoint, 0 if there is none."""
    try:
        steps = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    except OSError:
        return 0
    return max(steps, default=0)


def kill_one(method: str, workdir: pathlib.Path, inside: bool, rng: random.Random) -> str:
    """Starts the run and kills it; returns "inside", "between" or "ended"."""
    child = start(method, workdir)
    first = newest(workdir)
    # inside: during the 1st, 2nd ... save; else at a random time after the 0th, 1st ... one
    saves = rng.randint(1, 4) if inside else rng.randint(0, 4)
    moment = None
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if status:
                raise RuntimeError(f"it failed by itself: see {workdir}.log")
            return "ended"
        if moment is None:
            if inside and newest(workdir) >= first + 2 * (saves - 1) and saving(workdir):
                moment = time.monotonic() + rng.uniform(0, 0.02)
            elif not inside and newest(workdir) >= first + 2 * saves:
                moment = time.monotonic() + rng.uniform(0, 2.0 if saves == 0 else 0.2)
        elif time.monotonic() >= moment and saving(workdir) == inside:
            break
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "inside" if saving(workdir) else "between"


def finish(method: str, workdir: pathlib.Path) -> None:
    """Continues the run to its end."""
    _, status = os.waitpid(start(method, workdir), 0)
    if status:
        raise RuntimeError(f"it failed by itself: see {workdir}.log")


def content(workdir: pathlib.Path) -> tuple[dict, list]:
    """All arrays of the last checkpoint, and the log without times."""
    from common.run import jsonl
    from common.run.checkpoint import Checkpoints
    from common.run.writer import TIMING_KEYS

    with Checkpoints(workdir, None, read_only=True) as checkpoints:
        arrays, _ = checkpoints.read(STEPS)
    lines = [{k: v for k, v in r.items() if k not in TIMING_KEYS}
             for r in jsonl.read(workdir / jsonl.FILE)]  # fmt: skip
    return arrays, lines


def campaign(method: str, kills: int, seed: int, directory: pathlib.Path) -> dict:
    """Kills runs of a method until `kills` are reached, lets each end, and compares.

    Returns:
        Counts, and `differing`: the names of arrays (or "log") that differ from an undisturbed run.
    """
    rng, counts = random.Random(seed), {"inside": 0, "between": 0, "ended": 0}
    runs, whole = [], directory / f"{method}_whole"
    finish(method, whole)
    while counts["inside"] + counts["between"] < kills:
        workdir = directory / f"{method}_{len(runs)}"
        runs.append(workdir)
        while counts["inside"] + counts["between"] < kills:
            want_inside = counts["inside"] <= counts["between"]
            outcome = kill_one(method, workdir, want_inside, rng)
            counts[outcome] += 1
            print(f"\r{method}: {counts}", end="", file=sys.stderr, flush=True)
            if outcome == "ended":
                break
        finish(method, workdir)
    print(file=sys.stderr)
    import jax

    jax.config.update("jax_platforms", "cpu")
    import numpy as np

    want, want_lines = content(whole)
    differing = set()
    for workdir in runs:
        got, lines = content(workdir)
        differing |= want.keys() ^ got.keys()
        differing |= {n for n in want.keys() & got.keys()
                      if want[n].tobytes() != np.asarray(got[n]).tobytes()}  # fmt: skip
        differing |= set() if lines == want_lines else {"log"}
    return {
        "method": method,
        "kills": counts["inside"] + counts["between"],
        "inside_a_save": counts["inside"],
        "runs": len(runs),
        "arrays": len(want),
        "differing": sorted(differing),
    }


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="simclr", choices=("simclr", "moco"))
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="keep the runs and their logs there; default: delete them")
    options = parser.parse_args()
    os.environ |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
    with tempfile.TemporaryDirectory() as scratch:
        directory = pathlib.Path(options.out or scratch)
        directory.mkdir(parents=True, exist_ok=True)
        import jax

        import main as _  # noqa: F401  (imported once, for all that are forked)

        jax.config.update("jax_compilation_cache_dir", str(directory / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        found = campaign(options.method, options.kills, options.seed, directory)
    print(json.dumps(found))
    sys.exit(bool(found["differing"]))


if __name__ == "__main__":
    main()
