"""Speed: next to PyTorch, as a fraction of the peak, and what single choices cost or save."""

import functools
import importlib.util
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import loss, resident, side_by_side, train_step
from benchmarks.record import steps
from benchmarks.record.ledger import Found
from benchmarks.record.sanity import relative
from benchmarks.record.setting import Setting
from benchmarks.running import Running
from common.sharding import to_global
from simclr_jax.loss import nt_xent_with_metrics

PRECISIONS = ("highest", "high", "default")


def in_memory(setting: Setting, method: str, batch: int) -> Found:
    """ResNet-18 at 32 pixels with its data on the device."""
    c = steps.in_memory(method, batch, setting.sizes)
    found = resident.measured(c, setting.sizes.repeats, torch=False)["ours"]
    return Found(f"{found['images_per_second']:,.0f} image pairs/s{_of_peak(found)}", found)


def beside_pytorch(setting: Setting, method: str, batch: int) -> Found:
    """The same, taking turns with a PyTorch loop."""
    if not importlib.util.find_spec("torch"):
        return Found("PyTorch is not installed")
    c = steps.in_memory(method, batch, setting.sizes)
    found = resident.measured(c, setting.sizes.repeats)
    ours, other = found["ours"], found["PyTorch"]
    return Found(
        f"{ours['images_per_second']:,.0f} image pairs/s, PyTorch "
        f"{other['images_per_second']:,.0f}: ours is {other['time_of_ours']:.2f} x as fast",
        found,
    )


def large(setting: Setting, method: str) -> Found:
    """The network of the papers: ResNet-50 at 224 pixels."""
    flags = steps.large_flags(method, setting.sizes)
    ours = train_step.measured(flags, steps.large(method, setting.sizes))["ours"]
    words = f"{ours['pairs_per_second']:,.0f} image pairs/s, "
    return Found(
        f"{words}{side_by_side.milliseconds(ours['times'])} ms a step{_of_peak(ours)}", ours
    )


def fold_norm(setting: Setting) -> Found:
    """Batch norm folded into widening 1x1 convolutions, which saves memory traffic on a TPU."""
    runs = {
        name: Running(steps.large("simclr", setting.sizes, fold_norm=on))
        for name, on in (("folded", True), ("not folded", False))
    }
    programs = {name: _on_one_batch(run) for name, run in runs.items()}
    return _compared(side_by_side.seconds(programs, setting.sizes.repeats), "not folded")


def dispatch(setting: Setting, method: str) -> Found:
    """Time by the number of steps in one call of the compiled program."""
    sizes = setting.sizes
    counts = sorted({1, min(10, sizes.steps), sizes.steps})
    runs = {
        f"{n} a dispatch": Running(steps.in_memory(method, sizes.batches[0], sizes, steps=n))
        for n in counts
    }
    most = counts[-1]

    def turn(run: Running) -> object:
        for _ in range(most // run.config.steps_per_dispatch):
            metrics = run.dispatch()
        return metrics

    programs = {name: functools.partial(turn, run) for name, run in runs.items()}
    return _compared(side_by_side.seconds(programs, sizes.repeats), "1 a dispatch", steps=most)


def loss_precision(setting: Setting, rows: int) -> Found:
    """Time and error of NT-Xent by the precision of its similarity products."""
    z = _embeddings(rows)
    steps_of = {
        name: jax.jit(
            jax.value_and_grad(lambda z, p=name: nt_xent_with_metrics(z, 0.1, precision=p)[0])
        )
        for name in PRECISIONS
    }
    exact = steps_of["highest"](z)
    off = {
        name: [relative(a, b) for a, b in zip(step(z), exact, strict=True)]
        for name, step in steps_of.items()
    }
    programs = {name: functools.partial(step, z) for name, step in steps_of.items()}
    found = _compared(side_by_side.seconds(programs, setting.sizes.repeats), "highest")
    words = ", ".join(f"{name} {off[name][1]:.0e}" for name in PRECISIONS[1:])
    return Found(f"{found.figure}; gradients differ by {words}", found.values | {"off": off})


def loss_tiles(setting: Setting, rows: int) -> Found:
    """NT-Xent in tiles against the whole matrix of logits."""
    z = _embeddings(rows)
    programs = {
        "full logits": functools.partial(loss.compiled(loss.full_logits, rows), z),
        **{
            f"tiles of {b}": functools.partial(
                loss.compiled(functools.partial(loss.streamed, block=b), rows), z
            )
            for b in (512, 1024, 2048)
            if b <= max(rows, 512)
        },
    }
    return _compared(side_by_side.seconds(programs, setting.sizes.repeats), "full logits")


def _on_one_batch(run: Running):
    """A program that makes a step with a batch already on the device."""
    _, batch = run.batches.take(1)
    batch = to_global(run.mesh, batch)

    def program() -> object:
        run.state, metrics = run.compiled(run.state, batch, run.key)
        return metrics

    return program


def _embeddings(rows: int) -> jax.Array:
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(rows // 2, 2, loss.DIM)), jnp.float32)


def _of_peak(values: dict) -> str:
    return "" if values["of_peak"] is None else f" ({values['of_peak']:.0%} of the peak)"


def _compared(times: dict[str, list[float]], first: str, steps: int = 1) -> Found:
    """Milliseconds, and the ratios to one of them, which is listed first."""
    values = {
        name: {
            "ms": 1e3 * statistics.median(taken) / steps,
            "ratio": side_by_side.ratio(taken, times[first]),
        }
        for name, taken in times.items()
    }
    words = "; ".join(
        f"{name} {x['ms']:.3g} ms" + (f", {x['ratio']:.2f} of that" if name != first else "")
        for name, x in sorted(values.items(), key=lambda pair: pair[0] != first)
    )
    return Found(words, values)
