"""Code in the documentation works."""

import pathlib
import re

import pytest
import tiny

DOCS = pathlib.Path(__file__).parents[1] / "docs"


def test_the_tests_that_a_page_names_are_there():
    named = set()
    for page in [*DOCS.glob("*.md"), DOCS.parent / "README.md"]:
        named |= set(re.findall(r"(test_[a-z_]+\.py)(?:::(\w+))?", page.read_text()))
    assert len(named) > 10
    for file, name in named:
        (path,) = (DOCS.parent / "tests").glob(f"**/{file}")
        code = path.read_text()
        assert f"def {name}(" in code if name else code, (file, name)


@pytest.mark.slow
def test_the_example_of_a_method_trains(monkeypatch):
    text = (DOCS / "adding_a_method.md").read_text()
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    names = {"__name__": "byol_example"}
    exec(compile(code, "adding_a_method.md", "exec"), names)
    monkeypatch.setitem(tiny.METHODS, "byol", names["BYOL"])
    run = tiny.run(tiny.build(tiny.config("byol")), steps=2)
    first, second = (float(metrics["loss"]) for metrics in run.metrics)
    assert 0 <= second <= 4 and first != second  # 2 - 2 cos
    weights = [s.params["predictor"]["Dense_0"]["kernel"] for s in run.states]
    assert (weights[0] != weights[2]).any()
    assert run.traces == 1
