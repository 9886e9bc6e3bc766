"""Which file is the teacher of a student, before and after its run has begun."""

import dataclasses
import pathlib
import shutil

import jax
import pytest
import tiny
from etils import epath

from common.errors import UserError
from common.models import classifier, finetuned
from common.run import saved_config
from simclr_jax import teacher as teachers


def test_a_workdir_names_its_only_network(tmp_path):
    with pytest.raises(UserError, match="this is no run's workdir and has no fine-tuned"):
        finetuned.find(str(tmp_path), "distil.teacher")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="this run has no fine-tuned network; make one with"):
        finetuned.find(str(tmp_path), "distil.teacher")
    folder = tmp_path / "finetuned"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(b"")
    assert finetuned.find(str(tmp_path), "x").name == "a.safetensors"
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="this is no file of a fine-tuned network, give "):
        finetuned.find(str(tmp_path / "config.json"), "distil.teacher")
    (folder / "b.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"2 fine-tuned networks, name one with.*\.teacher.*b\.s"):
        finetuned.find(str(tmp_path), "distil.teacher")
    with pytest.raises(UserError, match=r"name one with --eval\.classify\.network=FILE"):
        finetuned.find(str(tmp_path), "eval.classify.network")


def begun(tmp_path, teacher):
    """The workdir of a student that has taken a step."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    saved_config.write(epath.Path(workdir), {"method": "distil", "distil": {"teacher": teacher}})
    teachers.keep(epath.Path(workdir), *classifier.load(teacher))
    (workdir / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    return epath.Path(workdir)


@pytest.mark.parametrize("happens", ["gone", "cut off", "no network"])
def test_a_run_that_has_begun_needs_its_copy(happens, tmp_path):
    """Whatever the file holds by now, which may be another network."""
    path = tiny.teacher()
    workdir = begun(tmp_path, path)
    copy = workdir / "teacher.safetensors"
    whole = copy.read_bytes()
    copy.unlink()
    if happens != "gone":
        copy.write_bytes(whole[:-4] if happens == "cut off" else b"something else")
    found = "is gone" if happens == "gone" else "is damaged"
    advice = rf"of this run's teacher, .*, {found}.*: put the file that it began with, {path}, in"
    for call in (teachers.named, teachers.readable):
        with pytest.raises(UserError, match=advice):
            call(path, workdir)
    copy.write_bytes(whole)
    assert teachers.named(path, workdir) == path


def test_a_replay_leaves_the_copy_alone(tmp_path):
    workdir = begun(tmp_path, tiny.teacher())
    (workdir / "teacher.safetensors").unlink()
    teachers.keep(workdir, *classifier.load(tiny.teacher()))
    assert not (workdir / "teacher.safetensors").exists()


def test_a_student_that_has_not_ended_is_no_network_yet(tmp_path):
    workdir = begun(tmp_path, tiny.teacher())
    with pytest.raises(UserError, match="is a student whose run has not ended, and it is saved at"):
        finetuned.find(str(workdir), "eval.classify.network")


@pytest.mark.parametrize("happens", ["nothing", "gone", "a second one", "another network"])
def test_a_run_that_has_begun_keeps_its_teacher(happens, tmp_path, caplog):
    """The same path and the workdir around it mean the teacher that the run has."""
    folder = tmp_path / "big" / "finetuned"
    folder.mkdir(parents=True)
    path = pathlib.Path(shutil.copy(tiny.teacher(), folder))
    workdir = begun(tmp_path, str(path))
    if happens == "gone":
        shutil.rmtree(tmp_path / "big")
    elif happens == "a second one":
        shutil.copy(path, folder / "second.safetensors")
    elif happens == "another network":
        shutil.copy(tiny.teacher(classes=9), path)
    for text in (str(path), str(tmp_path / "big")):
        assert teachers.named(text, workdir) == str(path)
        assert teachers.readable(str(path), workdir) == workdir / "teacher.safetensors"
    assert ("holds another network" in caplog.text) == (happens == "another network")
    (workdir / "metrics.jsonl").unlink()  # no step taken: whatever is there now counts
    if happens == "gone":
        with pytest.raises(UserError, match="no such file or directory"):
            teachers.named(str(path), workdir)
    assert teachers.readable(str(path), workdir) == epath.Path(path)


def test_another_file_is_the_teacher_of_a_run_only_if_it_is_the_same_network(tmp_path):
    first, moved = tiny.teacher(), tmp_path / "moved.safetensors"
    workdir = begun(tmp_path, first)
    network, arrays = classifier.load(first)
    classifier.save(moved, dataclasses.replace(network, info={"top1": 0.1}), arrays)
    assert teachers.named(str(moved), workdir) == first
    names = tuple(f"{name} of another kind" for name in network.classes)
    for other in ({"mean": (0.1, 0.2, 0.3)}, {"image_size": 9}, {"classes": names}):
        classifier.save(moved, dataclasses.replace(network, **other), arrays)
        assert teachers.named(str(moved), workdir) == str(moved)
    classifier.save(moved, network, jax.tree.map(lambda x: x + x.dtype.type(1), arrays))
    assert teachers.named(str(moved), workdir) == str(moved)
    with pytest.raises(UserError, match="no such file or directory"):
        teachers.named(str(tmp_path / "nowhere"), workdir)


@pytest.mark.parametrize(
    ("cut", "message"), [(40, "it ends in its header of"), (-4, r"it has .* of its .* bytes")]
)
def test_a_cut_off_teacher_is_refused_before_anything_starts(cut, message, tmp_path):
    path = tmp_path / "teacher.safetensors"
    path.write_bytes(pathlib.Path(tiny.teacher()).read_bytes()[:cut])
    c = tiny.config("distil", distil__teacher=str(path), head__dim=0)
    with pytest.raises(UserError, match=message):
        tiny.prepared(c, 1)


def test_a_teacher_of_other_arrays_than_it_says_is_refused(tmp_path):
    path = tmp_path / "teacher.safetensors"
    whole = bytearray(pathlib.Path(tiny.teacher()).read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)
    c = tiny.config("distil", distil__teacher=str(path), head__dim=0)
    run = tiny.prepared(c, 1)
    with pytest.raises(UserError, match="is damaged, its arrays are not those that were saved"):
        run.method.placed(run.method.init(run.init_key))
