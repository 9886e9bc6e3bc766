"""Every train step that is compiled here, as a config: to run it, or to lower or plan it only."""

import argparse
import dataclasses

from ml_collections import ConfigDict

from benchmarks import resident, scaling, train_step

METHODS = ("simclr", "moco")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of networks, batches and runs.

    Attributes:
        name: "full" or "tiny".
        stages: of the network of sanity steps; of all networks, if "tiny".
        width: of ResNets.
        batch: of sanity steps.
        batches: of the rates.
        images: of a dataset in device memory.
        steps: of a dispatch.
        large: depth, pixels and batch of the network of the papers.
        losses: rows 2N of the losses that are timed.
        bank: training rows, queries and width of kNN.
        repeats: of each timing.
        resume: steps of the run that is stopped, and the step at which it is.
        duration: of the training runs; None: the recipe's.
    """

    name: str = "full"
    stages: tuple[int, ...] = (1, 1)
    width: int = 64
    batch: int = 64
    batches: tuple[int, ...] = (512, 1024)
    images: int = 50_000
    steps: int = 50
    large: tuple[int, int, int] = (50, 224, 256)
    losses: tuple[int, ...] = (1024, 8192)
    bank: tuple[int, int, int] = (50_000, 1000, 512)
    repeats: int = 5
    resume: tuple[int, int] = (3000, 200)
    duration: str | None = None


FULL = Sizes()
TINY = Sizes(
    name="tiny", stages=(1,), width=4, batch=16, batches=(16,), images=64, steps=3,
    large=(50, 32, 4), losses=(64,), bank=(300, 20, 16), repeats=2, resume=(40, 10),
    duration="20 steps",
)  # fmt: skip

SIZES = {sizes.name: sizes for sizes in (FULL, TINY)}


def sanity(method: str, sizes: Sizes) -> dict[str, ConfigDict]:
    """A small network with every form of a step."""
    variants = {
        "host_float32": {},
        "host_bfloat16": {"dtype": "bfloat16"},
        "both_bfloat16": {"dtype": "bfloat16", "augment_on": "both"},
        "device_float32": {"augment_on": "device"},
        "device_bfloat16": {"dtype": "bfloat16", "augment_on": "device"},
        "device_bfloat16_dispatch": {
            "dtype": "bfloat16", "augment_on": "device", "steps": sizes.steps,
        },
        "device_bfloat16_microbatch": {
            "dtype": "bfloat16", "augment_on": "device", "microbatch": sizes.batch // 4,
        },
    }  # fmt: skip
    return {f"{method}_{name}": _small(method, sizes, **v) for name, v in variants.items()}


def _small(
    method: str,
    sizes: Sizes,
    dtype: str = "float32",
    augment_on: str = "host",
    steps: int = 1,
    microbatch: int = 0,
) -> ConfigDict:
    c = scaling.config(
        method, groups=8, stages=sizes.stages, width=sizes.width, dtype=dtype
    )  # fmt: skip
    c.batch_size, c.microbatch, c.steps_per_dispatch = sizes.batch, microbatch, steps
    c.data.augment_on, c.data.fake_examples = augment_on, 4 * sizes.batch
    if method == "moco":
        c.moco.queue_length = 16 * sizes.batch
    return c


def reference(method: str, sizes: Sizes) -> ConfigDict:
    """The step whose loss and gradient are compared with a CPU's.

    Plain SGD without decay keeps the gradient of the first step as its momentum.
    """
    c = _small(method, sizes)
    if sizes.name == "full":
        c.model.stages = ()  # ResNet-18
    c.optimizer.weight_decay, c.optimizer.momentum = 0.0, 0.9
    return c


def in_memory(
    method: str, batch: int, sizes: Sizes, steps: int | None = None, dtype: str = "bfloat16"
) -> ConfigDict:
    """ResNet-18 on a dataset in device memory, as for CIFAR-10."""
    c = resident.config(
        argparse.Namespace(
            method=method, width=sizes.width, batch=batch, dtype=dtype,
            steps=sizes.steps if steps is None else steps, images=max(sizes.images, batch),
        )
    )  # fmt: skip
    if sizes.name == "tiny":
        c.model.stages = sizes.stages
    return c


def large(method: str, sizes: Sizes, fold_norm: bool = True) -> ConfigDict:
    """ResNet-50 at 224 pixels."""
    c = train_step.config(large_flags(method, sizes), sizes.width)
    c.model.fold_norm = fold_norm
    if sizes.name == "tiny":
        c.model.stages = sizes.stages
    return c


def large_flags(method: str, sizes: Sizes) -> argparse.Namespace:
    """The flags of `benchmarks.train_step`."""
    depth, size, batch = sizes.large
    return argparse.Namespace(
        method=method, depth=depth, size=size, batch=batch, dtype="bfloat16", repeats=sizes.repeats
    )


def every(sizes: Sizes) -> dict[str, ConfigDict]:
    """All steps by name, except those of the training runs (`quality.config`)."""
    found: dict[str, ConfigDict] = {}
    for method in METHODS:
        found |= sanity(method, sizes)
        found[f"{method}_reference"] = reference(method, sizes)
        for batch in sizes.batches:
            found[f"{method}_batch{batch}"] = in_memory(method, batch, sizes)
        found[f"{method}_one_step"] = in_memory(method, sizes.batches[0], sizes, steps=1)
        found[f"{method}_resnet50"] = large(method, sizes)
        found[f"{method}_resnet50_unfolded"] = large(method, sizes, fold_norm=False)
    return found
