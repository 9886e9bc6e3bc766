"""The benchmarks run, and compare programs that compute the same."""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    input_pipeline,
    jpeg,
    loss,
    methods,
    moco_queue,
    resident,
    running,
    scaling,
    side_by_side,
)
from common import queue as queues
from common.contrast import normalize

pytestmark = [pytest.mark.slow, pytest.mark.optimised]


def test_the_losses_that_are_timed_are_one_loss():
    z = jnp.asarray(np.random.default_rng(0).normal(size=(12, 2, 8)), jnp.float32)
    want = jax.value_and_grad(lambda z: loss.streamed(z, 7))(z)
    for other in (loss.full_logits, loss.optax_logits):
        got = jax.value_and_grad(other)(z)
        np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
        np.testing.assert_allclose(got[1], want[1], atol=1e-5)


def test_the_queues_that_are_timed_are_one_queue(monkeypatch):
    monkeypatch.setattr(moco_queue, "BATCH", 4)
    rng = np.random.default_rng(0)
    queries, keys = (jnp.asarray(rng.normal(size=(4, 8)), jnp.float32) for _ in range(2))
    queue = normalize(jnp.asarray(rng.normal(size=(12, 8)), jnp.float32))
    slots = queues.Queue(keys=queue.reshape(3, 4, 8))
    want = moco_queue.usual(queries, keys, queue, 1)
    value, gradient, pushed = moco_queue.ours(queries, keys, slots, 1, length=12)
    np.testing.assert_allclose(value, want[0], rtol=1e-5)
    np.testing.assert_allclose(gradient, want[1], atol=1e-6)
    np.testing.assert_allclose(pushed.keys.reshape(12, 8), want[2], rtol=1e-6)


def test_tables(capsys):
    side_by_side.show("Loss", list("abcde"), loss.times(64, [16, 64], 2))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("Loss (") and len([x for x in lines if x.startswith("| 64 |")]) == 6
    whole, parts = (float(loss.memory(256, n)[2]) for n in (1, 2))
    assert whole == pytest.approx(2 * parts, abs=1)
    assert moco_queue.times(512, 2)[0][3] == "1.00"  # what the others are compared with
    assert float(moco_queue.memory(512, 2)[4]) > 0


def test_steps_in_parts_send_what_the_whole_batch_sends(monkeypatch):
    monkeypatch.setattr(scaling, "BATCH", 64)
    rows = [scaling.compiled(name, 2) for name in ("SimCLR, 32 BN groups", "MoCo, 32 BN groups")]
    assert all("all-reduce" in row[5] for row in rows)


def test_methods_are_compared_on_one_network(tmp_path):
    both = [methods.config(name, 64) for name in ("SimCLR", "MoCo")]
    assert both[0].model.to_dict() | {"bn_groups": 0} == both[1].model.to_dict() | {"bn_groups": 0}
    rows = methods.measured([16], 2)
    assert [row["negatives"] for row in rows] == [30, 4096]
    assert rows[1]["arguments"] > rows[0]["arguments"]  # the key encoder and the queue
    assert rows[0]["temporaries"] > rows[1]["temporaries"]  # activations of two views
    assert rows[0]["of_simclr"] == 1
    # an accuracy stands only beside the batch that the recorded run had
    shown = methods.table([row | {"batch": batch} for batch in (16, 128) for row in rows])
    assert [line[6] for line in shown] == ["", "", "61.5 %", "59.2 %"]
    methods.draw(rows, tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_a_turn_of_training_from_device_memory():
    c = resident.config(
        argparse.Namespace(
            method="moco", width=4, dtype="float32", batch=8, steps=2, images=32
        )
    )  # fmt: skip
    c.model.stages = (1, 1)
    turn = resident.ours(c)
    losses = [float(turn()["loss"]) for _ in range(2)]
    assert np.isfinite(losses).all() and losses[0] != losses[1]
    # as compiled for a CPU, where no work is in calls of libraries
    compiled = running.Running(c).compiled.cost_analysis()["flops"]
    assert running.flops(c) == pytest.approx(compiled, rel=0.1)


def test_exact_jpegs_are_pillows_and_fast_ones_are_not():
    found = jpeg.measured(input_pipeline.photographs(2), rounds=1, size=32)
    assert found["exact"]["worst"] == 0 and 2 <= found["fast"]["worst"] <= 25
    assert found["fast"]["mean"][2] < -0.5  # blue is darker
    assert found["exact"]["pairs"] > 0 < found["exact"]["of_fast"]
