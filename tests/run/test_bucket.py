"""A whole run in an object store: `gs://...` for the workdir and for the data."""

import json

import jax
import pytest
from absl import flags
from bucket import Refused, mounted
from etils import epath
from test_end_to_end import Killed, kill_before, lines, small
from test_writer import read_events

import main
from common.cli import command_line, modes
from common.data.sources import shard_writer
from common.data.sources.opening import open_source
from common.errors import UserError
from common.evaluate.online import make_evaluator
from common.run import files
from common.run.checkpoint import Checkpoints
from common.sharding import make_mesh
from common.train import loop


def test_the_bucket_refuses_what_a_store_cannot_do(tmp_path, monkeypatch):
    with mounted(tmp_path, monkeypatch):
        path = epath.Path("gs://b/x.txt")
        path.write_text("1")
        assert path.read_text() == "1" and (tmp_path / "b" / "x.txt").exists()
        with pytest.raises(Refused):
            path.open("a")
        with pytest.raises(Refused):
            path.replace("gs://b/y.txt")
        with pytest.raises(Refused):
            path.rename("gs://b/y.txt")


class Unreachable(RuntimeError):
    """Of TensorFlow's kind: no OSError, and two lines long."""

    __module__ = "tensorflow.python.framework.errors_impl"


@pytest.mark.parametrize(
    "flag",
    [
        "--workdir=gs://b/x", "--config.data.source=shards:gs://b/x", "--config.init_from=gs://b/x",
        "--config.resume_from=gs://b/x@7", "--config.data.dir=gs://b/x",
        "--eval.transfer.sources=embedded,folder:gs://b/x@train:val",
    ],
)  # fmt: skip
def test_a_store_that_does_not_answer_is_one_line(flag, tmp_path, monkeypatch):
    """Whatever names it, and before anything is compiled or trained."""
    asked = []

    def exists(path):
        asked.append(str(path))
        raise Unreachable("Could not resolve host\n\t when reading gs://b/x")

    demo = "--config=configs/simclr_demo.py:smoke"
    values = flags.FlagValues()
    command_line.define(modes.MODES, values)
    argv = ["main.py", demo, f"--workdir={tmp_path}", "--compile_cache=", flag]
    left = command_line.parse(argv, values, main.METHODS)
    with mounted(tmp_path, monkeypatch) as bucket, pytest.raises(UserError) as caught:
        bucket.exists = exists
        main.main(left, values)
    assert asked == ["gs://b/x"] and list(tmp_path.iterdir()) == []
    assert str(caught.value).startswith(
        "cannot reach gs://b/x (Could not resolve host when reading gs://b/x): check the name, "
    )


def test_what_is_said_of_a_store_or_a_disk_that_fails_in_the_middle():
    line = files.in_one_line(Unreachable("Timeout\nof gs://b/x"))
    assert line.startswith("cannot reach an object store (Timeout of gs://b/x): check the name")
    assert "make room or repair" in files.in_one_line(OSError(28, "No space left on device", "x"))
    assert files.in_one_line(OSError(2, "No such file", "x")) is None
    assert files.in_one_line(Unreachable("shapes differ")) is None  # a fault of this code
    assert files.in_one_line(RuntimeError("gs://b/x")) is None


def test_a_scheme_that_nothing_reads():
    with pytest.raises(UserError, match="no library here reads xx://"):
        files.reach("xx://b/x")


@pytest.mark.slow
def test_a_run_in_a_bucket_is_that_of_a_disk(tmp_path, monkeypatch):
    """Killed and resumed: metrics, discarded lines, events, pictures, summary, claim.

    Checkpoints alone go to a disk here: orbax speaks to a store through a client of its own.
    """
    disk, store = tmp_path / "disk", epath.Path("gs://b/run")

    class OnDisk(Checkpoints):
        def __init__(self, workdir, keep, **options):
            super().__init__(tmp_path / "checkpoints", keep, **options)

    def run(c, workdir):
        return loop.train(
            main.METHODS[c.method], c, workdir, make_evaluator, make_mesh(jax.devices()[:2])
        )

    with mounted(tmp_path / "store", monkeypatch) as bucket:
        data = small("simclr", data__fake_classes=2, evaluate__pictures=True)
        shard_writer.write(data.data, "gs://b/data")
        source = open_source(small("simclr", data__source="shards:gs://b/data").data, "train")
        assert source.kind == "pixels" and source.num_examples == 20
        c = small("simclr", data__source="shards:gs://b/data", evaluate__pictures=True)
        want = run(c, disk)
        monkeypatch.setattr(loop, "Checkpoints", OnDisk)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_before(patch, 6)
            run(c, store)
        got = run(c, store)
        assert got["knn_top1"] == want["knn_top1"]
        assert json.loads((store / "summary.json").read_text()) == got
        assert run(c, store) == got  # finished: says so again
        assert "gs://b/run/config.json" in bucket.written
    local = tmp_path / "store" / "b" / "run"
    assert lines(local) == lines(disk)
    assert [r["step"] for r in lines(local, "metrics.discarded.jsonl")] == [4]
    for name in ("augmented_pairs.png", "nearest_neighbours.png", "summary.json"):
        assert (local / name).stat().st_size > 0
    events = [e for file in read_events(local / "tensorboard") for e in file]
    tags = {(e.step, v.tag) for e in events for v in e.summary.value}
    assert {(7, "loss"), (6, "knn_top1"), (0, "knn_top1")} <= tags
