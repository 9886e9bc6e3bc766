"""What a command line changes of a config, and what is said of one that is wrong.

`python tests/cli/test_command_line.py` writes docs/reference/config.md.
"""

import os
import pathlib
import sys

import pytest
from absl import flags

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import main
from common import config
from common.cli import command_line, modes
from common.data.feed.recipe import FeedRecipe
from common.errors import UserError

DEMO = f"--config={ROOT / 'configs' / 'simclr_demo.py'}:smoke"
MOCO = f"--config={ROOT / 'configs' / 'moco_demo.py'}:smoke"


def parse(*arguments):
    values = flags.FlagValues()
    command_line.define(modes.MODES, values)
    left = command_line.parse(["main.py", *arguments], values, main.METHODS)
    return values, left[1:]


def value_of(argument, name):
    values, left = parse(DEMO, *([argument] if isinstance(argument, str) else argument))
    assert not left
    found = values
    for part in name.split("."):
        found = found[part].value if found is values else found[part]
    return found


def said(*arguments):
    with pytest.raises(UserError) as caught:
        parse(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("argument", "name", "value"),
    [
        ("--config.batch_size=8", "config.batch_size", 8),
        ("-config.batch_size=8", "config.batch_size", 8),
        (("--config.batch_size", "8"), "config.batch_size", 8),
        (("--config.batch_size=4", "--config.batch_size=8"), "config.batch_size", 8),
        ("--config.optimizer.learning_rate=1", "config.optimizer.learning_rate", 1.0),
        ("--config.optimizer.learning_rate=1e-3", "config.optimizer.learning_rate", 1e-3),
        ("--config.optimizer.nesterov", "config.optimizer.nesterov", True),
        ("--config.optimizer.nesterov=True", "config.optimizer.nesterov", True),
        ("--noconfig.model.fold_norm", "config.model.fold_norm", False),
        ("--config.data.test_split=", "config.data.test_split", ""),
        ("--config.duration=10 epochs", "config.duration", "10 epochs"),
        ("--config.model.stages=2", "config.model.stages", (2,)),
        ("--config.model.stages=2,1", "config.model.stages", (2, 1)),
        ("--config.model.stages=(2, 1)", "config.model.stages", (2, 1)),
        ("--config.model.stages=[2,1]", "config.model.stages", (2, 1)),
        ("--config.model.stages=()", "config.model.stages", ()),
        ("--config.optimizer.decay_at=9,1.5,90 %", "config.optimizer.decay_at", (9, 1.5, "90 %")),
        ("--config.augment.mean=(0,0.5,1)", "config.augment.mean", (0.0, 0.5, 1.0)),
        ("--eval.linear.learning_rate=(0.1,)", "eval.linear.learning_rate", (0.1,)),
        ("--eval.knn.k=7", "eval.knn.k", 7),
    ],
)
def test_a_value_is_read_by_the_type_of_its_field(argument, name, value):
    found = value_of(argument, name)
    assert found == value and type(found) is type(value)
    if isinstance(value, tuple):
        assert list(map(type, found)) == list(map(type, value))


def test_the_order_of_config_and_its_fields_does_not_matter():
    values, _ = parse("--config.seed=3", DEMO)
    assert values.config.seed == 3 and values.config.is_locked


def test_what_comes_after_two_dashes_is_no_flag():
    values, left = parse(DEMO, "--", "--config.seed=3")
    assert values.config.seed == 0 and left == ["--config.seed=3"]


@pytest.mark.parametrize("name", ["augment.blur", "augment.size", "augment.crop", "augment.mean",
                                  "augment.antialias", "augment.strength"])  # fmt: skip
