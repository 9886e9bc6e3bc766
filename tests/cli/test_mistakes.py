"""Likely mistakes, and the one line that each prints; docs/reliability.md shows this very table.

`python tests/cli/test_mistakes.py` writes the table anew.
"""

import ast
import json
import pathlib
import sys
import tempfile

import pytest
from absl import flags

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import main
from common.cli import command_line, modes
from common.errors import UserError

PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- mistakes begin -->", "<!-- mistakes end -->"
DEMO = "--config=configs/simclr_demo.py:smoke"
NEW = "--workdir=DIR/new"
# arguments -> words that the line must have
MISTAKES = [
    ((DEMO, NEW, "--config.batch_sze=64"), ["did you mean --config.batch_size?"]),
    ((DEMO, NEW, "--config.batch_size=big"), ["the field takes a whole number", "batch_size=16"]),
    ((DEMO, NEW, "--config.optimizer.learning_rate=fast"), ["takes a number, e.g."]),
    ((DEMO, NEW, "--config.optimizer.nesterov=maybe"), ["takes true or false"]),
    ((DEMO, NEW, "--config.model.stages=(1,"), ["a whole number, or several by commas"]),
    ((DEMO, NEW, "--config.batch_size=None"), ["this field always has a value"]),
    ((DEMO, NEW, "--config.knn.k=20"), ["did you mean --config.evaluate.knn_k or --eval.knn.k?"]),
    ((DEMO, NEW, "--config.temperature=0.5"), ["did you mean --config.simclr.temperature?"]),
    (
        (DEMO, NEW, "--config.distil.teacher=DIR/run"),
        ["--config.distil.teacher is a field of --mode=distil: add it, or leave the field out"],
    ),
    ((DEMO, NEW, "--config.augment.blur_probability=0"), ["--config.augment.blur or"]),
    (
        (DEMO, NEW, "--mode=kn"),
        ["one of train, distil, plan,", "did you mean --mode=knn?"],
    ),
    ((DEMO, "--mode=plan", "--config.model.bn_groups=3"), ["bn_groups=3", "divisor"]),
    ((DEMO, NEW, "--mode=plan", "--quick=perhaps"), ["expected true or false"]),
    ((DEMO, "--mode=plan", "--topology=cpu"), ["--topology=cpu is no TPU slice", "leave it out"]),
    ((DEMO, NEW, "--confg=x"), ["did you mean --config?"]),
    ((), ["nothing to do: try python main.py --config="]),
    ((DEMO,), ["--workdir is missing"]),
    ((NEW,), ["--config is missing"]),
    (("--config=configs/nope.py", NEW), ["no config file configs/nope.py"]),
    (
        ("--config=configs/simclr_demo.py:fast", NEW),
        ["config argument 'fast' is unknown: use :smoke or nothing"],
    ),
    (
        (DEMO, NEW, "--config.vit.patch=8"),
        ["--config.vit.patch has no effect on a ResNet: add --config.model.encoder=vit"],
    ),
    (
        (DEMO, NEW, "--config.model.encoder=vit", "--config.model.stem=cifar"),
        ["--config.model.stem has no effect on a ViT, whose sizes are config.vit: leave it out"],
    ),
    (
        ("--config=configs/moco_demo.py:smoke", NEW, "--config.head.layers=3"),
        ["--config.head.layers has no effect: a head of the kind moco_v2 has two layers"],
    ),
    ((DEMO, NEW, "--config.model.width_multiplier=0"), ["width_multiplier=0 is too small"]),
    ((DEMO, "--workdir=xx://bucket/run"), ["no library here reads xx://"]),
    ((DEMO, NEW, "extra"), ["unexpected argument 'extra'"]),
    ((DEMO, "--workdir=DIR/file"), ["is a file: give a new or an empty"]),
    ((DEMO, "--workdir=DIR/thesis"), ["is not empty and holds no run"]),
    ((DEMO, "--workdir=DIR/other", "--config.seed=1"), ["another config", "seed (was 0, now 1)"]),
    (
        (DEMO, "--workdir=DIR/other", "--config.duration=8 steps"),
        ["in a new --workdir, with --config.resume_from=DIR/other --config.resume_optimizer"],
    ),
    (("--mode=knn", NEW), ["give the --workdir that a run was trained in"]),
    (("--mode=knn", DEMO, NEW), ["leave --config out"]),
    (("--mode=replay", NEW), ["nothing to replay"]),
    ((DEMO, NEW, "--config.method=simsiam"), ['"simsiam" is unknown', "moco"]),
    ((DEMO, NEW, "--config.data.source=imagenet"), ["tfds:NAME"]),
    (
        (DEMO, NEW, "--config.data.source=folder:DIR/nowhere"),
        ["no folder", "expected a folder of image files"],
    ),
    (
        (DEMO, NEW, "--config.data.source=folder:DIR/thesis"),
        ["no image in", "expected image files (.jpg"],
    ),
    ((DEMO, NEW, "--config.data.on_corrupt=ignore"), ["on_corrupt", "(stop and name the file)"]),
    ((DEMO, NEW, "--config.batch_size=4096"), ["64 examples", "smaller config.batch_size"]),
    ((DEMO, NEW, "--config.model.bn_groups=3"), ["bn_groups=3", "divisor"]),
    ((DEMO, NEW, "--config.model.dtype=fp16"), ["bfloat16"]),
    ((DEMO, NEW, "--config.duration=ten epochs"), ['"10 epochs"']),
    ((DEMO, NEW, "--config.duration=0 steps"), ["no step at all"]),
    ((DEMO, NEW, "--config.optimizer.name=adam"), ["adamw"]),
    ((DEMO, NEW, "--config.optimizer.warmup=9 steps"), ["warmup"]),
    ((DEMO, NEW, "--config.augment.preset=simclear"), ["Did you mean 'simclr'"]),
    ((DEMO, NEW, "--config.checkpoint.keep=0"), ["checkpoint.keep=0"]),
    ((DEMO, NEW, "--config.on_nonfinite=ignore"), ["on_nonfinite", "skip"]),
    ((DEMO, NEW, "--config.resume_from=DIR/nowhere"), ["no checkpoints in"]),
    ((DEMO, NEW, "--config.batch_size=1"), ["batch_size=1 is too small"]),
    ((DEMO, NEW, "--config.optimizer.learning_rate=-0.1"), ["learning_rate=-0.1"]),
    ((DEMO, NEW, "--config.evaluate.knn_k=65"), ["evaluate.knn_k=65", "64 images"]),
    (
        (
            "--config=configs/moco_demo.py:smoke",
            NEW,
            "--config.batch_size=8",
            "--config.model.bn_groups=8",
            "--config.data.image_size=8",
        ),
        ["statistics of one value", "model.bn_groups"],
    ),
    ((DEMO, NEW, "--batch_size=64"), ["did you mean --config.batch_size"]),
    (
        (DEMO, NEW, "--config.learning_rate=0.1"),
        ["--config.optimizer.learning_rate or --config.probe.learning_rate"],
    ),
    (("--config=simclr_demo.py:smoke", NEW), ["did you mean configs/simclr_demo.py:smoke?"]),
    ((DEMO, NEW, "--config.data.source=DIR/thesis"), ["'folder:DIR/thesis'"]),
]


