"""`--mode=replay` starts where the run started, and takes its steps."""

import jax
import jax.numpy as jnp
import pytest
import toy
from test_end_to_end import lines

from common.run.writer import NonFiniteLossError
from common.sharding import make_mesh
from common.train import first_state, replay

W = ["params/backbone/w"]


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(replay, "make_mesh", lambda: make_mesh(jax.devices()[:1]))


def written(workdir):
    """All files, and when they were written."""
    return {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}


def replayed(c, workdir, method, step):
    """What is found of a run that stops in a step."""
    with pytest.raises(NonFiniteLossError, match=f"at step {step}: "):
        toy.train(c, workdir, method)
    before = written(workdir)
    found = replay.replay(str(workdir), {"simclr": method})
    assert written(workdir) == before
    assert (found["step"], found["same_batch"]) == (step, True)
    return found


def test_a_run_without_a_checkpoint_is_replayed_from_its_start(tmp_path, capsys):
    found = replayed(toy.config(), tmp_path, toy.with_nan_at(2), 2)
    assert (found["before"], found["after"], found["metrics"]) == ([], W, ["loss"])
    assert "nan" in found["where"]
    said = capsys.readouterr().err
    assert "replaying steps 1 to 2" in said and "step 2 on the batch noted: loss nan" in said


class WithBadUpdate(toy.Toy):
    """The loss of step 3 is good, and what it makes of the weight is not."""

    def train_step(self, state, batch, key):
        new, metrics = super().train_step(state, batch, key)
        bad = jnp.where(new.step == 3, jnp.nan, 0)
        return new.replace(params=jax.tree.map(lambda w: w + bad, new.params)), metrics


def test_the_numbers_are_those_of_the_run(tmp_path, capsys):
    found = replayed(toy.config(checkpoint__every="1 step"), tmp_path, WithBadUpdate, 3)
    assert (found["before"], found["after"], found["metrics"]) == ([], W, [])
    loss = lines(tmp_path)[-1]["loss"]
    assert f"step 3 on the batch noted: loss {loss}, " in capsys.readouterr().err


class OfLargeWeights(toy.Toy):
    """No number as soon as the weight is large, as it is not drawn."""

    def train_step(self, state, batch, key):
        state, metrics = super().train_step(state, batch, key)
        large = jnp.where(state.params["backbone"]["w"][0] > 50, jnp.nan, 0)
        return state, metrics | {"loss": metrics["loss"] + large}


def heavy(run, weights):
    """In the place of `with_weights`: a weight of 100."""
    state = run.method.init(run.init_key)
    params = jax.tree.map(lambda x: x * 0 + 100, state.params)
    return jax.device_put(state.replace(params=params), run.shardings), False


@pytest.mark.parametrize("field", ["init_from", "resume_from"])
def test_a_run_from_given_weights_is_replayed_from_them(field, tmp_path, monkeypatch):
    monkeypatch.setattr(first_state, "load_weights", lambda path: path)
    monkeypatch.setattr(first_state, "with_weights", heavy)
    other = tmp_path / "other"
    if field == "resume_from":
        toy.train(toy.config(init_from="weights", duration="1 step"), other)
    c = toy.config(**{field: str(other)})
    found = replayed(c, tmp_path / "run", OfLargeWeights, 1)
    assert (found["before"], found["metrics"]) == ([], ["loss"])


def test_a_run_that_skipped_too_often_is_replayed_without_the_updates_it_dropped(tmp_path):
    c = toy.config(on_nonfinite="skip", max_skipped=2)
    found = replayed(c, tmp_path, toy.with_nan_at(4, 5), 5)
    assert (found["before"], found["after"], found["metrics"]) == ([], W, ["loss"])


@pytest.mark.slow
def test_of_steps_that_were_taken_at_a_time_the_operation_is_named(tmp_path):
    """Not the loop over them."""
    off = {f"augment__{name}": 0.0 for name in ("jitter", "grey", "blur")}  # quicker
    c = toy.config(data__augment_on="device", steps_per_dispatch=3, **off)
    found = replayed(c, tmp_path, toy.with_nan_at(3), 3)
    assert (found["before"], found["after"], found["metrics"]) == ([], W, ["loss"])
    assert "nan" in found["where"] and "toy.py, line" in found["where"]
