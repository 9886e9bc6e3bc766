"""A new run from another run's weights: what fits is taken, and what does not is said."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import opened_run
import pytest
import tiny
from etils import epath

from common.config import check_same_run
from common.errors import UserError
from common.evaluate.online import make_evaluator
from common.method import Method
from common.optim import make_optimizer
from common.run.checkpoint import Checkpoints
from common.sharding import batch_sharding, make_mesh, replicated
from common.train import loop, resume_from


class Plain(Method):
    """A method without a wish."""


def place(seed, width=4, out=3, optimizer="sgd", **fields):
    """The parts of a real state that matter here, on two devices."""
    c = tiny.config("simclr", optimizer__name=optimizer)
    tx, _ = make_optimizer(c.optimizer, c.batch_size, total_steps=8, steps_per_epoch=4)
    rng, mesh = np.random.default_rng(seed), make_mesh(jax.devices()[:2])
    params = {"backbone": {"kernel": rng.normal(size=(3, width)).astype(np.float32)},
              "head": {"kernel": rng.normal(size=(width, out)).astype(np.float32)}}  # fmt: skip
    state = {
        "step": np.int32(seed),
        "params": params,
        "opt_state": tx.init(jax.tree.map(jnp.asarray, params)),
        **fields,
    }
    shardings = jax.tree.map(lambda _: replicated(mesh), state)
    if "queue" in fields:
        shardings["queue"] = batch_sharding(mesh)
    return jax.device_put(state, shardings)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The workdir of a run, and its state."""
    workdir = tmp_path_factory.mktemp("other")
    state = place(6, queue=np.arange(8.0, dtype=np.float32))
    with Checkpoints(workdir, 2) as checkpoints:
        checkpoints.save(6, state, {})
    return workdir, tiny.named_leaves(state)


def adopt(state, workdir, text, method=None, optimizer=False):
    method = method or Plain(None)
    got = resume_from.adopt(text, epath.Path(workdir), method, state, optimizer=optimizer)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(state), strict=True):
        assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)
    return tiny.named_leaves(got)


def test_the_same_network_takes_all_but_step_and_momentum(other, tmp_path, capsys):
    workdir, want = other
    state = place(1, queue=np.zeros(8, np.float32))
    before = tiny.named_leaves(state)
    got = adopt(state, tmp_path, str(workdir))
    assert got.keys() == want.keys() and any("opt_state" in n for n in want)
    for name in want:
        source = before if name.startswith(("['step']", "['opt_state']")) else want
        np.testing.assert_array_equal(got[name], source[name], err_msg=name)
    record = json.loads((tmp_path / resume_from.FILE).read_text())
    assert (record["step"], record["directory"]) == (6, str(workdir))
    assert record["not_taken"]["step"] == "starts at 0" and not record["not_used"]
    said = capsys.readouterr().err
    assert f"weights of {workdir} after step 6: params/backbone/kernel, params/head" in said
    assert "not asked for (resume_optimizer)" in said


def test_started_again_it_takes_the_same_step(tmp_path):
    state = place(1)
    for step in (6, 9):
        with Checkpoints(tmp_path / "other", 2) as checkpoints:
            checkpoints.save(step, place(step), {})
        (tmp_path / f"run{step}").mkdir()
        first = adopt(state, tmp_path / "run6", str(tmp_path / "other"))
        want = tiny.named_leaves(place(6))
        np.testing.assert_array_equal(first["['params']['backbone']['kernel']"],
                                      want["['params']['backbone']['kernel']"])  # fmt: skip
    newest = adopt(state, tmp_path / "run9", str(tmp_path / "other"))
    assert not np.array_equal(newest["['params']['backbone']['kernel']"],
                              want["['params']['backbone']['kernel']"])  # fmt: skip


