"""A run that is started again goes on as if it had not stopped."""

import json
import os
import shutil
import signal
import types

import pytest
import toy
from etils import epath
from test_end_to_end import TOTAL, lines
from test_sources import write

from common import config as configs
from common.data.sources import fake
from common.data.sources.fake import FakeSource
from common.errors import UserError
from common.run import files, saved_config
from common.run import workdir as workdirs
from common.run.writer import NonFiniteLossError
from common.train import loop, milestones, preemption, prepare
from common.train.position import Position
from common.train.preemption import PreemptedError
from simclr_jax.method import SimCLR


def test_a_run_that_is_killed_twice_is_the_run_that_never_stopped(tmp_path, monkeypatch, capsys):
    """Its lines, its summary, and its time: each step takes 10 s here."""
    clock = types.SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr(milestones, "time", clock)
    to_global = loop.to_global

    def slowly(*arguments):
        clock.now += 10
        return to_global(*arguments)

    monkeypatch.setattr(loop, "to_global", slowly)
    c = toy.config(evaluate__every="2 steps")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    summary = toy.train(c, whole, make_evaluator=toy.scored(toy.SCORES))
    assert (summary["seconds"], summary["knn_top1_at_init"]) == (70.0, 0.0)
    said = capsys.readouterr().err
    assert "7 of 0.0 GFLOP (2 an epoch)" in said and "resuming" not in said
    toy.train_until(5, c, broken, make_evaluator=toy.scored(toy.SCORES))
    toy.train_until(7, c, broken, start=3, make_evaluator=toy.scored(toy.SCORES))
    assert "resuming  after step 3 of 7" in capsys.readouterr().err
    resumed = toy.train(c, broken, make_evaluator=toy.scored(toy.SCORES))
    assert toy.untimed(resumed) == toy.untimed(summary) and lines(broken) == lines(whole)
    assert toy.weight(broken, TOTAL) == toy.weight(whole, TOTAL)
    assert resumed["seconds"] == 70.0
    # one step gives no rate, so the saved one is kept
    assert resumed["images_per_second"] == toy.progress(broken, 6)["images_per_second"]
    monkeypatch.setattr(loop, "compile_step", None)  # a finished run must not compile again
    assert toy.train(c, broken, make_evaluator=toy.scored(toy.SCORES)) == resumed


@pytest.mark.parametrize(("step", "saved", "scored"), [(4, [3, 4], [0]), (7, [6, 7], [0, 4])])
def test_scores_for_which_there_was_no_time_are_made_by_the_next_start(
    step, saved, scored, tmp_path
):
    """SIGTERM arrives twice in a step after which scores are due, be it the last."""
    c = toy.config(evaluate__every="4 steps")
    whole, told = tmp_path / "whole", tmp_path / "told"
    summary = toy.train(c, whole, make_evaluator=toy.scored(toy.SCORES))

    def tell(n):
        for _ in range(2 * (n == step)):
            os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    with toy.before_each_step(tell), pytest.raises(PreemptedError):
        toy.train(c, told, make_evaluator=toy.scored(toy.SCORES))
    assert signal.getsignal(signal.SIGTERM) is handler
    assert toy.saved_steps(told) == saved
    assert [r["step"] for r in lines(told) if "knn_top1" in r] == scored
    assert toy.untimed(toy.train(c, told, make_evaluator=toy.scored(toy.SCORES))) == toy.untimed(
        summary
    )
    assert lines(told) == lines(whole)


def test_ctrl_c_saves_as_sigterm_does(tmp_path, capfd):
    """A second SIGINT right behind it is the same one: a terminal tells the children, too."""

    def interrupt(n):
        for _ in range(2 * (n == 4)):
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with toy.before_each_step(interrupt), pytest.raises(PreemptedError, match="step 4 ") as caught:
        toy.train(toy.config(), tmp_path)
    assert caught.value.exit_status == 130
    assert signal.getsignal(signal.SIGINT) is handler
    assert capfd.readouterr().err.count("Ctrl-C again leaves at once") == 1
    assert toy.saved_steps(tmp_path) == [3, 4]


def test_a_second_ctrl_c_does_what_a_first_one_did_before(tmp_path, monkeypatch):
    monkeypatch.setattr(preemption, "_ONE_INTERRUPT", -1)

    def interrupt(n):
        for _ in range(2 * (n == 4)):
            os.kill(os.getpid(), signal.SIGINT)

    with toy.before_each_step(interrupt), pytest.raises(KeyboardInterrupt):
        toy.train(toy.config(), tmp_path)
    assert toy.saved_steps(tmp_path) == [3]


