"""Datasheet figures of the devices that a step can be planned for."""

import dataclasses
import math

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Device:
    """One device as JAX counts them: a chip, except on TPU v2 and v3, where it is one of two cores.

    Attributes:
        name: for people.
        tflops: peak of dense bfloat16 products, in 1e12 operations a second.
        hbm_gib: memory, in GiB.
        hbm_gb_per_s: memory bandwidth, in 1e9 bytes a second.
        ici_gb_per_s: all links to other chips together, one direction, in 1e9 bytes a second.
        devices_per_chip: 2 where a device is a core.
    """

    name: str
    tflops: float
    hbm_gib: float
    hbm_gb_per_s: float
    ici_gb_per_s: float
    devices_per_chip: int = 1


# cloud.google.com/tpu/docs, the page "system architecture" of each generation (Jouppi et al. 2020,
# CACM 63(7), table 3, for the links of v2 and v3). Chip figures are halved where a device is a
# core.
TPUS = {
    "v2": Device("TPU v2 core", 22.5, 8, 350, 124, 2),
    "v3": Device("TPU v3 core", 61.5, 16, 450, 164, 2),
    "v4": Device("TPU v4", 275, 32, 1228, 300),
    "v5e": Device("TPU v5e", 197, 16, 819, 200),
    "v5p": Device("TPU v5p", 459, 95, 2765, 600),
    "v6e": Device("TPU v6e", 918, 32, 1640, 400),
}

# nvidia.com, the datasheet of each; the links are NVLink.
GPUS = {
    "A100-SXM4-40GB": Device("NVIDIA A100 40 GB", 312, 40, 1555, 300),
    "A100-SXM4-80GB": Device("NVIDIA A100 80 GB", 312, 80, 2039, 300),
    "H100 80GB HBM3": Device("NVIDIA H100 SXM", 989, 80, 3350, 450),
    "H200": Device("NVIDIA H200", 989, 141, 4800, 450),
}

# `jax.Device.device_kind` on Cloud TPUs, where it does not have the form "TPU v4".
_KINDS = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}


def of_topology(topology: str) -> Device | None:
    """The device of e.g. "v5e:4x8"; None for a generation that is not listed here."""
    return TPUS.get(topology.partition(":")[0])


def devices_of(topology: str) -> int:
    """How many devices JAX has on e.g. "v5e:4x8"; 1 where that cannot be told."""
    device = of_topology(topology)
    sides = topology.partition(":")[2].split("x")
    if device is None or not all(side.isdecimal() for side in sides):
        return 1
    return math.prod(map(int, sides)) * device.devices_per_chip


def of_kind(kind: str) -> Device | None:
    """The device of `jax.Device.device_kind`; None if it is not listed here, as no CPU is."""
    if kind in _KINDS:
        return TPUS[_KINDS[kind]]
    if kind.startswith("TPU "):
        return TPUS.get(kind.removeprefix("TPU "))
    return next((device for name, device in GPUS.items() if name in kind), None)


def share_of_peak(flops: float | None, seconds: float, kind: str) -> float | None:
    """The fraction of a device's bfloat16 peak that `flops` in `seconds` amount to.

    Args:
        flops: floating-point operations on one device; None where the compiler reports none.
        seconds: > 0.
        kind: `jax.Device.device_kind`; the result is None for a device that is not listed here.
    """
    device = of_kind(kind)
    return flops / seconds / device.tflops / 1e12 if device and flops else None
