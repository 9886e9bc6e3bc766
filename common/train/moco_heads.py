"""The heads of the MoCo authors' checkpoints, as trees of `ProjectionHead`."""

import re
from collections.abc import Mapping

import numpy as np

from common.models.layout import BATCH_NORM, COUNTER

# The last linear maps of the query encoder of v1 and v2, which projects where others classify.
_LINEAR = {"moco_v1": {"": "dense1"}, "moco_v2": {"0.": "dense1", "2.": "dense2"}}
_PLACE = re.compile(r"(\d+)\.(\w+)")


def first_versions(arrays: Mapping[str, np.ndarray]) -> tuple[dict, dict] | None:
    """The projection head of v1 or v2: linear maps with biases, ReLU between them.

    Args:
        arrays: what comes after `fc.` in the file.

    Returns:
        `(params, batch_stats)`; None if these arrays are something else.
    """
    for layers in _LINEAR.values():
        wanted = {f"{theirs}{leaf}" for theirs in layers for leaf in ("weight", "bias")}
        if arrays.keys() == wanted:
            return {
                ours: {
                    "kernel": arrays[f"{theirs}weight"].transpose(),
                    "bias": arrays[f"{theirs}bias"],
                }
                for theirs, ours in layers.items()
            }, {}
    return None


def third_version(arrays: Mapping[str, np.ndarray]) -> tuple[dict, dict] | None:
    """A projection head or predictor of v3: one sequence of linear map, batch norm, ReLU, ...

    The linear maps have no bias; the last batch norm has neither scale nor shift, or is missing.

    Args:
        arrays: what comes after `head.`, `fc.` or `predictor.` in the file.

    Returns:
        `(params, batch_stats)`; None if these arrays are something else.
    """
    params: dict[str, dict] = {}
    stats: dict[str, dict] = {}
    norms = {theirs: ours for ours, theirs in BATCH_NORM.items()}
    for name, array in arrays.items():
        match = _PLACE.fullmatch(name)
        if not match:
            return None
        layer, module = divmod(int(match[1]), 3)
        leaf = match[2]
        if module == 0 and leaf == "weight":
            params[f"dense{layer + 1}"] = {"kernel": array.transpose()}
        elif module == 1 and leaf in norms:
            ours = norms[leaf]
            tree = stats if ours in ("mean", "var") else params
            tree.setdefault(f"bn{layer + 1}", {})[ours] = array
        elif module != 1 or leaf != COUNTER:
            return None
    return (params, stats) if stats else None