def test_a_run_that_is_older_than_a_field_goes_on_as_it_began(tmp_path, monkeypatch, caplog):
    """`seed` stands for a field that came later, `augment_view2.crop` for one that is decided."""
    c = toy.config()
    toy.train_until(3, c, tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    del saved["seed"]
    saved["augment_view2"]["crop"] = "torch"
    path.write_text(json.dumps(saved))
    c.unlock()
    c.seed, c.augment_view2.crop = 3, "auto"
    with pytest.raises(UserError, match="holds the run of another config: seed"):
        toy.train(c, tmp_path)
    monkeypatch.setattr(configs, "BEFORE", {"seed": 0})
    with caplog.at_level("WARNING"):
        begun = workdirs.as_begun(c, tmp_path)
    assert (begun.seed, begun.augment_view2.crop) == (0, "torch") and c.seed == 3
    assert "is older than the field seed: it is resumed as it began, with seed=0" in caplog.text
    assert saved_config.load(tmp_path, {"simclr": toy.Toy}).seed == 0
    toy.train(c, tmp_path)
    assert workdirs.as_begun(c, tmp_path / "new") is c
    other = toy.config()
    other.method = "moco"
    assert workdirs.as_begun(other, tmp_path) is other


def test_the_data_goes_on_where_it_was(tmp_path, monkeypatch):
    """Position, and how many processes had read a streamed set."""
    asked, train_batches = [], prepare.pipeline.train_batches

    def wrapped(*arguments, **options):
        asked.append((options["start_step"], options["saved_readers"]))
        batches = train_batches(*arguments, **options | {"saved_readers": None})
        batches.readers = 3
        return batches

    monkeypatch.setattr(prepare.pipeline, "train_batches", wrapped)
    c = toy.config()
    toy.train_until(5, c, tmp_path)
    toy.train(c, tmp_path)
    assert asked == [(0, None), (3, 3)]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("num_examples", 21, "has 21 images, and had 20"),
        ("listing", "other names", "20 images as before, but files were renamed"),
    ],
    ids=["size", "names"],
)
def test_other_data_is_not_continued(name, value, words, tmp_path, monkeypatch):
    class Named(FakeSource):
        listing = "names"

    def changed(*arguments):
        source = open_fake(*arguments)
        setattr(source, name, value)
        return source

    c, open_fake = toy.config(), fake.open_fake
    monkeypatch.setattr(fake, "FakeSource", Named)
    toy.train_until(5, c, tmp_path)
    monkeypatch.setattr(fake, "open_fake", changed)
    with pytest.raises(UserError, match=words):
        toy.train(c, tmp_path)
    assert toy.saved_steps(tmp_path) == [3]


@pytest.mark.slow
def test_the_same_files_in_another_place_continue_a_run(tmp_path, monkeypatch, caplog):
    photos = tmp_path / "photos"
    for i in range(20):
        write(photos / "train" / "ab"[i % 2] / f"{i}.png", i)
    c = toy.config(data__source=f"folder:{photos}")
    whole, run = tmp_path / "whole", tmp_path / "run"
    toy.train(c, whole)
    toy.train_until(5, c, run)
    copy = tmp_path / "old"
    shutil.copytree(run, copy)
    photos.rename(tmp_path / "elsewhere")
    c.data.source = f"folder:{tmp_path / 'elsewhere'}"
    with caplog.at_level("WARNING"):
        toy.train(c, run)
    assert f"was folder:{photos} and is now {c.data.source}: config.json says so" in caplog.text
    assert toy.weight(run, TOTAL) == toy.weight(whole, TOTAL)
    assert json.loads((run / "config.json").read_text())["data"]["source"] == c.data.source
    (tmp_path / "elsewhere").rename(tmp_path / "third")  # the run has ended by now
    c.data.source = f"folder:{tmp_path / 'third'}"
    toy.train(c, run)
    assert json.loads((run / "config.json").read_text())["data"]["source"] == c.data.source
    (tmp_path / "third").rename(tmp_path / "elsewhere")
    c.data.source = f"folder:{tmp_path / 'elsewhere'}"
    c.data.labels = "none"
    with pytest.raises(UserError, match=r"another config: data.labels \(was 'auto', now 'none'\)"):
        toy.train(c, copy)
    c.data.labels = "auto"
    with monkeypatch.context() as patch:  # as shards of before: they did not list their files
        patch.setattr(Position, "of", lambda r: Position(num_examples=r["num_examples"]))
        with pytest.raises(UserError, match="its checkpoints do not list its files, so whether"):
            toy.train(c, copy)
    (tmp_path / "elsewhere" / "train" / "a" / "0.png").rename(tmp_path / "elsewhere/train/a/x.png")
    with pytest.raises(UserError, match="files were renamed, or added and removed"):
        toy.train(c, copy)
    shutil.rmtree(tmp_path / "elsewhere" / "train" / "a")  # a probe of another shape, too
    with pytest.raises(UserError, match=r"has 10 images, and had 20 when this run began"):
        toy.train(c, copy, SimCLR)
    c.data.source = "embedded"
    with pytest.raises(UserError, match=r"holds the run of another config: data.source"):
        toy.train(c, copy)


