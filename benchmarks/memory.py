"""Memory, file handles and threads of a long run on a small network.

    python -m benchmarks.memory --steps=3000 --since=500

trains on the embedded images through the whole host pipeline, with evaluations and checkpoints, and
measures the process after step `since` and at the end. Prints a JSON line; the exit status is 1 if
resident memory grew by more than 2 % or a handle or thread was left open.
"""

import argparse
import gc
import json
import pathlib
import sys
import tempfile

BOUND = 0.02


def look() -> dict[str, int]:
    """Resident memory in MiB, file handles and threads of this process, as Linux counts them."""
    gc.collect()
    status = dict(
        line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines()
    )
    return {
        "mib": int(status["VmRSS"].split()[0]) / 1024,
        "handles": len(list(pathlib.Path("/proc/self/fd").iterdir())),
        "threads": int(status["Threads"]),
    }


def run(steps: int, since: int, workdir: str) -> dict:
    """Trains `steps` steps; returns the measurements after `since` and at the end."""
    from common.config import base_config
    from common.evaluate.online import make_evaluator
    from common.train import loop as loop
    from main import METHODS

    c = base_config("moco", METHODS["moco"].default_config())
    c.batch_size, c.duration, c.log_every = 16, f"{steps} steps", 10
    c.data.image_size, c.data.train_split = 28, "test"  # the smaller one
    c.model.stages, c.model.width, c.model.stem = (1,), 8, "patch4"
    c.model.bn_groups = 4
    c.head.hidden, c.head.dim = 16, 16
    c.moco.queue_length = 256
    c.evaluate.every, c.evaluate.knn_examples, c.evaluate.pictures = "10 %", 64, False
    c.checkpoint.every = "5 %"
    seen, took = {}, loop.Watch.add

    def watched(self, first, metrics, ids):
        took(self, first, metrics, ids)
        if first == steps or (first >= since and not seen):
            seen[first] = look()

    loop.Watch.add = watched
    try:
        loop.train(METHODS["moco"], c, workdir, make_evaluator)
    finally:
        loop.Watch.add = took
    first, last = seen[min(seen)], seen[steps]
    return {
        "steps": steps,
        "since": since,
        "mib": [round(first["mib"], 1), round(last["mib"], 1)],
        "growth": round(last["mib"] / first["mib"] - 1, 4),
        "handles": [first["handles"], last["handles"]],
        "threads": [first["threads"], last["threads"]],
    }


def flat(found: dict) -> bool:
    """Whether nothing grew. Writing a checkpoint takes a few handles and threads."""
    return (
        found["growth"] <= BOUND
        and found["handles"][1] <= found["handles"][0] + 8
        and found["threads"][1] <= found["threads"][0] + 8
    )


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--since", type=int, default=500)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = run(options.steps, options.since, scratch)
    print(json.dumps(found))
    sys.exit(not flat(found))


if __name__ == "__main__":
    main()
