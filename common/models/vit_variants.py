"""What ViTs of others have that ours do not: turned into the same function, or refused by name."""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from common.errors import UserError
from common.models import positions

_GAMMA = re.compile(r"(blocks\.\d+)\.ls([12])\.gamma")
_SCALED = {"1": "attn.proj", "2": "mlp.fc2"}  # the linear map that each layer scale follows
_CHUNK = re.compile(r"blocks\.\d+\.(\d+\..*)")
# Part of a name -> what it belongs to.
_UNKNOWN = {
    "register_tokens": "register tokens",
    "reg_token": "register tokens",
    "dist_token": "a distillation token",
    ".mlp.w12.": "SwiGLU perceptrons",
    ".mlp.fc1_g.": "SwiGLU perceptrons",
    ".attn.q_norm.": "norms of queries and keys",
    ".attn.k_norm.": "norms of queries and keys",
    ".attn.norm.": "norms inside the attention",
    ".mlp.norm.": "norms inside the perceptron",
    "norm_pre.": "a norm before the blocks",
    "fc_norm.": "a norm after the mean of the patches",
    "attn_pool.": "pooling by attention",
}


def adapted(arrays: Mapping[str, Any], path: str) -> tuple[dict[str, Any], list[str]]:
    """Arrays of a file under timm's names, as an encoder of ours has them.

    Layer scale (Touvron et al. 2021b, eq. 4) multiplies what a linear map gives, so that it goes
    into the map's rows and bias: the same function. A mask token is of pretraining only. DINOv2's
    training code has its blocks in chunks, `blocks.CHUNK.BLOCK`, counted through.

    Args:
        arrays: by name, without a prefix.
        path: of the file, for messages.

    Returns:
        The arrays, and what was done, in words.

    Raises:
        UserError: naming a part that no encoder here has.
    """
    out = {_CHUNK.sub(r"blocks.\1", name): array for name, array in arrays.items()}
    for part, what in _UNKNOWN.items():
        inside = part.startswith(".")  # of a block
        if name := next((n for n in out if (part in n if inside else n.startswith(part))), ""):
            raise UserError(
                f"{path} is a ViT with {what} ({name}), which the encoders here do not have: take "
                "weights without"
            )
    first, second = (out.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    if first is not None and second is not None and first.shape[0] == 2 * second.shape[-1]:
        raise UserError(
            f"{path} is a ViT with SwiGLU perceptrons (blocks.0.mlp.fc1 is twice as wide as fc2 "
            "expects), which the encoders here do not have: take weights with an MLP"
        )
    notes, scales = [], [m for m in map(_GAMMA.fullmatch, out) if m]
    for match in scales:
        gamma = np.asarray(out.pop(match[0]), np.float32)
        into = f"{match[1]}.{_SCALED[match[2]]}"
        for name in (f"{into}.weight", f"{into}.bias"):
            if name in out:
                array = np.asarray(out[name], np.float32)
                out[name] = array * gamma.reshape((-1,) + (1,) * (array.ndim - 1))
    if scales:
        notes.append("layer scale is multiplied into attn.proj and mlp.fc2: the same function")
    if out.pop("mask_token", None) is not None:
        notes.append("mask_token is left out: only masked pretraining reads it")
    return out, notes


def check_heads(found: int | None, wanted: int, width: int, path: str) -> list[str]:
    """What has to be said of the number of heads, which shapes do not show.

    Args:
        found: in the metadata of the file; None of files of others.
        wanted: of the encoder.
        width: likewise.
        path: of the file, for the message.

    Raises:
        UserError: the two numbers differ.
    """
    if found is None:
        known = " (MoCo v3's ViT-S has 12, DINO's and DeiT's 6)" if width == 384 else ""
        return [
            f"the file does not tell its number of heads: {wanted}, as config.vit has it{known}"
        ]
    if found != wanted:
        raise UserError(
            f"{path} has {found} attention heads and the config {wanted}: set "
            f"--config.vit.heads={found}"
        )
    return []


def check_positions(table: Any, fixed: np.ndarray, side: int, wanted: int, path: str) -> None:
    """Raises a `UserError` if a table is for another grid, or is not the fixed one.

    Args:
        table: `[1, tokens, d]`, of the file, for a grid of `side` patches a side.
        fixed: the table of that grid.
        side: as above.
        wanted: that of the encoder.
        path: of the file, for the message.
    """
    check_grid(side, wanted, path)
    if (off := np.abs(table - fixed).max()) > rounding(table) + 1e-5:
        raise UserError(
            f"{path} has other positions than vit.positions=sincos (they differ by up to "
            f"{off:.2g}): set --config.vit.positions=learned"
        )


def check_grid(side: int, wanted: int, path: str) -> None:
    """Raises a `UserError` if fixed positions are for another number of patches a side."""
    if side != wanted:
        raise UserError(
            f"{path} has positions for {side} x {side} patches and the config {wanted} x {wanted}, "
            "which are not resized while they are fixed: set --config.vit.positions=learned, or "
            "data.image_size"
        )


def resized(table: Any, side: int, token: bool) -> np.ndarray:
    """A table of learned positions for a grid of `side` patches a side, float32."""
    wide = jnp.asarray(table, jnp.float32)
    return np.asarray(positions.resized(wide, (side, side), int(token)))


def rounding(table: Any) -> float:
    """Largest error of numbers of at most 1 that were rounded to the type they have, or had.

    A file of half precision may have been read as float32: a table whose numbers are all float16's
    has been rounded to float16.
    """
    wide = np.asarray(table, np.float32)
    for kind in (ml_dtypes.bfloat16, np.float16):  # the coarser one first
        if np.array_equal(wide, wide.astype(kind).astype(np.float32)):
            # half the distance of two neighbours in [0.5, 1)
            return float(ml_dtypes.finfo(kind).eps) / 4
    return 0.0
