"""What is done when a loss or a weight stops being a number, or the network stops learning.

The loss of every step is looked at, a few steps late so that the device never waits. "stop" ends
the run, names step and array, and leaves a reproduction in `<workdir>/nonfinite/` that
`--mode=replay` plays again. "skip" drops the update inside the compiled step and counts; only so
many in a row are tolerated.
"""

import collections
import json
import logging
import math
import shlex
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from common.method import Step
from common.run import digests, files
from common.run.writer import NonFiniteLossError
from common.train.prepare import Prepared

FOLDER = "nonfinite"
# Of every step of a dispatch, not only of the last.
WATCHED = ("loss", "skipped", "feature_std", "contrastive_top1")
_WINDOW = 500  # steps that an accuracy at chance must last before it is called so
# of `feature_std`, which is 1 for features spread over the sphere and 0 for equal ones
_COLLAPSED = 0.01
_CHANCE = 2.0  # times the chance level, and below, is no better than chance


def skip_nonfinite(train_step: Step) -> Step:
    """A train step that leaves the state as it was where `train_step` would spoil it.

    Its metric `skipped` is 1 for a step whose update was dropped. The step counts all the same: the
    schedule goes on, and the next step draws anew.
    """

    def step(state: Any, batch: dict, key: jax.Array) -> tuple[Any, dict]:
        new, metrics = train_step(state, batch, key)
        good = jnp.isfinite(metrics["loss"]) & all_finite(new)
        kept = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, state)
        return kept.replace(step=new.step), metrics | {"skipped": 1.0 - good}

    return step


