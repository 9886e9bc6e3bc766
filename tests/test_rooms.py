"""The layering: no file imports upwards, no circle, and the drawing in docs/reading.md is true.

`python tests/test_rooms.py` writes the arrows into the drawing.
"""

import ast
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reading.md"
BASE = "common"  # files of common/ and common/data/ that are not a room of their own
# From left to right: a file imports from its own room and from those to the left of it.
ROOMS = (
    BASE, "common.run", "common.data.images", "common.data.sources", "common.data.augment",
    "common.data.feed", "common.models", "common.optim", "common.setup", "common.method",
    "common.momentum", "common.train", "simclr_jax", "moco_jax", "common.evaluate",
    "common.export", "common.plan", "common.cli", "main",
)  # fmt: skip
METHODS = ("simclr_jax", "moco_jax")  # `common` does not know them, nor they each other
BEGIN, END = "%% arrows: python tests/test_rooms.py\n", "```"

Graph = dict[str, set[str]]


def room_of(module: str) -> str:
    inside = [room for room in ROOMS if f"{module}.".startswith(f"{room}.")]
    return max(inside, key=len)


def files_of(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """Path of each module of the project, by its dotted name."""
    paths = [path for name in ("common", *METHODS) for path in (root / name).rglob("*.py")]
    return {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for path in [*paths, root / "main.py"]
    }


def imports_of(root: pathlib.Path) -> Graph:
    """Modules of the project that each module imports, at its top or inside a function."""
    files = files_of(root)
    graph: Graph = {}
    for module, path in files.items():
        names = []
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.module and not node.level, f"{path}: imports are absolute"
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                names += [name if name in files else node.module for name in inner]
        graph[module] = {name for name in names if name in files} - {module}
    return graph


def upward(graph: Graph) -> list[str]:
    """Imports that the layering forbids, one a line."""
    found = []
    for module, imported in sorted(graph.items()):
        for other in sorted(imported):
            here, there = room_of(module), room_of(other)
            hidden = there in METHODS and here not in (there, "main")
            if ROOMS.index(there) > ROOMS.index(here) or hidden:
                found.append(f"{module} imports {other}")
    return found


def circle(graph: Graph) -> list[str]:
    """The modules of an import circle, the first one at the end again; [] if there is none."""
    done: set[str] = set()

    def search(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for other in sorted(graph[module]):
            if found := search(other, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := search(module, []))), [])


def arrows(graph: Graph) -> set[tuple[str, str]]:
    """The arrows of the drawing: imports between rooms, without those that follow from others.

    Of a graph without a circle these are unique (its transitive reduction).
    """
    rooms: Graph = {room: set() for room in ROOMS}
    for module, imported in graph.items():
        rooms[room_of(module)] |= {room_of(other) for other in imported} - {room_of(module)}

    def reach(room: str) -> set[str]:
        return set().union(*({other} | reach(other) for other in rooms[room]))

    return {
        (room, other)
        for room, others in rooms.items()
        for other in others
        if not any(other in reach(between) for between in others)
    }


def name_of(room: str) -> str:
    """The node of a room in the drawing."""
    return room.removeprefix("common.").replace(".", "_")


def drawn(page: str) -> tuple[set[str], set[tuple[str, str]]]:
    """Nodes and arrows of the drawing in a page."""
    (text,) = re.findall(r"```mermaid\n(.*?)```", page, re.DOTALL)
    nodes = re.findall(r"^\s*(\w+)\[", text, re.MULTILINE)
    pairs = re.findall(r"^\s*(\w+) --> (\w+)$", text, re.MULTILINE)
    assert len(nodes) == len(set(nodes)) and len(pairs) == len(set(pairs)) == text.count("-->")
    return set(nodes), set(pairs)


def test_no_file_imports_upwards():
    graph = imports_of(ROOT)
    assert len(graph) > 60 and graph["main"]
    found = upward(graph)
    assert not found, "\n".join(found)


def test_there_is_no_circle():
    found = circle(imports_of(ROOT))
    assert not found, " -> ".join(found)


def test_the_drawing_shows_the_imports():
    graph = imports_of(ROOT)
    assert not circle(graph) and not upward(graph)
    nodes, pairs = drawn(PAGE.read_text())
    assert nodes == {name_of(room) for room in ROOMS}
    assert pairs == {tuple(map(name_of, pair)) for pair in arrows(graph)}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("", []),
        ("import common.run.files", []),
        ("from common.models import heads", ["common.models.heads"]),
        ("def f():\n    import main", ["main"]),
        ("import moco_jax.loss", ["moco_jax.loss"]),
    ],
)
def test_upward_imports_are_found(tmp_path, line, found):
    names = ("common/run/files", "common/data/feed/pipeline", "common/models/heads",
             "moco_jax/loss", "main")  # fmt: skip
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.py").write_text(line if name.endswith("pipeline") else "")
    want = [f"common.data.feed.pipeline imports {module}" for module in found]
    assert upward(imports_of(tmp_path)) == want


def test_methods_are_known_to_main_alone():
    for room in ("common.evaluate", "common.cli", "moco_jax"):  # to the right of it, two of them
        assert upward({f"{room}.a": {"simclr_jax.loss"}, "simclr_jax.loss": set()})
    assert not upward({"main": {"simclr_jax.method"}, "simclr_jax.method": set()})


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert not circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_arrows_that_follow_from_others_are_left_out():
    graph = {"common.errors": set(), "common.run.files": {"common.errors"},
             "common.train.loop": {"common.errors", "common.run.files"}}  # fmt: skip
    assert arrows(graph) == {("common.run", "common"), ("common.train", "common.run")}


def write() -> None:
    """Writes the arrows into the drawing."""
    before, rest = PAGE.read_text().split(BEGIN)
    after = rest[rest.index(END) :]
    pairs = sorted(arrows(imports_of(ROOT)), key=lambda p: [-ROOMS.index(room) for room in p])
    lines = [f"    {name_of(a)} --> {name_of(b)}\n" for a, b in pairs]
    PAGE.write_text(before + BEGIN + "".join(lines) + after)


if __name__ == "__main__":
    if wrong := upward(graph := imports_of(ROOT)) or circle(graph):
        sys.exit("\n".join(wrong))
    write()
