"""Does it run on this device, and is the result right? Each check gives one figure."""

import contextlib
import importlib.metadata
import platform
import subprocess
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.record import steps
from benchmarks.record.ledger import Found
from benchmarks.record.setting import Setting
from benchmarks.running import Running
from common import queue as queues
from common.evaluate import knn
from common.sharding import to_global
from moco_jax.loss import info_nce
from simclr_jax.loss import nt_xent
from tests import oracles

# For float32, relative to the norm. On a CPU the gradient of this ResNet-18 in
# float32 is 3e-6 (SimCLR) and 1e-6 (MoCo) from that in float64 (measured once; no script is kept);
# another order of sums, or another convolution algorithm, may give ten times as much.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4
# The gradient jumps where an activation changes its sign, which one rounding of the parameters can
# cause: SimCLR's by 6e-4 or more for three of six such changes on a CPU (measured once; no script
# is kept). So more than one gradient is right: a CPU's from the state itself, and from this many
# neighbours, whose parameters are one rounding away.
NEIGHBOURS, ROUNDING = 8, 1e-7
DISPATCHES = 3
PACKAGES = (
    "jax", "jaxlib", "jax-cuda13-plugin", "libtpu", "flax", "optax", "orbax-checkpoint", "chex",
    "ml-collections", "numpy", "torch",
)  # fmt: skip