def test_none_gives_a_field_back_to_the_preset(name, tmp_path):
    """Whatever a config file has set: number, text, tuple or truth."""
    given = {"blur": 0.9, "size": 16, "crop": "torch", "mean": (0.5, 0.5, 0.5), "antialias": True,
             "strength": 0.5}  # fmt: skip
    path = tmp_path / "mine.py"
    second = {n: v for n, v in given.items() if n != "mean"}
    lines = [f"    c.augment.{n} = {v!r}" for n, v in given.items()]
    lines += [f"    c.augment_view2.{n} = {v!r}" for n, v in second.items()]
    path.write_text(
        "from configs import simclr_demo\ndef get_config():\n"
        "    c = simclr_demo.get_config('smoke')\n" + "\n".join([*lines, "    return c\n"])
    )
    field = name.removeprefix("augment.")
    values, _ = parse(
        f"--config={path}", f"--config.{name}=None", f"--config.augment_view2.{field}=None"
    )
    assert values.config.augment[field] is None and values.config.augment_view2[field] is None
    others = {n: values.config.augment[n] for n in given if n != field}
    assert others == {n: v for n, v in given.items() if n != field}
    if field != "strength":
        plain = parse(DEMO)[0].config
        want, _ = FeedRecipe.of(plain).views
        got, second = FeedRecipe.of(values.config).views
        assert getattr(got, field) == getattr(want, field) == getattr(second, field)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("batch_size", "this field always has a value; leave the flag out for the config's"),
        ("augment.preset", "this field always has a value"),
        ("data.dir", "or write --config.data.dir= for none"),
        ("data.test_split", "or write --config.data.test_split= for none"),
        ("model.stages", "this field always has a value"),
        ("augment", "augment is a section; set its fields"),
    ],
)
def test_none_is_refused_where_it_means_nothing(name, words):
    assert words in said(DEMO, f"--config.{name}=None")


NUMBER, WHOLE = "the field takes a number", "the field takes a whole number"
TRUTH = "true or false"


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--config.batch_size=abc", f"{WHOLE}, e.g. --config.batch_size=16"),
        ("--config.batch_size=", WHOLE),
        ("--config.batch_size=3.5", WHOLE),
        ("--config.augment.size=big", f"{WHOLE} (or None: the preset's), e.g. --config.aug"),
        ("--config.optimizer.learning_rate=fast", f"{NUMBER}, e.g. --config.optimizer.learn"),
        ("--config.optimizer.learning_rate=nan", NUMBER),
        ("--config.augment.blur=often", f"{NUMBER} (or None: the preset's)"),
        ("--config.optimizer.nesterov=maybe", f"{TRUTH}, e.g. --config.optimizer.nesterov=false"),
        ("--config.model.stages=(1,", f"{WHOLE}, or several by commas, e.g. --config"),
        ("--config.model.stages=abc", WHOLE),
        ("--config.model.stages=1.5,2", WHOLE),
        ("--config.model.stages=1,,2", WHOLE),
        ("--config.augment.mean=(1,", f"{NUMBER}, or several by commas (or None"),
        ("--eval.linear.learning_rate=abc", f"{NUMBER}, or several by commas, e.g. --eval.linear"),
        ("--eval.embed.report=perhaps", TRUTH),
        ("--eval.embed=3", "embed is a section"),
        ("--quick=perhaps", f"{TRUTH}, e.g. --quick=true"),
        ("--distributed=2", TRUTH),
        ("--mode=nope", "expected one of train, distil, plan, prepare, import, replay,"),
        ("--mode=", "expected one of train, distil, plan"),
        ("--mode=linear-eval", "; did you mean --mode=linear_eval?"),
    ],
)  # fmt: skip
def test_a_bad_value_says_what_was_found_expected_and_an_example(argument, words):
    line = said(DEMO, argument)
    assert line.startswith(f"{argument}: ") and words in line
    assert not any(x in line for x in ("('", "invalid literal", "could not convert", "Error"))


