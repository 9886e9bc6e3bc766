"""Configs: what they check, and what a continued run may change."""

import dataclasses
import importlib
import json
import pathlib
import re

import jax
import numpy as np
import pytest
import tiny
from absl import flags
from ml_collections import ConfigDict

from common import config, optim
from common.cli import command_line, modes
from common.data.augment import presets
from common.data.feed.recipe import FeedRecipe
from common.errors import UserError
from common.setup import make_setup
from common.sharding import make_mesh

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEMO = ROOT / "configs" / "simclr_demo.py"
NAMES = sorted(p.stem for p in (ROOT / "configs").glob("*_*.py") if p.stem != "__init__")


def parse(*arguments):
    """What `main.py` makes of a command line, with flags of its own."""
    argv, values = ["main.py", *map(str, arguments)], flags.FlagValues()
    command_line.define(modes.MODES, values)
    command_line.parse(argv, values, tiny.METHODS)
    command_line.check(values, modes.MODES)
    return values.config


def test_the_six_configs_are_there():
    both = {f"{method}_{name}" for method in ("simclr", "moco") for name in
            ("tpu", "cifar10", "demo")}  # fmt: skip
    assert both <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_config_is_locked_json_and_takes_smoke(name):
    module = importlib.import_module(f"configs.{name}")
    c = module.get_config()
    assert c.is_locked
    config.check(c)
    assert json.loads(json.dumps(config.as_dict(c)))["batch_size"] == c.batch_size
    smoke = module.get_config("smoke")
    assert smoke.data.source == "fake" and smoke.duration == "4 steps"
    with pytest.raises(UserError, match=r"'nope' is unknown: use (.*)") as error:
        module.get_config("nope")
    for variant in re.findall(r":(\w+), ", str(error.value)):
        assert config.as_dict(module.get_config(variant)) != config.as_dict(c)
        assert module.get_config(f"{variant}:smoke").data.source == "fake"
        with pytest.raises(UserError, match=f"'{variant}:nope' is unknown"):
            module.get_config(f"{variant}:nope")


def test_overrides_arrive_with_their_types():
    c = parse(
        f"--config={DEMO}:smoke", "--workdir=x", "--config.batch_size=8",
        "--config.optimizer.warmup=3 steps", "--config.model.stages=(2, 1)",
        "--config.augment.blur=0.25",
    )  # fmt: skip
    assert (c.batch_size, c.optimizer.warmup, c.model.stages) == (8, "3 steps", (2, 1))
    assert c.augment.blur == 0.25 and c.is_locked


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mode=knn"], ["takes the config from the workdir"]),
        (["--mode=plan", "--quick"], ["--quick is for plans of slices: add --topology"]),
        (["--topology=v5e:4x8"], ["--topology goes with --mode=plan, not with --mode=train"]),
    ],
)
def test_bad_arguments_are_one_line(arguments, words):
    with pytest.raises(UserError) as caught:
        parse(f"--config={DEMO}:smoke", "--workdir=x", *arguments)
    assert_one_line(caught.value, words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workdir=x"], ["--config"]),
        ([f"--config={DEMO}"], ["--workdir"]),
        (["--config=nowhere.py", "--workdir=x"], ["no config file nowhere.py", "get_config()"]),
        (["--config=nowhere.py", "--workdir=x", "--config.seed=1"], ["no config file nowhere.py"]),
        (["--config=", "--workdir=x"], ["no config file ''", "needs a Python file"]),
        ([f"--config={DEMO}:nope", "--workdir=x"], ["'nope' is unknown", "smoke"]),
        ([f"--config={DEMO}", "--workdir"], ["--workdir stands alone"]),
        (
            ["--mode=knn", "--workdir=x", "--config.seed=1"],
            ["--config.seed is a field of a config"],
        ),
    ],
)
def test_bad_flags_are_one_line(arguments, words):
    with pytest.raises(UserError) as caught:
        parse(*arguments)
    assert_one_line(caught.value, words)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("    c.model.widht = 64", ["did you mean 'width'"]),
        ("    c.model.width =", ["this is no Python"]),
        ("    c.model.width = nothing", ["NameError: name 'nothing' is not defined"]),
        ("    c.model.width = 'wide'", ["'width'", "cannot be casted to type <class 'int'>"]),
        ("    import no_such_module", ["No module named 'no_such_module'"]),
    ],
)
def test_a_mistake_inside_a_config_file_says_where(line, words, tmp_path):
    text = DEMO.read_text().splitlines()
    at = next(i for i, x in enumerate(text) if "c.model.width" in x)
    path = tmp_path / "mine.py"
    path.write_text("\n".join([*text[:at], line, *text[at + 1 :]]))
    with pytest.raises(UserError) as caught:
        parse(f"--config={path}", "--workdir=x")
    assert_one_line(caught.value, [f"{path}, line {at + 1}: ", *words])


