"""How long a run is said to take: the arithmetic, when it is said, and what is advised."""

import types

import jax
import pytest
import tiny

from common.train import forecast
from common.train.milestones import Due


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.2, "1 second"), (14.4, "14 seconds"), (99, "99 seconds"), (120, "2 minutes"),
        (5_999, "100 minutes"), (6_100, "2 hours"), (47 * 3600, "47 hours"), (49 * 3600, "2 days"),
        (5 * 86_400, "5 days"),
    ],
)  # fmt: skip
def test_a_duration_in_words(seconds, expected):
    assert forecast.in_words(seconds) == f"about {expected}"


def test_the_rate_of_a_device_is_that_of_a_matrix_product(monkeypatch):
    now = iter([0.0, 0.5, 1.0, 1.25, 2.0, 3.0])
    monkeypatch.setattr(forecast.time, "perf_counter", lambda: next(now))
    assert forecast.rate(jax.devices()[0], "float32") == 2 * 1024**3 / 0.25


class Clock:
    """Time that passes when a test says so."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(forecast.time, "perf_counter", lambda: self.now)


@pytest.fixture
def run(monkeypatch):
    """A run of `total` steps of 16 images, ten steps an epoch, and what is said of it."""

    def make(total, flops=0.0, evaluate=0, start=0, platform="cpu"):
        prepared = tiny.prepared(tiny.config("simclr"), devices=1)
        extent = types.SimpleNamespace(total_steps=total, steps_per_epoch=10)
        device = types.SimpleNamespace(platform=platform, device_kind="a device")
        stand_in = types.SimpleNamespace(
            extent=extent, config=prepared.config, setup=prepared.setup,
            mesh=types.SimpleNamespace(local_devices=[device], size=2),
        )  # fmt: skip
        monkeypatch.setattr(forecast, "cost", lambda step, parts: {"flops": flops})
        monkeypatch.setattr(forecast, "rate", lambda device, dtype: 1e9)
        said = []
        monkeypatch.setattr(forecast.console, "say", said.append)
        due = Due(total, checkpoint=0, evaluate=evaluate)
        return forecast.Forecast(stand_in, due, start), said

    return make


def test_before_the_first_step_from_the_arithmetic(run):
    made, said = run(1_000, flops=0.24e9)
    made.before(None)  # 1,000 steps x 0.24 GFLOP / (0.4 x 1 GFLOP/s)
    assert said == [
        "Expected: about 10 minutes, from its arithmetic alone; measured after 20 to 40 steps."
    ]
    made, said = run(1_000, flops=0.24e9, start=500)
    made.before(None)
    assert "about 5 minutes" in said[0]
    made, said = run(30, flops=0.24e9)
    made.before(None)
    assert said == ["Expected: about 18 seconds, from its arithmetic alone."]
    for total, flops in ((1_000, 0.0), (20, 1e9)):
        made, said = run(total, flops=flops)
        made.before(None)
        assert not said


def test_after_twenty_steps_from_the_clock(run, monkeypatch):
    """2 s a step after the first, and 30 s for each of the evaluations at 50, 100 and the end."""
    clock = Clock(monkeypatch)
    made, said = run(120, evaluate=50)
    made.before(None)
    clock.now += 60  # scores of raw pixels and of the untrained encoder
    made.begin()
    for step in range(1, 121):
        clock.now += 9 if step == 1 else 2
        made.after(step)
        assert bool(said) == (step >= 21)
    assert said == ["20 steps took about 40 seconds (8 images/s): about 5 minutes to go, with 3 "
                    "evaluations."]  # fmt: skip
    # 99 steps x 2 s + 3 x 30 s = 288 s


def test_a_pause_is_not_counted_as_steps(run, monkeypatch):
    clock = Clock(monkeypatch)
    made, said = run(1_000, evaluate=15)
    made.before(None)
    made.begin()
    for step in range(1, 60):
        clock.now += 1
        if step in (15, 30):  # an evaluation belongs to the step it follows
            clock.now += 500
        made.after(step)
    assert not said  # there were never twenty steps between two evaluations
    made, said = run(1_000, evaluate=25)
    made.begin()
    for step in (*range(1, 26), *range(26, 50)):
        clock.now += 1 + 500 * (step == 25)
        made.after(step)
    assert said[0].startswith("20 steps took about 20 seconds (16 images/s): about 16 minutes")


def test_a_run_of_many_pauses_is_measured_by_the_rate_of_the_log(run, monkeypatch):
    clock = Clock(monkeypatch)
    made, said = run(1_000, evaluate=15)
    made.before(None)
    made.begin()
    for step in range(1, 60):
        clock.now += 1 + 500 * (step % 15 == 0)
        made.after(step, 8.0 if step > 10 else None)
        assert bool(said) == (step >= 40)
    assert said[0].startswith("40 steps took about 80 seconds (8 images/s): about 32 minutes to go")
    made, said = run(40, evaluate=15)
    for step in range(1, 41):
        made.after(step, 8.0)
    assert not said  # nothing is left


def test_several_steps_in_one_dispatch(run, monkeypatch):
    clock = Clock(monkeypatch)
    made, said = run(500)
    made.begin()
    for step in (50, 100, 150):
        clock.now += 10
        made.after(step)
    assert said[0].startswith("50 steps took about 10 seconds (80 images/s): about 80 seconds")


@pytest.mark.parametrize(
    ("platform", "words"),
    [
        ("cpu", ["2 x a device", "simclr_photos.py:laptop", 'duration="4 epochs"']),
        ("gpu", ["simclr_photos.py or moco_photos.py"]),
        ("tpu", ["That is long"]),
    ],
)
def test_days_are_said_and_a_smaller_recipe_is_named(run, platform, words):
    made, said = run(100, flops=0.86e12, platform=platform)
    made.before(None)  # on a CPU 215,000 s, of which a day is 40 %: 4 of 10 epochs
    assert len(said) == 2 and all(word in said[1] for word in words)
    assert platform != "tpu" or "configs/" not in said[1]
    short, said = run(100, flops=0.3e12, platform=platform)
    short.before(None)
    assert ("That is long" in "".join(said)) == (platform != "cpu")
