"""A fine-tuned network in a file: what comes back, its logits by hand, and files that are none."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
import tiny
from bucket import mounted
from ml_collections import ConfigDict

from common.errors import UserError
from common.models import classifier
from common.models.classifier import SECTIONS, Classifier
from common.run import files, formats
from common.setup import make_encoder_setup
from common.sharding import make_mesh

NETWORKS = {
    "resnet": {"head__layers": 3, "model__bn_groups": 4},
    "vit": tiny.VIT | {"head__kind": "moco_v2", "vit__positions": "learned"},
}


@functools.cache
def made(network="resnet", **changes):
    """A classifier with random arrays, and the config that it is from."""
    c = tiny.config("simclr", **NETWORKS[network])
    fields = {
        "config": ConfigDict({name: c[name] for name in SECTIONS}),
        "view_size": 8,
        "layer": "head1",
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.25, 0.3),
        "image_size": 8,
        "classes": ("7", "null", "ä,b"),  # words that JSON knows otherwise
        "info": {"run": "runs/one", "top1": 0.5, "fraction": 1},
    }
    found = Classifier(**(fields | changes))
    return found, tiny.draw_state(found.shapes()), c


@pytest.mark.parametrize("network", ["resnet", pytest.param("vit", marks=pytest.mark.slow)])
def test_what_is_saved_comes_back(network, tmp_path):
    saved, arrays, _ = made(network)
    path = tmp_path / "one.safetensors"
    size = classifier.save(path, saved, arrays)
    assert size == path.stat().st_size
    found, back = classifier.load(path)
    assert found == classifier.describe(path)
    digest = found.info["digest"]
    assert found.info == saved.info | {"digest": digest} and len(digest) == 64
    assert found.config.to_dict() == saved.config.to_dict()
    same = {"config": saved.config, "info": saved.info}
    assert dataclasses.replace(found, **same) == saved
    assert found.network == saved.network
    want = tiny.named_leaves(arrays)
    got = tiny.named_leaves(back)
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert got[name].dtype == x.dtype and got[name].tobytes() == x.tobytes()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_logits_by_hand():
    """The first layer of a head of three, its batch norm with running statistics, in eval mode."""
    with jax.enable_x64(True):
        found, _, c = made()
        c = c.copy_and_resolve_references()
        c.model.dtype = "float64"
        found = dataclasses.replace(found, config=ConfigDict({n: c[n] for n in SECTIONS}))
        arrays = tiny.draw_state(found.shapes())
        setup = make_encoder_setup(c, make_mesh(jax.devices()[:1]))
        setup = dataclasses.replace(setup, mean=found.mean, std=found.std)
        images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
        params, stats = arrays["params"]["network"], arrays["batch_stats"]
        assert params["head"].keys() == {"dense1", "bn1"} and found.network.head.bn_groups == 1
        features = jax.jit(lambda x: setup.encode(params, stats, x, "backbone"))(images)
        h = np.asarray(features) @ params["head"]["dense1"]["kernel"]
        norm, seen = params["head"]["bn1"], stats["head"]["bn1"]
        h = (h - seen["mean"]) / np.sqrt(seen["var"] + 1e-5) * norm["scale"] + norm["bias"]
        last = arrays["params"]["classifier"]
        want = np.maximum(h, 0) @ last["kernel"] + last["bias"]
        got = jax.jit(found.logits)(arrays, images)
        assert np.abs(want).max() > 0.1 and (h < 0).any()
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


def test_it_is_written_whole_to_a_disk_and_to_a_store(tmp_path, monkeypatch):
    saved, arrays, _ = made()
    path = tmp_path / "one.safetensors"
    classifier.save(path, saved, arrays)
    before = path.read_bytes()

    def torn(target, data):
        target.write_bytes(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(
            files, "write_bytes", lambda p, data: files._whole(p, lambda t: torn(t, data))
        )
        with pytest.raises(OSError, match="No space"):
            classifier.save(path, dataclasses.replace(saved, info={"run": "two"}), arrays)
    assert path.read_bytes() == before
    with mounted(tmp_path / "bucket", monkeypatch):
        remote = "gs://b/runs/one.safetensors"
        classifier.save(remote, saved, arrays)
        found, back = classifier.load(remote)
        assert found.classes == saved.classes
        tiny.assert_close(back, arrays, 0, 0)


def header_of(path):
    data = path.read_bytes()
    return 8 + int.from_bytes(data[:8], "little")


def test_a_description_reads_the_header_alone(tmp_path):
    saved, arrays, _ = made()
    path = tmp_path / "one.safetensors"
    classifier.save(path, saved, arrays)
    data = path.read_bytes()
    start = header_of(path)
    path.write_bytes(data[:start] + bytes(len(data) - start))
    assert classifier.describe(path).layer == "head1"
    with pytest.raises(UserError, match="is damaged"):
        classifier.load(path)
    path.write_bytes(data[:-1])
    for read in (classifier.describe, classifier.load):
        with pytest.raises(UserError, match="cannot be read as"):
            read(path)


def test_files_that_are_none(tmp_path):
    saved, arrays, _ = made()
    path = tmp_path / "one.safetensors"
    classifier.save(path, saved, arrays)
    data, start = path.read_bytes(), header_of(path)

    def fails(match, path=path, read=classifier.load):
        with pytest.raises(UserError, match=match) as caught:
            read(path)
        assert "\n" not in str(caught.value)

    flipped = bytearray(data)
    flipped[-5] ^= 4
    path.write_bytes(flipped)
    fails("is damaged, its arrays are not those that were saved")
    for cut in (0, 5, start - 3):  # what an interrupted copy leaves
        path.write_bytes(data[:cut])
        fails("cannot be read as .safetensors", read=classifier.describe)
    path.write_bytes(b"\xff" * 40)
    fails("cannot be read as .safetensors", read=classifier.describe)
    fails(
        r"cannot read .*No such file or directory; give a \.safetensors file",
        tmp_path / "two.safetensors",
    )
    fails("has the file extension '.npz': expected .safetensors", tmp_path / "one.npz")

    path.write_bytes(data)
    arrays_of, metadata, _ = formats.read(path)
    formats.write(path, arrays_of, {"layout": "torchvision"})  # an export
    fails("is no fine-tuned network: give a file that --mode=finetune wrote")
    inner = metadata["classifier"]

    def rewrite(**changes):
        formats.write(path, arrays_of, {"classifier": json.dumps(inner | changes)})

    rewrite(version=2)
    fails(r"written by a newer version of the code \(its format is 2, expected 1\)")
    rewrite(layer="backbone")
    fails("holds arrays of another network than its own config describes")
    rewrite(config=inner["config"] | {"head": {"kindness": 1}})
    fails("a field 'head.kindness' that this version of the code does not know")
    older = {name: dict(fields) for name, fields in inner["config"].items()}
    del older["model"]["conv_init"], older["model"]["remat"]
    rewrite(config=older)
    assert classifier.load(path)[0].config.model.conv_init == "he"


def test_a_layer_beyond_the_head():
    with pytest.raises(
        UserError, match="layer 'head4' is unknown: choose one of backbone, head1, he"
    ):
        made(layer="head4")


def test_classifiers_start_at_zero_and_leave_out_what_is_above():
    c = tiny.config("simclr", head__layers=3)
    setup = make_encoder_setup(c, make_mesh(jax.devices()[:1]))
    params, _ = jax.eval_shape(setup.init_network, jax.random.key(0))
    for layer, names, width in (
        ("backbone", set(), setup.network.backbone.feature_dim),
        ("head2", {"dense1", "bn1", "dense2", "bn2"}, 8),
    ):
        found = classifier.start(setup.network, layer, 5, params)
        assert set(found["network"].get("head", {})) == names
        assert found["network"]["backbone"] == params["backbone"]
        kernel, bias = found["classifier"]["kernel"], found["classifier"]["bias"]
        assert (kernel.shape, bias.shape) == ((width, 5), (5,)) and not kernel.any()
