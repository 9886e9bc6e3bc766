"""Items that end in every way in which an item can, in seconds; for test_record.py."""

import os
import pathlib
import subprocess
import sys
import time

from benchmarks.record.items import Item
from benchmarks.record.ledger import Found

STEPS = 400  # of the training run
# What `main.py` does, as far as the kit sees it. With a second argument it trains until it is told
# to stop; one that carries on comes to its end.
TRAINING = f"""
import pathlib, signal, sys, time
path, forever = pathlib.Path(sys.argv[1]), len(sys.argv) > 2
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
path.with_name("started").write_text("")
step = int(path.read_text()) if path.exists() else 0
forever = forever and not step
while step < {STEPS}:
    step = min(step + 1, {STEPS} - forever)
    time.sleep(0.01 if forever else 0)
    if told:
        path.write_text(str(step))
        sys.stderr.write(f"told to stop: step {{step}} is saved\\n")
        sys.exit(143)
path.write_text(str(step))
"""


def good(setting) -> Found:
    return Found("all is well", {"pid": os.getpid(), "odd": float("nan")})


def wrong(setting) -> Found:
    return Found("off by 3", {"off": 3}, ok=False)


def raises(setting) -> Found:
    raise ValueError("a | first line\nand a second one")


def dies(setting) -> Found:
    print("last words", file=sys.stderr, flush=True)
    os.abort()


def hangs(setting) -> Found:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    (setting.out / "grandchild").write_text(str(child.pid))
    time.sleep(1000)


def train(setting) -> list[str]:
    more = ["forever"] if os.environ.get("TRAIN_FOREVER") else []
    return [sys.executable, "-c", TRAINING, str(setting.out / "progress"), *more]


def trained(setting) -> Found:
    return Found(pathlib.Path(setting.out / "progress").read_text())


def score(setting) -> list[str]:
    return [sys.executable, "-c", "pass"]


def fail(setting) -> list[str]:
    return [sys.executable, "-c", "import sys; sys.exit('error: no such thing')"]


def nowhere(setting) -> list[str]:
    return ["/no/such/command"]


def misread(setting) -> Found:
    return Found(f"{None:.2%}")


def every(sizes) -> list[Item]:
    return [
        Item("good", "sanity", 1, work=good),
        Item("wrong", "sanity", 1, work=wrong),
        Item("raises", "sanity", 1, work=raises),
        Item("dies", "sanity", 1, work=dies),
        Item("hangs", "sanity", 0.2, work=hangs),
        Item("late", "rates", 1, work=good),
        Item("too_long", "rates", 10_000, work=good),
        Item("fails", "quality", 5, command=fail, read=good),
        Item("nowhere", "quality", 5, command=nowhere, read=good),
        Item("misread", "quality", 5, command=score, read=misread),
        Item("trains", "quality", 5, command=train, read=trained, training=True),
        Item("scores", "quality", 5, command=score, read=good, after="trains"),
    ]