@pytest.mark.parametrize("name", ["workdir", "config.batch_size", "config.duration", "topology"])
@pytest.mark.parametrize("after", [[], ["--quick"]])
def test_a_flag_without_a_value_does_not_take_the_next_one_for_it(name, after):
    line = said(DEMO, f"--{name}", *after)
    words = "has no value: write" if "." in name else "stands alone, and needs a value:"
    assert line == f"--{name} {words} --{name}=VALUE"


def test_only_what_is_true_or_false_is_switched_off():
    assert "--noconfig.batch_size has no value" in said(DEMO, "--noconfig.batch_size")


@pytest.mark.parametrize(
    ("argument", "meant"),
    [
        ("config.batch_sze", ["config.batch_size"]),
        ("config.optimizer.learning_rat", ["config.optimizer.learning_rate"]),
        ("config.learning_rate", ["config.optimizer.learning_rate", "config.probe.learning_rate"]),
        ("config.lr", ["config.optimizer.learning_rate", "config.probe.learning_rate"]),
        ("config.temperature", ["config.simclr.temperature"]),
        ("config.moco.temperature", ["config.simclr.temperature"]),
        ("config.knn.k", ["config.evaluate.knn_k", "eval.knn.k"]),
        ("config.augment.blur_probability", ["config.augment.blur", "config.augment_view2.blur"]),
        ("config.epochs", ["config.duration"]),
        ("config.batch_size.x", ["config.batch_size"]),
        ("eval.knn.kk", ["eval.knn.k"]),
        ("config.linear.held_out", ["eval.linear.held_out"]),
        ("eval.evaluate.knn_k", ["eval.knn.k", "config.evaluate.knn_k"]),
        ("eval.k", ["eval.knn.k"]),
        ("eval.knn.temprature", ["eval.knn.temperature"]),
        ("batch_size", ["config.batch_size"]),
        ("temperature", ["eval.knn.temperature", "config.simclr.temperature",
                         "config.moco.temperature"]),
        ("confg", ["config"]),
        ("wrkdir", ["workdir"]),
        ("config.zzz", None),
        ("config.optimizer.zzz", None),
        ("eval.zzz", None),
        ("bogus", None),
    ],
)  # fmt: skip
def test_an_unknown_field_names_those_that_may_be_meant(argument, meant):
    line = said(DEMO, f"--{argument}=3")
    assert f"--{argument}: " in line
    assert "there is no flag" in line if "." not in argument else "there is no such field" in line
    hint = f"did you mean {' or '.join(f'--{name}' for name in meant)}?" if meant else (
        "`python main.py -h` lists all of them")  # fmt: skip
    assert line.endswith(f": {hint}") or line.endswith(f"; {hint}")


def test_the_temperature_is_that_of_the_method():
    assert "did you mean --config.moco.temperature?" in said(MOCO, "--config.temperature=1")


def test_a_field_that_no_flag_can_set(tmp_path):
    path = tmp_path / "mine.py"
    made = "ConfigDict({'x': [1, 2], 'later': None})"
    path.write_text(f"from ml_collections import ConfigDict\ndef get_config(): return {made}\n")
    assert "no flag can set a list" in said(f"--config={path}", "--config.x=1")
    assert parse(f"--config={path}", "--config.later=None")[0].config.later is None


def test_no_argument_at_all_says_what_to_type():
    line = said()
    assert "nothing to do: try python main.py --config=configs/" in line and len(line) < 150


def test_eval_alone_is_refused():
    assert said(DEMO, "--eval=3") == "--eval=3: set one of its fields, e.g. --eval.knn.k=20"


@pytest.mark.parametrize("name", ["config.batch_size", "eval.knn.k"])
def test_a_flagfile_counts_as_the_command_line(name, tmp_path):
    (tmp_path / "flags").write_text(f"--{name}=5\n")
    assert value_of(f"--flagfile={tmp_path / 'flags'}", name) == 5


def tables():
    for method, make in main.METHODS.items():
        tree = config.base_config(method, make.default_config())
        yield method, tree, command_line.usage.meanings(method, make)
    yield "eval", config.eval_config(), {n: f.meaning for n, f in config.EVAL_FIELDS.items()}


