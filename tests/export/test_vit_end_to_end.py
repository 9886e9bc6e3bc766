"""A ViT by `python main.py`: trained, exported, imported, evaluated; and the page's NNX module."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from test_main import ROOT, call, hurried

from common.run import jsonl

CONFIG = ("--config=configs/moco_v3_tpu.py:smoke", "--config.model.dtype=float32")


def run(workdir, mode, *arguments):
    done = call(f"--mode={mode}", f"--workdir={workdir}", *arguments, env=hurried())
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def knn(workdir):
    run(workdir, "knn")
    record = json.loads((workdir / jsonl.RESULTS).read_text().splitlines()[-1])
    assert record["mode"] == "knn"
    return {name: value for name, value in record.items() if "top" in name}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("vit") / "run"
    run(path, "train", *CONFIG)
    said = run(path, "export")
    assert "loads into timm.models.VisionTransformer(**arguments)" in said
    return path


@pytest.mark.slow
def test_what_is_exported_and_imported_has_the_same_neighbours(trained, tmp_path):
    file = trained / "export" / "model.safetensors"
    said = run(tmp_path / "new", "import", *CONFIG, f"--config.init_from={file}")
    assert "encoder; the projection head and the predictor are random" in said
    got, want = knn(tmp_path / "new"), knn(trained)
    assert got == want and got


@pytest.mark.slow
def test_the_nnx_module_of_the_documentation_is_the_encoder(trained, tmp_path, monkeypatch):
    """The page's code as it stands, in a folder that has such a run."""
    (code,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(), re.S)
        if "nnx.Module" in block
    )
    shutil.copytree(trained / "export", tmp_path / "runs" / "mine" / "export")
    monkeypatch.chdir(tmp_path)
    size = json.loads((trained / "export" / "export.json").read_text())["image_size"]
    pixels = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), dtype=np.uint8)
    names = {"pixels": pixels}
    with jax.numpy_rank_promotion("allow"):  # the code of a page is for people
        exec(compile(code, "export.md", "exec"), names)
    data = (trained / "export" / "encoder.stablehlo").read_bytes()
    want = jax.export.deserialize(bytearray(data)).call(pixels)
    assert np.std(want, 0).max() > 0.01
    np.testing.assert_allclose(names["features"], want, rtol=1e-4, atol=1e-5)
