"""The notebook, run from top to bottom; needs nbclient and ipykernel (`make test-notebook`)."""

import json
import pathlib

import pytest

PATH = pathlib.Path(__file__).resolve().parents[1] / "notebooks" / "colab_tpu.ipynb"


def test_the_notebook_is_stored_without_outputs():
    notebook = json.loads(PATH.read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert cells and not any(cell["outputs"] or cell["execution_count"] for cell in cells)


@pytest.mark.notebook
@pytest.mark.parametrize("method", ["simclr", "moco"])
def test_the_notebook_runs(method, tmp_path, monkeypatch):
    """Smoke setting: seconds of training on the images of the repository, all three pictures."""
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
    assert f"method  {method}" in text and "step 4/4" in text and "knn_top1_raw_pixels" in text
