"""`python main.py` as a person runs it: real processes, their exit status, and what they print."""

import json
import os
import pathlib
import pty
import signal
import subprocess
import sys
import time

import pytest

from common.run import jsonl
from common.run.writer import TIMING_KEYS

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEMO = "--config=configs/simclr_demo.py:smoke"
# The demo's own images, few of them scored, and steps that take no time.
REAL = ("--config.data.source=embedded", "--config.data.image_size=28",
        "--config.evaluate.knn_examples=64", "--config.evaluate.every=0 steps",
        "--config.evaluate.pictures=False")  # fmt: skip


def environment():
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TF_", "PYTHONWARNINGS"))}
    return env | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def hurried():
    """The same, where what XLA makes of the program does not matter."""
    return environment() | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def without_tensorflow(folder):
    """The same, where a module in `folder` ends a process that imports TensorFlow."""
    for name in ("tensorflow", "tensorflow_datasets"):
        (folder / f"{name}.py").write_text("raise SystemError('must not be imported')\n")
    return hurried() | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def command(*arguments):
    return [sys.executable, "main.py", "--compile_cache=", *map(str, arguments)]


def call(*arguments, env=None):
    return subprocess.run(
        command(*arguments), cwd=ROOT, env=env or environment(), capture_output=True, text=True
    )


def assert_one_error(done, *words):
    """Exit status, and one line on stderr without a stack trace."""
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.rstrip().endswith(errors[0])
    for word in words:
        assert word in errors[0]
    return errors[0]


def test_smoke_run_prints_its_result_and_no_noise_and_needs_no_tensorflow(tmp_path):
    """TensorFlow takes seconds to import, and need not be there for a run without its pipeline."""
    env = without_tensorflow(tmp_path)
    relative = os.path.relpath(tmp_path / "run", ROOT)  # as in the README
    done = call(DEMO, f"--workdir={relative}", env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    for word in ("devices", "parameters", "step 4/4", "kNN classifier", "Pictures to look at"):
        assert word in done.stderr
    noise = ("Warning", "WARNING", "Traceback", "oneDNN", "absl", "tensorflow")
    assert not [word for word in noise if word in done.stderr], done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 4


# Starting a process takes longer than a mode: all of them in one.
EVERY_MODE = """
import pathlib, sys
from common.cli import modes
from common.config import eval_config
from main import METHODS
for mode, changes in {
    "linear_eval": {"linear.variant": "augmented", "linear.epochs": 1},
    "finetune": {"finetune.fraction": 0.1, "finetune.epochs": 1},
    "classify": {}, "knn": {}, "embed": {}, "suggest": {}, "export": {},
    "transfer": {"logistic.num_values": 2, "logistic.max_iterations": 5},
}.items():
    c = eval_config()
    c.update_from_flattened_dict(changes)
    modes.run(mode, sys.argv[1], c, METHODS)
"""


@pytest.mark.slow
def test_a_run_on_the_device_is_evaluated_without_tensorflow(tmp_path):
    """By the modes that train on labels too; `test_eval_batches.py` does that in its process."""
    workdir, env = tmp_path / "run", without_tensorflow(tmp_path)
    done = call(
        DEMO, f"--workdir={workdir}", *REAL, "--config.data.train_split=test",
        "--config.steps_per_dispatch=2", "--config.data.augment_on=device", env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [sys.executable, "-c", EVERY_MODE, str(workdir)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]
    assert [record["mode"] for record in records] == [
        "linear_eval", "finetune", "classify", "knn", "embed", "suggest", "export",
        "transfer",
    ]  # fmt: skip
    assert records[0]["variant"] == "augmented"


@pytest.mark.slow  # `test_mistakes.py` makes all of these within one process
def test_unknown_key_is_one_line():
    done = call(DEMO, "--workdir=unused", "--config.batch_sze=3")
    assert_one_error(done, "batch_sze", "did you mean --config.batch_size?")
    assert done.stderr.count("\n") == 1


def test_a_mistake_found_while_tracing_is_one_line(tmp_path):
    done = call(DEMO, f"--workdir={tmp_path}", "--config.model.bn_groups=3")
    assert_one_error(done, "bn_groups", "3")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((DEMO, "--workdir=x", "--config.batch_size=abc"), ["batch_size=abc"]),
        (("--workdir=x",), ["--config"]),
        ((DEMO,), ["--workdir"]),
        (("--config=configs/nope.py", "--workdir=x"), ["no config file configs/nope.py"]),
        (("--config=configs/simclr_demo.py:fast", "--workdir=x"), ["'fast' is unknown"]),
        ((DEMO, "--workdir=/proc/run"), ["/proc/run"]),
        ((DEMO, "--workdir=main.py"), ["main.py is a file"]),
        ((DEMO, "--workdir=tests"), ["tests", "holds no run"]),
        ((DEMO, "--workdir=x", "extra"), ["extra"]),
        ((DEMO, "--workdir=x", "--config.data.source=tfds:no_such_set"), ["no_such_set"]),
        ((DEMO, "--workdir=x", "--config.augment.preset=simclear"), ["simclear", "simclr"]),
        ((DEMO, "--workdir=x", "--config.duration=-1 steps"), ["duration", "-1 steps"]),
    ],
)
def test_mistakes_on_the_command_line(arguments, words):
    assert_one_error(call(*arguments), *words)
    assert not (ROOT / "x").exists()


