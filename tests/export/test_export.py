"""Exported weights: names, shapes and numbers; the StableHLO function in a fresh process."""

import json
import subprocess
import sys
import textwrap
import zipfile

import bucket
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_resnet import BLOCKS

from common import version
from common.cli import modes
from common.config import as_dict, eval_config
from common.errors import UserError
from common.models import layout, layouts, resnet
from common.run import formats
from common.run.checkpoint import Checkpoints

STEP = 3


def workdir(path, c, devices=2, seed=0):
    """A run of random weights after step 3; returns its method and state."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(as_dict(c)))
    method = tiny.build(c, devices)
    state = tiny.place_state(method, seed)
    with Checkpoints(path, None) as checkpoints:
        checkpoints.save(STEP, state, {})
    return method, state


def export(path, **changes):
    """`--mode=export`; `changes` as in `tiny.config`."""
    s = eval_config()
    for name, value in changes.items():
        section, *rest = name.split("__")
        if rest:
            s[section][rest[0]] = value
        else:
            s[section] = value
    return modes.run("export", path, s, tiny.METHODS)


def variables(**network):
    """Random parameters and batch statistics of an encoder."""
    model = resnet.ResNet(**network)
    size = 16 if model.stem == "patch4" else 8
    images = jnp.zeros((1, size, size, 3))
    drawn = tiny.draw_state(jax.eval_shape(lambda: model.init(jax.random.key(0), images, False)))
    return drawn["params"], drawn["batch_stats"]


def state_dict_by_hand(depth):
    """Shapes in `torchvision.models.resnet{depth}().state_dict()` after He et al. 2016, table 1."""
    out, wide, before = {}, 4 if depth >= 50 else 1, 64

    def norm(name, c):
        leaves = ("weight", "bias", "running_mean", "running_var")
        out.update({f"{name}.{leaf}": (c,) for leaf in leaves})

    out["conv1.weight"] = (64, 3, 7, 7)
    norm("bn1", 64)
    for stage, blocks in enumerate(BLOCKS[depth]):
        mid = 64 * 2**stage
        for block in range(blocks):
            at = f"layer{stage + 1}.{block}"
            sizes = [(before, mid, 1), (mid, mid, 3), (mid, 4 * mid, 1)]
            sizes = sizes if wide == 4 else [(before, mid, 3), (mid, mid, 3)]
            for i, (c, d, k) in enumerate(sizes, 1):
                out[f"{at}.conv{i}.weight"] = (d, c, k, k)
                norm(f"{at}.bn{i}", d)
            if before != wide * mid:
                out[f"{at}.downsample.0.weight"] = (wide * mid, before, 1, 1)
                norm(f"{at}.downsample.1", wide * mid)
            before = wide * mid
    return out


@pytest.mark.parametrize(
    ("depth", "entries", "parameters"),
    # of torchvision's state_dict and its parameters, both without the last layer
    [(18, 120, 11_176_512), (50, 318, 23_508_032)],
)
def test_names_and_shapes_are_torchvisions(depth, entries, parameters):
    model = resnet.ResNet(depth=depth)
    tree = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), False))
    got = jax.eval_shape(layout.to_torchvision, tree["params"], tree["batch_stats"])
    got_shapes = {name: x.shape for name, x in got.items()}
    assert got_shapes == state_dict_by_hand(depth)
    norms = layout.batch_norms(got)
    assert len(got) + len(norms) == entries
    assert sum(x.size for n, x in got.items() if "running" not in n) == parameters
    assert layout.describe(got) == {
        "depth": depth, "stages": tuple(BLOCKS[depth]), "bottleneck": depth == 50, "width": 64,
        "stem": "imagenet", "feature_dim": 512 if depth == 18 else 2048,
        "resnet_d": False, "selective_kernels": False, "torchvision": f"resnet{depth}",
    }  # fmt: skip


D = {"stages": (2, 1), "width": 4, "resnet_d": True}
RESNET_D = [
    D,
    D | {"stem": "cifar"},
    D | {"stem": "cifar", "bottleneck": True, "sk_ratio": 0.5},
    {"depth": 50, "width": 4, "resnet_d": True, "sk_ratio": 0.5},
]


@pytest.mark.parametrize(
    "network",
    [{"depth": 50, "width": 4}]
    + [{"stages": (2, 1, 1), "width": 4, "stem": stem} for stem in resnet.STEMS]
    + [pytest.param(x, marks=pytest.mark.slow) for x in RESNET_D],
)
def test_there_and_back_is_exact(network):
    trees = variables(**network)
    arrays = layout.to_torchvision(*trees)
    back = layout.from_torchvision(arrays)
    assert jax.tree.structure(back) == jax.tree.structure(trees)
    jax.tree.map(np.testing.assert_array_equal, back, trees)
    found = layout.describe(arrays)
    assert found["stem"] == network.get("stem", "imagenet")
    assert found["feature_dim"] == resnet.ResNet(**network).feature_dim
    assert found["depth"] == network.get("depth") and found["width"] == 4
    assert found["resnet_d"] == network.get("resnet_d", False)
    assert found["selective_kernels"] == ("sk_ratio" in network)
    assert found["torchvision"] == ""  # of its constructors none is so narrow


def test_a_resnet_d_from_elsewhere_may_be_another_function():
    """timm's first shortcut does not pool, and no name or shape shows it; ours are known by what
    they record."""
    own = layouts.of(None)
    for network, metadata, says in (
        (D, {}, True), (D, {"layout": own.name}, False),
        ({"stages": (1,), "width": 4, "stem": "cifar"}, {}, False),
    ):  # fmt: skip
        arrays = layout.to_torchvision(*variables(**network))
        found, notes = own.fitted(arrays, metadata, "file")
        assert found.keys() == arrays.keys()
        assert [n.startswith("a ResNet-D from elsewhere") for n in notes] == [True] * says


def test_each_array_of_a_batch_norm_has_pytorchs_name():
    """All four have one shape, and a round trip would hide a name that is wrong both ways."""
    params, batch_stats = variables(stages=(1,), width=4, stem="cifar")
    arrays = layout.to_torchvision(params, batch_stats)
    norms = {
        "bn1": (params["stem_bn"], batch_stats["stem_bn"]),
        "layer1.0.bn2": (params["layer1_0"]["bn2"], batch_stats["layer1_0"]["bn2"]),
    }
    for theirs, (found, running) in norms.items():
        np.testing.assert_array_equal(arrays[f"{theirs}.weight"], found["scale"])
        np.testing.assert_array_equal(arrays[f"{theirs}.bias"], found["bias"])
        np.testing.assert_array_equal(arrays[f"{theirs}.running_mean"], running["mean"])
        np.testing.assert_array_equal(arrays[f"{theirs}.running_var"], running["var"])


@pytest.mark.parametrize("stem", ["cifar", "patch2", "patch4"])
def test_a_patch_stem_is_the_convolution_that_the_metadata_describes(stem):
    """PyTorch's Conv2d(3, d, kernel_size, stride, padding), a window at a time."""
    model = resnet.ResNet(stages=(1,), width=4, stem=stem)
    params, batch_stats = variables(stages=(1,), width=4, stem=stem)
    x = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    _, record = model.apply(
        {"params": params, "batch_stats": batch_stats}, x, False,
        capture_intermediates=lambda m, _: m.name == "stem_conv", mutable=["intermediates"],
    )  # fmt: skip
    got = record["intermediates"]["stem_conv"]["__call__"][0]
    kernel = layout.to_torchvision(params, batch_stats)["conv1.weight"].astype(np.float64)
    how = layout.conv1(stem)
    k, s, p = how["kernel_size"], how["stride"], how["padding"]
    assert kernel.shape == (4, 3, k, k) and not how["max_pool"]
    padded = np.pad(x.astype(np.float64), ((0, 0), (p, p), (p, p), (0, 0)))
    side = (16 + 2 * p - k) // s + 1
    assert got.shape == (2, side, side, 4)
    for i in range(side):
        for j in range(side):
            window = padded[:, i * s : i * s + k, j * s : j * s + k]
            want = np.einsum("nhwc,dchw->nd", window, kernel)
            np.testing.assert_allclose(got[:, i, j], want, rtol=1e-5, atol=1e-5)


