"""What is not a number: stopped or skipped, named, and played again; collapse said in words."""

import json
import logging
import types

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from test_end_to_end import TOTAL, lines, small

import main
from common.errors import UserError
from common.evaluate.online import make_evaluator
from common.run.writer import NonFiniteLossError
from common.sharding import make_mesh
from common.train import divergence, loop, replay
from common.train.prepare import Extent
from simclr_jax.method import SimCLR


@flax.struct.dataclass
class State:
    step: jax.Array
    w: jax.Array
    count: jax.Array


class Toy:
    """Adds the batch to `w`; the loss is its sum."""

    chance = 0.1

    def train_step(self, state, batch, key):
        loss = batch["x"].sum()
        new = State(state.step + 1, state.w + batch["y"], state.count + 1)
        return new, {"loss": loss}


@pytest.mark.parametrize(("x", "y"), [(np.nan, 0.0), (np.inf, 0.0), (0.0, np.nan)])
def test_a_step_that_would_spoil_the_state_leaves_it(x, y):
    """A bad loss, or a good one and a bad update; the next good step goes on from there."""
    step = jax.jit(divergence.skip_nonfinite(Toy().train_step))
    state = State(jnp.int32(4), jnp.ones(3), jnp.int32(0))
    got, metrics = step(state, {"x": jnp.full(2, x), "y": jnp.full(3, y)}, None)
    assert metrics["skipped"] == 1 and got.step == 5 and got.count == 0
    np.testing.assert_array_equal(got.w, np.ones(3))
    got, metrics = step(got, {"x": jnp.ones(2), "y": jnp.full(3, 2.0)}, None)
    assert metrics["skipped"] == 0 and got.step == 6 and got.count == 1
    np.testing.assert_array_equal(got.w, np.full(3, 3.0))


def watch(workdir, mode="stop", total=1000, limit=3, skipped=0):
    c = types.SimpleNamespace(on_nonfinite=mode, max_skipped=limit, seed=5)
    run = types.SimpleNamespace(config=c, method=Toy(), extent=Extent(total, 10))
    return divergence.Watch(run, epath.Path(workdir), skipped=skipped)


IDS = np.array([3, 1])


def test_the_first_bad_step_is_named_and_its_reproduction_kept(tmp_path):
    w = watch(tmp_path)
    w.saved = 2
    state = {"params": {"a": jnp.ones(2), "b": jnp.array([1.0, np.nan])}, "z": jnp.array(np.inf)}
    for step, loss in ((3, 1.0), (4, np.nan), (5, np.nan)):
        w.add(step, {"loss": jnp.float32(loss), "other": None}, IDS[None])
    w.check_all(state, but=2)
    with pytest.raises(NonFiniteLossError, match=r"^loss is nan at step 4: .*params/b of 2; `main"):
        w.check_all(state)
    record = json.loads((tmp_path / "nonfinite" / "step_4.json").read_text())
    assert (record["checkpoint"], record["seed"], record["bad_arrays"]) == (2, 5, ["params/b", "z"])
    with np.load(tmp_path / "nonfinite" / "step_4.process_0.npz", allow_pickle=False) as file:
        assert sorted(file) == ["ids"]
        np.testing.assert_array_equal(file["ids"], IDS)


