"""Assigns each instruction of a compiled training step to a part of the step.

XLA keeps the path of names under which JAX traced an operation (`op_name`): the scopes of
`common/train/dispatch.py`, `common/method.py` and the losses, Flax's modules, then the primitive.
The backward pass has the same path, in `transpose(jvp(...))`.
"""

import re
from collections import Counter
from typing import NamedTuple

CONVOLUTIONS, NORMS, PRODUCTS, COPIES = "convolutions", "norms", "other products", "copies"
OTHER = "other"
SCOPES = ("augmentation", "loss", "probe", "update")  # of `jax.named_scope`
ROWS = (CONVOLUTIONS, NORMS, "augmentation", "loss", PRODUCTS, "probe", "update", COPIES, OTHER)
AROUND = "around"  # an instruction that only runs others, which are counted themselves

_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$|^(?:ENTRY )?%?([\w.-]+)\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = .*? ([a-z][\w-]*)\(")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_CALLS = re.compile(r"\bcalls=%?([\w.-]+)")
_NORM = re.compile(r"(?:\w+_)?bn\d*")  # as the networks name their batch norms
_COPY = {"copy", "copy-start", "copy-done", "slice-start", "slice-done", "transpose"}
# a fusion of a copy with only these is a copy
_MOVES = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "reshape", "convert"}


class _Instruction(NamedTuple):
    name: str
    opcode: str
    path: list[str]  # names of the scopes and modules, and the primitive
    target: str  # of a custom call
    calls: str  # the computation of a fusion or an asynchronous operation


def categories(text: str) -> dict[str, str]:
    """The category, one of `ROWS` or `AROUND`, of every instruction by its name.

    A fusion has the category of its heaviest instruction: a convolution, else a product, else that
    of its own path, else the most frequent one of its instructions other than "other": a ReLU fused
    with a batch norm counts as norm. Everything in a scope belongs to its part, products and
    convolutions too. Products inside the backbone are 1 x 1 convolutions (`common/models/fold.py`)
    and count as such. "other" is the rest: ReLU, sums of residual blocks, pooling, standardising
    the images.

    Args:
        text: `compiled.as_text()`, of a CPU, GPU or TPU.
    """
    computations = _parse(text)
    found: dict[str, str] = {}
    for name in computations:
        _visit(name, computations, found)
    return found


def _parse(text: str) -> dict[str, list[_Instruction]]:
    computations: dict[str, list[_Instruction]] = {}
    current: list[_Instruction] = []
    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            paths, targets, calls = (p.search(line) for p in (_OP_NAME, _TARGET, _CALLS))
            current.append(
                _Instruction(
                    *match.groups(),
                    _path(paths[1]) if paths else [],
                    targets[1] if targets else "",
                    calls[1] if calls else "",
                )
            )
        elif match := _HEAD.match(line):
            current = computations.setdefault(match[1] or match[2], [])
    return computations


def _path(op_name: str) -> list[str]:
    """`transpose(jvp(loss))/exp` is `["loss", "exp"]`; an argument of the step has no path."""
    parts = op_name.split("/")
    return [re.sub(r"^(?:\w+\()+|\)+$", "", part) for part in parts] if len(parts) > 1 else []


def _visit(
    name: str, computations: dict[str, list[_Instruction]], found: dict[str, str]
) -> list[str]:
    """Puts a computation's instructions into `found`, and gives their categories."""
    for i in computations.get(name, []):
        if i.name not in found:
            found[i.name] = _of(i, computations, found)
    return [found[i.name] for i in computations.get(name, [])]


def _of(i: _Instruction, computations: dict[str, list[_Instruction]], found: dict[str, str]) -> str:
    if i.opcode in ("while", "conditional", "call"):
        return AROUND
    own, inside = _alone(i), Counter(_visit(i.calls, computations, found))
    for heavy in (CONVOLUTIONS, PRODUCTS):
        if inside[heavy]:
            return heavy
    if own != OTHER:
        return own
    votes = Counter({name: n for name, n in inside.items() if name not in (OTHER, COPIES)})
    if votes:
        return votes.most_common(1)[0][0]
    opcodes = {x.opcode for x in computations.get(i.calls, [])}
    return COPIES if inside[COPIES] and opcodes <= _COPY | _MOVES else OTHER


def _alone(i: _Instruction) -> str:
    """The category of the instruction itself, without what it calls."""
    scope = next((part for part in i.path if part in SCOPES), None)
    if scope and (i.opcode not in _COPY or i.opcode == "transpose"):
        return scope
    if i.opcode in _COPY:  # inserted by XLA, with the path of what it copies
        return COPIES
    convolves = i.opcode == "convolution" or "conv" in i.target
    if convolves or i.opcode == "dot" or re.search("gemm|matmul", i.target):
        # the opcode is no guide: a TPU's products are convolutions, and some convolutions products
        inside = "backbone" in i.path or "conv_general_dilated" in i.path
        return CONVOLUTIONS if inside or (convolves and not i.path) else PRODUCTS
    if any(_NORM.fullmatch(part) for part in i.path):
        return NORMS
    return OTHER
