"""Checkpoints: exact, placed as asked; only those count that are complete and undamaged."""

import gc
import re
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from common import queue as queues
from common.errors import UserError
from common.run import checkpoint, digests
from common.run.checkpoint import Checkpoints
from common.sharding import batch_sharding, make_mesh, replicated, state_shardings

# Orbax leaves the coroutines that it had begun when it stops at a broken file: Python may find them
# in the test after the one that broke it.
pytestmark = pytest.mark.filterwarnings(
    "ignore:coroutine:RuntimeWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(autouse=True)
def no_leftovers_for_other_files():
    yield
    gc.collect()


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


@pytest.mark.parametrize("devices", [1, 4])
def test_digests_do_not_depend_on_the_sharding(devices):
    """Against the NumPy form on whole arrays, for every width of element."""
    mesh = make_mesh(jax.devices()[:devices])
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        host = {
            "f64": rng.normal(size=(4, 3)),
            "f32": rng.normal(size=(3, 8, 2)).astype(np.float32),
            "bf16": np.asarray(jnp.asarray(rng.normal(size=(8, 2)), jnp.bfloat16)),
            "i8": rng.integers(-99, 99, (8,)).astype(np.int8),
            "flag": rng.integers(0, 2, (8,)) > 0,
            "scalar": np.int32(-7),
            "empty": np.zeros((0, 4), np.float32),
        }
        host["f32"][0, 0, 0] = np.nan
        place = {k: batch_sharding(mesh) if k in ("f64", "bf16", "i8") else replicated(mesh)
                 for k in host}  # fmt: skip
        placed = {k: jax.device_put(x, place[k]) for k, x in host.items()}
        got = digests.of_state(placed)
        assert got == {k: digests.of_array(np.asarray(x)) for k, x in host.items()}
        swapped = host["f32"][::-1]
        assert digests.of_array(swapped) != got["f32"]  # the same elements at other places
        for bit in range(32):
            flipped = host["f32"].copy()
            flipped.view(np.uint32)[1, 2, 1] ^= np.uint32(1 << bit)
            assert digests.of_array(flipped) != got["f32"]


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[len(data) // 2] ^= 4
    path.write_bytes(data[: len(data) // 2] if how == "truncated" else data)


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with checkpoints of steps 3 and 5; one array makes up nearly all of the bytes."""
    mesh = make_mesh(jax.devices()[:2])
    w = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)
    shardings = {"w": replicated(mesh), "rows": batch_sharding(mesh)}
    s = jax.device_put({"w": w, "rows": np.arange(8)}, shardings)
    workdir = tmp_path_factory.mktemp("saved")
    with Checkpoints(workdir, 2) as checkpoints:
        for step in (3, 5):
            checkpoints.save(step, s, {"position": step})
    return workdir, s, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), s), shardings


@pytest.fixture
def two(saved, tmp_path):
    """A copy of it, in `tmp_path`."""
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    return saved[1:]


@pytest.mark.parametrize("part", ["array", "progress", "tree"])
@pytest.mark.parametrize("how", ["flipped", "truncated"])
def test_a_damaged_newest_checkpoint_is_set_aside(part, how, two, tmp_path, caplog):
    s, abstract, shardings = two
    newest = tmp_path / "checkpoints" / "5"
    damage({"array": largest(newest / "state"), "progress": newest / "progress" / "metadata",
            "tree": newest / "state" / "_METADATA"}[part], how)  # fmt: skip
    with Checkpoints(tmp_path, 2) as checkpoints:
        step, got, progress = checkpoints.restore_newest(abstract, shardings)
        assert (step, progress) == (3, {"position": 3})
        assert_equal(got, s)
        assert checkpoints.all_steps() == [3]
        checkpoints.save(5, s, {"position": 5})  # it comes by this step again
    if (part, how) == ("array", "truncated"):  # it is named, and so is its file
        assert re.search(r'Error reading "(w|rows)/', caplog.text), caplog.text
    assert "step 5 is damaged" in caplog.text and "going on from that of step 3" in caplog.text
    assert [p.name for p in (tmp_path / "damaged_checkpoints").iterdir()] == ["5"]
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.restore_newest(abstract, shardings)[0] == 5


class Recorder:
    """A function, and what it was called with."""

    def __init__(self, function):
        self.function, self.calls = function, []

    def __call__(self, *arguments):
        self.calls.append(arguments)
        return self.function(*arguments)


def test_one_process_reads_a_checkpoint_once(two, tmp_path, monkeypatch):
    """Process 0 of several reads it before all do; alone it would be the same read twice."""
    s, abstract, shardings = two
    monkeypatch.setattr(Checkpoints, "read", lambda *_: pytest.fail("read twice"))
    with Checkpoints(tmp_path, 2) as checkpoints:
        step, got, _ = checkpoints.restore_newest(abstract, shardings)
    assert step == 5
    assert_equal(got, s)


def test_of_several_processes_one_reads_first(two, tmp_path, monkeypatch):
    """What it finds damaged none of them restores."""
    _, abstract, shardings = two
    monkeypatch.setattr(checkpoint, "_several_processes", lambda: True)
    damage(largest(tmp_path / "checkpoints" / "5" / "state"), "flipped")
    with Checkpoints(tmp_path, 2) as checkpoints:
        monkeypatch.setattr(checkpoints, "restore", restored := Recorder(checkpoints.restore))
        assert checkpoints.restore_newest(abstract, shardings)[0] == 3
    assert [step for step, *_ in restored.calls] == [3]


def test_when_all_are_damaged_none_is_touched(two, tmp_path):
    _, abstract, shardings = two
    for step in ("3", "5"):
        damage(largest(tmp_path / "checkpoints" / step / "state"), "flipped")
    with Checkpoints(tmp_path, 2) as checkpoints:
        with pytest.raises(
            UserError, match=r"step 5 in .* damaged .*those of step 3: restore the f"
        ):
            checkpoints.restore_newest(abstract, shardings)
        assert checkpoints.all_steps() == [3, 5]
    assert not (tmp_path / "damaged_checkpoints").exists()


def test_reading_only_notices_damage_and_changes_nothing(two, tmp_path):
    _, abstract, shardings = two
    part = {"w": abstract["w"]}
    half = tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp"  # a run is writing this now
    half.mkdir()
    with Checkpoints(tmp_path, None, read_only=True) as checkpoints:
        assert checkpoints.restore_part(5, part, {"w": shardings["w"]})["w"].shape == (64, 256)
        damage(largest(tmp_path / "checkpoints" / "5" / "state"), "flipped")
        with pytest.raises(UserError, match=r"the checkpoint of step 5 in .* is damaged"):
            checkpoints.restore_part(5, part, {"w": shardings["w"]})
    assert half.exists() and (tmp_path / "checkpoints" / "5").exists()


def test_whatever_a_reader_makes_of_a_damaged_part_is_one_line(two, tmp_path, monkeypatch):
    _, abstract, shardings = two

    def fail(*_, **__):
        raise Exception("one of no special kind")  # as Orbax does of some truncated files

    with Checkpoints(tmp_path, None, read_only=True) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "restore", fail)
        with pytest.raises(UserError, match=r"step 5 in .* is damaged .*one of no special kind"):
            checkpoints.restore_part(5, {"w": abstract["w"]}, {"w": shardings["w"]})


def test_a_value_that_changed_on_its_way_is_named(two, tmp_path):
    """A record beside the state that parses well and says something else."""
    _, abstract, shardings = two
    path = tmp_path / "checkpoints" / "5" / "progress" / "metadata"
    path.write_text(path.read_text().replace('"position": 5', '"position": 7'))
    with Checkpoints(tmp_path, 2) as checkpoints, pytest.raises(UserError, match="beside the st"):
        checkpoints.restore(5, abstract, shardings)


def test_checkpoints_of_before_there_were_digests_are_read(two, tmp_path, caplog):
    _, abstract, shardings = two
    path = tmp_path / "checkpoints" / "5" / "progress" / "metadata"
    path.write_text('{"position": 5}')
    with Checkpoints(tmp_path, 2) as checkpoints:
        step, _, progress = checkpoints.restore_newest(abstract, shardings)
    assert (step, progress) == (5, {"position": 5}) and "without digests" in caplog.text


def test_which_checkpoints_stay(tmp_path):
    """The last two, the first of each ten steps, and the two best (of equal scores the older)."""
    s = {"w": jax.device_put(np.zeros(3, np.float32), replicated(make_mesh(jax.devices()[:1])))}
    scores = {4: 0.5, 8: 0.9, 10: 0.1, 14: 0.9, 20: None, 24: 0.2, 28: 0.3}
    for steps in ([4, 8, 10], [14, 20, 24, 28]):  # also after a restart
        with Checkpoints(tmp_path, 2, every=10, best=2) as checkpoints:
            for step in steps:
                checkpoints.save(step, s, {"results": {"knn_top1": scores[step]}})
    assert checkpoints.all_steps() == [8, 10, 14, 20, 24, 28]


# tensorstore may report a writer that failed after the loop that waited for it is gone
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_one_line_and_costs_no_older_checkpoint(two, tmp_path):
    """The limit on the size of a file stands for it: a write fails in the middle."""
    s, abstract, shardings = two
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    said = r"cannot write the checkpoint of step 7 .*: make room .* resumes from step 5"
    with Checkpoints(tmp_path, 1) as checkpoints:
        # less than half of `w`: each device writes one, at times into a file of its own
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        try:
            with pytest.raises(UserError, match=said) as caught:
                checkpoints.save(7, s, {"position": 7})
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert "\n" not in str(caught.value)
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.restore_newest(abstract, shardings)[0] == 5
        # a failed writer may still be tidying up its unfinished directory: it must not count
        assert checkpoints.all_steps() == [3, 5]


def test_a_save_that_failed_shows_as_soon_as_it_has_ended(tmp_path, monkeypatch):
    """The loop asks at each log line, and must not wait there for a save that still goes on."""

    def failed():
        raise OSError("no space left")

    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.check()  # nothing has been saved
        monkeypatch.setattr(checkpoints._manager, "wait_until_finished", failed)
        checkpoints._writing = 7
        monkeypatch.setattr(checkpoints._manager, "is_saving_in_progress", lambda: True)
        checkpoints.check()
        monkeypatch.setattr(checkpoints._manager, "is_saving_in_progress", lambda: False)
        with pytest.raises(UserError, match=r"step 7 .*no space left.* starts from scratch"):
            checkpoints.check()
        checkpoints.check()  # it was said
