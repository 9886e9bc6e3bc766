"""A method that compiles in no time, to see the real training loop at work."""

import contextlib
import json
from typing import Any

import flax
import jax
import jax.numpy as jnp
from test_end_to_end import small

from common.evaluate import online
from common.method import Method
from common.run.checkpoint import Checkpoints
from common.sharding import make_mesh
from common.train import loop
from simclr_jax.method import SimCLR


@flax.struct.dataclass
class State:
    step: jax.Array
    params: Any
    batch_stats: Any
    probe: Any


class Toy(Method):
    """One weight, which grows by 1 a step; the loss depends on weight, images and key.

    Features are the pixels.
    """

    default_config = SimCLR.default_config
    nan_at = ()  # steps whose loss and update are not numbers

    def init(self, key):
        params = {"backbone": {"w": jax.random.normal(key, (1,))}}
        return State(jnp.zeros((), jnp.int32), params, {"mean": jnp.zeros(1)}, None)

    def train_step(self, state, batch, key):
        w, step = state.params["backbone"]["w"], state.step + 1
        bad = jnp.where((step == jnp.array(self.nan_at or (0,))).any(), jnp.nan, 0)
        noise = jax.random.uniform(jax.random.fold_in(key, state.step))
        metrics = {
            "loss": w[0] + batch["images"].mean() / 255 + noise + bad,
            "noise": noise,
            "learning_rate": self.setup.schedule(state.step),
        }
        params = {"backbone": {"w": w + 1 + bad}}
        return state.replace(step=step, params=params), metrics

    def encode(self, state, images, layer="backbone"):
        return images.reshape(len(images), -1).astype(jnp.float32)


def with_nan_at(*steps):
    """`Toy` that diverges in these steps."""
    return type("Toy", (Toy,), {"nan_at": steps})


def config(**changes):
    """7 steps over epochs of 2; a line at 1, 3, 6, 7, a checkpoint at 3, 6, 7, no scores."""
    settings = {"evaluate__every": "0 steps", "data__test_split": "", "model__bn_groups": 1}
    return small("simclr", **(settings | changes))


def train(c, workdir, method=Toy, make_evaluator=online.make_evaluator):
    return loop.train(method, c, workdir, make_evaluator, make_mesh(jax.devices()[:1]))


class Killed(Exception):
    """Stands for the end of the process."""


@contextlib.contextmanager
def before_each_step(act):
    """Calls `act(n)` before the n-th step that is taken."""
    taken, to_global = [], loop.to_global

    def wrapped(*arguments):
        taken.append(1)
        act(len(taken))
        return to_global(*arguments)

    loop.to_global = wrapped
    try:
        yield taken
    finally:
        loop.to_global = to_global


def train_until(step, c, workdir, method=Toy, start=0, make_evaluator=online.make_evaluator):
    """Trains, and dies when it would take `step`; `start` steps were done before."""

    def die(n):
        if start + n == step:
            raise Killed

    with before_each_step(die), contextlib.suppress(Killed):
        train(c, workdir, method, make_evaluator)
        raise AssertionError("the run has ended")


def scored(scores):
    """Makes an evaluator whose kNN after each step is that of a table."""

    class Scored:
        def __call__(self, state, keep=False):
            knn = scores[int(state.step)]
            return {"knn_top1": knn, "probe_test_top1": knn / 2}

        def raw_pixels(self):
            return {"knn_top1_raw_pixels": 0.25}

        def draw_neighbours(self, state, path, when=""):
            return False

    return lambda run, bank, test: Scored()


SCORES = {step: step / 10 for step in range(8)} | {2: 0.9}  # kNN after each step


def saved_steps(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())


def progress(workdir, step):
    """What was saved beside the state."""
    path = workdir / "checkpoints" / str(step) / "progress" / "metadata"
    return json.loads(path.read_text())["progress"]


def weight(workdir, step):
    with Checkpoints(workdir, None, read_only=True) as checkpoints:
        return float(checkpoints.read(step)[0]["params/backbone/w"][0])


def untimed(summary):
    return {k: v for k, v in summary.items() if k not in ("images_per_second", "seconds")}


def reproduction(workdir, step):
    return json.loads((workdir / "nonfinite" / f"step_{step}.json").read_text())
