"""How many bytes a compiled TPU program moves between a chip and its HBM, counted from its text.

XLA's own "bytes accessed" also counts operands in the chip's fast memory, and counts an array that
is fetched in slices whole for every slice. Here an operand or result counts if it is in HBM, and a
fetch counts the bytes that it moves.
"""

import math
import re
from typing import NamedTuple

_LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([a-z][\w-]*)\(([^)]*)\)")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.-]+)")
_PATH = re.compile(r'op_name="([^"]*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_FREE = {"parameter", "get-tuple-element", "bitcast", "tuple", "constant", "iota"}
# Of custom calls, these move data. Others only mark an array, or join slices that lie side by side.
KERNEL = "tpu_custom_call"  # Pallas


class Moved(NamedTuple):
    """What one instruction touches.

    Attributes:
        kind: its opcode; of a custom call, its target.
        path: of names under which JAX traced it; "" for none.
        touched: bytes of all operands and results, wherever they are; each once.
        hbm: bytes read from and written to HBM.
    """

    kind: str
    path: str
    touched: int
    hbm: int


def read(text: str) -> list[Moved] | None:
    """The instructions of a program that take or give arrays.

    An instruction that uses part of an array counts the whole array; a loop counts once.

    Args:
        text: `compiled.as_text()` of a program for TPUs.

    Returns:
        For one device; None where the text names no memory spaces (CPU, GPU).
    """
    entry = text[text.find("\nENTRY ") :]
    entry = entry[: entry.find("\n}")]
    if "S(1)" not in entry:
        return None
    found, arrays = [], {}
    for line in entry.splitlines()[1:]:
        match = _LINE.match(line.replace("{{", "{").replace("((", "("))
        if not match:
            continue
        name, shape, kind, operands = match.groups()
        arrays[name] = [_array(*found) for found in _ARRAY.findall(shape)]
        if kind in _FREE or kind.endswith("-done"):
            continue
        touched = arrays[name] + [a for x in _NAME.findall(operands) for a in arrays.get(x, [])]
        if kind in ("slice-start", "copy-start"):
            touched = arrays[name][:2]  # the result names both ends, and a scalar
        hbm = sum(size for size, in_hbm in touched if in_hbm)
        if kind == "slice-start":
            hbm = min(size for size, _ in touched) * sum(in_hbm for _, in_hbm in touched)
        elif kind == "custom-call":
            target = _TARGET.search(line)
            kind = target[1] if target else kind
            hbm *= kind == KERNEL
        path = _PATH.search(line)
        found.append(Moved(kind, path[1] if path else "", sum(size for size, _ in touched), hbm))
    return found


def hbm_bytes(text: str) -> int | None:
    """Bytes read from and written to HBM in one step, see `read`."""
    found = read(text)
    return None if found is None else sum(x.hbm for x in found)


def _array(kind: str, bits: str, dimensions: str, layout: str) -> tuple[int, bool]:
    """(bytes, whether it is in HBM)."""
    count = math.prod(int(d) for d in dimensions.split(",") if d)
    return count * (8 if kind == "pred" else int(bits or 0)) // 8, "S(" not in layout