def test_a_bad_loss_inside_a_dispatch_names_its_step(tmp_path):
    """Of a dispatch that took 2 of at most 3 steps, the rest is not looked at."""
    w, ids = watch(tmp_path), np.array([[3, 1], [0, 2]])
    each = {"loss": jnp.array([1.0, 2.0, np.nan])}
    w.add(5, metrics := {"loss": each["loss"][1], "each": each}, ids)
    assert "each" not in metrics
    w.check_all({})
    w.add(7, {"each": {"loss": jnp.array([1.0, np.inf, np.nan])}}, ids)
    with pytest.raises(NonFiniteLossError, match=r"^loss is inf at step 8: "):
        w.check_all({})
    with np.load(tmp_path / "nonfinite" / "step_8.process_0.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["ids"], [0, 2])


def test_skipped_steps_are_counted_and_only_so_many_in_a_row_tolerated(tmp_path, caplog):
    w = watch(tmp_path, "skip", skipped=4)
    assert w.counts() == {"skipped_steps": 4} and watch(tmp_path).counts() == {}
    for step, bad in enumerate([1, 1, 0, 1, 1], start=1):
        w.check(step, {"loss": np.nan if bad else 1.0, "skipped": float(bad)}, IDS, {})
    assert w.skipped == 8 and "step 5: loss is nan, the update is dropped (8 so far)" in caplog.text
    with pytest.raises(NonFiniteLossError, match=r"^3 steps in a row were skipped, .* at step 6: "):
        w.check(6, {"loss": np.nan, "skipped": 1.0}, IDS, {})


def test_collapse_is_said_in_words_and_once(tmp_path, caplog):
    def go(steps, spread, accuracy):
        caplog.clear()
        w = watch(tmp_path)
        assert w._window == 100
        for step in range(1, steps + 1):
            scalars = {"loss": 1.0, "feature_std": spread, "contrastive_top1": accuracy}
            w.check(step, scalars, IDS, {})
        return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]

    assert go(300, 0.5, 0.9) == []
    assert go(99, 0.5, 0.1) == []  # early in a run it may be at chance
    (said,) = go(300, 0.5, 0.12)
    assert said.startswith("step 100: for 100 steps the network has told images apart no better")
    assert "12.00% right, 10.00% by guessing" in said
    (said,) = go(300, 0.001, 0.9)
    assert said.startswith("step 50: the features have collapsed") and "0.0010" in said


class Poisoned(SimCLR):
    """The update of the step from 4 to 5 is no number."""

    def train_step(self, state, batch, key):
        new, metrics = super().train_step(state, batch, key)
        spoil = jnp.where(state.step == 4, jnp.log(-1.0 - state.step), 1.0)
        return new.replace(params=jax.tree.map(lambda x: x * spoil, new.params)), metrics


def poisoned(c, workdir):
    return loop.train(Poisoned, c, workdir, make_evaluator, make_mesh(jax.devices()[:1]))


@pytest.mark.slow  # `test_replay.py` does it with a method that compiles in no time
def test_a_run_that_stopped_is_played_again(tmp_path, capsys, monkeypatch):
    with pytest.raises(UserError, match="nothing to replay"):
        replay.replay(tmp_path, main.METHODS)
    c = small("simclr", checkpoint__every="2 steps", evaluate__every="0 steps", log_every=1)
    with pytest.raises(NonFiniteLossError, match=r"^loss is nan at step 6: .*--mode=replay"):
        poisoned(c, tmp_path)  # the loss of step 5 was good, and no checkpoint was due there
    monkeypatch.setattr(replay, "make_mesh", lambda: make_mesh(jax.devices()[:1]))
    found = replay.replay(str(tmp_path), {"simclr": Poisoned})
    assert found["step"] == 6 and found["same_batch"]
    assert found["before"][0].startswith("params/") and "loss" in found["metrics"]
    said = capsys.readouterr().err
    assert "replaying steps 5 to 6" in said and "not finite before it: params/" in said
    assert "first NaN" in said


@pytest.mark.slow  # as does `test_restarts.py`
def test_a_run_that_skips_ends_and_counts(tmp_path):
    c = small("simclr", on_nonfinite="skip", evaluate__every="0 steps", log_every=1)
    assert poisoned(c, tmp_path)["steps"] == TOTAL
    counts = {r["step"]: r["skipped_steps"] for r in lines(tmp_path) if "loss" in r}
    assert counts == {1: 0, 2: 0, 3: 0, 4: 0, 5: 1, 6: 1, 7: 1}
