"""Where the time of a step goes; its own process, because XLA compiles differently for it.

    python -m benchmarks.record.profile OUT SIZES WHAT

`benchmarks.record` starts it. The rows of `benchmarks.trace` go to `OUT/profiles/WHAT.json`, the
profile itself, for xprof, to a folder next to it.
"""

import json
import pathlib
import sys

from benchmarks import trace
from benchmarks.record import steps
from benchmarks.record.ledger import Found
from benchmarks.record.setting import Setting, cache, hardware

FOLDER = "profiles"
WHAT = (*steps.METHODS, "resnet50")


def command(setting: Setting, what: str) -> list[str]:
    """The command of the process."""
    out, sizes = str(setting.out), setting.sizes.name
    return [sys.executable, "-m", "benchmarks.record.profile", out, sizes, what]


def read(setting: Setting, what: str) -> Found:
    """The result of the process."""
    found = json.loads((setting.out / FOLDER / f"{what}.json").read_text())
    rows = found["rows"]
    words = ", ".join(f"{name} {part:.1%}" for name, _, part in rows if part >= 0.001)
    parts = dict.fromkeys(name for name, _, _ in rows) | {name: part for name, _, part in rows}
    return Found(
        f"{sum(ms for _, ms, _ in rows):.2f} ms a step: {words}",
        {"rows": rows},
        hardware=found["hardware"],
        ok=abs(sum(parts.values()) - 1) < 1e-3 and parts[trace.CONVOLUTIONS] > 0,
    )


def main() -> None:
    """Traces a few steps."""
    out, name, what = sys.argv[1:]
    trace.no_graphs()
    import jax

    jax.config.update("jax_compilation_cache_dir", cache())
    sizes = steps.SIZES[name]
    if what == "resnet50":
        c = steps.large("simclr", sizes)
    else:
        c = steps.in_memory(what, sizes.batches[0], sizes, steps=1)
    folder = pathlib.Path(out) / FOLDER
    folder.mkdir(exist_ok=True)
    rows = trace.profile(c, directory=str(folder / what))
    (folder / f"{what}.json").write_text(json.dumps({"rows": rows, "hardware": hardware()}) + "\n")


if __name__ == "__main__":
    main()