@pytest.mark.slow
def test_a_bucket_that_is_not_there_is_one_line_and_tensorflow_is_quiet():
    """TensorFlow, which is imported for it, writes C++ lines about credentials and oneDNN."""
    done = call("--mode=knn", "--workdir=gs://there-is-no-bucket-of-this-name/run")
    assert_one_error(done, "gs://there-is-no-bucket-of-this-name/run")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_on_a_terminal_one_line_is_rewritten_and_tensorflow_is_quiet(tmp_path):
    reader, terminal = pty.openpty()
    process = subprocess.Popen(
        command(DEMO, f"--workdir={tmp_path / 'run'}", *REAL), cwd=ROOT, env=hurried(),
        stdout=terminal, stderr=terminal,
    )  # fmt: skip
    os.close(terminal)
    output = b""
    while True:
        try:
            piece = os.read(reader, 65536)
        except OSError:  # the other side is closed
            break
        if not piece:
            break
        output += piece
    os.close(reader)
    text = output.decode()
    assert process.wait() == 0, text
    assert "\rstep 4/4  " in text and "\r\n" in text
    for word in ("oneDNN", "absl::InitializeLog", "WARNING", "Traceback", "E0000", "W0000"):
        assert word not in text, text


@pytest.mark.slow
def test_a_process_that_is_killed_and_then_interrupted_continues_bit_by_bit(tmp_path):
    """SIGKILL right after a checkpoint, Ctrl-C (twice) long before the next.

    SIGKILL for either method: `test_faults.py`; SIGTERM: `test_record_whole.py`.
    """
    arguments = (
        "--config=configs/moco_demo.py:smoke", *REAL, "--config.duration=300 steps",
        "--config.checkpoint.every=100 steps", "--config.data.train_split=test",
    )  # fmt: skip
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def records(workdir):
        return [{k: v for k, v in r.items() if k not in TIMING_KEYS}
                for r in jsonl.read(workdir / jsonl.FILE)]  # fmt: skip

    def saved():
        folder = broken / "checkpoints"
        names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
        return max((int(name) for name in names if name.isdigit()), default=0)

    def logged():
        path = broken / jsonl.FILE
        return max((r["step"] for r in jsonl.read(path)), default=0) if path.exists() else 0

    def start(until):
        process = subprocess.Popen(
            command(*arguments, f"--workdir={broken}"), cwd=ROOT, env=hurried(), text=True,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        while process.poll() is None and not until():
            time.sleep(0.01)
        return process

    done = call(*arguments, f"--workdir={whole}", env=hurried())
    assert done.returncode == 0, done.stderr

    process = start(until=lambda: saved() >= 100)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()
    assert not (broken / "summary.json").exists()
    first, lost = saved(), logged()  # the log has gone further

    process = start(until=lambda: logged() > lost)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGINT, errors
    assert f"after step {first}" in errors
    assert "told to stop: step " in errors and "Traceback" not in errors
    second = saved()
    assert first < second < 300 and f"told to stop: step {second} " in errors

    done = call(*arguments, f"--workdir={broken}", env=hurried())
    assert done.returncode == 0, done.stderr
    assert f"after step {second}" in done.stderr
    assert records(broken) == records(whole)  # losses and norms of all parameters, to the last bit
    timed = {"images_per_second", "seconds"}
    a, b = (json.loads((w / "summary.json").read_text()) for w in (whole, broken))
    assert {k: v for k, v in a.items() if k not in timed} == {
        k: v for k, v in b.items() if k not in timed}  # fmt: skip


@pytest.mark.parametrize("while_it", ["imports", "compiles"])
def test_ctrl_c_before_the_first_step_is_one_line(while_it, tmp_path):
    process = subprocess.Popen(
        command(DEMO, f"--workdir={tmp_path / 'run'}"), cwd=ROOT, env=hurried(), text=True,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    maps = pathlib.Path(f"/proc/{process.pid}/maps")

    def reached():
        if while_it == "compiles":
            return (tmp_path / "run" / "config.json").exists()
        return "jaxlib" in maps.read_text() if maps.exists() else time.sleep(0.5) is None

    while not reached():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGINT, errors
    assert errors == "\ninterrupted\n"
