"""The list of single faults, `*.toml` in this folder, and whether it still fits the checkout."""

import ast
import dataclasses
import functools
import pathlib
import tomllib

LISTS = pathlib.Path(__file__).resolve().parent
ROOT = LISTS.parents[1]


class ListError(Exception):
    """The list, or a test without any fault, is wrong: nothing can be said about the tests."""


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One fault: `line` of `file` becomes `fault`, and then `test` (a pytest id) has to fail."""

    source: str  # name of its list
    what: str
    file: str
    line: str
    fault: str
    test: str


def read_lists(folder: pathlib.Path = LISTS) -> list[Mutant]:
    """All faults of the lists in `folder`."""
    mutants = []
    for path in sorted(folder.glob("*.toml")):
        try:
            entries = tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]
            mutants += [Mutant(source=path.name, **entry) for entry in entries]
        except (tomllib.TOMLDecodeError, KeyError, TypeError) as error:
            raise ListError(f"{path.name}: {error}") from error
    return mutants


def problems(mutants: list[Mutant], root: pathlib.Path = ROOT) -> list[str]:
    """What is wrong with the faults as text, without running anything."""
    found, seen = [], set()
    for m in mutants:
        path, at = root / m.file, f"{m.source}: {m.what}: "
        if not path.resolve().is_relative_to(root.resolve()):
            found.append(f"{at}{m.file} is not in the checkout")
            continue
        count = path.read_text(encoding="utf-8").count(m.line) if path.is_file() else 0
        if count != 1:
            found.append(f"{at}its line occurs {count} times in {m.file}, expected once")
        if m.fault == m.line:
            found.append(f"{at}its fault is the line itself")
        elif count == 1 and not _is_python(path, m):
            found.append(f"{at}with it {m.file} is no Python: any test would fail")
        if (m.file, m.line, m.fault) in seen:
            found.append(f"{at}it is in the list twice")
        seen.add((m.file, m.line, m.fault))
        if not _has_test(root, m.test):
            found.append(f"{at}there is no test {m.test}")
    return found


def _is_python(path: pathlib.Path, m: Mutant) -> bool:
    try:
        ast.parse(path.read_text(encoding="utf-8").replace(m.line, m.fault))
    except SyntaxError:
        return False
    return True


def _has_test(root: pathlib.Path, test: str) -> bool:
    """Whether the file and the function of a pytest id exist; only pytest knows parameters."""
    file, _, name = test.split("[")[0].partition("::")
    return (root / file).is_file() and name in _functions(root / file)


@functools.cache
def _functions(path: pathlib.Path) -> set[str]:
    """Names of the functions of a file."""
    nodes = ast.parse(path.read_text(encoding="utf-8")).body
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
