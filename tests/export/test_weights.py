"""Weights from elsewhere and our own: what is read, left out, placed where, and refused.

PyTorch's own files are in `test_torch.py`.
"""

import functools
import json
import pickle
import shutil
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tiny
from test_export import STEP, export, variables, workdir

from common.config import eval_config
from common.errors import UserError
from common.evaluate import pretrained
from common.evaluate.online import make_evaluator
from common.models import layout
from common.run import formats
from common.run.checkpoint import Checkpoints
from common.sharding import make_mesh
from common.train import first_state, loop, weights
from common.train import import_weights as import_mode
from common.train.import_weights import import_weights

NETWORK = {"stages": (1, 1), "width": 4, "stem": "cifar"}  # of `tiny.config`
D = 8


def encoder(seed=0):
    """Arrays of an encoder as torchvision names them."""
    drawn = variables(**NETWORK)
    rng = np.random.default_rng(seed)
    return {n: rng.uniform(0.5, 1.5, x.shape).astype(np.float32)
            for n, x in layout.to_torchvision(*drawn).items()}  # fmt: skip


def state_dict(prefix="", seed=0):
    """`encoder` with the counters, behind a prefix."""
    arrays = encoder(seed)
    counters = {f"{n}.num_batches_tracked": np.array(5) for n in layout.batch_norms(arrays)}
    return {prefix + n: x for n, x in (arrays | counters).items()}


def linear(name, out, into, bias=True):
    rng = np.random.default_rng([out, into])
    arrays = {f"{name}.weight": rng.normal(size=(out, into)).astype(np.float32)}
    return arrays | ({f"{name}.bias": rng.normal(size=out).astype(np.float32)} if bias else {})


def moco_v2():
    """The names in the authors' checkpoint: two encoders, the queue."""
    query, key = "module.encoder_q.", "module.encoder_k."
    return (
        state_dict(query, 1) | linear(f"{query}fc.0", D, D) | linear(f"{query}fc.2", 8, D)
        | state_dict(key, 2) | linear(f"{key}fc.0", D, D) | linear(f"{key}fc.2", 8, D)
        | {"module.queue": np.zeros((8, 40), np.float32), "module.queue_ptr": np.zeros(1, np.int64)}
    )  # fmt: skip


def moco_v3():
    base, key = "module.base_encoder.", "module.momentum_encoder."
    projector = linear(f"{base}fc.0", 16, D, bias=False) | linear(f"{base}fc.3", 8, 16, bias=False)
    return (
        state_dict(base, 1) | projector | state_dict(key, 2)
        | linear("module.predictor.0", 16, 8, bias=False)
    )  # fmt: skip


def save(path, arrays):
    formats.write(path, arrays, {})
    return path