@pytest.mark.parametrize(("name", "tree", "meanings"), list(tables()), ids=lambda x: str(x)[:9])
def test_every_field_has_a_meaning_and_there_are_none_too_many(name, tree, meanings):
    """A new field: add its line to `common/fields.py`, or to `MEANINGS` of its method."""
    found = set(config.flatten(config.as_dict(tree)))
    assert found - set(meanings) == set(), f"no meaning of these fields of {name}"
    assert set(meanings) - found == set(), f"{name} has no such fields"
    for field, text in meanings.items():
        assert text.strip() == text and "\n" not in text and len(text) < 200, field


def test_examples_are_of_fields_and_are_read_as_they_are_shown():
    examples = {name: field.example for name, field in config.FIELDS.items() if field.example}
    assert len(examples) > 3
    for name, example in examples.items():
        text = ",".join(map(str, example))
        assert value_of(f"--config.{name}={text}", f"config.{name}") == example


PAGE = ROOT / "docs" / "reference" / "config.md"


@pytest.fixture
def printed(capsys):
    def call(*arguments):
        values = flags.FlagValues()
        command_line.define(modes.MODES, values)
        with pytest.raises(SystemExit) as caught:
            command_line.parse(["main.py", *arguments], values, main.METHODS)
        assert caught.value.code == 0
        return capsys.readouterr().out

    return call


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_the_help_lists_modes_flags_and_fields_in_80_columns(flag, printed):
    text = printed(flag)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    starts = {line.split()[0].partition("=")[0] for line in lines if line.startswith("  ")}
    assert starts >= {"train", "plan", "prepare", "import", "replay", *modes.MODES}
    assert starts >= {"--config", "--workdir", "--mode", "--topology", "--coordinator"}
    for _, tree, _ in tables():
        names = set(config.flat(tree))
        assert {n for n in names if not n.startswith("augment_view2.")} <= starts
    assert "  batch_size=256" in text and "images of the global batch" in text
    assert "  moco.queue_length=65536" in text and "  simclr.temperature=0.1" in text


def test_a_reader_of_the_help_may_have_read_enough(monkeypatch, tmp_path):
    closed = os.open(tmp_path / "pipe", os.O_CREAT | os.O_WRONLY)

    class Pipe:
        encoding, fileno, write = "utf-8", staticmethod(lambda: closed), len

        def flush(self):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Pipe())
    values = flags.FlagValues()
    command_line.define(modes.MODES, values)
    with pytest.raises(SystemExit) as ended:
        command_line.parse(["main.py", "-h"], values, main.METHODS)
    assert not ended.value.code
    os.write(closed, b"lost")  # as the interpreter does at its exit
    assert (tmp_path / "pipe").read_bytes() == b""


def test_the_help_with_a_config_shows_its_values(printed):
    text = printed(MOCO, "-h")
    assert "  batch_size=16 " in text and "  moco.queue_length=40 " in text
    assert "simclr.temperature" not in text and "  augment.preset=cifar" in text


def test_the_page_of_all_fields_is_up_to_date():
    assert PAGE.read_text() == page(), "run `python tests/cli/test_command_line.py`"


def page():
    return INTRODUCTION + command_line.usage.markdown(main.METHODS)


INTRODUCTION = """# Every field of a config, and of `--eval`

`python main.py -h` prints the same on a terminal, and with `--config=FILE` the values of that file.
Write `--config.NAME=VALUE` to change one for a run; several values are separated by commas, and
true and false can be written `--config.NAME` and `--noconfig.NAME`. `None` in `augment` means what
the preset says; `--config.augment.blur=None` gives a field back to it that the config file has set.
"Empty" is written `--config.NAME=`. `python tests/cli/test_command_line.py` writes this page.

"""

if __name__ == "__main__":
    PAGE.write_text(page())
