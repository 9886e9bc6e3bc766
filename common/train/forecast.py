"""How long a run will take: said before its first step, and again after twenty of them.

Somebody who starts the recipe of a TPU pod on a laptop should know at once, and not next week.
"""

import time

import jax
import jax.numpy as jnp

from common.run import console
from common.train.milestones import Due
from common.train.prepare import Prepared
from common.train.step import cost

STEPS = 20  # measured, after the first one, which compiles and fills the pipeline
TOO_LONG = 24 * 3600.0  # seconds
# A train step's rate as a share of that of one large matrix product on the same device. That of
# CPUs foretold 11 minutes of a run of 12 (docs/results.md, photographs); the others are guesses,
# which the clock puts right after `STEPS`.
_SHARE = {"cpu": 0.4, "gpu": 0.2, "tpu": 0.3}
_SIDE = {"cpu": 1024}  # of the matrices that are multiplied; elsewhere 4,096
_SMALLER = {
    "cpu": "configs/simclr_photos.py:laptop or moco_photos.py:laptop for photographs, "
    "simclr_cifar10.py:cpu for CIFAR-10",
    "gpu": "configs/simclr_photos.py or moco_photos.py for photographs, simclr_cifar10.py for "
    "CIFAR-10",
}


class Forecast:
    """Says how long a run takes.

    Args:
        run: what is trained.
        due: its scores and checkpoints.
        start: step at which this start begins.
    """

    def __init__(self, run: Prepared, due: Due, start: int) -> None:
        self._run, self._due, self._start = run, due, start
        self._left = run.extent.total_steps - start
        self._mark: tuple[float, int] | None = None
        self._begin, self._scoring, self._done = time.perf_counter(), 0.0, False

    def before(self, step: jax.stages.Compiled) -> None:
        """Says what the arithmetic of the steps alone will take.

        Args:
            step: the compiled train step.
        """
        flops = cost(step, self._run.setup.microbatches).get("flops", 0.0)
        device = self._run.mesh.local_devices[0]
        if flops > 0 and self._left > STEPS:
            share = _SHARE.get(device.platform, _SHARE["gpu"])
            seconds = self._left * flops / (share * rate(device, self._run.config.model.dtype))
            later = (
                f"; measured after {STEPS} to {2 * STEPS} steps" if self._left > 2 * STEPS else ""
            )
            console.say(f"Expected: {in_words(seconds)}, from its arithmetic alone{later}.")
            self._advise(seconds)
        self._begin = time.perf_counter()

    def begin(self) -> None:
        """The first step follows: what came since `before` were the first scores."""
        # of raw pixels and of the untrained encoder; the later ones are of an encoder only
        self._scoring = (time.perf_counter() - self._begin) / 2

    def after(self, step: int, rate: float | None = None) -> None:
        """Counts a step, or several in one dispatch; says how long the rest takes when it knows.

        Args:
            step: updates done.
            rate: images a second by the log, for runs that pause too often to count steps here.
        """
        now = time.perf_counter()
        if self._done:
            return
        if self._mark is None or self._due.anything(step):  # a pause does not count as steps
            self._mark = now, step
        begun, first = self._mark
        steps_left, counted = self._run.extent.total_steps - step, step - first
        if counted >= STEPS:
            a_step = (now - begun) / counted
        elif rate and steps_left and step - self._start >= 2 * STEPS:
            a_step, counted = self._run.config.batch_size / rate, step - self._start
        else:
            return
        self._done = True
        scores = sum(self._due.scores(s) for s in _ends(self._due, step))
        seconds = steps_left * a_step + scores * self._scoring
        images = self._run.config.batch_size / a_step
        console.say(
            f"{counted} steps took {in_words(counted * a_step)} ({images:,.0f} images/s): "
            f"{in_words(seconds)} to go, with {scores} evaluation{'' if scores == 1 else 's'}."
        )
        self._advise(seconds)

    def _advise(self, seconds: float) -> None:
        """Names a smaller recipe where this one is too large for the devices."""
        if seconds <= TOO_LONG:
            return
        device = self._run.mesh.local_devices[0]
        part = TOO_LONG / seconds
        shorter = max(1, int(part * self._left / self._run.extent.steps_per_epoch))
        other = _SMALLER.get(device.platform, "")
        console.say(
            f"That is long for {self._run.mesh.size} x {device.device_kind}."
            + (f" Recipes of a fitting size: {other}." if other else "")
            + (
                f' In a day it would do --config.duration="{shorter} epochs".'
                if part * self._left >= self._run.extent.steps_per_epoch
                else ""
            )
        )


def rate(device: jax.Device, dtype: str) -> float:
    """Operations a second of a matrix product on one device, the best of three; takes 0.1 s.

    Args:
        device: of this process.
        dtype: of the matrices.
    """
    side = _SIDE.get(device.platform, 4096)
    kind = jnp.bfloat16 if dtype == "bfloat16" and device.platform != "cpu" else jnp.float32
    with jax.transfer_guard("allow"):
        matrix = jax.device_put(jnp.ones((side, side), kind), device)
        product = jax.jit(jnp.matmul)
        product(matrix, matrix).block_until_ready()
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            product(matrix, matrix).block_until_ready()
            times.append(time.perf_counter() - begin)
    return 2 * side**3 / min(times)


def in_words(seconds: float) -> str:
    """A duration for a sentence, in the unit in which it is a number of some size."""
    for name, size, most in (("second", 1.0, 100.0), ("minute", 60.0, 100.0), ("hour", 3600.0, 48)):
        if seconds / size < most:
            value = max(1, round(seconds / size))
            return f"about {value:,} {name}{'' if value == 1 else 's'}"
    return f"about {round(seconds / 86400):,} days"


def _ends(due: Due, step: int) -> list[int]:
    """The steps after `step` that scores can follow."""
    every = due.evaluate or due.total
    return sorted({*range((step // every + 1) * every, due.total + 1, every), due.total})