@pytest.mark.parametrize(
    ("text", "words"),
    [("x = 1", "mine.py has no get_config()"), ("def get_config(): return 3", "no ConfigDict")],
)
def test_a_file_that_is_no_config(text, words, tmp_path):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError) as caught:
        parse(f"--config={tmp_path / 'mine.py'}", "--workdir=x")
    assert_one_line(caught.value, [words])


def assert_one_line(error, words):
    assert "\n" not in str(error) and "Traceback" not in str(error)
    for word in words:
        assert word in str(error)


@pytest.mark.parametrize(
    ("field", "value", "least"),
    [
        ("batch_size", 1, 2), ("log_every", 0, 1), ("model__bn_groups", 0, 1), ("seed", -1, 0),
        ("checkpoint__keep", 0, 1), ("evaluate__knn_k", -1, 0), ("data__image_size", 0, 1),
    ],
)  # fmt: skip
def test_a_number_out_of_range_is_refused(field, value, least):
    dotted = field.replace("__", ".")
    message = rf"{dotted}={value} is too small: expected at least {least}"
    with pytest.raises(UserError, match=message):
        config.check(tiny.config("simclr", **{field: value}))
    config.check(tiny.config("simclr", **{field: max(least, 1)}))


@pytest.mark.parametrize("groups", [5, 32])  # 32 divides the 2 x 16 views of a step
def test_groups_that_do_not_divide_the_batch_are_refused(groups):
    for method in ("simclr", "moco"):
        message = f"bn_groups={groups} does not divide batch_size=16: .* 2, 4, 8"
        with pytest.raises(UserError, match=message):
            config.check(tiny.config(method, model__bn_groups=groups))


@pytest.mark.parametrize("name", ["simclr_cifar10", "moco_cifar10", "moco_v2plus_cifar10"])
def test_the_configs_for_two_cores_are_sound(name):
    c = importlib.import_module(f"configs.{name}").get_config("cpu")
    config.check(c)
    assert c.data.source == "tfds:cifar10" and c.model.stages == (1, 1)
    assert FeedRecipe.of(c).size == 24
    method = tiny.METHODS[c.method](make_setup(c, make_mesh(jax.devices()[:1]), 7800, 390, 10))
    state = jax.eval_shape(method.init, jax.random.key(0))
    assert 1e6 < sum(x.size for x in jax.tree.leaves(state.params)) < 2e6


OURS = (True, "he", "", "lecun", 1.0)  # what the figures of the demos and of :cpu are measured with


@pytest.mark.parametrize(
    ("name", "arg", "want"),
    [
        ("simclr_tpu", "", (True, "lecun", "", "normal", 2.0)),  # the authors' TensorFlow
        ("simclr_v2_tpu", "r152", (True, "lecun", "", "normal", 2.0)),
        ("simclr_cifar10", "", (False, "he", "torch", "torch", 1.0)),  # torchvision, a new stem
        ("moco_cifar10", "", (False, "he", "torch", "torch", None)),
        ("moco_v2plus_cifar10", "", (False, "he", "torch", "torch", None)),
        ("moco_tpu", "", (False, "he", "", "torch", None)),  # torchvision
        ("simclr_cifar10", "cpu", OURS),
        ("moco_cifar10", "cpu", (*OURS[:4], None)),
        ("simclr_demo", "", OURS),
        ("moco_demo", "", (*OURS[:4], None)),
    ],
)
def test_each_config_starts_as_the_code_that_it_cites(name, arg, want):
    c = importlib.import_module(f"configs.{name}").get_config(arg)
    m, scale = c.model, c.simclr.loss_scale if "simclr" in c else None
    assert (m.zero_init_residual, m.conv_init, m.stem_init, c.head.init, scale) == want


