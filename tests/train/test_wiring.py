"""What the training loop hands to whom, and when, seen with a method that costs nothing."""

import contextlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from test_end_to_end import TOTAL, lines

from common.data.sources import fake
from common.data.sources.fake import FakeSource
from common.errors import UserError
from common.evaluate import online
from common.method import root_keys
from common.run import workdir as workdirs
from common.run.checkpoint import Checkpoints
from common.run.writer import NonFiniteLossError
from common.train import dispatch, loop, milestones
from common.train.profiling import Profile


class Halves(FakeSource):
    """Images whose upper or lower half is light: the label says which, in the test set the other.

    A split named "like_test" has the labels of the test set.
    """

    def read(self, ids):
        lower = self.labels[ids] != (self.split in ("test", "like_test"))
        images = np.zeros((len(ids), 2, *self.image_shape, 3), np.uint8)
        images[np.arange(len(ids)), lower.astype(int)] = 200
        h, w = self.image_shape
        images = images[:, :, : h // 2].reshape(len(ids), h, w, 3)
        return images, self.labels[ids]


@pytest.mark.parametrize(
    ("bank_split", "right"), [("", 0.0), ("like_test", 1.0)], ids=["train", "bank"]
)
def test_the_train_split_votes_unless_there_is_a_bank(bank_split, right, tmp_path, monkeypatch):
    """Test labels are the opposite of those of training: by their votes kNN is always wrong."""
    monkeypatch.setattr(fake, "FakeSource", Halves)
    handed = []

    def make_evaluator(run, bank, test):
        handed.extend(source.split for source in (bank, test))
        return online.make_evaluator(run, bank, test)

    c = toy.config(
        data__test_split="test", data__bank_split=bank_split, data__fake_classes=2,
        duration="1 step", evaluate__every="1 step",
    )  # fmt: skip
    summary = toy.train(c, tmp_path, make_evaluator=make_evaluator)
    assert handed == [bank_split or "train", "test"]  # the other way round the scores are the same
    scores = [summary[f"knn_top1{name}"] for name in ("", "_at_init", "_raw_pixels")]
    assert scores == [right] * 3


@pytest.mark.parametrize(
    ("every", "steps"), [("0 steps", [0, 7]), ("2 steps", [0, 2, 4, 6, 7])], ids=["end", "often"]
)
def test_scores_are_made_when_they_are_due_and_at_the_end(every, steps, tmp_path):
    c = toy.config(evaluate__every=every, checkpoint__every="0 steps")
    summary = toy.train(c, tmp_path, make_evaluator=toy.scored(toy.SCORES))
    found = {r["step"]: r["knn_top1"] for r in lines(tmp_path) if "knn_top1" in r}
    assert found == {step: toy.SCORES[step] for step in steps}
    names = ("knn_top1", "probe_top1", "knn_top1_at_init", "knn_top1_raw_pixels")
    assert [summary[name] for name in names] == [0.7, 0.35, 0.0, 0.25]
    assert summary["dataset"] == "fake (train)"
    assert toy.saved_steps(tmp_path) == [TOTAL]


def test_checkpoints_stay_as_the_config_says(tmp_path):
    """The newest, the first of each 4 steps, and the best."""
    c = toy.config(
        evaluate__every="1 step", checkpoint__every="1 step", checkpoint__keep=1,
        checkpoint__keep_every="2 epochs", checkpoint__keep_best=1,
    )  # fmt: skip
    toy.train(c, tmp_path, make_evaluator=toy.scored(toy.SCORES))
    assert toy.saved_steps(tmp_path) == [2, 4, 7]


def test_a_run_of_one_step_has_the_rate_of_that_step(tmp_path, monkeypatch):
    clock = types.SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr(milestones, "time", clock)

    def wait(n):
        clock.now += 10

    with toy.before_each_step(wait):
        summary = toy.train(toy.config(duration="1 step"), tmp_path)
    assert summary["images_per_second"] == 0.8


def test_a_run_whose_workdir_was_taken_over_stops_before_it_saves(tmp_path, monkeypatch):
    class Lock:
        checks = 0

        def check(self):
            self.checks += 1
            if self.checks == 2:
                raise UserError("in use by another run")

    monkeypatch.setattr(workdirs.lock, "hold", lambda _: contextlib.nullcontext(Lock()))
    with pytest.raises(UserError, match="in use by another run"):
        toy.train(toy.config(), tmp_path)
    assert toy.saved_steps(tmp_path) == [3]


def test_a_save_that_failed_shows_at_the_next_line(tmp_path, monkeypatch):
    """And not only when the next one is due, at step 6."""

    def check(checkpoints):
        if checkpoints._writing == 3:
            raise UserError("cannot write")

    monkeypatch.setattr(Checkpoints, "check", check)
    with toy.before_each_step(lambda n: None) as taken, pytest.raises(UserError, match="write"):
        toy.train(toy.config(log_every=1), tmp_path)
    assert len(taken) == 4


def test_a_bad_loss_is_seen_while_few_steps_are_in_flight(tmp_path):
    c = toy.config(checkpoint__every="0 steps", log_every=9)
    stopped = pytest.raises(NonFiniteLossError, match="loss is nan at step 2")
    with toy.before_each_step(lambda n: None) as taken, stopped:
        toy.train(c, tmp_path, toy.with_nan_at(2))
    assert len(taken) <= 2 + loop.IN_FLIGHT
    assert toy.reproduction(tmp_path, 2)["checkpoint"] is None


def spoil(monkeypatch, change):
    """Passes what each step returns through `change(step, state, metrics)`."""
    compile_step, taken = loop.compile_step, iter(range(1, 100))

    def compiled(*arguments):
        step_fn = compile_step(*arguments)

        def step(state, batch, key):
            out = step_fn(state, batch, key)
            with jax.transfer_guard("allow"):
                return change(next(taken), *out)

        step.cost_analysis = step_fn.cost_analysis
        return step

    monkeypatch.setattr(loop, "compile_step", compiled)


def test_a_bad_loss_between_log_lines_names_its_step(tmp_path, monkeypatch):
    """The loss of step 5 is made NaN; lines are due at 1, 3, 6, a checkpoint at 2, 4, 6."""

    def change(step, state, metrics):
        return state, metrics | {"loss": metrics["loss"] * (np.nan if step >= 5 else 1)}

    spoil(monkeypatch, change)
    with pytest.raises(NonFiniteLossError, match=r"^loss is nan at step 5: .*learning rate"):
        toy.train(toy.config(checkpoint__every="2 steps"), tmp_path)
    assert toy.saved_steps(tmp_path) == [2, 4]
    assert not (tmp_path / "summary.json").exists()


def test_a_broken_state_is_not_saved_though_its_loss_was_finite(tmp_path, monkeypatch):
    """A step's loss is computed before its update, so it cannot tell what the update did."""

    def change(step, state, metrics):
        if step == 4:
            state = state.replace(params=jax.tree.map(lambda x: x * np.nan, state.params))
        return state, metrics

    spoil(monkeypatch, change)
    with pytest.raises(NonFiniteLossError, match=r"^the state is not finite at step 4: "):
        toy.train(toy.config(checkpoint__every="2 steps"), tmp_path)
    assert toy.saved_steps(tmp_path) == [2]


def test_the_method_gets_the_key_and_the_schedule_of_the_run(tmp_path):
    c = toy.config(log_every=1, optimizer__warmup="1 epoch")
    toy.train(c, tmp_path)
    records = lines(tmp_path)
    key = root_keys(c.seed)[1]
    noise = [float(jax.random.uniform(jax.random.fold_in(key, t))) for t in range(TOTAL)]
    np.testing.assert_allclose([r["noise"] for r in records], noise, rtol=1e-6)
    rest = [(1 + np.cos(np.pi * t / 5)) / 2 for t in range(5)]
    want = 0.05 * np.array([1 / 3, 2 / 3, *rest])
    np.testing.assert_allclose([r["learning_rate"] for r in records], want, rtol=1e-5)
    assert [r["epoch"] for r in records] == [0.5, 1, 1.5, 2, 2.5, 3, 3.5]


@pytest.mark.parametrize("most", [1, 5])
def test_a_dispatch_ends_where_something_is_due(most, tmp_path, monkeypatch):
    """A line (1, 7), scores (4), a checkpoint (6), and the edges of a trace of step 3."""
    firsts = []

    class Traced(Profile):
        def step(self, first):
            firsts.append(first)
            return contextlib.nullcontext()

    def views(function, images, parameters, **_):
        return jnp.stack([images, images], axis=1)

    monkeypatch.setattr(loop, "Profile", Traced)
    monkeypatch.setattr(dispatch.on_device, "views", views)  # those take long to compile
    c = toy.config(
        data__augment_on="device", steps_per_dispatch=most, profile="3:3", log_every=7,
        evaluate__every="4 steps", checkpoint__every="6 steps",
    )  # fmt: skip
    toy.train(c, tmp_path, make_evaluator=toy.scored(toy.SCORES))
    assert firsts == ([1, 2, 3, 4, 5, 7] if most > 1 else [1, 2, 3, 4, 5, 6, 7])
    assert [r["step"] for r in lines(tmp_path) if "loss" in r] == [1, 7]
    assert [r["step"] for r in lines(tmp_path) if "knn_top1" in r] == [0, 4, 7]
    assert toy.saved_steps(tmp_path) == [6, 7]
    assert toy.weight(tmp_path, 7) == pytest.approx(toy.weight(tmp_path, 6) + 1)
