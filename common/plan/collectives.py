"""Which collectives a compiled program holds, read from its text."""

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
        """Bytes that each device sends, at least (a ring does with that)."""
        share = (self.group - 1) / self.group
        return self.bytes * {"all-reduce": 2 * share, "collective-permute": 1}.get(self.kind, share)


def read(text: str, devices: int) -> list[Collective]:
    """Finds the collectives of an HLO text, in its order.

    Args:
        text: `compiled.as_text()`. A collective in the body of a loop counts once, and so does one
            that the TPU compiler has written into several fusions: they share a channel and a size.
            (On CPUs all collectives of `shard_map` share channel 1.)
        devices: of the program, the group where an instruction names none.
    """
    found, channels = [], set()
    for match in _INSTRUCTION.finditer(text):
        shape, kind, start = match.groups()
        line = text[match.start() : text.find("\n", match.end())]
        channel = _CHANNEL.search(line)
        arrays = _ARRAY.findall(shape)
        if start and kind != "all-reduce":  # (operands, results, and scalars of its own)
            arrays = [array for array in arrays if array[1]]
            arrays = arrays[len(arrays) // 2 :]
        sizes = [_bytes(*array) for array in arrays]
        group = _group(line, devices)
        size = sum(sizes) * (group if kind == "reduce-scatter" else 1)
        if channel and (kind, channel[1], size) in channels:
            continue
        channels.add((kind, channel[1], size) if channel else None)
        found.append(Collective(kind, size, group))
    return found


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