class Watch:
    """Looks at what each step reported, in order.

    Args:
        run: what is trained.
        workdir: of the run.
        saved: step of the newest checkpoint, which a reproduction starts from.
        skipped: updates that were dropped before this start.
    """

    def __init__(
        self, run: Prepared, workdir: epath.Path, saved: int | None = None, skipped: int = 0
    ) -> None:
        self._workdir, self._seed, self._chance = workdir, run.config.seed, run.method.chance
        self._skip, self._most = run.config.on_nonfinite == "skip", run.config.max_skipped
        self._in_flight: collections.deque = collections.deque()
        self._window = min(_WINDOW, max(50, run.extent.total_steps // 10))
        self._accuracies: collections.deque = collections.deque(maxlen=self._window)
        self._spreads: collections.deque = collections.deque(maxlen=min(50, self._window))
        self._warned: set[str] = set()
        self._in_a_row = 0
        self.saved, self.skipped = saved, skipped

    def counts(self) -> dict[str, float]:
        """What belongs into the log beside the metrics of a step."""
        return {"skipped_steps": self.skipped} if self._skip else {}

    def add(self, first: int, metrics: dict[str, Any], ids: np.ndarray) -> None:
        """Adds what a dispatch reported.

        Args:
            first: its first step.
            metrics: its scalars; "each", which holds `WATCHED` of every step, is taken out.
            ids: `[steps, b]`, the examples of each step in this process.
        """
        alone = {name: metrics[name] for name in WATCHED if name in metrics}
        self._in_flight.append((first, metrics.pop("each", alone), ids))

    def check_all(self, state: Any, but: int = 0) -> None:
        """Waits for all dispatches but the last few, and checks every step of them, in order.

        Args:
            state: the newest, to name what is wrong with it.
            but: how many may still run.

        Raises:
            NonFiniteLossError: for the first bad step that is not to be skipped.
        """
        while len(self._in_flight) > but:
            first, arrays, ids = self._in_flight.popleft()
            arrays = {name: np.atleast_1d(x) for name, x in jax.device_get(arrays).items()}
            for i in range(len(ids)):
                scalars = {name: float(x[i]) for name, x in arrays.items()}
                self.check(first + i, scalars, ids[i], state)

    def check(self, step: int, scalars: Mapping[str, float], ids: np.ndarray, state: Any) -> None:
        """Judges one step."""
        loss = scalars["loss"]
        if scalars.get("skipped"):
            self.skipped += 1
            self._in_a_row += 1
            logging.warning(
                "step %d: loss is %s, the update is dropped (%d so far)", step, loss, self.skipped
            )
            if self._in_a_row >= self._most:
                what = f"{self._in_a_row} steps in a row were skipped, and loss is {loss}"
                raise self.stopped(step, what, ids, state)
            return
        self._in_a_row = 0
        if not math.isfinite(loss):
            raise self.stopped(step, f"loss is {loss}", ids, state)
        self._warn_of_collapse(step, scalars)

    def check_state(self, step: int, state: Any, ids: np.ndarray) -> None:
        """Refuses a state that is to be saved; a loss is that of what was before the step."""
        if not all_finite(state):
            raise self.stopped(step, "the state is not finite", ids, state)

    def stopped(self, step: int, what: str, ids: np.ndarray, state: Any) -> NonFiniteLossError:
        """The error of a run that stops itself, with its reproduction on disk."""
        bad = not_finite(state)
        folder = self._workdir / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step_{step}.process_{jax.process_index()}.npz"
        with path.open("wb") as file:
            np.savez(file, ids=ids)
        record = {
            "step": step,
            "what": what,
            "bad_arrays": bad,
            "checkpoint": self.saved,
            "seed": self._seed,
            "key": f"fold_in(root key of the seed, {step - 1})",
            "batch": f"step_{step}.process_*.npz",
            "processes": jax.process_count(),
            "devices": jax.device_count(),
            "command": shlex.join(sys.argv),
        }
        if jax.process_index() == 0:
            files.write_text(folder / f"step_{step}.json", json.dumps(record, indent=2) + "\n")
        where = f"first bad array: {bad[0]} of {len(bad)}; " if bad else ""
        return NonFiniteLossError(
            f"{what} at step {step}: the run stops, and the last good checkpoint stays; {where}"
            f"`main.py --mode=replay --workdir={self._workdir}` takes that step again; try a "
            "smaller learning rate, a longer warm-up or optimizer.clip_norm"
        )

    def _warn_of_collapse(self, step: int, scalars: Mapping[str, Any]) -> None:
        if "feature_std" in scalars:
            self._spreads.append(float(scalars["feature_std"]))
        if "contrastive_top1" in scalars:
            self._accuracies.append(float(scalars["contrastive_top1"]))
        spread, accuracy = _mean(self._spreads), _mean(self._accuracies)
        if spread is not None and spread < _COLLAPSED:
            self._warn(
                "spread",
                f"step {step}: the features have collapsed, all images look nearly the same to "
                f"the network (feature_std {spread:.4f}, 1 is a good spread): try a smaller "
                "learning rate, a longer warm-up, or check the augmentation",
            )
        if accuracy is not None and self._chance and accuracy <= _CHANCE * self._chance:
            self._warn(
                "accuracy",
                f"step {step}: for {self._window} steps the network has told images apart no "
                f"better than chance ({accuracy:.2%} right, {self._chance:.2%} by guessing): try "
                "another learning rate or temperature, or check the augmentation",
            )

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            if jax.process_index() == 0:
                logging.warning("%s", text)


def _mean(window: collections.deque) -> float | None:
    """Of a full window; None before."""
    return sum(window) / len(window) if len(window) == window.maxlen else None


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether no float of a tree of arrays is NaN or infinite."""
    return _flags(tree).all()


def _flags(tree: Any) -> jax.Array:
    return jnp.array([_finite(x) for x in jax.tree.leaves(tree)])


def _finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all() if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.bool_(True)


def not_finite(tree: Any) -> list[str]:
    """Names of the arrays that hold a NaN or an infinity, in the order of the tree."""
    flags = np.asarray(jax.jit(_flags, out_shardings=digests.everywhere(tree))(tree))
    return [name for name, good in zip(digests.names(tree), flags, strict=True) if not good]
