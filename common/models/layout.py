"""A ResNet's arrays under torchvision's names, in PyTorch's shapes, and back.

The names are those of `torchvision.models.resnet50().state_dict()`, which timm, solo-learn, lightly
and the MoCo authors share. Conversions only move numbers: there and back is exact to the bit.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from common.errors import UserError
from common.models.resnet import DEPTHS

# Counts forward passes; only a PyTorch batch norm without momentum reads it.
COUNTER = "num_batches_tracked"
# A batch norm's arrays: our names -> PyTorch's.
BATCH_NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_NAME = re.compile(
    r"(?:(?P<stem>conv1|bn1)|layer(?P<stage>[1-9]\d*)\.(?P<block>\d+)\."
    r"(?P<module>conv[123]|bn[123]|downsample\.[01]))\.(?P<leaf>\w+)"
)
# Side of conv1's kernel -> stem.
_STEMS = {7: "imagenet", 3: "cifar", 6: "patch2", 12: "patch4"}


def conv1(stem: str) -> dict[str, Any]:
    """How PyTorch has to apply `conv1.weight`, and whether a max pool follows.

    A patch stem is a 3x3 convolution over patches of p x p pixels: the same sums as one of 3p x 3p
    pixels with stride p and p zeros on every side.
    """
    if stem == "imagenet":
        return {"kernel_size": 7, "stride": 2, "padding": 3, "max_pool": True}
    patch = 1 if stem == "cifar" else int(stem[-1])
    return {"kernel_size": 3 * patch, "stride": patch, "padding": patch, "max_pool": False}


def to_torchvision(params: Mapping, batch_stats: Mapping) -> dict[str, Any]:
    """Arrays of an encoder by torchvision's names, without `num_batches_tracked` and `fc`.

    Args:
        params: of the encoder ("backbone" of a state's `params`), kernels `[h, w, c, d]`.
        batch_stats: likewise.

    Returns:
        Name to array: convolutions `[d, c, h, w]`, all others `[d]`.
    """
    out = {}
    for path, array in (flatten_dict(params) | flatten_dict(batch_stats)).items():
        if path == ("stem_conv", "kernel"):
            array = _pixels(array)
        if path[-1] == "kernel":
            array = array.transpose(3, 2, 0, 1)
        out[_torch_name(path)] = array
    return out


def from_torchvision(arrays: Mapping[str, Any]) -> tuple[dict, dict]:
    """The inverse of `to_torchvision`.

    Returns:
        `(params, batch_stats)` of an encoder.

    Raises:
        UserError: for a name, a number of axes or a first convolution that no ResNet here has.
    """
    params: dict[tuple[str, ...], Any] = {}
    batch_stats: dict[tuple[str, ...], Any] = {}
    for name, array in arrays.items():
        match = _NAME.fullmatch(name)
        path = _our_path(match) if match else None
        if path is None:
            raise UserError(f"{name} is no array of a ResNet in torchvision's layout")
        axes = 4 if path[-1] == "kernel" else 1
        if array.ndim != axes:
            raise UserError(f"{name} has the shape {array.shape}: expected {axes} axes")
        if axes == 4:
            array = array.transpose(2, 3, 1, 0)
        if path == ("stem_conv", "kernel"):
            array = _patches(array)
        (batch_stats if path[-1] in ("mean", "var") else params)[path] = array
    return unflatten_dict(params), unflatten_dict(batch_stats)


def describe(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """What the shapes say about a network in torchvision's layout.

    Args:
        arrays: from `to_torchvision`, or a file.

    Returns:
        `depth` (None unless the stages are a published network's), `stages` (blocks of each),
        `bottleneck`, `width` (of the first stage), `stem` ("" if it is not one of `STEMS`),
        `feature_dim`, and `torchvision` (the constructor that takes these arrays, or "").
    """
    blocks: dict[int, int] = {}
    for match in filter(None, map(_NAME.fullmatch, arrays)):
        if match["stage"]:
            stage = int(match["stage"])
            blocks[stage] = max(blocks.get(stage, 0), int(match["block"]) + 1)
    stages = tuple(blocks[stage] for stage in sorted(blocks))
    bottleneck = "layer1.0.conv3.weight" in arrays
    first = arrays["conv1.weight"].shape
    depth = {layout: d for d, layout in DEPTHS.items()}.get((bottleneck, stages))
    stem = _STEMS.get(first[-1], "")
    usual = stem == "imagenet" and first[0] == 64 and depth is not None and depth <= 152
    return {
        "depth": depth,
        "stages": stages,
        "bottleneck": bottleneck,
        "width": first[0],
        "stem": stem,
        "feature_dim": first[0] * 2 ** (len(stages) - 1) * (4 if bottleneck else 1),
        "torchvision": f"resnet{depth}" if usual else "",
    }


def in_words(network: Mapping[str, Any]) -> str:
    """A sentence's part about what `describe` returns."""
    kind = "bottleneck" if network["bottleneck"] else "basic"
    depth = f"depth={network['depth']}" if network["depth"] else f"stages={network['stages']}"
    stem = network["stem"] or "unknown"
    return f"a ResNet with {depth} ({kind} blocks), width {network['width']}, stem {stem}"


def batch_norms(arrays: Mapping[str, Any]) -> list[str]:
    """Names of the batch norms, e.g. "layer1.0.bn1"."""
    end = ".running_mean"
    return [name.removesuffix(end) for name in arrays if name.endswith(end)]


def _torch_name(path: tuple[str, ...]) -> str:
    *block, module, leaf = path
    if not block:
        module = {"stem_conv": "conv1", "stem_bn": "bn1"}[module]
    else:
        module = {"downsample_conv": "downsample.0", "downsample_bn": "downsample.1"}.get(
            module, module
        )
        module = f"{block[0].replace('_', '.')}.{module}"
    return f"{module}.{'weight' if leaf == 'kernel' else BATCH_NORM[leaf]}"


def _our_path(match: re.Match) -> tuple[str, ...] | None:
    """Path of the array in our trees; None if such a module has no array of that name."""
    module = match["stem"] or match["module"]
    norm = module.startswith("bn") or module == "downsample.1"
    names = {theirs: ours for ours, theirs in BATCH_NORM.items()} if norm else {"weight": "kernel"}
    if match["leaf"] not in names:
        return None
    leaf = names[match["leaf"]]
    if match["stem"]:
        return ("stem_bn" if norm else "stem_conv", leaf)
    if module.startswith("downsample"):
        module = "downsample_bn" if norm else "downsample_conv"
    return (f"layer{match['stage']}_{int(match['block'])}", module, leaf)


def _pixels(kernel: Any) -> Any:
    """Kernel over patches `[3, 3, p p c, d]` to the one over pixels `[3p, 3p, c, d]`.

    `space_to_depth` orders a patch's channels by row, column, colour. Images have three colours, so
    that other stems (p = 1) pass through.
    """
    h, w, channels, d = kernel.shape
    p = math.isqrt(channels // 3)
    kernel = kernel.reshape(h, w, p, p, channels // p**2, d).transpose(0, 2, 1, 3, 4, 5)
    return kernel.reshape(h * p, w * p, channels // p**2, d)


def _patches(kernel: Any) -> Any:
    """The inverse of `_pixels`."""
    h, w, c, d = kernel.shape
    stem = _STEMS.get(h) if h == w else None
    if stem is None:
        raise UserError(
            f"conv1.weight is a convolution of {h}x{w} pixels: expected one of "
            f"{', '.join(f'{k}x{k} (stem {name})' for k, name in _STEMS.items())}"
        )
    if stem in ("imagenet", "cifar"):
        return kernel
    p = h // 3
    kernel = kernel.reshape(3, p, 3, p, c, d).transpose(0, 2, 1, 3, 4, 5)
    return kernel.reshape(3, 3, p * p * c, d)