def test_the_recipe_of_simclr_v2_is_the_published_one():
    """Section 3.1 of the paper: 6.4 after 5 % of 800 epochs of 312 steps."""
    for arg in ("", "sk", "r152"):
        c = importlib.import_module("configs.simclr_v2_tpu").get_config(arg)
        config.check(c)
        total = optim.steps_of(c.duration, 312, name="duration")
        _, schedule = optim.make_optimizer(c.optimizer, c.batch_size, total, 312)
        assert (c.batch_size, total, c.head.layers, c.simclr.temperature) == (4096, 249_600, 3, 0.1)
        assert (c.optimizer.name, c.optimizer.weight_decay, c.model.bn_groups) == ("lars", 1e-4, 1)
        rates = [float(schedule(step)) for step in (0, 12_479, 12_480, 249_599)]
        np.testing.assert_allclose(rates[1:3], 6.4, rtol=1e-3)
        assert rates[0] < 1e-3 and rates[3] < 1e-6
        m = c.model
        sk = 0.0625 if arg else 0.0
        assert (m.resnet_d, m.sk_ratio) == (bool(arg), sk)
        assert (m.depth, m.width_multiplier) == ((152, 3) if arg == "r152" else (50, 1))


def test_the_table_of_fields_agrees_with_the_code_that_reads_it():
    """Augmentation's own fields and types; defaults that are within their bounds."""
    read = {f.name: f.type for f in dataclasses.fields(presets.Augmentation)}
    read |= {"preset": str, "strength": float, "mean": tuple, "std": tuple}
    for name in ("augment", "augment_view2"):
        section = config.section(name)
        assert {field: section.get_type(field) for field in section} == read
    for name, field in (config.FIELDS | config.EVAL_FIELDS).items():
        optional = field.kind is not None and field.default is None
        assert optional or not field.one_of or field.default in field.one_of, name
        assert field.least is None or field.default >= field.least, name
    with pytest.raises(KeyError):
        config.section("data", sauce="fake")


def test_a_run_from_before_the_scale_of_the_loss_goes_on_with_1():
    c = tiny.config("simclr", simclr__loss_scale=2.0)
    saved = config.as_dict(c)
    del saved["simclr"]["loss_scale"]
    begun, newer = config.as_begun(c, saved)
    assert begun.simclr.loss_scale == 1.0 and newer == {"simclr.loss_scale": 1.0}
    config.check_same_run(saved, config.as_dict(begun), "w")
    with pytest.raises(UserError, match=r"simclr.loss_scale \(was 'absent', now 2.0\)"):
        config.check_same_run(saved, config.as_dict(c), "w")


def test_a_run_from_before_dcl_goes_on_with_nt_xent():
    c = tiny.config("simclr", simclr__loss="dcl")
    saved = config.as_dict(c)
    del saved["simclr"]["loss"]
    begun, newer = config.as_begun(c, saved)
    assert begun.simclr.loss == "nt_xent" and newer == {"simclr.loss": "nt_xent"}
    config.check_same_run(saved, config.as_dict(begun), "w")
    with pytest.raises(UserError, match=r"simclr.loss \(was 'absent', now 'dcl'\)"):
        config.check_same_run(saved, config.as_dict(c), "w")
    with pytest.raises(UserError, match=r'simclr.loss="dlc" is unknown.*did you mean "dcl"'):
        tiny.build(tiny.config("simclr", simclr__loss="dlc"))


def test_runs_from_before_memory_and_v2plus_go_on_without():
    """Nothing has to be given for the new fields, and what they would change is refused."""
    new = {
        "simclr": {"memory_length": 40, "memory_momentum": 0.9},
        "moco": {"momentum_end": 0.999, "queue_per_view": True, "loss_scale": 0.5},
    }
    for method, fields in new.items():
        saved = config.as_dict(tiny.config(method))
        for name in fields:
            del saved[method][name]
        config.check_same_run(saved, config.as_dict(tiny.config(method)), "w")
        for name, value in fields.items():
            c = tiny.config(method, **{f"{method}__{name}": value})
            with pytest.raises(UserError, match=rf"{method}.{name} \(was 'absent', now {value}\)"):
                config.check_same_run(saved, config.as_dict(c), "w")


