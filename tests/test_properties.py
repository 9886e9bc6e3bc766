"""Properties of the parts that count: queue, schedules, durations, shares of a batch, padding."""

import jax
import numpy as np
import pytest

hypothesis = pytest.importorskip("hypothesis")  # comes with requirements.txt
from hypothesis import given
from hypothesis import strategies as st

from common import config as configs
from common import queue as queues
from common.data.feed import pipeline
from common.data.order import order
from common.data.sources import tfrecords
from common.data.sources.opening import open_source
from common.data.sources.tfrecords import Shard
from common.errors import UserError
from common.optim import learning_rate_schedule, steps_of
from common.run import digests
from common.sharding import local_rows, make_mesh

# the same examples each time, and few: this is to be quick
quick = hypothesis.settings(max_examples=25, derandomize=True, deadline=None, database=None)
small = st.integers(1, 40)


@quick
@given(length=small, rows=small, pushes=st.integers(0, 100))
def test_the_queue_counts_the_last_keys_and_no_others(length, rows, pushes):
    """Against a list that grows: entries are numbered by when they were pushed."""
    count = queues.slots(length, rows)
    age = np.full((count, rows), -1)
    for step in range(pushes):
        age[step % count] = step * rows + np.arange(rows)
    mask = np.asarray(queues.mask(length, rows, pushes))
    assert mask.sum() == length and mask.shape == (count, rows)
    pushed = sorted(age[mask & (age >= 0)].tolist())
    assert pushed == list(range(pushes * rows))[-length:]


@quick
@given(steps=st.integers(0, 10**6), per_epoch=st.integers(1, 10**4))
def test_a_duration_in_steps_is_those_steps(steps, per_epoch):
    for text in (f"{steps} steps", f"{steps}step", steps):
        assert steps_of(text, per_epoch) == steps
    assert steps_of(f"{steps} epochs", per_epoch) == steps * per_epoch


@quick
@given(percent=st.floats(0, 100), total=st.integers(1, 10**6))
def test_a_percentage_is_that_part_and_only_nothing_is_nothing(percent, total):
    steps = steps_of(f"{percent:.6f} %", 7, total)
    assert abs(steps - round(percent, 6) / 100 * total) <= 1
    assert (steps == 0) == (float(f"{percent:.6f}") == 0)


@quick
@given(text=st.text(max_size=12))
def test_any_other_text_is_a_user_error_of_one_line(text):
    try:
        assert steps_of(text, 10, 100) >= 0
    except UserError as error:
        assert "duration" in str(error)


@quick
@given(
    name=st.sampled_from(["cosine", "constant"]),
    warmup=st.integers(0, 50),
    total=st.integers(51, 200),
    peak=st.floats(1e-3, 10.0),
)
def test_a_schedule_rises_to_its_peak_and_never_leaves_its_bounds(name, warmup, total, peak):
    c = configs.section("optimizer")
    c.schedule, c.warmup, c.learning_rate, c.scaling = name, f"{warmup} steps", peak, "none"
    schedule = learning_rate_schedule(c, 256, total, 10)
    rates = np.array([float(schedule(s)) for s in (*range(0, total, 7), warmup, total)])
    assert (rates >= -1e-9).all() and (rates <= peak * (1 + 1e-5)).all()
    np.testing.assert_allclose(float(schedule(warmup)), peak, rtol=1e-5)


@quick
@given(devices=st.sampled_from([1, 2, 4, 8]), each=st.integers(1, 9))
def test_the_rows_of_all_devices_are_the_batch(devices, each):
    mesh = make_mesh(jax.devices()[:devices])
    np.testing.assert_array_equal(local_rows(mesh, devices * each), np.arange(devices * each))


@quick
@given(takes=st.lists(st.integers(1, 30), min_size=1, max_size=8), count=st.integers(1, 9))
def test_processes_share_the_files_of_a_set_without_overlap(takes, count):
    firsts = np.cumsum([0, *takes])
    shards = [
        Shard(str(i), 5, n, int(f)) for i, (n, f) in enumerate(zip(takes, firsts, strict=False))
    ]
    read = []
    for index in range(count):
        start, end = tfrecords.process_range(sum(takes), index, count)
        parts = tfrecords.select_range(shards, start, end)
        assert sum(p.take for p in parts) == end - start
        for p in parts:
            whole = shards[int(p.path)]
            assert p.skip >= whole.skip and p.skip + p.take <= whole.skip + whole.take
            read += range(p.first, p.first + p.take)
    assert read == list(range(sum(takes)))


@quick
@given(n=st.integers(1, 60), batch=st.integers(1, 16), size=st.sampled_from([1, 2, 4]))
def test_padding_hides_nothing_and_shows_nothing_twice(n, batch, size):
    """Every example once under the mask, and every process the same number of batches."""
    from test_sources import config

    batch *= size
    source = open_source(config("fake", fake_examples=n, image_size=4), "train")
    seen, lengths = [], set()
    for index in range(size):
        rows = np.arange(index, batch, size)
        batches = list(pipeline.eval_batches(source, batch, 4, rows))
        lengths.add(len(batches))
        for b in batches:
            assert len(b["ids"]) == len(rows)
            assert (b["labels"][~b["mask"]] == -1).all() and not b["images"][~b["mask"]].any()
            seen += b["ids"][b["mask"]].tolist()
    assert sorted(seen) == list(range(n)) and len(lengths) == 1


@quick
@given(seed=st.integers(0, 2**31), epoch=st.integers(0, 1000), n=st.integers(1, 500))
def test_an_epoch_is_every_example_once(seed, epoch, n):
    assert sorted(order(seed, epoch, n).tolist()) == list(range(n))


leaves = st.one_of(st.integers(-9, 9), st.booleans(), st.text(max_size=3), st.none())
trees = st.dictionaries(
    st.sampled_from("abc"), st.one_of(leaves, st.dictionaries(st.sampled_from("xy"), leaves))
)


@quick
@given(a=trees, b=trees)
def test_a_config_is_the_same_run_as_itself_and_as_no_other(a, b):
    configs.check_same_run(a, a, "here")

    def on(tree):
        return {k: v for k, v in configs.flatten(tree).items() if v}

    def known(tree, key):
        return key in configs.flatten(tree)

    keys = configs.flatten(a).keys() | configs.flatten(b).keys()
    same = all(configs.flatten(a).get(k) == configs.flatten(b).get(k, ...) if known(a, k)
               else k not in on(b) for k in keys)  # fmt: skip
    if same:
        configs.check_same_run(a, b, "here")
    else:
        with pytest.raises(UserError, match="another config"):
            configs.check_same_run(a, b, "here")


@quick
@given(data=st.binary(min_size=4, max_size=64), bit=st.integers(0, 511))
def test_every_flipped_bit_changes_the_digest(data, bit):
    array = np.frombuffer(data[: len(data) // 4 * 4], np.uint32)
    flipped = array.copy()
    flipped.view(np.uint8)[bit // 8 % flipped.nbytes] ^= np.uint8(1 << bit % 8)
    assert digests.of_array(array) != digests.of_array(flipped)
