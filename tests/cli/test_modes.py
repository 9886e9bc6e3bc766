"""What `python main.py` does beside training, and leaves beside results: real processes."""

import json

import pytest
from test_main import DEMO, assert_one_error, call, environment

pytestmark = pytest.mark.slow


def test_compiled_programs_are_kept_and_asked_steps_traced(tmp_path):
    env = environment() | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    options = f"--compile_cache={tmp_path / 'cache'}", "--config.profile=2:3"
    done = call(DEMO, f"--workdir={tmp_path / 'run'}", *options, env=env)
    assert done.returncode == 0, done.stderr
    assert [p for p in (tmp_path / "cache").iterdir() if "train_step" in p.name]
    assert list((tmp_path / "run" / "tensorboard" / "plugins" / "profile").glob("*/*.xplane.pb"))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    timed = [r for r in map(json.loads, lines) if "seconds_step" in r]
    assert timed and all(0 <= r["seconds_input"] <= r["seconds_step"] for r in timed)
    assert all("seconds_pause" in r for r in timed)


def test_a_plan_of_this_machine(tmp_path):
    """A table on stderr, one JSON object a line on stdout, and nothing on the disk."""
    done = call(DEMO, "--mode=plan", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    (row,) = map(json.loads, done.stdout.splitlines())
    assert row["topology"] == "local" and row["tflop"] > 0 and row["peak_gib"] > 0
    assert "peak GiB" in done.stderr and not list(tmp_path.iterdir())


def test_shards_are_prepared_and_trained_on(tmp_path):
    done = call(DEMO, "--mode=prepare", f"--workdir={tmp_path / 'shards'}")
    assert done.returncode == 0, done.stderr
    assert "train: 64 images in 1 file\n" in done.stderr
    source = f"--config.data.source=shards:{tmp_path / 'shards'}"
    done = call(DEMO, source, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    again = call(DEMO, "--mode=prepare", f"--workdir={tmp_path / 'shards'}")
    assert_one_error(again, "is not empty", "new directory")


def test_a_pod_that_is_not_there():
    done = call(DEMO, "--workdir=x", "--distributed")
    assert_one_error(done, "--coordinator=HOST:PORT,COUNT,INDEX")
