"""Version and commit, and that an installation has every file it needs."""

import json
import pathlib
import re
import shutil
import subprocess
import tomllib

import pytest

from common import version

ROOT = pathlib.Path(__file__).parents[1]


def git(root, *arguments):
    name = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    command = ["git", "-C", str(root), *name, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_commit_of_a_checkout(tmp_path, monkeypatch):
    commit = version.commit.__wrapped__  # not cached
    git(tmp_path, "init", "--quiet")
    (tmp_path / "file").write_text("1")
    assert commit(tmp_path) is None  # no commit yet
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "--quiet", "--message=one")
    git(tmp_path, "tag", "v1")  # the digits of the commit all the same
    head = git(tmp_path, "rev-parse", "HEAD")[:12]
    (tmp_path / "untracked").write_text("")
    assert commit(tmp_path) == head
    (tmp_path / "file").write_text("2")
    assert commit(tmp_path) == f"{head}-dirty"
    installed = tmp_path / "venv" / "site-packages"
    installed.mkdir(parents=True)
    assert commit(installed) is None  # somebody else's repository
    monkeypatch.setenv("PATH", "")
    assert commit(tmp_path) is None  # no git


@pytest.mark.parametrize(
    ("commit", "text"), [("abc-dirty", "9.9 (commit abc-dirty)"), (None, "9.9")]
)
def test_version_and_commit_in_words(monkeypatch, commit, text):
    monkeypatch.setattr(version, "VERSION", "9.9")
    monkeypatch.setattr(version, "commit", lambda: commit)
    assert version.in_words() == text
    assert version.fields() == {"version": "9.9", "commit": commit}


def test_an_installation_has_every_file():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    tools = project["tool"]["setuptools"]
    module, name = tools["dynamic"]["version"]["attr"].rsplit(".", 1)
    assert getattr(version, name) == version.VERSION and module == version.__name__
    packages = tools["packages"]["find"]["include"]
    for package in ("common", "configs", "moco_jax", "simclr_jax"):
        assert f"{package}*" in packages
        directories = {path.parent for path in (ROOT / package).rglob("*.py")}
        assert all((directory / "__init__.py").exists() for directory in directories)
    data = [path for pattern in tools["package-data"]["common"]
            for path in (ROOT / "common").glob(pattern)]  # fmt: skip
    files = [f for f in (ROOT / "common").rglob("*")
             if f.is_file() and f.suffix not in (".py", ".pyc")]  # fmt: skip
    assert sorted(data) == sorted(files) and len(files) >= 5


def test_every_place_that_names_the_repository_names_the_same_one():
    address = version.REPOSITORY
    known = "://" in address
    assert known or address == "ADDRESS-OF-THE-REPOSITORY"
    notebook = json.loads((ROOT / "notebooks" / "colab_tpu.ipynb").read_text())
    code = "".join(line for cell in notebook["cells"] for line in cell["source"])
    assert re.findall(r'^REPOSITORY = "(.*?)"', code, re.M) == [address]
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {})
    named = [
        *re.findall(r'^repository-code: *"?([^"\s]+)', (ROOT / "CITATION.cff").read_text(), re.M),
        *re.findall(r"^repo_url: *(\S+)", (ROOT / "mkdocs.yml").read_text(), re.M),
        *urls.values(),
    ]
    assert named == ([address] * 3 if known else [])  # no address yet: none names one
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md")]
    cloned = {c for page in pages for c in re.findall(r"git clone (\S+)", page.read_text())}
    assert cloned == {address}


def test_requirements_are_listed_once_and_test_tools_are_none_of_them():
    dynamic = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["dynamic"]
    both = (dynamic["dependencies"]["file"], dynamic["optional-dependencies"]["test"]["file"])
    everything = (ROOT / "requirements.txt").read_text().splitlines()
    assert [line for line in everything if line[:1] not in ("", "#")] == [f"-r {f}" for f in both]
    run, test = ((ROOT / file).read_text() for file in both)
    for line in (run + test).splitlines():
        assert not line.startswith("-"), line  # setuptools reads requirements, no options
    for tool in ("pytest", "ruff", "hypothesis"):
        assert f"\n{tool}>=" in test and f"\n{tool}>=" not in run
