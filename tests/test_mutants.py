"""The runner of single faults on a toy project, and the list of this project, which is not run."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

MUTANTS = pathlib.Path(__file__).with_name("mutants")
sys.path.insert(0, str(MUTANTS))
import fault_list  # noqa: E402

SUMS = """
def total(numbers):
    result = 0
    for number in numbers:
        result += number
    return result


def double(x):
    return x * 2
"""
TESTS = """
import os
import pathlib

import sums

assert sums.double(3) > 4, "this file cannot be collected"


def test_total():
    assert sums.total([1, 2]) == 3


def test_double():
    assert sums.double(2) == 4


def test_it_ends():
    pathlib.Path(os.environ["PID_FILE"]).write_text(str(os.getpid()))
    for _ in iter(lambda: sums.total([0]), 0):
        pass


def test_that_fails():
    assert sums.total([1]) == 3
"""
KILLED = ("the first counts twice", "result = 0", "result = numbers[0]", "test_total")
SURVIVED = ("a power is taken for a product", "x * 2", "x**2", "test_double")
BROKEN = ("nothing is doubled", "x * 2", "x", "test_double")
HANGS = ("it never ends", "+= number", "+= 1", "test_it_ends")
FAILS_ANYWAY = ("the last is left out", "in numbers", "in numbers[:-1]", "test_that_fails")


def faults(*entries):
    """A list of faults as TOML."""
    text = ""
    for what, line, fault, test in entries:
        fields = {"what": what, "file": "sums.py", "line": line, "fault": fault}
        fields["test"] = f"tests/test_sums.py::{test}"
        text += "[[mutant]]\n" + "".join(f"{k} = '{v}'\n" for k, v in fields.items())
    return text


@pytest.fixture
def project(tmp_path):
    """Makes a checkout with the runner of this one and a list of the faults that are given."""

    def make(*entries):
        root = tmp_path / "project"
        lists = root / "tests" / "mutants"
        lists.mkdir(parents=True)
        for path in MUTANTS.glob("*.py"):
            shutil.copy(path, lists)
        (root / "sums.py").write_text(SUMS)
        (root / "tests" / "conftest.py").write_text("import sys\nsys.path.insert(0, '.')\n")
        (root / "tests" / "test_sums.py").write_text(TESTS)
        (lists / "toy.toml").write_text(faults(*entries))
        (tmp_path / "scratch").mkdir()
        return root

    return make


def start(root, *options):
    """Starts the runner in another directory than the project."""
    own = {"TMPDIR": root.parent / "scratch", "PID_FILE": root.parent / "pid"}
    quick = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.Popen(
        [sys.executable, root / "tests" / "mutants" / "run.py", *options],
        cwd=root.parent, env=os.environ | own | quick, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def run(root, *options):
    """Exit status and lines of the runner, which leaves the project as it was and no scratch."""
    before = {path: path.read_bytes() for path in root.rglob("*.*")}
    process = start(root, *options)
    output, _ = process.communicate(timeout=120)
    assert {path: path.read_bytes() for path in root.rglob("*.*")} == before
    assert list((root.parent / "scratch").iterdir()) == []
    return process.returncode, output.splitlines()


def ended(pid):
    """Whether a process is no more, or only waits for its parent to take note."""
    try:
        return "Z" in pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0]
    except OSError:
        return True


def test_a_fault_is_killed_or_survives(project):
    root = project(KILLED, SURVIVED)
    status, lines = run(root, "--jobs=2")
    assert status == 1
    assert any(x.startswith("killed ") and x.endswith(f" s  sums.py  {KILLED[0]}") for x in lines)
    assert any(x.startswith("survived ") and x.endswith(f"sums.py  {SURVIVED[0]}") for x in lines)
    assert "    tests/test_sums.py::test_double (toy.toml)" in lines
    assert lines[-1].startswith("1 of 2 faults killed in ")


@pytest.mark.slow
def test_a_test_that_hangs_is_killed_with_its_fault(project):
    status, lines = run(project(KILLED, HANGS), "--timeout=1", "--only=never")
    assert status == 0 and lines[0].startswith("timed out ")
    assert lines[-1].startswith("1 of 1 faults killed in ")


@pytest.mark.slow
def test_a_fault_that_keeps_its_test_from_running_is_an_error_of_the_list(project):
    status, lines = run(project(BROKEN), "--jobs=1")
    assert status == 2 and lines[0].startswith("error ")
    assert lines[1].startswith("    toy.toml: pytest ended with status ")
    assert any("this file cannot be collected" in line for line in lines)
    assert lines[-1].startswith("0 of 1 faults killed in ")


@pytest.mark.slow
def test_a_test_that_fails_anyway_kills_nothing(project):
    status, lines = run(project(FAILS_ANYWAY))
    assert status == 2 and lines[0] == "error: the tests do not pass without any fault:"
    assert any("test_that_fails" in line for line in lines)
    assert not any("faults killed" in line for line in lines)


WRONG = {
    "double": (KILLED[1:], "it is in the list twice"),
    "no Python": (("x * 2", "x *", "test_double"), "with it sums.py is no Python"),
    "gone": (("x * 3", "x", "test_double"), "its line occurs 0 times in sums.py"),
    "twice": (("result", "total", "test_total"), "its line occurs 3 times in sums.py"),
    "same": (("x * 2", "x * 2", "test_double"), "its fault is the line itself"),
    "untested": (
        ("x * 2", "x + 1", "test_halve"),
        "there is no test tests/test_sums.py::test_halve",
    ),
    "no test": (("x * 2", "x + 2", "total"), "there is no test tests/test_sums.py::total"),
}


def test_a_list_that_does_not_fit_is_refused_before_anything_runs(project):
    root = project(KILLED, *((what, *fields) for what, (fields, _) in WRONG.items()))
    status, lines = run(root)
    assert status == 2
    assert len(lines) == len(WRONG)
    for line, (what, (_, words)) in zip(lines, WRONG.items(), strict=True):
        assert f"toy.toml: {what}: {words}" in line


def test_a_list_with_an_unknown_field_is_named(tmp_path):
    (tmp_path / "toy.toml").write_text(faults(KILLED) + "colour = 1\n")
    with pytest.raises(fault_list.ListError, match=r"^toy\.toml: .*colour"):
        fault_list.read_lists(tmp_path)


def test_a_part_of_the_list(project):
    root = project(KILLED, SURVIVED, HANGS)
    assert len(run(root, "--list")[1]) == 3
    status, lines = run(root, "--list", "--every=2", "--only=sums")
    assert status == 0
    assert [line.split("  ")[1] for line in lines] == [KILLED[0], HANGS[0]]
    status, lines = run(root, "--only=moco")
    assert status == 2 and lines == ["error: no fault has 'moco' in its `what` or `file`"]


@pytest.mark.skipif(not pathlib.Path("/proc/self").exists(), reason="looks into /proc")
@pytest.mark.slow
def test_an_interrupt_leaves_no_process_and_no_copy(project):
    root = project(HANGS)
    source = root / "sums.py"
    source.write_text(source.read_text().replace("+= number", "+= 1"))  # it hangs without a fault
    lists = root / "tests" / "mutants" / "toy.toml"
    lists.write_text(
        lists.read_text().replace("+= number", "result = 0").replace("+= 1", "result = 2")
    )
    process, pid = start(root), root.parent / "pid"
    while not (pid.exists() and pid.read_text()):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, "")
    assert list((root.parent / "scratch").iterdir()) == []
    assert ended(int(pid.read_text()))


def test_the_list_of_this_project_is_in_order():
    mutants = fault_list.read_lists()
    wrong = fault_list.problems(mutants)
    assert not wrong, "\n".join(wrong)
    names = [m.what for m in mutants]
    assert len(names) == len(set(names))
    assert len(names) > 60  # of which a sample says something