def test_a_run_starts_from_one_place():
    c = config.base_config("simclr", ConfigDict())
    c.init_from, c.resume_from = "a.npz", "b"
    with pytest.raises(UserError, match=r"init_from=a.npz and resume_from=b: .* one of them"):
        config.check(c)


def test_unknown_dtype_and_temperature_are_refused():
    with pytest.raises(UserError, match="float16"):
        config.check(tiny.config("simclr", model__dtype="float16"))
    with pytest.raises(UserError, match="knn_temperature=0"):
        config.check(tiny.config("simclr", evaluate__knn_temperature=0.0))


def test_what_a_continued_run_may_change():
    saved = config.as_dict(tiny.config("moco"))
    free = {"log_every": 1, "checkpoint__every": "1 step", "evaluate__every": "1 step",
            "data__dir": "d", "data__on_corrupt": "replace"}  # fmt: skip
    config.check_same_run(saved, config.as_dict(tiny.config("moco", **free)), "w")
    fixed = {"batch_size": 32, "model__stages": (2,), "seed": 1, "moco__momentum": 0.5,
             "duration": "9 steps", "evaluate__knn_k": 3, "data__source": "fake"}  # fmt: skip
    for field, value in fixed.items():
        with pytest.raises(UserError, match=rf"^w holds.*{field.replace('__', '.')} \(was"):
            config.check_same_run(saved, config.as_dict(tiny.config("moco", **{field: value})), "w")


def test_a_run_that_is_to_train_for_longer_is_told_how():
    saved = config.as_dict(tiny.config("simclr", duration="8 steps"))
    longer = tiny.config("simclr", duration="9 steps")
    with pytest.raises(UserError) as caught:
        config.check_same_run(saved, config.as_dict(longer), "runs/mine")
    how = "--config.resume_from=runs/mine --config.resume_optimizer"
    words = ["duration (was '8 steps', now '9 steps')", f"train on in a new --workdir, with {how}"]
    assert_one_line(caught.value, words)
    two = tiny.config("simclr", duration="9 steps", seed=1)
    with pytest.raises(UserError, match="give another --workdir, or the config of that run"):
        config.check_same_run(saved, config.as_dict(two), "runs/mine")


@pytest.mark.parametrize(("before", "how"), [("distil", " with --mode=distil"), ("moco", "")])
def test_a_run_of_another_method_is_named_as_that(before, how):
    """Not by the fields that follow from it, of which there are many."""
    saved, now = (config.as_dict(tiny.config(name)) for name in (before, "simclr"))
    with pytest.raises(UserError) as caught:
        config.check_same_run(saved, now, "w")
    words = [f"w holds a run of the method {before}, and this is one of simclr", f"run{how} to con"]
    assert_one_line(caught.value, words)


def test_a_field_of_another_version_is_named():
    saved = config.as_dict(tiny.config("simclr"))
    now = json.loads(json.dumps(saved))
    del saved["head"]["dim"]
    with pytest.raises(UserError, match=r"head.dim \(was 'absent', now 8\)"):
        config.check_same_run(saved, now, "w")


def test_chance_is_that_of_guessing():
    """Of 2 x 16 views each has 31 others; a query has its key and the 40 of the queue."""
    assert tiny.build(tiny.config("simclr"), 1).chance == 1 / 31
    assert tiny.build(tiny.config("simclr", simclr__memory_length=40), 1).chance == 1 / 71
    assert tiny.build(tiny.config("moco", model__bn_groups=4), 1).chance == 1 / 41


def test_what_an_import_left_open_may_be_decided_by_the_training():
    saved = {"data": {"value_range": "auto", "labels": "auto", "source": "folder:a"}, "seed": 0}
    current = {"data": {"value_range": "0:1", "labels": "auto", "source": "folder:a"}, "seed": 0}
    config.check_same_run(saved, current, "w")
    assert config.with_decided(saved, current) == current
    assert config.with_decided(current, saved) == current  # and once: it stays
    with pytest.raises(UserError, match=r"data.value_range \(was '0:1', now 'auto'\)"):
        config.check_same_run(current, saved, "w")
    current["data"]["labels"] = "none"
    with pytest.raises(UserError, match=r"data.labels \(was 'auto', now 'none'\)"):
        config.check_same_run(saved, current, "w")
