"""Checkpoints: exact, placed as asked, and only the complete ones count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from common.checkpoint import Checkpoints
from common.sharding import make_mesh, replicated, state_shardings
from moco_jax import queue as queues


def state(mesh, seed=0):
    """A queue (sharded), weights of two types, and a missing field."""

    def make():
        key = jax.random.key(seed)
        return {
            "queue": queues.init(key, 24, 16, 4),
            "w": jax.random.normal(key, (3, 5)),
            "half": jax.random.normal(key, (4,)).astype(jnp.bfloat16),
            "step": jnp.int32(seed),
            "probe": None,
        }

    abstract = jax.eval_shape(make)
    shardings = state_shardings(mesh, abstract)
    shardings["queue"] = state_shardings(mesh, abstract["queue"])
    return jax.jit(make, out_shardings=shardings)(), abstract, shardings


def assert_equal(got, want):
    got, want = tiny.named_leaves(got), tiny.named_leaves(want)
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype, name
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def test_round_trip_on_another_number_of_devices(tmp_path):
    first, _, _ = state(make_mesh(jax.devices()[:2]))
    progress = {"position": 7, "results": {"knn_top1": 0.1 + 0.2}, "process_count": None}
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.save(7, first, progress)
    mesh = make_mesh(jax.devices()[:4])
    _, abstract, shardings = state(mesh, seed=1)
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.latest_step == 7
        got, read = checkpoints.restore(7, abstract, shardings)
    assert read == progress  # the float too, to the last bit
    assert_equal(got, first)
    assert got["w"].sharding == replicated(mesh)
    assert jax.tree.leaves(got["queue"])[0].sharding.mesh.size == 4


def test_saved_before_the_buffers_are_reused(tmp_path):
    mesh = make_mesh(jax.devices()[:2])
    first, abstract, shardings = state(mesh)
    want = jax.device_get(first)
    wipe = jax.jit(lambda x: jax.tree.map(jnp.zeros_like, x), donate_argnums=0)
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(1, first, {})
        jax.block_until_ready(wipe(first))  # as the next step does
        checkpoints.wait()
        got, _ = checkpoints.restore(1, abstract, shardings)
    assert_equal(got, want)


def test_keeps_the_newest(tmp_path):
    mesh = make_mesh(jax.devices()[:1])
    s, _, _ = state(mesh)
    with Checkpoints(tmp_path, 2) as checkpoints:
        for step in (3, 5, 8):
            checkpoints.save(step, s, {})
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["5", "8"]


@pytest.mark.parametrize("name", ["9.orbax-checkpoint-tmp", "9.orbax-checkpoint-tmp-17"])
def test_a_half_written_checkpoint_is_ignored_and_written_anew(tmp_path, name):
    mesh = make_mesh(jax.devices()[:1])
    s, abstract, shardings = state(mesh, seed=3)
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.save(5, s, {"position": 5})
    half = tmp_path / "checkpoints" / name
    (half / "state").mkdir(parents=True)
    (half / "state" / "manifest.ocdbt").write_bytes(b"torn")
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.latest_step == 5
        assert checkpoints.restore(5, abstract, shardings)[1] == {"position": 5}
        checkpoints.save(9, s, {"position": 9})
    with Checkpoints(tmp_path, 2) as checkpoints:
        got, progress = checkpoints.restore(9, abstract, shardings)
    assert progress == {"position": 9}
    assert_equal(got, s)
