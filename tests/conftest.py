"""Eight simulated CPU devices for every test, JAX at its strictest that Flax and Optax tolerate.

All processes of a run share what they compile, and no test may take for ever.
"""

import contextlib
import faulthandler
import gc
import os
import pathlib
import signal
import sys
from collections.abc import Generator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Tests share helpers with those of other rooms: `import tiny`, `from test_sources import picture`.
ROOMS = sorted({path.parent for path in (ROOT / "tests").glob("**/test_*.py")})
sys.path[:0] = [str(ROOT), *map(str, ROOMS)]

# Nearly all of the time of the tests is compiling. What one process has compiled, every other takes
# from here: pytest's workers, each `main.py` that a test starts, and the next run of the tests.
# Environment variables, since they reach all of these; before JAX is imported, which reads them.
COMPILED = ROOT / ".pytest_cache" / "compiled"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(COMPILED))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before anything imports TensorFlow

# Triton, which PyTorch's builds for CUDA bring, ends a process that has imported TensorFlow with a
# segmentation fault; the other way round they get along.
with contextlib.suppress(ImportError):
    import triton  # noqa: F401

# A shell without job control starts its background commands deaf to Ctrl-C, which tests send.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax  # noqa: E402

# Before the first device access, which fixes the number of devices.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# A [b] array that meets a [b, d] one by accident is an error.
jax.config.update("jax_numpy_rank_promotion", "raise")

COMPILED_BYTES = 2**30  # of programs, most of them of code as it once was: the oldest go
LONG = ("slow", "multiprocess", "notebook", "torch", "tpu")  # markers of tests that take minutes
MAPPINGS = 30_000  # of a process: then what it has compiled goes, see below
LONG_SECONDS = 900  # their time limit; pyproject.toml has that of all others
TEARDOWN_SECONDS = 300  # for the fixtures of any test
STDERR = os.dup(2)  # pytest has another one while a test runs
# Of all tests, and of the quick ones alone, these take most of the time (`--durations=0`).
LONGEST_FILES = (
    "record_whole", "timm", "torch", "multiprocess", "faults", "tpu", "matrix", "steps", "main",
    "microbatch", "distributed", "end_to_end", "resident", "benchmarks", "record", "preemption",
    "pipeline", "augment",
)  # fmt: skip


def pytest_sessionstart(session: pytest.Session) -> None:
    """Keeps the folder of compiled programs from growing with every change of the code."""
    if not hasattr(session.config, "workerinput") and COMPILED.is_dir():  # no worker
        total = 0
        for path in sorted(COMPILED.iterdir(), key=os.path.getmtime, reverse=True):
            total += path.stat().st_size
            if total > COMPILED_BYTES:
                path.unlink(missing_ok=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives the long tests their time limit, and starts with the files that take longest.

    Workers take one file after another: one that starts last and takes minutes keeps all waiting.
    """
    for item in items:
        if is_long(item) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(LONG_SECONDS))
    last = len(LONGEST_FILES)
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, last))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """XLA takes less care of programs that are only run, which saves a third of compiling them.

    What looks at a compiled program says so (`optimised`), and the processes that tests start run
    what users run.
    """
    careful = item.get_closest_marker("optimised") is not None
    jax.config.update("jax_disable_most_optimizations", not careful)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    """A test that has failed lost its time limit: its fixtures have one of their own."""
    faulthandler.dump_traceback_later(TEARDOWN_SECONDS, exit=True, file=STDERR)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
        forget_programs()


def forget_programs() -> None:
    """Lets go of compiled programs before a process has more parts of memory than it may.

    Each program that XLA compiles for a CPU takes about a hundred mappings, Linux allows 65,530,
    and one more ends the process with a segmentation fault.
    """
    try:
        with open("/proc/self/maps", "rb") as file:
            mappings = sum(1 for _ in file)
    except OSError:  # no Linux
        return
    if mappings > MAPPINGS:
        if tiny := sys.modules.get("tiny"):
            tiny.forget_runs()
        jax.clear_caches()
        gc.collect()


def is_long(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(name) for name in LONG)
