"""Pairs (one image, two views) a second of the train step: ours and PyTorch's, in turns.

    python -m benchmarks.train_step [--method=simclr] [--widths=16,64] [--batch=128] [--repeats=5]

A ResNet-18 at 32 px on the first device of this machine, images in memory already. PyTorch
(channels_last; `benchmarks/torch_steps.py`) is included where it is installed, on a CPU. On a CPU a
third contestant is our step with XLA's defaults: without the pieces of
`common/models/cpu_conv.py` and without `common/train/xla_options.py`. On a GPU or TPU `--depth=50
--size=224 --dtype=bfloat16` are for the networks of the papers, and the fraction of the
peak arithmetic is printed.
"""

import argparse
import contextlib
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import running, scaling, side_by_side
from common.models import cpu_conv
from common.plan import chips
from common.train import xla_options

QUEUE = 4096


@contextlib.contextmanager
def xla_alone():
    """Our step without the pieces of kernel gradients and with XLA's default options."""
    pieces, cpu_conv.PIECES = cpu_conv.PIECES, 1
    options, xla_options.CPU_OPTIONS = xla_options.CPU_OPTIONS, {}
    try:
        yield
    finally:
        cpu_conv.PIECES, xla_options.CPU_OPTIONS = pieces, options


def config(flags: argparse.Namespace, width: int) -> Any:
    """Ours."""
    c = scaling.config(
        flags.method, groups=1, width=width, depth=flags.depth, dtype=flags.dtype,
        stem="cifar" if flags.size <= 64 else "imagenet",
    )  # fmt: skip
    c.batch_size, c.data.image_size = flags.batch, flags.size
    if flags.method == "moco":
        c.moco.queue_length = -(-QUEUE // flags.batch) * flags.batch
    return c


def torch_step(flags: argparse.Namespace, width: int, length: int) -> Callable[[], Any]:
    """PyTorch's, on as many threads as there are cores."""
    import torch

    from benchmarks import torch_steps

    rng = np.random.default_rng(0)
    shape = (flags.batch, 2, flags.size, flags.size, 3)
    images = torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))

    def views() -> tuple[torch.Tensor, torch.Tensor]:
        return torch_steps.planes(images[:, 0]), torch_steps.planes(images[:, 1])

    if flags.method == "simclr":
        return torch_steps.simclr(views, width, images.device)
    return torch_steps.moco(views, width, images.device, length)


def measured(flags: argparse.Namespace, c: Any) -> dict[str, dict[str, Any]]:
    """Each contestant's `pairs_per_second`, `times` of its turns, `time_of_ours`, `of_peak`."""
    cpu = jax.devices()[0].platform == "cpu"
    programs = {"ours": scaling.ready(c)[0]}
    if cpu:
        with xla_alone():
            programs["ours, XLA alone"] = scaling.ready(c)[0]
        if flags.depth == 18 and flags.size <= 64 and importlib.util.find_spec("torch"):
            length = c.moco.queue_length if flags.method == "moco" else 0
            programs["PyTorch, channels_last"] = torch_step(flags, c.model.width, length)
    times = side_by_side.seconds(programs, flags.repeats)
    kind, work = jax.devices()[0].device_kind, running.flops(c)
    return {
        name: {
            "pairs_per_second": flags.batch / statistics.median(taken),
            "times": taken,
            "time_of_ours": side_by_side.ratio(taken, times["ours"]),
            # the peak is that of bfloat16
            "of_peak": chips.share_of_peak(work, statistics.median(taken), kind),
        }
        for name, taken in times.items()
    }


def rows(flags: argparse.Namespace, width: int) -> list[list[Any]]:
    """A row for each contestant; the last two columns are relative to the first and the peak."""
    return [
        [f"{flags.method}, width {width}: {name}", f"{x['pairs_per_second']:,.0f}",
         side_by_side.milliseconds(x["times"]), f"{x['time_of_ours']:.2f}",
         None if x["of_peak"] is None else f"{x['of_peak']:.0%}"]
        for name, x in measured(flags, config(flags, width)).items()
    ]  # fmt: skip


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=["simclr", "moco"], default="simclr")
    parser.add_argument("--widths", default="16,64")
    for name, value in (("batch", 128), ("repeats", 5), ("depth", 18), ("size", 32)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="float32")
    flags = parser.parse_args()
    found = [row for width in flags.widths.split(",") for row in rows(flags, int(width))]
    side_by_side.show(
        f"Train step, ResNet-{flags.depth}, {flags.size} px, batch {flags.batch}, {flags.dtype}",
        ["step", "pairs/s", "ms", "time, of ours", "of the peak"],
        found,
    )


if __name__ == "__main__":
    main()