def test_scores_of_other_images_do_not_follow_in_one_run(tmp_path):
    for i in range(24):
        write(tmp_path / "photos" / ("train" if i < 16 else "test") / f"{i}.png", i)
    c = toy.config(data__source=f"folder:{tmp_path}/photos", data__test_split="test")
    run = tmp_path / "run"
    toy.train_until(5, c, run)
    (tmp_path / "photos/test/20.png").rename(tmp_path / "photos/test/x.png")
    with pytest.raises(UserError, match=r"now 16 vote and 8 are scored; when it began 16 vote a"):
        toy.train(c, run)
    (tmp_path / "photos/test/x.png").unlink()
    with pytest.raises(UserError, match=r"score this run have changed .now 16 vote and 7 are sc"):
        toy.train(c, run)
    write(tmp_path / "photos/test/20.png", 20)
    toy.train(c, run)
    Position.of({"num_examples": 3}).check_same_scored("16:a 7:b")  # of before there was a list


def test_a_folder_means_the_same_from_every_directory(tmp_path, monkeypatch):
    for i in range(16):
        write(tmp_path / "here" / "photos" / "train" / f"{i}.png", i)
    monkeypatch.chdir(tmp_path / "here")
    c = toy.config(data__source="folder:photos/")
    toy.train_until(5, c, tmp_path / "run")
    saved = saved_config.read(tmp_path / "run")
    assert saved["data"]["source"] == f"folder:{tmp_path}/here/photos"
    assert c.data.source == "folder:photos/"
    saved["data"]["source"] = "folder:photos"  # of an older run
    saved_config.write(epath.Path(tmp_path / "run"), saved)
    toy.train(c, tmp_path / "run")
    assert saved_config.read(tmp_path / "run")["data"]["source"].endswith("/here/photos")
    kept = ("tfds:cifar10", "embedded", "folder:gs://bucket/a", "shards:", "folder:/a/b")
    assert [files.whole(source) for source in kept] == list(kept)


def test_a_run_from_the_weights_of_another_one(tmp_path, monkeypatch):
    """They are taken once: the new run carries on by itself, also when the other one is gone."""
    other, new = tmp_path / "other", tmp_path / "new"
    c = toy.config(resume_from=str(other))
    with monkeypatch.context() as patch, pytest.raises(UserError, match="no checkpoints in"):
        patch.setattr(loop, "compile_step", None)  # minutes, for a large network
        toy.train(c, new)
    toy.train(toy.config(seed=5, duration="2 steps"), other)
    toy.train_until(5, c, new)
    assert toy.weight(new, 3) == pytest.approx(toy.weight(other, 2) + 3)
    shutil.rmtree(other)
    summary = toy.train(c, new)
    assert summary["started_from"] == str(other)
    assert toy.weight(new, TOTAL) == pytest.approx(toy.weight(new, 6) + 1)


def test_steps_skipped_before_a_restart_count(tmp_path):
    """And their loss in the log stops nothing."""
    c = toy.config(on_nonfinite="skip", log_every=1)
    method = toy.with_nan_at(2, 3, 6)
    toy.train_until(5, c, tmp_path, method)
    toy.train(c, tmp_path, method)
    records = {r["step"]: r for r in lines(tmp_path)}
    counts = [records[step]["skipped_steps"] for step in range(1, 8)]
    assert counts == [0, 1, 2, 2, 2, 3, 3]
    assert [step for step in records if records[step]["loss"] is None] == [2, 3, 6]


def test_a_run_that_diverges_names_the_checkpoint_before(tmp_path):
    """One of this start, or the one that it started from."""
    c, method = toy.config(), toy.with_nan_at(5)
    with pytest.raises(NonFiniteLossError, match="step 5"):
        toy.train(c, tmp_path / "first", method)
    assert toy.reproduction(tmp_path / "first", 5)["checkpoint"] == 3
    toy.train_until(4, c, tmp_path / "again", method)
    with pytest.raises(NonFiniteLossError, match="step 5"):
        toy.train(c, tmp_path / "again", method)
    assert toy.reproduction(tmp_path / "again", 5)["checkpoint"] == 3
