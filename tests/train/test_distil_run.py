"""Whole runs of a student: resumed, scored, started from other weights, and a teacher itself."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import opened_run
import pytest
import tiny
from test_end_to_end import Killed, assert_same_run, kill_before, lines, run, small

import main
from common.cli.modes import MODES
from common.errors import UserError
from common.evaluate import features
from common.models import classifier
from common.run import saved_config
from common.run.writer import NonFiniteLossError
from common.train import replay
from simclr_jax.distil import Distil

pytestmark = pytest.mark.slow


def student(**changes):
    """7 steps; scores after 2, 4, 6 and 7 on images of the teacher's three classes."""
    return small("distil", **({"data__fake_classes": 3, "head__dim": 0} | changes))


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory):
    """The workdir of a pretrained run with one fine-tuned network."""
    workdir = opened_run.write(tmp_path_factory.mktemp("teacher") / "run")
    MODES["finetune"](opened_run.load(workdir))
    assert len(list((workdir / "finetuned").iterdir())) == 1
    return workdir


@pytest.fixture(scope="module")
def straight(fine_tuned, tmp_path_factory):
    """A student's run without a break; nothing may write there."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    return workdir, run(student(distil__teacher=str(fine_tuned)), workdir)


def losses(workdir):
    return [r["loss"] for r in lines(workdir) if "loss" in r]


def another_teacher(path):
    """Puts other weights of the same network into a file."""
    c, arrays = classifier.load(path)
    classifier.save(path, c, jax.tree.map(lambda x: x * x.dtype.type(1.5), arrays))


def others_weights(path):
    another_teacher(path)


def no_classifier(path):
    path.write_bytes(b"something else")


def gone_with_its_run(path):
    shutil.rmtree(path.parent.parent)


@pytest.mark.parametrize("happens", [others_weights, no_classifier, gone_with_its_run])
def test_a_run_goes_on_with_the_teacher_it_began_with(
    happens, fine_tuned, straight, tmp_path, monkeypatch, caplog, capsys
):
    """Bit for bit, whatever has become of the file by then."""
    copy, workdir = tmp_path / "teacher", tmp_path / "run"
    shutil.copytree(fine_tuned, copy)
    c = student(distil__teacher=str(copy))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_before(patch, 6)
        run(c, workdir)
    happens(next((copy / "finetuned").iterdir()))
    capsys.readouterr()
    summary = run(c, workdir)
    assert f"(its copy, {workdir}/teacher.safetensors)" in capsys.readouterr().err
    config = saved_config.load(workdir, tiny.METHODS)
    config.distil.teacher = str(fine_tuned)  # the same network as either run has kept
    assert_same_run(config, workdir, straight[0], classes=3)
    assert summary["student_top1"] == straight[1]["student_top1"]
    assert summary["teacher_top1"] == straight[1]["teacher_top1"]
    changed = "holds another network than when this run began" in caplog.text
    assert changed == (happens != gone_with_its_run)
    if happens is others_weights:  # with them from the start it is another run
        run(c, tmp_path / "other")
        assert losses(tmp_path / "other") != losses(workdir)


def test_another_network_in_the_place_of_the_copy_is_refused(fine_tuned, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    c = student(distil__teacher=str(fine_tuned))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_before(patch, 6)
        run(c, workdir)
    another_teacher(workdir / "teacher.safetensors")
    with pytest.raises(UserError, match="is not the network that taught this run so far"):
        run(c, workdir)
    shutil.copy(next((fine_tuned / "finetuned").iterdir()), workdir / "teacher.safetensors")
    assert run(c, workdir)["steps"] == 7


def test_a_run_that_took_no_step_may_begin_with_another_teacher(
    fine_tuned, straight, tmp_path, monkeypatch
):
    path, workdir = tmp_path / "teacher.safetensors", tmp_path / "run"
    shutil.copy(next((fine_tuned / "finetuned").iterdir()), path)
    another_teacher(path)
    c = student(distil__teacher=str(path))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_before(patch, 1)
        run(c, workdir)
    assert (workdir / "teacher.safetensors").exists()
    c.distil.teacher = str(fine_tuned)
    run(c, workdir)
    assert losses(workdir) == losses(straight[0])
    kept, theirs = (
        classifier.describe(p)
        for p in (workdir / "teacher.safetensors", next((fine_tuned / "finetuned").iterdir()))
    )
    assert kept.info["digest"] == theirs.info["digest"]


def test_a_student_is_replayed_without_its_teacher(fine_tuned, tmp_path, monkeypatch):
    """From before the first checkpoint, where its arrays are needed too."""
    copy, workdir = tmp_path / "teacher", tmp_path / "run"
    shutil.copytree(fine_tuned, copy)

    class Bad(Distil):
        def train_step(self, state, batch, key):
            state, metrics = super().train_step(state, batch, key)
            nan = jnp.where(state.step == 2, jnp.nan, 0)
            return state, metrics | {"loss": metrics["loss"] + nan}

    monkeypatch.setitem(main.METHODS, "distil", Bad)
    with pytest.raises(NonFiniteLossError):
        run(student(distil__teacher=str(copy), log_every=1), workdir)
    shutil.rmtree(copy)
    found = replay.replay(str(workdir), main.METHODS)
    assert (found["step"], found["same_batch"], found["metrics"]) == (2, True, ["loss"])


def test_student_and_teacher_are_scored_on_the_test_split(fine_tuned, straight, capsys):
    workdir, summary = straight
    opened = opened_run.load(workdir, layer="projection")
    test = opened.open("test")
    logits, labels, _ = opened.extract(test)
    top1 = (logits.argmax(-1) == labels).mean()
    assert summary["student_top1"] == pytest.approx(top1)
    teacher, arrays = classifier.load(next((fine_tuned / "finetuned").iterdir()))
    encode = features.jit_encoder(teacher.logits, opened.mesh)
    found = opened.extract(test, encode=lambda images: encode(arrays, images))
    assert summary["teacher_top1"] == pytest.approx((found[0].argmax(-1) == labels).mean())
    scores = {r["step"]: r for r in lines(workdir) if "knn_top1" in r}
    assert list(scores) == [0, 2, 4, 6, 7]
    assert [step for step, r in scores.items() if "teacher_top1" in r] == [0]
    assert all("student_top1" in r for step, r in scores.items() if step)
    assert json.loads((workdir / "summary.json").read_text())["teacher"].count("finetuned/")
    steps = [r for r in lines(workdir) if "loss" in r]
    names = {"agreement", "teacher_confidence", "teacher_entropy", "divergence", "feature_std"}
    assert names <= steps[-1].keys() and "contrastive_top1" not in steps[-1]

    # the file that the run leaves is the same classifier
    path = workdir / "finetuned" / "distilled.safetensors"
    saved, arrays = classifier.load(path)
    images = test.views(np.arange(5), 8)
    want = opened.method.encode(opened.state, images, "projection")
    np.testing.assert_allclose(saved.logits(arrays, images), want, rtol=1e-5, atol=1e-5)
    found = MODES["classify"](opened_run.load(workdir))[0]
    assert (found["top1"], found["num_test"]) == (pytest.approx(top1), len(labels))
    assert found["network"].endswith("distilled.safetensors") and found["layer"] == "backbone"
    found = MODES["classify"](opened_run.load(fine_tuned))[0]
    assert found["top1"] == pytest.approx(summary["teacher_top1"], abs=0.5)
    assert saved.classes == teacher.classes and saved.info["top1"] == summary["student_top1"]


def test_labels_of_other_classes_score_no_classifier(straight):
    opened = opened_run.load(straight[0])
    opened.config.data.fake_classes = 4
    with pytest.raises(UserError, match=r"4 classes and not 3, those of dist.*: give images"):
        MODES["classify"](opened)


def test_a_student_can_be_a_teacher(straight, tmp_path):
    c = student(distil__teacher=str(straight[0]), model__width=8, duration="2 steps")
    summary = run(c, tmp_path / "next")
    assert summary["teacher_top1"] == straight[1]["student_top1"]


@pytest.mark.parametrize("start", ["init_from", "resume_from"])
def test_a_student_can_start_from_a_pretrained_encoder(start, fine_tuned, tmp_path):
    c = student(
        distil__teacher=str(fine_tuned), duration="1 steps", optimizer__learning_rate=0.0,
        model__stages=(1, 1), **{start: str(fine_tuned)},
    )  # fmt: skip
    run(c, tmp_path / "run")
    mine = opened_run.load(tmp_path / "run").state.params
    theirs = opened_run.load(fine_tuned).state.params
    jax.tree.map(np.testing.assert_array_equal, mine["backbone"], theirs["backbone"])
    assert mine["head"]["dense1"]["kernel"].shape[1] == 3 != 8


def test_images_without_labels_are_enough(fine_tuned, tmp_path):
    c = student(distil__teacher=str(fine_tuned), duration="2 steps", data__test_split="")
    summary = run(c, tmp_path / "run")
    assert summary["student_top1"] is None and summary["knn_top1"] is None


def test_other_classes_are_not_scored(fine_tuned, tmp_path, capsys):
    c = student(distil__teacher=str(fine_tuned), duration="2 steps", data__fake_classes=4)
    summary = run(c, tmp_path / "run")
    assert summary["student_top1"] is None and summary["knn_top1"] is not None
    assert "not scored as a classifier: fake (test) has 4 classes and not 3" in (
        capsys.readouterr().err
    )
