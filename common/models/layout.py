"""A ResNet's arrays under torchvision's names, in PyTorch's shapes, and back.

The names are those of `torchvision.models.resnet50().state_dict()`, which timm, solo-learn, lightly
and the MoCo authors share; what torchvision does not have, ResNet-D and selective kernels, is named
as in timm. Conversions only move numbers: there and back is exact to the bit.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from common.errors import UserError
from common.models.resnet import DEPTHS

# Counts forward passes; only a PyTorch batch norm without momentum reads it.
COUNTER = "num_batches_tracked"
# A batch norm's arrays: our names -> PyTorch's.
BATCH_NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_LEAVES = BATCH_NORM | {"kernel": "weight"}
_NORM_LEAVES = {theirs: ours for ours, theirs in BATCH_NORM.items()}
_NAME = re.compile(
    r"(?:layer(?P<stage>[1-9]\d*)\.(?P<block>\d+))?(?P<module>\.?[a-z].*)\.(?P<leaf>\w+)"
)
# Names of modules -> ours; in a block they begin with a dot. Of two that have one name of ours each
# holds a half of the channels: timm has a module for either branch of selective kernels, and in
# blocks with these a convolution and its norm in one.
_STEM = {"conv1": "stem_conv", "bn1": "stem_bn"}
_DEEP_STEM = {
    "conv1.0": "stem_conv1", "conv1.1": "stem_bn1", "conv1.3": "stem_conv2",
    "conv1.4": "stem_bn2", "conv1.6": "stem_conv3", "bn1": "stem_bn3",
}  # fmt: skip
_BLOCK = {f".{name}": name for name in ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3")}
_SELECTIVE = {
    ".conv1.conv": "conv1", ".conv1.bn": "bn1",
    ".conv2.paths.0.conv": "sk/conv", ".conv2.paths.1.conv": "sk/conv",
    ".conv2.paths.0.bn": "sk/bn", ".conv2.paths.1.bn": "sk/bn",
    ".conv2.attn.fc_reduce": "sk/squeeze", ".conv2.attn.bn": "sk/squeeze_bn",
    ".conv2.attn.fc_select": "sk/select", ".conv3.conv": "conv3", ".conv3.bn": "bn3",
}  # fmt: skip
_SHORTCUT = {".downsample.0": "downsample_conv", ".downsample.1": "downsample_bn"}
_POOLED = {".downsample.1": "avg_downsample_conv", ".downsample.2": "avg_downsample_bn"}
# Side of conv1's kernel -> stem.
_STEMS = {7: "imagenet", 3: "cifar", 6: "patch2", 12: "patch4"}


def conv1(stem: str, resnet_d: bool = False) -> dict[str, Any]:
    """How PyTorch has to apply `conv1.weight`, and whether a max pool follows.

    A patch stem is a 3x3 convolution over patches of p x p pixels: the same sums as one of 3p x 3p
    pixels with stride p and p zeros on every side. Of three convolutions (ResNet-D) this is the
    first; the others have stride 1.
    """
    if stem == "imagenet" and resnet_d:
        return {"kernel_size": 3, "stride": 2, "padding": 1, "max_pool": True, "convolutions": 3}
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
    trees = flatten_dict(params, sep="/") | flatten_dict(batch_stats, sep="/")
    theirs: dict[str, list[str]] = {}
    for name, ours in _modules(trees).items():
        theirs.setdefault(ours, []).append(name)
    for path, array in trees.items():
        module, leaf = path.rsplit("/", 1)
        block, _, rest = module.partition("/") if path.startswith("layer") else ("", "", module)
        if path == "stem_conv/kernel":
            array = _pixels(array)
        if leaf == "kernel":
            array = array.transpose(3, 2, 0, 1)
        names = theirs[rest]
        size = len(array) // len(names)
        for i, name in enumerate(names):
            full = f"{block.replace('_', '.')}{name}.{_LEAVES[leaf]}"
            out[full] = array[i * size : (i + 1) * size]
    return out


def from_torchvision(arrays: Mapping[str, Any]) -> tuple[dict, dict]:
    """The inverse of `to_torchvision`.

    Returns:
        `(params, batch_stats)` of an encoder.

    Raises:
        UserError: for a name, a number of axes or a first convolution that no ResNet here has.
    """
    modules = _modules(arrays)
    found: dict[str, list[Any]] = {}
    for name, array in sorted(arrays.items()):  # halves in their order
        path = _our_path(name, modules)
        if path is None:
            raise UserError(f"{name} is no array of a ResNet in torchvision's layout")
        axes = 4 if path.endswith("kernel") else 1
        if array.ndim != axes:
            raise UserError(f"{name} has the shape {array.shape}: expected {axes} axes")
        found.setdefault(path, []).append(array)
    params: dict[str, Any] = {}
    batch_stats: dict[str, Any] = {}
    for path, parts in found.items():
        array = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if path.endswith("kernel"):
            array = array.transpose(2, 3, 1, 0)
        if path == "stem_conv/kernel":
            array = _patches(array)
        (batch_stats if path.endswith(("mean", "var")) else params)[path] = array
    return unflatten_dict(params, sep="/"), unflatten_dict(batch_stats, sep="/")


def describe(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """What the shapes say about a network in torchvision's layout.

    Args:
        arrays: from `to_torchvision`, or a file.

    Returns:
        `depth` (None unless the stages are a published network's), `stages` (blocks of each),
        `bottleneck`, `width` (of the first stage), `stem` ("" if it is not one of `STEMS`),
        `feature_dim`, `resnet_d`, `selective_kernels`, and `torchvision` (the constructor that
        takes these arrays, or "").
    """
    blocks: dict[int, int] = {}
    modules = _modules(arrays)
    ours = set(modules.values())
    for name in arrays:
        path = _our_path(name, modules)
        if path and path.startswith("layer"):
            stage, block = map(int, path.partition("/")[0].removeprefix("layer").split("_"))
            blocks[stage] = max(blocks.get(stage, 0), block + 1)
    stages = tuple(blocks[stage] for stage in sorted(blocks))
    deep, pooled, selective = (x in ours for x in ("stem_conv3", "avg_downsample_conv", "sk/conv"))
    bottleneck = selective or "layer1.0.conv3.weight" in arrays
    first = arrays["conv1.6.weight" if deep else "conv1.weight"].shape
    depth = {layout: d for d, layout in DEPTHS.items()}.get((bottleneck, stages))
    stem = "imagenet" if deep else _STEMS.get(first[-1], "")
    usual = stem == "imagenet" and first[0] == 64 and depth is not None and depth <= 152
    return {
        "depth": depth,
        "stages": stages,
        "bottleneck": bottleneck,
        "width": first[0],
        "stem": stem,
        "feature_dim": first[0] * 2 ** (len(stages) - 1) * (4 if bottleneck else 1),
        "resnet_d": pooled,
        "selective_kernels": selective,
        "torchvision": f"resnet{depth}" if usual and not pooled else "",
    }


def in_words(network: Mapping[str, Any]) -> str:
    """A sentence's part about what `describe` returns."""
    kind = "bottleneck" if network["bottleneck"] else "basic"
    depth = f"depth={network['depth']}" if network["depth"] else f"stages={network['stages']}"
    stem = network["stem"] or "unknown"
    words = f"a ResNet with {depth} ({kind} blocks), width {network['width']}, stem {stem}"
    words += ", resnet_d" if network["resnet_d"] else ""
    return words + (", selective kernels" if network["selective_kernels"] else "")


def batch_norms(arrays: Mapping[str, Any]) -> list[str]:
    """Names of the batch norms, e.g. "layer1.0.bn1"."""
    end = ".running_mean"
    return [name.removesuffix(end) for name in arrays if name.endswith(end)]


def _modules(names: Iterable[str]) -> dict[str, str]:
    """Our modules by the other names, of the network that has arrays of these names (either's)."""

    def has(*parts: str) -> bool:
        return any(part in name for name in names for part in parts)

    names = list(names)
    stem = _DEEP_STEM if has("conv1.6.", "stem_conv3/") else _STEM
    block = _SELECTIVE if has(".attn.fc_select.", "/sk/") else _BLOCK
    shortcut = _POOLED if has(".downsample.2.", "/avg_downsample_") else _SHORTCUT
    return stem | block | shortcut


def _our_path(name: str, modules: Mapping[str, str]) -> str | None:
    """Path of the array in our trees; None if such a module has no array of that name."""
    match = _NAME.fullmatch(name)
    module = modules.get(match["module"]) if match else None
    if not match or module is None or bool(match["stage"]) != match["module"].startswith("."):
        return None
    kinds = _NORM_LEAVES if "bn" in module else {"weight": "kernel"}
    if match["leaf"] not in kinds:
        return None
    block = f"layer{match['stage']}_{int(match['block'])}/" if match["stage"] else ""
    return f"{block}{module}/{kinds[match['leaf']]}"


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
