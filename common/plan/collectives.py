"""The collectives of a compiled program, read from its text."""

import bisect
import dataclasses
import math
import re
from collections.abc import Iterable

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# `%name = shape kind(operands)`; an asynchronous one is counted where it starts.
_INSTRUCTION = re.compile(
    rf"^\s*(?:ROOT\s+)?%?[\w.-]+ = (.*?) ({'|'.join(KINDS)})(-start)?\(", re.MULTILINE
)
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_BITS = re.compile(r"(\d+)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_CHAIN = re.compile(r'chain_id="(\d+)"')
# The head of a computation that a fusion calls: `%name (parameters) -> result {`.
_FUSION = re.compile(r"^%[\w.-]*(?:fusion|fused_computation)[\w.-]* \(", re.MULTILINE)
_GROUPS = re.compile(r"replica_groups=(?:\[(\d+),(\d+)\]|\{\{([\d,]*)\})")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction.

    Attributes:
        kind: one of `KINDS`.
        bytes: what one device contributes or receives, whichever is more: of an all-reduce the
            array, of an all-gather its result, of a reduce-scatter its operand.
        group: devices that take part together.
    """

    kind: str
    bytes: int
    group: int

    @property
    def traffic(self) -> float:
        """The least bytes that each device sends; a ring needs no more."""
        others = (self.group - 1) / self.group
        factors = {"all-reduce": 2 * others, "collective-permute": 1}
        return self.bytes * factors.get(self.kind, others)


def read(text: str, devices: int) -> list[Collective]:
    """Finds the collectives of an HLO text; one in the body of a loop counts once.

    The TPU compiler overlaps collectives with arithmetic: such a one appears in each of the fusions
    that run meanwhile, which it may number as a chain. It counts once, by chain, channel and shape.
    (The channel alone is not enough: all gathers of a `shard_map` may have the same.)

    Args:
        text: `compiled.as_text()`.
        devices: of the program: the group where an instruction names none.
    """
    fusions = [m.start() for m in _FUSION.finditer(text)]
    ends = [text.find("\n}", start) for start in fusions]
    found, seen, hidden = [], set(), []
    for match in _INSTRUCTION.finditer(text):
        line = text[match.start() : text.find("\n", match.end())]
        channel, chain = _CHANNEL.search(line), _CHAIN.search(line)
        one = _collective(match[1], match[2], match[3], line, devices)
        key = (one, channel and channel[1], chain and chain[1])
        i = bisect.bisect_right(fusions, match.start()) - 1
        if i >= 0 and match.start() < ends[i]:
            hidden.append(key)
        else:
            seen.add(key)
            found.append(one)
    return found + [key[0] for key in dict.fromkeys(hidden) if key not in seen]


def _collective(shape: str, kind: str, start: str | None, line: str, devices: int) -> Collective:
    arrays = _ARRAY.findall(shape)
    if start and kind != "all-reduce":  # (operands, results, and scalars of its own)
        arrays = [array for array in arrays if array[1]]
        arrays = arrays[len(arrays) // 2 :]
    size = sum(_bytes(*array) for array in arrays)
    group = _group(line, devices)
    return Collective(kind, size * (group if kind == "reduce-scatter" else 1), group)


def totals(collectives: Iterable[Collective]) -> dict[str, dict[str, int]]:
    """`{kind: {"count": ..., "bytes": ...}}`, the largest first."""
    out: dict[str, dict[str, int]] = {}
    for c in collectives:
        entry = out.setdefault(c.kind, {"count": 0, "bytes": 0})
        entry["count"] += 1
        entry["bytes"] += c.bytes
    return dict(sorted(out.items(), key=lambda item: -item[1]["bytes"]))


def _bytes(kind: str, dimensions: str) -> int:
    bits = 8 if kind == "pred" else int((_BITS.search(kind) or [0, 0])[1])
    return math.prod(int(d) for d in dimensions.split(",") if d) * bits // 8


def _group(line: str, devices: int) -> int:
    match = _GROUPS.search(line)
    if not match:
        return devices
    if match[2]:  # [groups,size]<=[...]
        return int(match[2])
    return len(match[3].split(",")) if match[3] else devices