def prepare(directory: pathlib.Path) -> None:
    """What the mistakes find in DIR."""
    (directory / "file").write_text("")
    (directory / "thesis").mkdir()
    (directory / "thesis" / "chapter1.txt").write_text("precious")
    from common.config import as_dict
    from configs.simclr_demo import get_config

    other = directory / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(as_dict(get_config("smoke"))))
    (other / "metrics.jsonl").write_text('{"step": 1}\n')


def said(arguments: tuple[str, ...], directory: pathlib.Path) -> str:
    """What `main.py` prints for these arguments, after "error: ", with DIR for the directory."""
    given = ["main.py", *(a.replace("DIR", str(directory)) for a in arguments)]
    values = flags.FlagValues()
    try:
        command_line.define(modes.MODES, values)
        given += ["--compile_cache="] if arguments else []
        left = command_line.parse(given, values, main.METHODS)
        main.main(left, values)
    except UserError as error:
        return str(error).replace(str(directory), "DIR")
    raise AssertionError(f"{arguments} went through")


def row(arguments: tuple[str, ...], line: str) -> str:
    """A line of the table."""
    shown = " ".join(f"'{a}'" if " " in a else a for a in arguments)
    shown = shown.replace(DEMO, "--config=...").replace(NEW, "--workdir=...") or "(none)"
    return f"| `{shown}` | {line.replace('|', chr(92) + '|')} |"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("mistakes")
    prepare(path)
    return path


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=lambda x: str(x[-1:])[:40])
def test_a_mistake_prints_one_line_and_the_docs_show_it(arguments, words, directory, monkeypatch):
    monkeypatch.chdir(ROOT)
    line = said(arguments, directory)
    assert "\n" not in line and len(line) < 400
    for word in words:
        assert word in line, line
    assert row(arguments, line) in PAGE.read_text(), "run `python tests/cli/test_mistakes.py`"


def test_every_user_error_is_one_line_of_source():
    """No message is made of text with a newline in it."""
    packages = ("common", "simclr_jax", "moco_jax", "configs")
    for path in (path for name in packages for path in (ROOT / name).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError":
                texts = [x.value for x in ast.walk(node) if isinstance(x, ast.Constant)]
                assert not any("\n" in text for text in texts if isinstance(text, str)), (
                    f"{path}:{node.lineno}"
                )


def write() -> None:
    """Puts the table into the page."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = pathlib.Path(scratch) / "mistakes"
        directory.mkdir()
        prepare(directory)
        rows = [row(arguments, said(arguments, directory)) for arguments, _ in MISTAKES]
    table = "\n".join(["| arguments | what is printed |", "| --- | --- |", *rows])
    page = PAGE.read_text()
    start, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    PAGE.write_text(f"{page[:start]}\n\n{table}\n\n{page[end:]}")


if __name__ == "__main__":
    import os

    os.chdir(ROOT)
    write()
