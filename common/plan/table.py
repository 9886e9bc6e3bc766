"""The table that `--mode=plan` prints."""

from collections.abc import Sequence
from typing import Any


def render(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text: all figures are for one device and one step."""
    columns = [
        ("topology", lambda r: r["topology"]),
        ("chips", lambda r: r["chips"]),
        ("batch", lambda r: r["batch"]),
        ("a device", lambda r: r["batch_per_device"]),
        ("remat", lambda r: r["remat"]),
        ("peak GiB", lambda r: r["peak_gib"]),
        ("of", lambda r: r["hbm_gib"]),
        ("fits", lambda r: {True: "yes", False: "NO", None: "?"}[r["fits"]]),
        ("TFLOP", lambda r: r.get("tflop")),
        ("GB", lambda r: r.get("gb_accessed")),
        ("arith. ms", lambda r: r.get("arithmetic_ms")),
        ("memory ms", lambda r: r.get("memory_ms")),
        ("ICI ms", lambda r: r.get("ici_ms")),
        ("images/s", lambda r: r.get("images_per_second")),
        ("hours", lambda r: r.get("hours")),
    ]
    cells = [[name for name, _ in columns]]
    cells += [["-" if (x := get(r)) is None else _text(x) for _, get in columns] for r in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    ]
    lines.append("")
    for r in rows:
        name = f"{r['topology']}, remat={r['remat']}"
        if "temporaries_gib" in r:
            lines.append(
                f"{name}: peak {r['peak_gib']:.2f} GiB = {r['arguments_gib']:.2f} arguments + "
                f"{r['temporaries_gib']:.2f} temporaries + {r['outputs_gib']:.2f} outputs - "
                f"{r['aliased_gib']:.2f} outputs aliased to arguments"
            )
        if r["fits"] is False:
            lines.append(f"{name}: {r['advice']}")
            continue
        moved = ", ".join(
            f"{c['count']} {kind} of {c['bytes'] / 1e6:,.2f} MB"
            for kind, c in r["collectives"].items()
        )
        lines.append(f"{name}: collectives: {moved or 'none'}")
    if any(r.get("quick") for r in rows):
        lines += [
            "",
            "Compiled with little effort (--quick): a real run differs slightly.",
        ]
    if rates := {r["device"]: r["rates"] for r in rows if "rates" in r}:
        lines += [
            "",
            "Bounds, not forecasts: the largest of arithmetic, memory, links at datasheet rates.",
            *(
                f"{name}: {d['tflops']:g} bfloat16 TFLOP/s, {d['hbm_gb_per_s']:g} GB/s memory, "
                f"{d['ici_gb_per_s']:g} GB/s links"
                for name, d in rates.items()
            ),
        ]
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else value
