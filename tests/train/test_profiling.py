"""Traces of the requested steps, on a disk and in a bucket."""

import jax
import jax.numpy as jnp
import pytest
from bucket import mounted
from etils import epath

from common.errors import UserError
from common.train.profiling import Profile


def trace(span, workdir, steps):
    """Runs a few steps as the loop does; returns the names of the trace's files."""
    profile = Profile(span, epath.Path(workdir))
    for step in range(1, steps + 1):
        with profile.step(step):
            state = jnp.zeros(3) + step
        profile.after(step, state)
    profile.close()
    root = epath.Path(workdir) / "tensorboard" / "plugins" / "profile"
    return [p.name for run in root.iterdir() for p in run.iterdir()] if root.exists() else []


@pytest.mark.parametrize("steps", [5, 3])  # a run that ends inside the span has its trace too
def test_a_trace_on_a_disk(steps, tmp_path):
    assert any(name.endswith(".xplane.pb") for name in trace("2:4", tmp_path, steps))


def test_a_trace_in_a_bucket(tmp_path, monkeypatch):
    with mounted(tmp_path, monkeypatch) as bucket:
        names = trace("2:2", "gs://b/run", 3)
        assert any(name.endswith(".xplane.pb") for name in names)
        assert all(path.startswith("gs://b/run/tensorboard/") for path in bucket.written)


def test_only_process_0_traces_and_only_if_asked(tmp_path, monkeypatch):
    assert trace("", tmp_path, 2) == []
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert trace("1:2", tmp_path, 2) == []


@pytest.mark.parametrize("span", ["5", "5:4", "0:3", "a:b"])
def test_mistakes(span, tmp_path):
    with pytest.raises(UserError, match=rf'profile="{span}": write FIRST:LAST'):
        Profile(span, epath.Path(tmp_path))
