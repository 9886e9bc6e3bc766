"""Code in the documentation works."""

import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys

import pytest
import tiny
from mutants.checkout import copy_checkout

from common.train import summary

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"


def test_the_tests_that_a_page_names_are_there():
    named = set()
    for page in [*DOCS.glob("*.md"), ROOT / "README.md"]:
        named |= set(re.findall(r"(test_[a-z_]+\.py)(?:::(\w+))?", page.read_text()))
    assert len(named) > 10
    for file, name in named:
        (path,) = (ROOT / "tests").glob(f"**/{file}")
        code = path.read_text()
        assert f"def {name}(" in code if name else code, (file, name)


def test_the_files_that_a_page_names_are_there():
    pattern = re.compile(
        r"\b(?:common|configs|simclr_jax|moco_jax|benchmarks|tests)/[\w/]+\.(?:py|toml)"
    )
    example = {"adding_a_method.md"}  # names files that the reader makes
    pages = [page for page in DOCS.glob("**/*.md") if page.name not in example]
    pages += [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    named = {name for page in pages for name in pattern.findall(page.read_text())}
    named -= {"configs/CONFIG.py", "configs/nope.py", "tests/test_NAME.py"}
    assert len(named) > 30
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]


def test_the_table_to_fill_in_is_named_where_suggest_writes_it():
    pages = [*DOCS.glob("*.md"), ROOT / "README.md"]
    named = [x for page in pages for x in re.findall(r"label\.csv=([^\s`]+)", page.read_text())]
    paths = [path for text in named for path in text.split(",") if "label_these" in path]
    assert len(paths) >= 5 and all(path.startswith("runs/mine/") for path in paths)


def test_the_pictures_that_are_sent_are_named():
    text = (DOCS / "evaluation.md").read_text().partition("**Weights & Biases** gets")[2]
    named = re.findall(r"`(\w+\.png)`", text.partition("What it is called")[0])
    assert named == list(summary.PICTURES)


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


@pytest.mark.slow
def test_the_example_of_a_method_trains(monkeypatch):
    code = blocks("adding_a_method.md", "python")[0]
    names = {"__name__": "byol_example"}
    exec(compile(code, "adding_a_method.md", "exec"), names)
    monkeypatch.setitem(tiny.METHODS, "byol", names["BYOL"])
    run = tiny.run(tiny.build(tiny.config("byol")), steps=2)
    first, second = (float(metrics["loss"]) for metrics in run.metrics)
    assert 0 <= second <= 4 and first != second  # 2 - 2 cos
    weights = [s.params["predictor"]["Dense_0"]["kernel"] for s in run.states]
    assert (weights[0] != weights[2]).any()
    assert run.traces == 1


def type_in(page, checkout):
    """Makes the files and the changes that the page shows, and nothing else."""
    text = (DOCS / page).read_text()
    new = re.findall(
        r"(?:Create|and) `([\w/]+\.py)`[^`]*?:\n\n```python\n(.*?)```", text, re.DOTALL
    )
    assert [name for name, _ in new] == ["byol_jax/method.py", "configs/byol_demo.py"]
    (empty,) = re.findall(r"Create an empty `([\w/]+\.py)`", text)
    for name, code in [(empty, ""), *new]:
        assert not (checkout / name).exists()
        (checkout / name).parent.mkdir(exist_ok=True)
        (checkout / name).write_text(code)
    (changed,) = re.findall(r"In `main.py`,.*?```python\n(.*?)```", text, re.DOTALL)
    imported, entry = changed.split("\n\n")
    main = (checkout / "main.py").read_text()
    first = main.index("from moco_jax")
    main = main[:first] + imported + "\n" + main[first:]
    (methods,) = re.findall(r"^METHODS.*?^\}\n", main, re.MULTILINE | re.DOTALL)
    (checkout / "main.py").write_text(main.replace(methods, methods[: -len("}\n")] + entry + "}\n"))


def test_what_the_page_types_into_main_names_every_method(tmp_path):
    """Quick, unlike the test below: the copy is not run."""
    copy_checkout(ROOT, tmp_path)
    type_in("adding_a_method.md", tmp_path)
    (methods,) = re.findall(
        r"^METHODS.*?= (\{.*?^\})", (tmp_path / "main.py").read_text(), re.MULTILINE | re.DOTALL
    )
    assert re.findall(r'"(\w+)":', methods) == [*tiny.METHODS, "byol"]


@pytest.mark.slow
def test_adding_a_method_works_as_written(tmp_path):
    """Typed into a copy of the checkout: trained, stopped and resumed, evaluated, exported."""
    copy_checkout(ROOT, tmp_path)
    type_in("adding_a_method.md", tmp_path)
    hurried = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    started = {"cwd": tmp_path, "env": os.environ | hurried, "text": True}

    def arguments(command):
        python, *rest = shlex.split(command)
        assert python == "python"
        return [sys.executable, *rest]

    (train,), modes = (block.splitlines() for block in blocks("adding_a_method.md", "bash"))
    process = subprocess.Popen(arguments(train), stderr=subprocess.PIPE, **started)
    for line in process.stderr:
        if line.startswith("step 10 "):
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGINT, errors
    step = int(re.search(r"told to stop: step (\d+) ", errors)[1])
    assert 10 <= step < 40

    def run(command):
        done = subprocess.run(arguments(command), capture_output=True, check=False, **started)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    assert f"after step {step} of 40" in run(train)  # the same command continues
    said = {command: run(command) for command in modes}
    wanted = {
        "--mode=knn": "kNN", "--mode=finetune": "fine-tun", "--mode=export": "Exported",
        "--mode=plan": "images/s", "-h ": "of the target network",
    }  # fmt: skip
    assert len(said) == len(wanted)
    for (command, text), (mode, words) in zip(said.items(), wanted.items(), strict=True):
        assert mode in command and words.lower() in text.lower(), text
    workdir = tmp_path / "runs" / "byol"
    assert json.loads((workdir / "summary.json").read_text())["steps"] == 40
    exported = json.loads((workdir / "export" / "export.json").read_text())
    assert exported["method"] == "byol" and exported["step"] == 40