def device(setting: Setting) -> Found:
    """Devices, memory, driver and versions."""
    first = jax.devices()[0]
    values: dict[str, Any] = {
        "device": first.device_kind, "platform": first.platform, "devices": jax.device_count(),
        "memory_gib": (first.memory_stats() or {}).get("bytes_limit", 0) / 2**30,
        "runtime": getattr(first.client, "platform_version", "").replace("\n", " "),
        "python": platform.python_version(), "driver": None,
    }  # fmt: skip
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # missing, hanging or failing
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
        values["driver"] = done.stdout.split("\n")[0].strip() or None
    for name in PACKAGES:
        try:
            values[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            values[name] = None
    memory = f"{values['memory_gib']:.1f} GiB, " if values["memory_gib"] else ""
    driver = f"driver {values['driver']}, " if values["driver"] else ""
    return Found(
        f"{values['devices']} x {first.device_kind} ({first.platform}), "
        f"{memory}{driver}Python {values['python']}, "
        + ", ".join(f"{name} {values[name]}" for name in ("jax", "flax", "optax", "torch")),
        values,
    )


def step(setting: Setting, name: str) -> Found:
    """A step of `steps.sanity` compiles, runs without implicit transfers, and donates its state."""
    c = steps.sanity(name.split("_")[0], setting.sizes)[name]
    begin = time.perf_counter()
    run = Running(c)
    compiled = time.perf_counter() - begin
    old = jax.tree.leaves(run.state)
    size = sum(x.nbytes for x in old)
    losses = [float(run.dispatch()["loss"]) for _ in range(DISPATCHES)]
    donated = sum(x.nbytes for x in old if x.is_deleted()) / size
    begin = time.perf_counter()
    jax.block_until_ready(run.dispatch())
    ms = 1e3 * (time.perf_counter() - begin) / c.steps_per_dispatch
    taken, wanted = int(run.state.step), (DISPATCHES + 1) * c.steps_per_dispatch
    return Found(
        f"{taken} of {wanted} steps with losses of {min(losses):.3f} to {max(losses):.3f}, "
        f"{ms:.2f} ms a step, {donated:.0%} of the state's memory reused, "
        f"{compiled:.0f} s to compile",
        {"losses": losses, "ms": ms, "donated": donated, "compile_seconds": compiled},
        ok=bool(np.isfinite(losses).all() and len(set(losses)) > 1)
        and taken == wanted and donated > 0.9,
    )  # fmt: skip


def same_as_cpu(setting: Setting, method: str) -> Found:
    """Loss and gradient of one step from one state on one batch, here and on a CPU."""
    c = steps.reference(method, setting.sizes)
    with jax.default_matmul_precision("highest"):
        cpu = _FirstStep(c, jax.devices("cpu")[0])
        start = jax.device_get(cpu.run.state)
        there = [cpu(start)]
        here = _FirstStep(c, jax.devices()[0])(start)
        while _nearest(here[1], there) > GRADIENT_TOLERANCE and len(there) <= NEIGHBOURS:
            there.append(cpu(_neighbour(start, seed=len(there))))
    quick = _FirstStep(c, jax.devices()[0])(start)  # the precision of a run: TF32 on a GPU
    values = {
        "loss": relative(here[0], there[0][0]),
        "gradient": _nearest(here[1], there),
        "gradient_of_the_same_state": relative(here[1], there[0][1]),
        "states": len(there),
        "loss_default_precision": relative(quick[0], there[0][0]),
        "gradient_default_precision": relative(quick[1], there[0][1]),
    }
    beside = f" from one of {len(there)} states a rounding apart" if len(there) > 1 else ""
    return Found(
        f"relative difference of the loss {values['loss']:.1e}, of the gradient "
        f"{values['gradient']:.1e}{beside}; with products in a run's precision "
        f"{values['loss_default_precision']:.1e} and {values['gradient_default_precision']:.1e}",
        values,
        ok=values["loss"] < LOSS_TOLERANCE and values["gradient"] < GRADIENT_TOLERANCE,
    )


def _nearest(gradient: np.ndarray, of: list[tuple[np.ndarray, np.ndarray]]) -> float:
    return min(relative(gradient, other) for _, other in of)


def _neighbour(state: Any, seed: int) -> Any:
    """A state whose parameters are one rounding away, up or down."""
    rng = np.random.default_rng(seed)

    def moved(x: np.ndarray) -> np.ndarray:
        return (x * (1 + ROUNDING * rng.choice([-1, 1], x.shape))).astype(x.dtype)

    return state.replace(params=jax.tree.map(moved, state.params))


class _FirstStep:
    """A step, compiled for a device, and its first batch."""

    def __init__(self, c: Any, on: jax.Device) -> None:
        self.run = Running(c, on)
        _, batch = self.run.batches.take(1)
        self.batch = to_global(self.run.mesh, batch)

    def __call__(self, start: Any) -> tuple[np.ndarray, np.ndarray]:
        """Loss and gradient `[parameters]` from a state on the host."""
        place = lambda x, old: jax.device_put(x, old.sharding)  # noqa: E731
        state = jax.tree.map(place, start, self.run.state)
        state, metrics = self.run.compiled(state, self.batch, self.run.key)
        momentum = optax.tree_utils.tree_get(jax.device_get(state.opt_state), "trace")
        gradient = np.concatenate([np.ravel(x) for x in jax.tree.leaves(momentum)])
        return np.asarray(metrics["loss"]), gradient


def relative(found: Any, wanted: Any) -> float:
    """Norm of the difference over that of `wanted`; NaN stays NaN, which passes no check."""
    found, wanted = (np.asarray(x, np.float64).ravel() for x in (found, wanted))
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def losses(setting: Setting, name: str) -> Found:
    """Value and gradient of NT-Xent or InfoNCE against NumPy in float64."""
    rng = np.random.default_rng(0)
    n, d, temperature = setting.sizes.losses[0] // 2, 128, 0.2
    base = rng.normal(size=(n, d))
    first, second = (
        (base + rng.normal(size=base.shape)).astype(np.float32) for _ in range(2)
    )  # fmt: skip
    if name == "nt_xent":
        found = jax.jit(jax.value_and_grad(lambda z: nt_xent(z, second, temperature)))(first)
        value, (gradient, _) = oracles.nt_xent(first, second, temperature)
    else:
        negatives = rng.normal(size=(4, n, d))
        negatives /= np.linalg.norm(negatives, axis=-1, keepdims=True)
        queue = queues.Queue(keys=jnp.asarray(negatives, jnp.float32))

        def loss(q: jax.Array) -> jax.Array:
            return info_nce(q, second, queue, length=4 * n, step=0, temperature=temperature)[0]

        found = jax.jit(jax.value_and_grad(loss))(first)
        value, gradient = oracles.info_nce(
            first, second, negatives.reshape(-1, d), temperature
        )  # fmt: skip
    off = relative(found[0], value), relative(found[1], gradient)
    return Found(
        f"{n} pairs: relative difference of the value {off[0]:.1e}, of the gradient {off[1]:.1e}",
        {"value": off[0], "gradient": off[1]},
        ok=off[0] < LOSS_TOLERANCE and off[1] < GRADIENT_TOLERANCE,
    )


def neighbours(setting: Setting) -> Found:
    """The kNN of the evaluation against a full sort in NumPy."""
    n, queries, d = setting.sizes.bank
    k = min(200, n // 10)
    rng = np.random.default_rng(0)
    bank, asked = (rng.normal(size=(m, d)).astype(np.float32) for m in (n, queries))
    begin = time.perf_counter()
    found, similarities = knn.neighbours(bank, asked, k)
    seconds = time.perf_counter() - begin
    unit = [x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True) for x in (asked, bank)]
    exact = unit[0] @ unit[1].T
    wanted = np.argsort(-exact, axis=1, kind="stable")[:, :k]
    agree = float(np.mean(found == wanted))
    off = float(np.abs(similarities - np.take_along_axis(exact, found, 1)).max())
    return Found(
        f"{agree:.3%} of {k} neighbours of {queries} among {n:,} are those of NumPy, similarities "
        f"within {off:.1e}, {seconds:.1f} s",
        {"agree": agree, "difference": off, "seconds": seconds},
        ok=agree > 0.999 and off < 1e-5,
    )