def test_another_head(other, tmp_path, capsys):
    workdir, want = other
    state = place(1, out=5)
    before = tiny.named_leaves(state)
    got = adopt(state, tmp_path, f"{workdir}@6")
    name = "['params']['{}']['kernel']"
    np.testing.assert_array_equal(got[name.format("backbone")], want[name.format("backbone")])
    np.testing.assert_array_equal(got[name.format("head")], before[name.format("head")])
    record = json.loads((tmp_path / resume_from.FILE).read_text())
    assert record["not_taken"]["params/head/kernel"] == "[4, 3] there and [4, 5] here"
    assert record["not_used"] == ["queue"]
    assert "not restored: params/head/kernel: [4, 3] there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"vit__heads": 2}, "has 3 attention heads and the config 2: set --config.vit.heads=3"),
        ({"data__image_size": 12}, "has positions for 2 x 2 patches and the config 3 x 3, which"),
    ],
)
def test_what_the_shapes_of_a_vit_do_not_show_is_compared(changes, text, tmp_path):
    """Heads and fixed positions: the same arrays would be another function."""
    other = tmp_path / "other"
    opened_run.write(other, "moco_v3", **tiny.VIT)
    method = tiny.build(tiny.config("simclr", **tiny.VIT | changes), 1)
    with pytest.raises(UserError, match=text):
        resume_from.adopt(str(other), epath.Path(tmp_path), method, None)


def test_another_scale_of_images_is_said(tmp_path, capsys):
    other = opened_run.write(tmp_path / "other", augment__preset="simclr")
    method = tiny.build(
        tiny.config("simclr", augment__preset="simclr", augment__mean=(0.5, 0.4, 0.3)), 1
    )
    adopt(tiny.place_state(method), tmp_path, str(other), method)
    said = capsys.readouterr().err
    assert "its images were scaled with mean (0.0, 0.0, 0.0) and std (1.0, 1.0, 1.0), here" in said
    assert "here with mean (0.5, 0.4, 0.3) and std (1.0, 1.0, 1.0)" in said


@pytest.mark.parametrize(
    "variant", ["moco", "moco_v3", pytest.param("simclr_memory", marks=pytest.mark.slow)]
)
def test_a_momentum_encoder_follows_weights_of_a_run_without_one(variant):
    c = tiny.config(variant, model__bn_groups=4) if variant in tiny.METHODS else (
        tiny.variant_config(variant, "float32"))  # fmt: skip
    method = tiny.build(c, 2)
    state = tiny.place_state(method)
    got, derived = method.adopted(state, {"params/backbone/stem_conv/kernel"})
    assert derived == ["key_params", "key_batch_stats"]
    a, b = tiny.named_leaves(got.key_params), tiny.named_leaves(state.params)
    b = {n: x for n, x in b.items() if "predictor" not in n}
    assert a.keys() == b.keys() and all(np.array_equal(a[n], b[n]) for n in a)
    same, derived = method.adopted(state, {"params/x", "key_params/x"})
    assert same is state and derived == []


@pytest.mark.slow
def test_a_memory_begins_empty_after_a_run_without_one_and_is_left_behind(tmp_path):
    """The momentum encoder and the keys of a run with a memory are no part of one without."""
    memory = {"simclr__memory_length": 40}
    plain, more = opened_run.write(tmp_path / "a"), opened_run.write(tmp_path / "b", **memory)
    for workdir, there, changes in (
        (plain, {}, memory),
        (more, memory, {}),
        (more, memory, memory),
    ):
        c = tiny.config("simclr", **changes)
        method = tiny.build(c, 2)
        (work := tmp_path / f"{workdir.name}{len(changes)}").mkdir()
        state = jax.jit(method.init)(jax.random.key(0))
        got = resume_from.adopt(str(workdir), epath.Path(work), method, state)
        record = json.loads((work / resume_from.FILE).read_text())
        unused = {name.split("/")[0] for name in record["not_used"]}
        if not changes:
            assert not hasattr(got, "queue") and not record["derived"]
            assert unused == {"key_params", "key_batch_stats", "queue"}
            continue
        assert not unused and record["derived"] == (
            [] if there else ["key_params", "key_batch_stats"]
        )
        assert bool(np.any(got.queue.keys)) == bool(there)
        same = np.array_equal(*(tiny.named_leaves(x["head"])["['dense1']['kernel']"]
                                for x in (got.key_params, got.params)))  # fmt: skip
        assert same != bool(there)


