"""A vision transformer's arrays under timm's names, in PyTorch's shapes, and back.

The names are those of `timm.models.VisionTransformer(...).state_dict()`, which MoCo v3, DINO,
DINOv2, DeiT and MAE share. Conversions only move numbers: there and back is exact to the bit.

Convolutional patches have no name in timm: they get those of MoCo v3's code, where
`patch_embed.proj` is one sequence of convolution, batch norm, ReLU, ..., 1x1 convolution.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from common.errors import UserError
from common.models.layout import BATCH_NORM

_NAME = re.compile(r"blocks\.(?P<block>\d+)\.(?P<module>[a-z0-9.]+)\.(?P<leaf>weight|bias)")
_STEM = re.compile(r"patch_embed\.proj\.(?P<place>\d+)\.(?P<leaf>\w+)")
_LINEAR = {"weight": "kernel", "bias": "bias"}
_NORM = {"weight": "scale", "bias": "bias"}
# Of a block: timm's module -> ours.
_MODULES = {
    "norm1": ("norm1", _NORM),
    "attn.proj": ("out", _LINEAR),
    "norm2": ("norm2", _NORM),
    "mlp.fc1": ("mlp1", _LINEAR),
    "mlp.fc2": ("mlp2", _LINEAR),
}
_QKV = ("query", "key", "value")  # the order of their rows in `attn.qkv`
_WHOLE = {"cls_token": ("token",), "pos_embed": ("positions",)}


def to_timm(params: Mapping, batch_stats: Mapping, table: Any = None) -> dict[str, Any]:
    """Arrays of an encoder by timm's names, without `head` and `num_batches_tracked`.

    Args:
        params: of the encoder ("backbone" of a state's `params`).
        batch_stats: likewise; {} unless the patches are convolutions.
        table: `[1, tokens, d]`, fixed positions; they are in `params` if they are learned.

    Returns:
        Name to array: linear maps `[out, in]`, convolutions `[d, c, h, w]`.
    """
    params = dict(params)
    out = _patches_out(params.pop("patches"), batch_stats.get("patches", {}))
    for name, (ours,) in _WHOLE.items():
        if ours in params:
            out[name] = params.pop(ours)
    if table is not None:
        out["pos_embed"] = table
    if "norm" in params:
        out |= {f"norm.{leaf}": params["norm"][ours] for leaf, ours in _NORM.items()}
    for i in range(depth_of(params)):
        block = params[f"block{i}"]
        for theirs, (ours, leaves) in _MODULES.items():
            for leaf, name in leaves.items():
                array = block[ours][name]
                out[f"blocks.{i}.{theirs}.{leaf}"] = array.T if name == "kernel" else array
        for leaf, name in _LINEAR.items():
            out[f"blocks.{i}.attn.qkv.{leaf}"] = _joined([block[part][name].T for part in _QKV])
    return out


def from_timm(arrays: Mapping[str, Any]) -> tuple[dict, dict]:
    """The inverse of `to_timm`; a table of positions becomes a parameter.

    Returns:
        `(params, batch_stats)` of an encoder.

    Raises:
        UserError: for a name that no ViT here has.
    """
    params: dict[tuple[str, ...], Any] = {}
    batch_stats: dict[tuple[str, ...], Any] = {}
    convolutions = sorted(int(m["place"]) for m in map(_STEM.fullmatch, arrays) if m)
    for name, array in arrays.items():
        block, stem = _NAME.fullmatch(name), _STEM.fullmatch(name)
        if name in _WHOLE:
            params[_WHOLE[name]] = array
        elif name in ("norm.weight", "norm.bias"):
            params["norm", _NORM[name.removeprefix("norm.")]] = array
        elif name == "patch_embed.proj.bias":
            params["patches", "bias"] = array
        elif name == "patch_embed.proj.weight":
            params["patches", "kernel"] = array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])
        elif stem and (path := _stem_path(stem, convolutions[-1])):
            if path[-1] == "kernel":
                array = array[:, :, 0, 0].T if path[1] == "project" else array.transpose(2, 3, 1, 0)
            (batch_stats if path[-1] in ("mean", "var") else params)[path] = array
        elif block and block["module"] == "attn.qkv":
            where, leaf = f"block{int(block['block'])}", _LINEAR[block["leaf"]]
            for part, rows in zip(_QKV, np.split(array, 3), strict=True):
                params[where, part, leaf] = rows.T
        elif block and block["module"] in _MODULES:
            ours, leaves = _MODULES[block["module"]]
            leaf = leaves[block["leaf"]]
            where = f"block{int(block['block'])}"
            params[where, ours, leaf] = array.T if leaf == "kernel" else array
        else:
            raise UserError(f"{name} is no array of a ViT in timm's layout")
    return unflatten_dict(params), unflatten_dict(batch_stats)


def describe(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """What names and shapes say about a ViT in timm's layout. They do not tell its heads.

    Args:
        arrays: from `to_timm`, or a file.

    Returns:
        `width`, `depth`, `hidden` (width inside the perceptron), `patch`, `patches` ("linear" or
        "conv"), `pool` ("token" or "mean"), `grid` (patches on a side that the positions are for),
        `feature_dim`.
    """
    stem = sorted(int(m["place"]) for m in map(_STEM.fullmatch, arrays) if m)
    blocks = {int(m["block"]) for m in map(_NAME.fullmatch, arrays) if m}
    width = arrays[f"patch_embed.proj.{stem[-1]}.weight" if stem else "patch_embed.proj.weight"]
    hidden = arrays.get("blocks.0.mlp.fc1.weight")
    token = "cls_token" in arrays
    return {
        "width": width.shape[0],
        "depth": max(blocks, default=-1) + 1,
        "hidden": 0 if hidden is None else hidden.shape[0],
        "patch": 2 ** (stem[-1] // 3) if stem else width.shape[-1],
        "patches": "conv" if stem else "linear",
        "pool": "token" if token else "mean",
        "grid": side_of(arrays["pos_embed"], token) if "pos_embed" in arrays else 0,
        "feature_dim": width.shape[0],
    }


def in_words(network: Mapping[str, Any]) -> str:
    """A sentence's part about what `describe` returns."""
    kind = " (convolutions)" if network["patches"] == "conv" else ""
    pool = "a class token" if network["pool"] == "token" else "no class token"
    side = network["grid"]
    table = f"{side} x {side} positions" if side else "positions of no square grid"
    return (
        f"a ViT of width {network['width']}, {network['depth']} blocks of hidden width "
        f"{network['hidden']}, patch {network['patch']}{kind}, {pool}, {table}"
    )


def side_of(table: Any, token: bool) -> int:
    """Side of the square grid of a position table `[1, tokens, d]`; 0 if it is none."""
    count = table.shape[1] - token if len(table.shape) == 3 else 0
    side = math.isqrt(max(count, 0))
    return side if side**2 == count else 0


def depth_of(params: Mapping) -> int:
    """Number of blocks in an encoder's parameters."""
    return sum(name.startswith("block") for name in params)


def _patches_out(params: Mapping, batch_stats: Mapping) -> dict[str, Any]:
    if "kernel" in params:
        kernel = params["kernel"]  # [row, column, colour of a patch, d], the first three in one
        p = math.isqrt(kernel.shape[0] // 3)
        kernel = kernel.reshape(p, p, 3, -1).transpose(3, 2, 0, 1)
        return {"patch_embed.proj.weight": kernel, "patch_embed.proj.bias": params["bias"]}
    out = {}
    last = sum(name.startswith("conv") for name in params)
    for (module, leaf), array in (flatten_dict(params) | flatten_dict(batch_stats)).items():
        place = 3 * last if module == "project" else 3 * (int(module[-1]) - 1)
        if module.startswith("bn"):
            out[f"patch_embed.proj.{place + 1}.{BATCH_NORM[leaf]}"] = array
        elif module == "project":
            array = array.T[:, :, None, None] if leaf == "kernel" else array
            theirs = "weight" if leaf == "kernel" else "bias"
            out[f"patch_embed.proj.{place}.{theirs}"] = array
        else:
            out[f"patch_embed.proj.{place}.weight"] = array.transpose(3, 2, 0, 1)
    return out


def _stem_path(match: re.Match, last: int) -> tuple[str, ...] | None:
    """Path of an array of convolutional patches; None if there is no such array."""
    place, leaf = int(match["place"]), match["leaf"]
    if place == last:
        return ("patches", "project", _LINEAR[leaf]) if leaf in _LINEAR else None
    layer, module = divmod(place, 3)
    if module == 0 and leaf == "weight":
        return ("patches", f"conv{layer + 1}", "kernel")
    norm = {theirs: ours for ours, theirs in BATCH_NORM.items()}
    if module == 1 and leaf in norm:
        return ("patches", f"bn{layer + 1}", norm[leaf])
    return None


def _joined(parts: list) -> Any:
    """NumPy's arrays stay what they are, to the bit; those that are traced are JAX's."""
    return (np if isinstance(parts[0], np.ndarray) else jnp).concatenate(parts)
