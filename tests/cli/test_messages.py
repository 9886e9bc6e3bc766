"""Every message that a user can get is read by a test.

A place that makes a `UserError` has words that no other place has, and a string in some test has
twelve characters of them in a row. That does not prove that the test provokes the error; it keeps a
new message from going unread, and two mistakes from being told in the same words.
"""

import ast
import collections
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
LENGTH = 12  # "expected at" is in many messages


def user_errors(tree):
    """(line, constant parts of the message) of each place that words a `UserError` itself."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or getattr(node.func, "id", "") != "UserError":
            continue
        message = node.args[0]
        parts = message.values if isinstance(message, ast.JoinedStr) else [message]
        words = [x.value for x in parts if isinstance(x, ast.Constant)]
        if words:  # else it passes on what another place has worded
            yield node.lineno, words


def strings(tree):
    """The strings of a test file that are no docstrings, with what a regex escapes as it is."""
    documentation = set()
    for node in ast.walk(tree):  # an expression comes before its parts
        if isinstance(node, ast.Expr):
            documentation.add(id(node.value))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not (
            len(node.value) < LENGTH or id(node) in documentation
        ):  # fmt: skip
            yield re.sub(r"\\(\W)", r"\1", node.value)


def pieces(text):
    return {text[i : i + LENGTH] for i in range(len(text) - LENGTH + 1)}


def places_of(sources):
    """All pieces of each message in `sources` (name -> text), by its place."""
    return {
        f"{name}:{line}": set().union(*map(pieces, words))
        for name, text in sources.items()
        for line, words in user_errors(ast.parse(text))
    }


def unread(places, tests):
    """The places with a message that no string in `tests` reads."""
    common = collections.Counter(piece for found in places.values() for piece in found)
    read = {piece for text in tests for s in strings(ast.parse(text)) for piece in pieces(s)}
    return [
        place
        for place, found in places.items()
        if not any(common[piece] == 1 for piece in found & read)
    ]


def test_every_user_error_is_read_by_a_test():
    packages = ("common", "simclr_jax", "moco_jax", "configs")
    paths = [ROOT / "main.py", *(p for name in packages for p in (ROOT / name).rglob("*.py"))]
    sources = {str(path.relative_to(ROOT)): path.read_text() for path in paths}
    places = places_of(sources)
    assert len(places) > 150
    assert unread(places, [path.read_text() for path in (ROOT / "tests").glob("**/*.py")]) == []


A = """raise UserError(f"{n} images are too few: expected {m}")"""
B = """raise UserError(f"{n} labels are wrong" " and odd")"""


@pytest.mark.parametrize(
    ("source", "test", "found"),
    [
        (A, 'match="3 images are too few"', []),
        (A, r'match=r"images\ are.*few: expected 4"', []),
        (A, r'match=r"few\: expected 4"', []),
        (A, 'match="images"', ["a.py:1"]),
        (A, '"""3 images are too few"""', ["a.py:1"]),  # a docstring reads nothing
        (A + "\n" + B, 'match="images are too few"', ["a.py:2"]),
        (A + "\n" + A, 'match="images are too few"', ["a.py:1", "a.py:2"]),  # which of them?
        ('raise UserError("; ".join(errors))', "", []),
    ],
)
def test_what_counts_as_read(source, test, found):
    assert unread(places_of({"a.py": source}), [f"x({test})" if "=" in test else test]) == found
