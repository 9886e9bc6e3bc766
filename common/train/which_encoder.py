"""Which of the encoders in a file of weights is taken."""

from collections.abc import Mapping
from typing import Any

from etils import epath

from common.errors import UserError
from common.models import layouts


def choose(
    names: Mapping[str, Any], path: epath.Path
) -> tuple[type[layouts.Layout], str, list[str]]:
    """Which encoder of a file is taken, and why that one, if there are several.

    Args:
        names: of the arrays in the file.
        path: of the file.

    Returns:
        `(its layout, the prefix of its names, what to say about the choice)`.

    Raises:
        UserError: the file has no encoder, or several and no rule for them.
    """
    found = [(kind, prefix) for kind in layouts.LAYOUTS for prefix in kind.prefixes(names)]
    if not found:
        expected = ", ".join(
            f"no {kind.words}: expected {kind.marks[0][0]} and {kind.marks[1][0]}"
            for kind in layouts.LAYOUTS
        )
        raise UserError(f"{path} holds {expected}, but found {first_three(sorted(names))}")
    # of an encoder and its moving average, the one that was trained
    trained = [x for x in found if "momentum" not in x[1] and not x[1].endswith("encoder_k.")]
    found = trained or found
    # DINO's evaluations, and DINOv2's, use the moving average
    teachers = [x for x in found if x[0] is layouts.TimmViT and x[1].startswith("teacher.")]
    if teachers and all(x in teachers or x[1].startswith("student.") for x in found):
        found = teachers
    if len(found) > 1:
        raise UserError(
            f"{path} holds {len(found)} encoders, {first_three([repr(p) for _, p in found])}: "
            "expected one; write a file with the one you mean"
        )
    ((kind, prefix),) = found
    reason = ""
    if prefix.endswith("base_encoder."):
        reason = "the encoder that gradients trained, which MoCo v3's main_lincls.py uses"
    elif prefix.startswith("teacher."):
        reason = "the moving average, which DINO's own evaluations use"
    return kind, prefix, [f"of {path.name}, {prefix}* is taken, {reason}"] if reason else []


def first_three(names: list[str]) -> str:
    """The first names of a list, for a message."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
