"""The notebook, run from top to bottom; needs nbclient and ipykernel (`make test-notebook`)."""

import json
import os
import pathlib
import subprocess
import sys
import types
import zipfile

import pytest

PATH = pathlib.Path(__file__).resolve().parents[1] / "notebooks" / "colab_tpu.ipynb"


def test_the_notebook_is_stored_without_outputs():
    notebook = json.loads(PATH.read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert cells and not any(cell["outputs"] or cell["execution_count"] for cell in cells)


def setup_cell():
    """What the cell "Set up" defines, up to where it starts to act."""
    notebook = json.loads(PATH.read_text())
    (code,) = (
        "".join(c["source"]) for c in notebook["cells"] if "def checkout" in str(c["source"])
    )
    names = {"REPOSITORY": "", "DRIVE": False}
    exec(code.partition("root = checkout()")[0], names)
    return names


@pytest.mark.parametrize("address", ["", "ADDRESS-OF-THE-REPOSITORY", "--upload-pack=touch x"])
def test_without_an_address_or_a_checkout_one_line_says_so(address, tmp_path, monkeypatch):
    names = setup_cell()
    names["REPOSITORY"] = address
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="set REPOSITORY in the form above") as error:
        names["checkout"]()
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_checkout_around_the_notebook_is_used_and_another_one_is_cloned(tmp_path, monkeypatch):
    names = setup_cell()
    monkeypatch.chdir(PATH.parent)
    assert names["checkout"]() == PATH.parents[1]
    origin = tmp_path / "origin"
    origin.mkdir()
    git = ["git", "-C", str(origin), "-c", "user.name=a", "-c", "user.email=a@b"]
    (origin / "main.py").write_text("")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    (tmp_path / "content").mkdir()
    monkeypatch.chdir(tmp_path / "content")
    names["REPOSITORY"] = f"file://{origin}"
    cloned = names["checkout"]()
    assert cloned == tmp_path / "content" / "contrastive" and (cloned / "main.py").exists()
    names["REPOSITORY"] = ""  # the cell runs again: the clone is there
    assert names["checkout"]() == cloned


@pytest.mark.parametrize(
    ("driver", "extra"), [("550.54.15", "cuda12"), ("580.82.07", "cuda13"), ("", "cpu")]
)
def test_the_jax_that_a_gpu_needs(driver, extra, tmp_path, monkeypatch):
    names = setup_cell()
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho {driver}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    if not any(pathlib.Path("/dev").glob("accel[0-9]*")):
        assert names["accelerator"]() == extra


def cell(part):
    """The code of the cell in which that occurs."""
    cells = [
        "".join(c["source"])
        for c in json.loads(PATH.read_text())["cells"]
        if c["cell_type"] == "code"
    ]
    (code,) = (code for code in cells if part in code)
    return code


def test_photos_are_asked_for_until_there_are_some(tmp_path, monkeypatch):
    uploads = [{}, {"a (1).jpg": b"x"}]
    files = types.SimpleNamespace(upload=lambda: uploads.pop(0))
    monkeypatch.setitem(sys.modules, "google", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "google.colab", types.SimpleNamespace(files=files))
    photos = tmp_path / "content" / "photos"
    names = setup_cell() | {
        "SMOKE": False, "COLAB": True, "DATA": "photos", "PHOTOS": str(photos),
    }  # fmt: skip
    code = cell("photos = pathlib.Path(PHOTOS)")
    with pytest.raises(SystemExit, match="No images in"):  # the upload was cancelled
        exec(code, names)
    exec(code, names)
    assert names["data"] == [f"--config.data.source=folder:{photos}"] and not uploads
    exec(code, names)  # and are not asked for again


def test_archives_are_unpacked_and_those_that_were_there_stay(tmp_path, monkeypatch):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "mine.zip").write_bytes(b"of the user")
    with zipfile.ZipFile(tmp_path / "up.zip", "w") as archive:
        archive.writestr("b/c.png", b"x")
    files = types.SimpleNamespace(upload=lambda: {"up.zip": (tmp_path / "up.zip").read_bytes()})
    monkeypatch.setitem(sys.modules, "google", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "google.colab", types.SimpleNamespace(files=files))
    names = setup_cell() | {
        "SMOKE": False, "COLAB": True, "DATA": "photos", "PHOTOS": str(photos),
    }  # fmt: skip
    exec(cell("photos = pathlib.Path(PHOTOS)"), names)
    assert sorted(path.name for path in photos.glob("**/*")) == ["b", "c.png", "mine.zip"]


@pytest.mark.parametrize("labelled", [False, True])
def test_the_summary_has_figures_for_photos_without_labels(labelled, tmp_path, capsys):
    figures = {"trained": {"view_agreement": 0.625, "rankme": 31.25}, "raw_pixels": {"rankme": 9.5}}
    scores = {"knn_top1": 0.75} if labelled else {"knn_top1": None, "label_free": figures}
    (tmp_path / "summary.json").write_text(json.dumps(scores))

    def run(*arguments):
        command = [sys.executable, *arguments]
        print(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    exec(cell("knn_top1_at_init"), {"workdir": tmp_path, "run": run})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    if labelled:
        assert lines == [["knn_top1", "75.0%"]]
    else:
        assert ["view", "agreement", "62.5", "%", "-", "more", "is", "better"] in lines
        assert ["RankMe", "31.2", "9.5", "more,", "of", "networks"] in lines


@pytest.mark.notebook
@pytest.mark.parametrize("method", ["simclr", "moco"])
def test_the_notebook_runs(method, tmp_path, monkeypatch):
    """Smoke setting: seconds of training on the repository's images, pictures, report, export."""
    import nbclient
    import nbformat

    monkeypatch.setenv("NOTEBOOK_SMOKE", "1")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    # From elsewhere, with nothing but links to the code: runs/ of the repository stays as it is.
    for path in PATH.parents[1].iterdir():
        if path.name not in ("runs", "notebooks") and not path.name.startswith("."):
            (tmp_path / path.name).symlink_to(path)
    notebook = nbformat.read(PATH, as_version=4)
    notebook.cells[1].source = notebook.cells[1].source.replace('"simclr"', f'"{method}"', 1)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    text = "".join(o.get("text", "") for o in outputs)
    assert len(pictures) == 3
    (report,) = (o["data"]["text/html"] for o in outputs if "text/html" in o.get("data", {}))
    assert "srcdoc=" in report and len(report) > 10_000
    assert len(list(tmp_path.glob("runs/*/encoder.zip"))) == 1
    assert f"method  {method}" in text and "step 4/4" in text and "knn_top1_raw_pixels" in text