KINDS = {
    "torchvision": (lambda: state_dict("", 1) | linear("fc", 10, D), "", ["fc.bias", "fc.weight"]),
    "data parallel": (lambda: state_dict("module.", 1), "module.", []),
    "solo-learn": (
        lambda: state_dict("backbone.", 1) | state_dict("momentum_backbone.", 2)
        | linear("projector.0", 8, D),
        "backbone.", "projector.0.",
    ),
    "MoCo v2": (moco_v2, "module.encoder_q.", "module.queue"),
    "MoCo v3": (moco_v3, "module.base_encoder.", "module.base_encoder.fc.0.weight"),
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
@pytest.mark.parametrize("kind", KINDS)
def test_files_of_others(tmp_path, kind, suffix):
    make, prefix, unused = KINDS[kind]
    arrays = make()
    found = weights.load_weights(save(tmp_path / f"w.{suffix}", arrays))
    assert found.prefix == prefix and found.metadata == {}
    want = encoder(1)  # and not the momentum encoder's
    assert found.arrays.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(found.arrays[name], want[name])
    if isinstance(unused, list):
        assert list(found.unused) == unused
    else:
        assert any(name.startswith(unused) for name in found.unused)
    head = found.head is not None
    assert head == (kind == "MoCo v2")
    # nothing is lost silently: used, left and said, or a counter
    used = {prefix + name for name in want}
    used |= {n for n in arrays if head and n.startswith("module.encoder_q.fc.")}
    left = arrays.keys() - used - set(found.unused)
    assert all(name.endswith("num_batches_tracked") for name in left)


def test_half_precision_becomes_float32(tmp_path):
    arrays = state_dict()
    half = {n: x.astype(ml_dtypes.bfloat16) for n, x in encoder().items()}
    header, data = {}, b""
    for name, x in half.items():  # as another program writes it
        raw = x.tobytes()
        header[name] = {
            "dtype": "BF16", "shape": list(x.shape), "data_offsets": [len(data), len(data + raw)],
        }  # fmt: skip
        data += raw
    text = json.dumps(header).encode()
    (tmp_path / "half.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    shapes = shapes_of("simclr")
    found = weights.load_weights(tmp_path / "half.safetensors")
    params, stats, _ = weights.fit(found, *shapes)
    assert {x.dtype for x in jax.tree.leaves((params, stats))} == {np.dtype(np.float32)}
    want = layout.from_torchvision({n: x.astype(np.float32) for n, x in half.items()})
    jax.tree.map(np.testing.assert_array_equal, (params["backbone"], stats["backbone"]), want)
    assert arrays  # the same names with counters


@functools.cache
def shapes_of(method, **changes):
    setup = tiny.build(tiny.config(method, **dict(changes)), 1).setup
    return jax.eval_shape(setup.init_network, jax.random.key(0))


@pytest.mark.parametrize("method", ["simclr", "moco"])
def test_a_run_and_its_export(tmp_path, method):
    """Backbone, head and statistics of the checkpoint asked for, bit by bit."""
    _, state = workdir(tmp_path / "run", tiny.config(method, model__bn_groups=4))
    export(tmp_path / "run", export__format="npz,safetensors")
    want = jax.device_get((state.params, state.batch_stats))
    shapes = shapes_of(method)
    for path in ("", f"checkpoints/{STEP}", "export/model.npz", "export/model.safetensors"):
        found = weights.load_weights(tmp_path / "run" / path)
        assert found.metadata["method"] == method and found.metadata["step"] == STEP
        params, stats, with_head = weights.fit(found, *shapes)
        assert with_head == (not path.startswith("export"))
        names = ("backbone", "head") if with_head else ("backbone",)
        for got, tree in zip((params, stats), want, strict=True):
            kept = {name: tree[name] for name in names if name in tree}
            assert jax.tree.structure(got) == jax.tree.structure(kept)
            jax.tree.map(np.testing.assert_array_equal, got, kept)
    other = shapes_of(method, head__dim=5)
    found = weights.load_weights(tmp_path / "run")
    assert weights.fit(found, *other)[2] is False


def init_state(c, devices=4):
    method = tiny.build(c, devices)
    state = first_state.draw_state(method.run)
    assert jax.tree.map(lambda x: x.sharding, state) == method.run.shardings
    return state


def test_a_run_starts_from_the_authors_moco(tmp_path, capsys):
    """Query and key encoder with their heads; the rest as without `init_from`."""
    path = save(tmp_path / "moco.npz", moco_v2())
    c = tiny.config("moco", model__bn_groups=4)
    plain = init_state(c)
    c.init_from = str(path)
    state = init_state(c)
    said = capsys.readouterr().err
    assert "encoder and projection head; not used: module.encoder_k.bn1.bias" in said
    arrays = moco_v2()
    for params, stats in (
        (state.params, state.batch_stats),
        (state.key_params, state.key_batch_stats),
    ):
        want = encoder(1)
        got = layout.to_torchvision(params["backbone"], stats["backbone"])
        for name in want:
            np.testing.assert_array_equal(got[name], want[name])
        for theirs, ours in (("fc.0", "dense1"), ("fc.2", "dense2")):
            head = params["head"][ours]
            name = f"module.encoder_q.{theirs}"
            np.testing.assert_array_equal(head["kernel"], arrays[f"{name}.weight"].T)
            np.testing.assert_array_equal(head["bias"], arrays[f"{name}.bias"])
    for name in ("queue", "opt_state", "step"):
        got, want = getattr(state, name), getattr(plain, name)
        jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_head_of_another_kind_is_drawn_and_the_scale_of_images_is_said(tmp_path, capsys):
    path = save(tmp_path / "moco.npz", moco_v2())
    c = tiny.config("simclr", augment__preset="simclr")
    plain = init_state(c)
    c.init_from = str(path)
    state = init_state(c)
    said = capsys.readouterr().err
    assert "the projection head is random; not used: its projection head" in said
    assert (
        "it does not say how its images were scaled; here mean and std are (0.0, 0.0, 0.0)" in said
    )
    for field in ("params", "batch_stats"):
        got, want = getattr(state, field)["head"], getattr(plain, field)["head"]
        jax.tree.map(np.testing.assert_array_equal, got, want)
    name = "layer1.0.conv1.weight"
    got = layout.to_torchvision(state.params["backbone"], state.batch_stats["backbone"])[name]
    np.testing.assert_array_equal(got, encoder(1)[name])


def test_moco_v1_has_one_layer_and_a_classifier_is_no_head(tmp_path):
    prefix = "module.encoder_q."
    arrays = state_dict(prefix) | linear(f"{prefix}fc", 8, D)
    found = weights.load_weights(save(tmp_path / "v1.npz", arrays))
    shapes = shapes_of("moco", head__kind="moco_v1")
    params, _, with_head = weights.fit(found, *shapes)
    assert with_head and not found.unused
    kernel = params["head"]["dense1"]["kernel"]
    np.testing.assert_array_equal(kernel, arrays[f"{prefix}fc.weight"].T)
    found = weights.load_weights(save(tmp_path / "tv.npz", state_dict() | linear("fc", 8, D)))
    assert found.head is None and set(found.unused) == {"fc.weight", "fc.bias"}


@pytest.mark.slow
def test_imported_weights_are_a_run_that_every_mode_opens(tmp_path, capsys):
    arrays = state_dict() | linear("fc", 10, D)
    path = save(tmp_path / "w.safetensors", arrays)
    c = tiny.config("simclr", init_from=str(path), optimizer__warmup="2 epochs")
    run = tmp_path / "run"
    record = import_weights(tiny.METHODS["simclr"], c, run)
    said = capsys.readouterr().out
    assert "holds the weights as step 0" in said and said.endswith("with the same --config.\n")
    (line,) = (run / "results.jsonl").read_text().splitlines()
    assert json.loads(line) == record
    assert record["unused"] == ["fc.bias", "fc.weight"] and len(record["sha256"]) == 64
    assert json.loads((run / "config.json").read_text())["init_from"] == str(path)
    opened = pretrained.load(run, eval_config(), tiny.METHODS)
    assert opened.step == 0
    params, stats = jax.device_get((opened.state.params, opened.state.batch_stats))
    got = layout.to_torchvision(params["backbone"], stats["backbone"])
    for name, want in encoder().items():
        np.testing.assert_array_equal(got[name], want)
    assert export(run, export__format="npz")["checkpoint_step"] == 0
    metadata = formats.read(run / "export" / "model.npz")[1]
    assert metadata["init_from"] == path.name and metadata["step"] == 0
    # training with the same config starts here: the workdir is that run's
    with Checkpoints(run, None) as checkpoints:
        assert checkpoints.latest_step == 0
    with pytest.raises(UserError, match="has checkpoints already: give a new --workdir"):
        import_weights(tiny.METHODS["simclr"], c, run)


@pytest.mark.parametrize(
    ("warmup", "duration", "too_long"),
    [
        ("2 epochs", "1 epoch", True), ("9 steps", "8 steps", True), ("150 %", "8 steps", True),
        ("1 epoch", "1 epoch", False), ("2 epochs", "8 steps", False),  # of one step each
        ("9 steps", "1 epoch", False), ("0 steps", "8 steps", False),
    ],
)  # fmt: skip
def test_an_import_is_not_said_to_be_trainable_with_a_warm_up_that_is_too_long(
    warmup, duration, too_long
):
    """Without the data, so only where it is so for epochs of any length."""
    c = tiny.config("simclr", optimizer__warmup=warmup, duration=duration)
    assert import_mode._warms_up_too_long(c) == too_long


def test_images_have_to_be_scaled_as_in_the_run_that_is_imported(tmp_path):
    workdir(tmp_path / "run", tiny.config("simclr"))  # ImageNet's mean and std
    export(tmp_path / "run", export__format="npz")
    for path in ("", "export/model.npz"):
        where = str(tmp_path / "run" / path)
        c = tiny.config("simclr", init_from=where, augment__preset="simclr")
        text = r"mean \(0.485, 0.456, 0.406\).*config.augment.mean='\(0.485, 0.456, 0.406\)'"
        with pytest.raises(UserError, match=text):
            import_weights(tiny.METHODS["simclr"], c, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def without(arrays, name):
    return {n: x for n, x in arrays.items() if n != name}


MISFITS = {
    "missing": (
        lambda: without(state_dict(), "layer2.0.bn1.running_var"),
        r"lacks layer2.0.bn1.running_var;",
    ),
    "many missing": (
        lambda: {n: x for n, x in state_dict().items() if "layer2" not in n},
        r"lacks layer2.0.bn1.bias, .* and \d+ more; .*stages=\(1,\).*asks for .*stages=\(1, 1\)",
    ),
    "beyond": (
        lambda: state_dict() | {"layer1.0.se.weight": np.ones((4, 4), np.float32)},
        "has layer1.0.se.weight, which the network does not have",
    ),
    "another shape": (
        lambda: state_dict() | {"layer1.0.conv2.weight": np.ones((4, 4, 1, 1), np.float32)},
        r"has layer1.0.conv2.weight \(4, 4, 1, 1\) and not \(4, 4, 3, 3\)",
    ),
    "another stem": (
        lambda: state_dict() | {"conv1.weight": np.ones((4, 3, 7, 7), np.float32)},
        "conv1.weight .*7, 7.* holds .*stem imagenet, the config asks for .*stem cifar",
    ),
    "not finite": (
        lambda: state_dict() | {"bn1.bias": np.array([1, np.nan, 1, 1], np.float32)},
        "has numbers that are not finite in bn1.bias",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISFITS)
def test_weights_that_do_not_fit_are_named(tmp_path, kind):
    make, text = MISFITS[kind]
    found = weights.load_weights(save(tmp_path / "w.npz", make()))
    with pytest.raises(UserError, match=text) as raised:
        weights.fit(found, *shapes_of("simclr"))
    other = "no field of the config helps: the file is incomplete, or of another network"
    advice = dict.fromkeys(("missing", "beyond", "another shape"), other)
    advice["not finite"] = "take another one"
    assert "\n" not in str(raised.value)
    assert str(raised.value).endswith(advice.get(kind, "change config.model"))


class Trap:
    """Unpickling one leaves a trace."""

    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('sprung').touch()",))


def trap(path):
    np.savez(path, **{"conv1.weight": np.array([Trap()], object)})


FILES = {
    "a trap.npz": (trap, "cannot be read as .npz .*pickle"),
    "pickle.npz": (lambda p: p.write_bytes(pickle.dumps(Trap())), "cannot be read as .npz"),
    "empty.npz": (lambda p: p.write_bytes(b""), "empty.npz is empty: fetch"),
    "empty.safetensors": (lambda p: p.write_bytes(b""), "is empty: fetch or write it again"),
    "pickle.safetensors": (
        lambda p: p.write_bytes(pickle.dumps(Trap())), "cannot be read as .safetensors",
    ),
    "cut.safetensors": (
        lambda p: p.write_bytes(safetensors.numpy.save(encoder())[:-9]),
        "cannot be read as .safetensors",
    ),
    "cut.npz": (
        lambda p: p.write_bytes(save(p, encoder()).read_bytes()[:-300]), "cannot be read as .npz",
    ),
    "weights.h5": (lambda p: p.write_bytes(b"x"), "unknown file extension: expected one of"),
    "absent": (lambda p: None, "there is no file or workdir .*absent: give one of weights, or"),
    "absent.npz": (lambda p: None, "absent.npz: No such file .*; give a file of weights or a w"),
    "directory": (lambda p: p.mkdir(), r"is a directory and holds no run \(no config.json\)"),
    "vit.npz": (
        lambda p: save(p, {"blocks.0.attn.qkv.weight": np.ones(3), "cls_token": np.ones(3)}),
        "holds no ResNet with torchvision's names: .*found blocks.0.attn.qkv.weight, cls_token",
    ),
    "classifier.safetensors": (
        lambda p: shutil.copy(tiny.teacher(), p),
        "is a network with a classifier, for distil.teacher and --mode=classify: give the workdir",
    ),
    "two.npz": (
        lambda p: save(p, state_dict("student.") | state_dict("teacher.")),
        "holds 2 encoders, 'student.', 'teacher.': expected one; write a file",
    ),
    "torch.pth": (lambda p: p.write_bytes(b"x"), "PyTorch is not installed: pip install torch"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_that_cannot_be_used_are_refused_and_nothing_in_them_runs(
    tmp_path, monkeypatch, name
):
    make, text = FILES[name]
    monkeypatch.chdir(tmp_path)
    make(tmp_path / name)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=text) as raised:
        weights.load_weights(tmp_path / name)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "sprung").exists()


def test_arrays_of_a_wrong_rank_and_unknown_stems_are_named():
    for change, text in (
        ({"conv1.weight": np.ones((4, 3, 5, 5))}, "conv1.weight is a convolution of 5x5 pixels"),
        ({"bn1.bias": np.ones((4, 1))}, r"bn1.bias has the shape \(4, 1\): expected 1 axes"),
        ({"layer1.0.conv1.bias": np.ones(4)}, "layer1.0.conv1.bias is no array of a ResNet"),
        ({"stem.0.weight": np.ones(4)}, "stem.0.weight is no array of a ResNet"),
    ):
        with pytest.raises(UserError, match=text):
            layout.from_torchvision(encoder() | change)


def test_import_needs_weights_and_a_run_needs_a_checkpoint(tmp_path):
    c = tiny.config("simclr")
    with pytest.raises(UserError, match="--mode=import needs the weights"):
        import_weights(tiny.METHODS["simclr"], c, tmp_path / "new")
    workdir(tmp_path / "run", c)
    with pytest.raises(UserError, match=r"no such checkpoint in .* \(step 5\): it has 3"):
        weights.load_weights(tmp_path / "run" / "checkpoints" / "5")
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is not JSON \(.*restore it"):
        weights.load_weights(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config.json cannot be read \('augment'\): restore it"):
        weights.load_weights(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("imported", [True, False])
def test_training_starts_from_the_weights(tmp_path, imported):
    """In an imported workdir as in a new one: learning rate 0 leaves them as they were."""
    path, run = save(tmp_path / "moco.npz", moco_v2()), tmp_path / "run"
    c = tiny.config(
        "moco", init_from=str(path), data__source="fake", data__fake_examples=20, batch_size=8,
        data__fake_classes=3, duration="3 steps", model__bn_groups=4, moco__queue_length=12,
        optimizer__learning_rate=0.0, evaluate__pictures=False, checkpoint__every="1 step",
    )  # fmt: skip
    if imported:
        import_weights(tiny.METHODS["moco"], c, run)
    summary = loop.train(tiny.METHODS["moco"], c, run, make_evaluator, make_mesh(jax.devices()[:2]))
    assert summary["steps"] == 3
    found = weights.load_weights(run)
    assert found.metadata["step"] == 3
    for name, want in encoder(1).items():
        same = np.array_equal(found.arrays[name], want)
        assert same != ("running" in name), name  # the statistics have seen three batches
    kernel = moco_v2()["module.encoder_q.fc.2.weight"].T
    np.testing.assert_array_equal(found.head[0]["dense2"]["kernel"], kernel)
    path.unlink()  # needed at the start only
    assert (
        loop.train(tiny.METHODS["moco"], c, run, make_evaluator, make_mesh(jax.devices()[:2]))
        == summary
    )