# Nothing of this project is imported: it must not be needed.
RELOAD = """
import sys
import jax
import numpy as np

function = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
images = np.load(sys.argv[2])
many, one = (np.asarray(function.call(x)) for x in (images, images[:1]))
np.savez(sys.argv[3], many=many, one=one)
print(",".join(function.platforms), function.nr_devices)
assert not any(name.split(".")[0] in ("common", "flax") for name in sys.modules)
"""


def test_export_of_a_run(tmp_path, capsys):
    """Files, metadata, the line in results.jsonl; the reloaded function equals the encoder."""
    c = tiny.config("moco", model__bn_groups=4, model__stem="patch2")
    method, state = workdir(tmp_path / "run", c)
    record = export(tmp_path / "run")
    out = tmp_path / "run" / "export"
    said = capsys.readouterr().out
    assert "encoder after step 3" in said and "fc: zeros (no linear evaluation)" in said
    assert record["mode"] == "export" and record["checkpoint_step"] == 3
    assert record["files"] == {p.name: p.stat().st_size for p in out.iterdir()
                               if p.name != "export.json"}  # fmt: skip

    arrays, metadata, digest = formats.read(out / "model.safetensors")
    assert len(digest) == 64
    params, stats = jax.device_get((state.params["backbone"], state.batch_stats["backbone"]))
    want = layout.to_torchvision(params, stats)
    norms = layout.batch_norms(want)
    d = 8  # two stages from width 4
    assert arrays.keys() == want.keys() | {f"{n}.num_batches_tracked" for n in norms} | {
        "fc.weight", "fc.bias",
    }  # fmt: skip
    for name, array in want.items():
        assert arrays[name].dtype == np.float32
        np.testing.assert_array_equal(arrays[name], array)
    for name in norms:
        counter = arrays[f"{name}.num_batches_tracked"]
        assert counter.shape == () and counter.dtype == np.int64 and counter == 3
    assert arrays["fc.weight"].shape == (1000, d) and not arrays["fc.weight"].any()
    assert arrays["fc.bias"].shape == (1000,) and not arrays["fc.bias"].any()

    other = np.load(out / "model.npz")
    assert set(other.files) == arrays.keys()
    for name in other.files:
        assert other[name].dtype == arrays[name].dtype
        np.testing.assert_array_equal(other[name], arrays[name])
    assert formats.read(out / "model.npz")[1] == metadata
    assert json.loads((out / "export.json").read_text()) == metadata | {"files": record["files"]}
    assert metadata["mean"] == [0.485, 0.456, 0.406] and metadata["std"] == [0.229, 0.224, 0.225]
    expected = {
        "method": "moco", "step": 3, "weights": "trained", "stem": "patch2", "stages": [1, 1],
        "width": 4, "feature_dim": d, "image_size": 8, "input_range": [0, 1], "torchvision": "",
        "conv1": {"kernel_size": 6, "stride": 2, "padding": 2, "max_pool": False},
        "fc": "zeros (no linear evaluation)", "data": "embedded (train)",
    }  # fmt: skip
    assert {name: metadata[name] for name in expected} == expected
    assert metadata["versions"]["jax"] == jax.__version__
    assert {name: metadata[name] for name in ("version", "commit")} == version.fields()
    assert "not part of conv1" in metadata["input"]

    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(RELOAD), out / "encoder.stablehlo",
         tmp_path / "images.npy", tmp_path / "features.npz"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["cpu,cuda,tpu", "1"]
    got = np.load(tmp_path / "features.npz")
    live = jax.jit(method.encode)(state, images)
    assert live.shape == (5, d) and np.std(live, 0).max() > 0.1
    np.testing.assert_allclose(got["many"], live, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got["one"], live[:1], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of one run for tests that do not interfere with each other's exports."""
    path = tmp_path_factory.mktemp("export") / "run"
    workdir(path, tiny.config("simclr"))
    return path


def linear_eval(path, d=8, **changes):
    rng = np.random.default_rng(1)
    found = {
        "kernel": rng.normal(size=(d, 3)), "bias": rng.normal(size=3),
        "class_names": np.array(["cat", "dog", "naïve"]), "step": STEP,
    } | changes  # fmt: skip
    found = {name: value for name, value in found.items() if value is not None}
    np.savez(path / "linear_eval.npz", **found)
    return found


def test_classifier_is_that_of_the_linear_evaluation_of_this_checkpoint(run):
    want = linear_eval(run)
    assert export(run, export__format="npz")["fc"] == "linear evaluation of step 3"
    arrays, metadata, _ = formats.read(run / "export" / "model.npz")
    np.testing.assert_array_equal(arrays["fc.weight"], want["kernel"].T.astype(np.float32))
    np.testing.assert_array_equal(arrays["fc.bias"], want["bias"].astype(np.float32))
    assert metadata["class_names"] == ["cat", "dog", "naïve"]
    for changes, reason in (
        ({"step": 2}, "of step 2"),
        ({"layer": "head1"}, "of the layer head1"),
        ({"image_size": 12}, "of images of 12 pixels, not of 8"),
    ):
        linear_eval(run, **changes)
        assert reason in export(run, export__format="npz")["fc"]
        arrays, metadata, _ = formats.read(run / "export" / "model.npz")
        assert arrays["fc.weight"].shape == (1000, 8) and not arrays["fc.weight"].any()
        assert metadata["class_names"] == []
    linear_eval(run)
    record = export(run, export__format="npz", features="untrained")
    assert record["fc"].startswith("zeros")  # it was of the trained encoder
    linear_eval(run, bias=None)
    with pytest.raises(UserError, match=r"linear_eval.npz lacks bias: run --mode=linear_eval"):
        export(run)
    (run / "linear_eval.npz").unlink()


def test_only_what_is_asked_for_and_where(run, tmp_path, monkeypatch):
    export(run, export__format=" npz,", export__dir=str(tmp_path / "a" / "b"))
    assert {p.name for p in (tmp_path / "a" / "b").iterdir()} == {"model.npz", "export.json"}
    with bucket.mounted(tmp_path / "store", monkeypatch) as store:
        export(run, export__dir="gs://b/weights")
        names = ("model.safetensors", "model.npz", "encoder.stablehlo", "export.json")
        assert store.written == [f"gs://b/weights/{name}" for name in names]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"export__format": "onnx"},
            "format='onnx': expected one or more of safetensors, npz,",
        ),
        ({"export__format": ","}, "format=',': expected one or more of"),
        ({"features": "pixels"}, "features='pixels' has no weights to export"),
    ],
)
def test_mistakes_are_one_line(run, changes, text):
    with pytest.raises(UserError, match=text):
        export(run, **changes)


def test_a_directory_that_cannot_be_written_is_named(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file/x: .*--eval.export.dir"):
        export(run, export__dir=str(tmp_path / "file" / "x"))


def test_metadata_that_no_zip_comment_holds_leaves_out_its_longest_entry(tmp_path):
    names = [f"class number {i}" for i in range(20_000)]
    path = tmp_path / "m.npz"
    formats.write(path, {"x": np.arange(3)}, {"class_names": names, "step": 7, "method": "moco"})
    assert zipfile.ZipFile(path).testzip() is None
    arrays, metadata, _ = formats.read(path)
    assert arrays["x"].tolist() == [0, 1, 2] and metadata == {"step": 7, "method": "moco"}
