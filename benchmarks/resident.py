"""Images a second of training from device memory: ours and a PyTorch loop, in turns.

    python -m benchmarks.resident [--method=simclr] [--width=64] [--batch=512] [--dtype=bfloat16]

ResNet-18 on images of CIFAR-10's shape and number, all on the first device. A step is timed end
to end: drawing the batch, augmenting it there, forward, backward and update. Ours makes `--steps`
steps a dispatch. PyTorch (`benchmarks/torch_steps.py`: channels_last, autocast, on a GPU compiled,
augmentation on the device too) is included where it is installed. A turn is two dispatches, or as
many steps. On two CPU cores: `--width=16 --batch=64 --dtype=float32 --steps=2`.
"""

import argparse
import importlib.util
import os
import statistics
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too

import jax
import numpy as np

from benchmarks import scaling, side_by_side
from benchmarks.running import Running, flops
from common.plan import chips

IMAGES, QUEUE, DISPATCHES = 50_000, 4096, 2


def config(flags: argparse.Namespace) -> Any:
    """Ours, with the augmentation of configs/simclr_cifar10.py."""
    c = scaling.config(flags.method, groups=1, width=flags.width, dtype=flags.dtype)
    c.batch_size, c.steps_per_dispatch = flags.batch, flags.steps
    c.data.augment_on, c.data.fake_examples = "device", flags.images
    c.augment.preset, c.augment.crop, c.augment.area_min = "cifar", "torch", 0.2
    c.augment.interpolation, c.augment.color_style = "bilinear", "pil"
    if flags.method == "moco":
        c.moco.queue_length = -(-QUEUE // flags.batch) * flags.batch
    return c


def ready(c: Any) -> tuple[Callable[[], Any], jax.stages.Compiled]:
    """A function that makes one more dispatch, and the compiled program."""
    run = Running(c)
    return run.dispatch, run.compiled


def ours(c: Any) -> Callable[[], Any]:
    """A turn."""
    run = Running(c)

    def turn() -> Any:
        for _ in range(DISPATCHES):
            metrics = run.dispatch()
        return metrics

    return turn


def pytorchs(c: Any, amp: bool) -> Callable[[], float]:
    """The same turn in PyTorch, on a GPU if JAX has one."""
    import torch

    from benchmarks import torch_steps

    gpu = jax.devices()[0].platform == "gpu"
    device = torch.device("cuda" if gpu else "cpu")
    torch.backends.cudnn.benchmark = True  # chooses the fastest convolution
    torch.set_float32_matmul_precision("high")
    rng = np.random.default_rng(0)
    shape = (c.data.fake_examples, 32, 32, 3)
    data = torch.from_numpy(rng.integers(0, 256, shape, np.uint8)).to(device)

    def views() -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.randint(len(data), (c.batch_size,), device=device)
        images = torch_steps.planes(data[ids])
        return torch_steps.augmented(images), torch_steps.augmented(images)

    if c.method == "simclr":
        step = torch_steps.simclr(views, c.model.width, device, amp)
    else:
        step = torch_steps.moco(views, c.model.width, device, c.moco.queue_length, amp)

    def turn() -> float:
        for _ in range(DISPATCHES * c.steps_per_dispatch):
            loss = step()
        return float(loss)  # waits for the GPU

    return turn


def measured(c: Any, repeats: int, torch: bool = True) -> dict[str, dict[str, float | None]]:
    """Times ours and, if wanted, PyTorch where it is installed, in turns.

    Returns:
        For each: `images_per_second`, `ms` a step, `time_of_ours`, and `of_peak`, the share of the
        device's peak that our floating-point operations are (None where that is not known).
    """
    programs = {"ours": ours(c)}
    if torch and importlib.util.find_spec("torch"):
        programs["PyTorch"] = pytorchs(c, amp=c.model.dtype == "bfloat16")
    times = side_by_side.seconds(programs, repeats)
    steps, work, found = DISPATCHES * c.steps_per_dispatch, flops(c), {}
    for name, taken in times.items():
        middle = statistics.median(taken) / steps
        found[name] = {
            "images_per_second": c.batch_size / middle,
            "ms": 1e3 * middle,
            "time_of_ours": side_by_side.ratio(taken, times["ours"]),
            "of_peak": chips.share_of_peak(work, middle, jax.devices()[0].device_kind),
        }
    return found


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=["simclr", "moco"], default="simclr")
    for name, value in (("width", 64), ("batch", 512), ("steps", 50), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    flags = parser.parse_args()
    rows = [
        [name, f"{x['images_per_second']:,.0f}", f"{x['ms']:.2f}", f"{x['time_of_ours']:.2f}",
         None if x["of_peak"] is None else f"{x['of_peak']:.0%}"]
        for name, x in measured(config(flags), flags.repeats).items()
    ]  # fmt: skip
    side_by_side.show(
        f"{flags.method}, ResNet-18 of width {flags.width}, batch {flags.batch}, {flags.dtype}, "
        f"data on the device",
        ["", "images/s", "ms a step", "time, of ours", "of the peak"],
        rows,
    )


if __name__ == "__main__":
    main()