@pytest.mark.slow
@pytest.mark.parametrize("field", ["resume_from", "init_from"])
def test_moco_v3_starts_from_the_weights_of_a_simclr_run(field, tmp_path):
    """Both encoders have them, heads too; the predictor is drawn."""
    other = opened_run.write(tmp_path / "simclr", head__kind="moco_v3")
    c = tiny.config(
        "moco_v3", data__source="fake", data__fake_examples=60, data__fake_classes=3,
        duration="1 step", evaluate__every="0 steps", evaluate__pictures=False,
        data__test_split="", optimizer__learning_rate=0.0, **{field: str(other)},
    )  # fmt: skip
    mesh = make_mesh(jax.devices()[:2])
    loop.train(tiny.METHODS["moco_v3"], c, tmp_path / "run", make_evaluator, mesh)
    with Checkpoints(epath.Path(other), None, read_only=True) as checkpoints:
        want = checkpoints.read(opened_run.STEP)[0]
    with Checkpoints(epath.Path(tmp_path / "run"), None, read_only=True) as checkpoints:
        got = checkpoints.read(1)[0]
    names = [n for n in want if n.startswith("params/")]
    assert len(names) == len([n for n in got if n.startswith("key_params/")]) > 10
    for name in names:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)
        # (an average of equal numbers)
        np.testing.assert_allclose(got[f"key_{name}"], want[name], rtol=1e-6, err_msg=name)
    assert np.std(got["params/predictor/dense1/kernel"]) > 0.01
    if field == "resume_from":
        record = json.loads((tmp_path / "run" / resume_from.FILE).read_text())
        assert record["derived"] == ["key_params", "key_batch_stats"]
        missing = [n for n in record["not_taken"] if "opt_state" not in n and "probe" not in n]
        assert all(n == "step" or "/predictor/" in n for n in missing) and len(missing) > 3


@pytest.mark.parametrize(("name", "kept"), [("sgd", 0), ("adamw", 1)])
def test_with_the_optimiser_its_counter_of_the_schedule_starts_anew(name, kept, tmp_path):
    state = place(0, optimizer=name)
    counters = [n for n in tiny.named_leaves(state) if n.endswith(".count")]
    assert len(counters) == 1 + kept
    with Checkpoints(tmp_path / "other", 2) as checkpoints:
        checkpoints.save(5, jax.tree.map(lambda x: x + 5, state), {})
    got = adopt(state, tmp_path, str(tmp_path / "other"), optimizer=True)
    assert sorted(int(got[n]) for n in counters) == [0] + [5] * kept
    moments = [n for n in got if "opt_state" in n and got[n].ndim]
    assert moments and all((got[n] == 5).all() for n in moments)


def test_what_cannot_be_resumed_from(other, tmp_path):
    workdir, _ = other
    state = place(0, width=8)

    def said(text, where=tmp_path):
        with pytest.raises(UserError) as caught:
            adopt(state, where, text)
        return str(caught.value)

    assert "no checkpoints in" in said(f"{tmp_path}/nowhere")
    assert "no checkpoint of step 7; there are: 6" in said(f"{workdir}@7")
    assert "is the workdir itself" in said(str(workdir), workdir)
    assert "fits this network: params/backbone/kernel is [3, 4] there and [3, 8] here" in said(
        f"{workdir}@6"
    )


@pytest.mark.filterwarnings(
    "ignore:coroutine:RuntimeWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_a_damaged_source_is_one_line(other, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(other[0], copy)
    path = copy / "checkpoints" / "6" / "progress" / "metadata"
    path.write_text(path.read_text().replace('"params/head/kernel": ', '"params/head/kernel": 1'))
    state = place(0)
    said = r"the checkpoint of step 6 in .* is damaged \(params/head/kernel is not what was saved\)"
    with pytest.raises(UserError, match=said):
        adopt(state, tmp_path, str(copy))


def test_a_run_of_older_code_is_continued_with_new_fields_off():
    c = {"seed": 0, "resume_from": "", "resume_optimizer": False}
    check_same_run({"seed": 0}, c, "here")
    with pytest.raises(UserError, match=r"resume_from \(was 'absent', now 'x'\)"):
        check_same_run({"seed": 0}, c | {"resume_from": "x"}, "here")
