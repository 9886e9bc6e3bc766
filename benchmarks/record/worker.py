"""A process that runs items one after the other, so that a crash or a hang costs only one.

    python -m benchmarks.record.worker OUT DATA SIZES CATALOGUE DEADLINE ITEM [ITEM ...]

`benchmarks.record` starts it. Before an item it writes the item's name to `OUT/now`; after it, a
record. DEADLINE is in seconds since 1970: an item that would not end before it is skipped.
"""

import dataclasses
import importlib
import os
import pathlib
import sys
import threading
import time
import traceback

from benchmarks.record import items, steps
from benchmarks.record.ledger import Found, Ledger
from benchmarks.record.setting import Setting, cache, hardware

NOW = "now"  # the file


def do(item: items.Item, setting: Setting, ledger: Ledger) -> None:
    """Runs an item, and records its result or its error."""
    begin = time.perf_counter()
    try:
        found = item.work(setting)
    except Exception as error:
        traceback.print_exc()
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        found = Found(f"{type(error).__name__}: {lines[0][:300]}", ok=False)
    state = "ok" if found.ok else "failed"
    seconds = time.perf_counter() - begin
    found = dataclasses.replace(found, hardware=hardware())
    ledger.add(item.stage, item.name, state, found, seconds)


def main() -> None:
    """Runs the items on the command line."""
    out, data, sizes, catalogue, deadline, *names = sys.argv[1:]
    _end_with(os.getppid())
    import jax

    jax.config.update("jax_compilation_cache_dir", cache())
    if sizes == "full" and jax.default_backend() == "cpu":
        sys.exit("error: JAX finds no GPU or TPU here: give --tiny to try it on a CPU")
    setting = Setting(pathlib.Path(out), data, steps.SIZES[sizes], catalogue)
    every = importlib.import_module(catalogue).every(setting.sizes)
    known = {item.name: item for item in every}
    ledger = Ledger(setting.out)
    for item in (known[name] for name in names):
        if time.time() + item.seconds > float(deadline):
            continue
        (setting.out / NOW).write_text(item.name)
        print(f"\n== {item.name}", file=sys.stderr, flush=True)
        do(item, setting, ledger)
        jax.clear_caches()  # compiled programs stay on disk only


def _end_with(parent: int) -> None:
    """Exits when the process that started this one is gone: nobody would read the results."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main()
