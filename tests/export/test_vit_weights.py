"""ViTs under timm's names: names, numbers, files of MoCo v3, DINO and DINOv2, and refusals.

PyTorch's forward passes are in `test_torch_vit.py` and `test_timm.py`.
"""

import functools
import json
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
import vit_files
from test_export import RELOAD, STEP, export, linear_eval, workdir
from test_weights import init_state, save
from vit_files import DEPTH, GRID, WIDTH

from common.errors import UserError
from common.models import layout, layouts, positions, resnet, vit, vit_layout
from common.run import formats
from common.train import weights
from common.train.import_weights import import_weights

NETWORK = {"width": WIDTH, "depth": DEPTH, "heads": 3, "mlp_ratio": 2.0, "patch": 4,
           "image_size": 8}  # of `tiny.VIT`  # fmt: skip
VARIANTS = {
    "token": {},
    "mean": {"pool": "mean"},
    "learned": {"positions": "learned"},
    "frozen": {"patches": "frozen"},
    "conv": {"patches": "conv"},
    "learned mean conv": {"positions": "learned", "pool": "mean", "patches": "conv"},
}


def variables(**network):
    """An encoder, and random parameters and batch statistics of it."""
    model = vit.ViT(**NETWORK | network)
    images = jnp.zeros((1, model.image_size, model.image_size, 3))
    drawn = tiny.draw_state(jax.eval_shape(lambda: model.init(jax.random.key(0), images, False)))
    return model, drawn["params"], drawn.get("batch_stats", {})


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_and_shapes_are_timms_and_there_and_back_is_exact(variant):
    model, *trees = variables(**VARIANTS[variant])
    own = layouts.of(model)
    arrays = own.to_other(*trees)
    token = model.pool == "token"
    want = vit_files.shapes(token=token)
    if model.patches == "conv":
        want = {n: s for n, s in want.items() if not n.startswith("patch_embed")}
        want |= vit_files.conv_stem(WIDTH, 4)
    assert {name: x.shape for name, x in arrays.items()} == want
    traced = jax.eval_shape(own.to_other, *trees)
    assert {name: x.shape for name, x in traced.items()} == want
    back = own.from_other(arrays)
    assert jax.tree.structure(back) == jax.tree.structure(tuple(trees))
    jax.tree.map(np.testing.assert_array_equal, back, tuple(trees))
    about = own.about(arrays)
    assert about["width"] == about["feature_dim"] == WIDTH and about["depth"] == DEPTH
    assert (about["hidden"], about["patch"], about["grid"]) == (24, 4, GRID)
    for field in ("heads", "mlp_ratio", "patches", "positions", "pool"):
        assert about[field] == getattr(model, field)
    assert bool(about["timm"]) == bool(own.loads_into(about)) == (model.patches != "conv")


@pytest.mark.parametrize(
    ("variant", "count"),
    # of timm's vit_small_patch16_224 and vit_base_patch16_224 without the head, as published
    [("S", 21_665_664), ("B", 85_798_656)],
)
def test_the_published_networks_have_as_many_numbers_as_timms(variant, count):
    width, depth, heads = vit.VARIANTS[variant]
    model = vit.ViT(width=width, depth=depth, heads=heads)
    tree = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)), False))
    arrays = jax.eval_shape(layouts.of(model).to_other, tree["params"], {})
    assert sum(x.size for x in arrays.values()) == count
    want = vit_files.shapes(width, depth, 4 * width, 16, 14)
    assert {name: x.shape for name, x in arrays.items()} == want


def test_each_array_is_where_timm_has_it():
    """A round trip would hide two that are exchanged both ways."""
    model, params, _ = variables(positions="learned")
    arrays = vit_layout.to_timm(params, {})
    block = params["block1"]
    for i, part in enumerate(("query", "key", "value")):  # rows: query, key, value
        rows = slice(i * WIDTH, (i + 1) * WIDTH)
        got = arrays["blocks.1.attn.qkv.weight"][rows]
        np.testing.assert_array_equal(got, block[part]["kernel"].T)
        np.testing.assert_array_equal(arrays["blocks.1.attn.qkv.bias"][rows], block[part]["bias"])
    for theirs, ours in (("attn.proj", "out"), ("mlp.fc1", "mlp1"), ("mlp.fc2", "mlp2")):
        np.testing.assert_array_equal(arrays[f"blocks.1.{theirs}.weight"], block[ours]["kernel"].T)
        np.testing.assert_array_equal(arrays[f"blocks.1.{theirs}.bias"], block[ours]["bias"])
    for norm in ("norm1", "norm2"):
        np.testing.assert_array_equal(arrays[f"blocks.1.{norm}.weight"], block[norm]["scale"])
        np.testing.assert_array_equal(arrays[f"blocks.1.{norm}.bias"], block[norm]["bias"])
    np.testing.assert_array_equal(arrays["norm.weight"], params["norm"]["scale"])
    np.testing.assert_array_equal(arrays["cls_token"], params["token"])
    np.testing.assert_array_equal(arrays["pos_embed"], params["positions"])
    # a patch as a convolution sees it: row, column, colour one after the other
    image = np.random.default_rng(0).normal(size=(4, 4, 3))
    want = image.reshape(-1) @ params["patches"]["kernel"].astype(np.float64)
    got = np.einsum("ijc,dcij->d", image, arrays["patch_embed.proj.weight"].astype(np.float64))
    np.testing.assert_allclose(got, want, rtol=1e-12)
    assert model.positions == "learned"


def test_the_fixed_positions_are_moco_v3s():
    model, params, _ = variables()
    table = layouts.of(model).to_other(params, {})["pos_embed"]
    np.testing.assert_allclose(table, vit_files.fixed(), atol=1e-7)
    assert not table[0, 0].any()
    large = vit_files.fixed(14, 16)
    np.testing.assert_allclose(positions.sincos(14, 14, 16, True), large, atol=1e-5)


@functools.cache
def network_of(method, **changes):
    setup = tiny.build(tiny.config(method, **dict(tiny.VIT | changes)), 1).setup
    return (*jax.eval_shape(setup.init_network, jax.random.key(0)), setup.network.backbone)


def fitted(path, method="simclr", **changes):
    """What `fit` makes of a file: arrays under timm's names again, and whether with the head."""
    shapes = network_of(method, **changes)
    found = weights.load_weights(path)
    params, stats, with_head = weights.fit(found, *shapes)
    arrays = layouts.of(shapes[2]).to_other(params["backbone"], stats.get("backbone", {}))
    return arrays, with_head, found


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone."])
def test_timms_files(tmp_path, prefix, suffix, capsys):
    want = vit_files.timm()
    path = save(tmp_path / f"w.{suffix}", vit_files.behind(prefix, want))
    got, with_head, found = fitted(path, vit__positions="learned")
    assert found.prefix == prefix and not with_head
    assert found.unused == (f"{prefix}head.bias", f"{prefix}head.weight")
    assert got.keys() == want.keys() - {"head.weight", "head.bias"}
    for name, array in got.items():
        np.testing.assert_array_equal(array, want[name])
    assert "does not tell its number of heads: 3, as config.vit has it" in capsys.readouterr().err


def test_positions_of_another_grid_are_resized_and_that_is_said(tmp_path, capsys):
    path = save(tmp_path / "w.npz", vit_files.timm(grid=5))
    got, _, _ = fitted(path, vit__positions="learned")
    table = vit_files.timm(grid=5)["pos_embed"]
    np.testing.assert_array_equal(got["pos_embed"][:, 0], table[:, 0])
    want = jax.image.resize(table[0, 1:].reshape(5, 5, WIDTH), (2, 2, WIDTH), "bicubic")
    np.testing.assert_allclose(got["pos_embed"][0, 1:].reshape(2, 2, WIDTH), want, rtol=1e-5)
    assert "positions resized from 5 x 5 to 2 x 2 patches" in capsys.readouterr().err


def half(table, kind):
    return np.asarray(table, np.float32).astype(kind).astype(np.float32)


@pytest.mark.parametrize("kind", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_fixed_positions_are_recognised_in_every_precision(tmp_path, kind):
    """A half-precision file that PyTorch's reader has made float32 as well; any fault is seen."""
    arrays = vit_files.timm()
    arrays["pos_embed"] = half(vit_files.fixed(), kind)
    got, _, _ = fitted(save(tmp_path / "w.npz", arrays))
    np.testing.assert_allclose(got["pos_embed"], vit_files.fixed(), atol=1e-7)
    step = {np.float32: 3e-5, np.float16: 2**-9}.get(kind, 2**-6)
    arrays["pos_embed"] = half(arrays["pos_embed"] + np.eye(1, WIDTH, 7) * step, kind)
    with pytest.raises(UserError, match=r"other positions than vit.positions=sincos .*differ by"):
        fitted(save(tmp_path / "w.npz", arrays))


def test_big_visions_table_of_the_same_name_is_another_one(tmp_path):
    """Columns first, and another exponent, as its `posemb_sincos_2d` has it."""
    w = 10000.0 ** (-np.arange(3) / 2)
    y, x = (p.reshape(-1, 1) * w for p in np.mgrid[:2, :2])
    table = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], 1)
    arrays = vit_files.timm()
    arrays["pos_embed"] = np.concatenate([np.zeros((1, WIDTH)), table])[None].astype(np.float32)
    path = save(tmp_path / "w.npz", arrays)
    with pytest.raises(UserError, match=r"set --config.vit.positions=learned"):
        fitted(path)
    got, _, _ = fitted(path, vit__positions="learned")
    np.testing.assert_array_equal(got["pos_embed"], arrays["pos_embed"])


def test_moco_v3s_checkpoint_gives_encoder_head_and_predictor(tmp_path, capsys):
    """In both encoders of a run; what is drawn is drawn as without `init_from`."""
    arrays = vit_files.moco_v3()
    path = save(tmp_path / "vit-s.npz", arrays)
    found = weights.load_weights(path)
    assert found.prefix == "module.base_encoder."
    assert all(name.startswith("module.momentum_encoder.") for name in found.unused)
    c = tiny.config("moco_v3", **tiny.VIT | {"head__layers": 3})
    plain = init_state(c)
    c.init_from = str(path)
    state = init_state(c)
    said = capsys.readouterr().err
    assert "encoder, projection head and predictor; not used: module.momentum_encoder." in said
    assert (
        "module.base_encoder.* is taken, the encoder that gradients trained, which MoCo v3's"
        in said
    )
    for params, stats in (
        (state.params, state.batch_stats), (state.key_params, state.key_batch_stats),
    ):  # fmt: skip
        got = vit_layout.to_timm(jax.device_get(params["backbone"]), {})
        assert got.keys() == vit_files.shapes().keys() - {"pos_embed"}
        for name, array in got.items():
            np.testing.assert_array_equal(array, arrays[f"module.base_encoder.{name}"])
        parts = [("head", "module.base_encoder.head", 3)]
        if "predictor" in params:
            parts.append(("predictor", "module.predictor", 2))
        for part, prefix, layers in parts:
            for i in range(layers):
                dense, norm = f"{prefix}.{3 * i}", f"{prefix}.{3 * i + 1}"
                kernel = params[part][f"dense{i + 1}"]["kernel"]
                np.testing.assert_array_equal(kernel, arrays[f"{dense}.weight"].T)
                running = stats[part][f"bn{i + 1}"]
                np.testing.assert_array_equal(running["mean"], arrays[f"{norm}.running_mean"])
                np.testing.assert_array_equal(running["var"], arrays[f"{norm}.running_var"])
                if i < layers - 1:
                    scale = params[part][f"bn{i + 1}"]
                    np.testing.assert_array_equal(scale["scale"], arrays[f"{norm}.weight"])
                    np.testing.assert_array_equal(scale["bias"], arrays[f"{norm}.bias"])
    assert "predictor" in state.params and "predictor" not in state.key_params
    for name in ("opt_state", "step", "probe"):
        got, want = getattr(state, name), getattr(plain, name)
        jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        ("moco_v3", {"head__dim": 4},
         "encoder; the projection head and the predictor are random; not used: its projection head "
         "(of another kind or size), its predictor (of another kind or size), module.momentum_"),
        ("moco_v3", {"moco_v3__predictor_hidden": 4},
         "encoder and projection head; the predictor is random; not used: its predictor (of"),
        ("moco_v3", {"moco_v3__predictor_layers": 0},
         "encoder and projection head; not used: its predictor (of another kind or size)"),
        ("simclr", {}, "encoder; the projection head is random; not used: its projection head"),
    ],
)  # fmt: skip
def test_heads_of_another_kind_or_size_are_drawn(tmp_path, capsys, method, changes, words):
    path = save(tmp_path / "m.npz", vit_files.moco_v3())
    settings = tiny.VIT | {"head__layers": 3} | changes
    init_state(tiny.config(method, init_from=str(path), **settings), 1)
    assert words in capsys.readouterr().err


def test_moco_v3s_convolutional_patches(tmp_path):
    stem = vit_files.conv_stem(WIDTH, 4)
    arrays = vit_files.moco_v3(patches=stem)
    got, _, found = fitted(save(tmp_path / "m.npz", arrays), vit__patches="conv")
    for name in stem:
        np.testing.assert_array_equal(got[name], arrays[f"module.base_encoder.{name}"])
    assert not any(name.endswith("num_batches_tracked") for name in found.arrays)


def test_dinos_checkpoint_gives_the_teacher(tmp_path):
    both = {f"{part}.{n}": x for part, d in vit_files.dino().items() for n, x in d.items()}
    got, _, found = fitted(save(tmp_path / "d.npz", both), vit__positions="learned")
    assert found.prefix == "teacher.backbone."
    assert any(
        "the moving average, which DINO's own evaluations use" in note for note in found.notes
    )
    for name, array in got.items():
        np.testing.assert_array_equal(array, both[f"teacher.backbone.{name}"])
    assert "teacher.head.mlp.0.weight" in found.unused
    left = both.keys() - {f"teacher.backbone.{name}" for name in got}
    assert set(found.unused) == left  # nothing is lost silently
    student = {n: x for n, x in both.items() if n.startswith("student.")}
    found = weights.load_weights(save(tmp_path / "s.npz", student))
    assert found.prefix == "student.module.backbone." and not found.notes


@pytest.mark.parametrize("chunks", [False, True])
def test_dinov2s_layer_scale_is_multiplied_into_the_maps(tmp_path, capsys, chunks):
    arrays = vit_files.dinov2()
    if chunks:  # of its training code; blocks are counted through
        arrays = {n.replace("blocks.", "blocks.0.", 1).replace("blocks.0.1", "blocks.1.1"): x
                  for n, x in arrays.items()}  # fmt: skip
        assert "blocks.1.1.ls1.gamma" in arrays
    got, _, found = fitted(save(tmp_path / "v2.npz", arrays), vit__positions="learned")
    whole = vit_files.dinov2()
    assert got.keys() == vit_files.shapes().keys()
    for i in range(DEPTH):
        for scale, into in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
            gamma = whole[f"blocks.{i}.{scale}.gamma"]
            weight, bias = (whole[f"blocks.{i}.{into}.{leaf}"] for leaf in ("weight", "bias"))
            # what the scaled map gives for any input
            np.testing.assert_array_equal(got[f"blocks.{i}.{into}.weight"], gamma[:, None] * weight)
            np.testing.assert_array_equal(got[f"blocks.{i}.{into}.bias"], gamma * bias)
        for name in ("attn.qkv.weight", "mlp.fc1.bias", "norm1.weight"):
            np.testing.assert_array_equal(got[f"blocks.{i}.{name}"], whole[f"blocks.{i}.{name}"])
    assert [note.split(" is ")[0] for note in found.notes] == ["layer scale", "mask_token"]
    assert "resized from 5 x 5 to 2 x 2" in capsys.readouterr().err


def plus(**arrays):
    return lambda: (
        vit_files.timm() | {name: np.ones(shape, np.float32) for name, shape in arrays.items()}
    )


UNKNOWN = {
    "DINOv2's registers": (plus(register_tokens=(1, 4, WIDTH)), "a ViT with register tokens (reg"),
    "timm's registers": (plus(reg_token=(1, 4, WIDTH)), "a ViT with register tokens (reg_token)"),
    "DINOv2's giant": (
        plus(**{"blocks.0.mlp.w12.weight": (32, WIDTH)}), "with SwiGLU perceptrons (blocks.0.mlp.w",
    ),
    "timm's packed SwiGLU": (
        plus(**{"blocks.0.mlp.fc1.weight": (48, WIDTH)}), "SwiGLU perceptrons (blocks.0.mlp.fc1 is",
    ),
    "query norm": (
        plus(**{"blocks.0.attn.q_norm.weight": (4,)}), "with norms of queries and keys (blocks.0.a",
    ),
    "fc_norm": (plus(**{"fc_norm.weight": (WIDTH,)}), "with a norm after the mean of the patches"),
    "CLIP": (plus(**{"norm_pre.weight": (WIDTH,)}), "with a norm before the blocks (norm_pre.wei"),
    "DeiT, distilled": (plus(dist_token=(1, 1, WIDTH)), "with a distillation token (dist_token)"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_no_encoder_here_has_is_refused_by_name(tmp_path, kind):
    make, text = UNKNOWN[kind]
    with pytest.raises(UserError) as raised:
        weights.load_weights(save(tmp_path / "w.npz", make()))
    assert text in str(raised.value) and "\n" not in str(raised.value)
    ends = ("not have: take weights without", "not have: take weights with an MLP")
    assert str(raised.value).endswith(ends)


MISFITS = {
    "depth": (
        lambda: vit_files.timm(depth=3), {},
        r"has blocks.2.norm1.weight.*and 9 more, which the network.*the file holds a ViT of width"
        r" 12, 3 blocks of hidden width 24, patch 4, a class token, 2 x 2 positions, the config "
        r"asks for .* 2 blocks .*: change config.vit$",
    ),
    "no class token": (
        lambda: vit_files.timm(token=False), {}, r"lacks cls_token, norm.*no class token",
    ),
    "a class token": (
        vit_files.timm, {"vit__pool": "mean"}, r"has cls_token, norm.weight, norm.bias, which",
    ),
    "convolutions": (
        vit_files.timm, {"vit__patches": "conv"},
        r"lacks patch_embed.proj.0.*asks for.*patch 4 \(convolutions\)",
    ),
    "width": (
        lambda: vit_files.timm(width=24), {},
        r"blocks.0.attn.proj.weight \(24, 24\) and not \(12, 12\)",
    ),
    "another grid": (
        lambda: vit_files.timm(grid=5), {"vit__positions": "sincos"},
        r"has positions for 5 x 5 patches and the config 2 x 2, which are not resized while",
    ),
    "no square": (
        lambda: vit_files.timm() | {"pos_embed": np.ones((1, 7, WIDTH), np.float32)}, {},
        r"has pos_embed \(1, 7, 12\) and not \(1, 5, 12\)",
    ),
    "not finite": (
        lambda: vit_files.timm() | {"norm.bias": np.full(WIDTH, np.inf, np.float32)}, {},
        r"has numbers that are not finite in norm.bias",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISFITS)
def test_weights_that_do_not_fit_are_named(tmp_path, kind):
    make, changes, text = MISFITS[kind]
    with pytest.raises(UserError, match=text) as raised:
        fitted(save(tmp_path / "w.npz", make()), **{"vit__positions": "learned"} | changes)
    assert "\n" not in str(raised.value)


def test_the_other_kind_of_encoder_is_named(tmp_path):
    found = weights.load_weights(save(tmp_path / "w.npz", vit_files.timm()))
    setup = tiny.build(tiny.config("simclr"), 1).setup
    shapes = jax.eval_shape(setup.init_network, jax.random.key(0))
    text = r"holds a ViT .*another kind of encoder: set --config.model.encoder=vit"
    with pytest.raises(UserError, match=text):
        weights.fit(found, *shapes, setup.network.backbone)
    model = resnet.ResNet(stages=(1, 1), width=4, stem="cifar")
    drawn = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), False))
    arrays = jax.tree.map(
        lambda x: np.zeros(x.shape, np.float32),
        jax.eval_shape(layout.to_torchvision, drawn["params"], drawn["batch_stats"]),
    )
    found = weights.load_weights(save(tmp_path / "r.npz", arrays))
    with pytest.raises(UserError, match=r"holds a ResNet .*model.encoder=resnet"):
        weights.fit(found, *network_of("simclr"))


def test_a_file_without_an_encoder_is_told_of_both_kinds(tmp_path):
    path = save(tmp_path / "w.npz", {"stem.weight": np.ones(3)})
    text = (
        "holds no ResNet with torchvision's names: expected conv1.weight and layer1.0.conv1.weight,"
        " no ViT with timm's names: expected patch_embed.proj.weight and blocks.0.norm1.weight, "
        "but found stem.weight"
    )
    with pytest.raises(UserError, match=text):
        weights.load_weights(path)


def test_names_that_are_no_vits():
    for name in ("blocks.0.attn.rope.weight", "patch_embed.proj.2.weight", "absolute_pos"):
        with pytest.raises(UserError, match=f"{name} is no array of a ViT in timm's layout"):
            vit_layout.from_timm({name: np.ones(3), "patch_embed.proj.6.bias": np.ones(3)})


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["simclr_vit", "moco_vit", "moco-v3_vit"])
def test_a_run_and_its_export(tmp_path, variant):
    """All that the checkpoint has comes back to the bit, and the function from the file."""
    method = variant.split("_")[0].replace("-", "_")
    c = tiny.config(method, **tiny.VARIANTS[variant])
    built, state = workdir(tmp_path / "run", c)
    whole = variant == "moco_vit"
    record = export(tmp_path / "run", **({} if whole else {"export__format": "npz,safetensors"}))
    network = built.setup.network
    shapes = jax.eval_shape(built.setup.init_network, jax.random.key(0))
    want = jax.device_get((state.params, state.batch_stats))
    for path in ("", f"checkpoints/{STEP}", "export/model.npz", "export/model.safetensors"):
        found = weights.load_weights(tmp_path / "run" / path)
        assert found.metadata["heads"] == 3 and found.metadata["method"] == method
        params, stats, with_head = weights.fit(found, *shapes, network.backbone)
        assert with_head == (not path.startswith("export"))
        names = ("backbone", "head", "predictor") if with_head else ("backbone",)
        for got, tree in zip((params, stats), want, strict=True):
            kept = {name: tree[name] for name in names if name in tree}
            assert jax.tree.structure(got) == jax.tree.structure(kept)
            jax.tree.map(np.testing.assert_array_equal, got, kept)
    # heads of another number have the same shapes
    with pytest.raises(
        UserError, match=r"has 3 attention heads and the config 6: set --config.vit"
    ):
        weights.fit(found, *shapes, network.backbone.clone(heads=6))
    about = json.loads((tmp_path / "run" / "export" / "export.json").read_text())
    assert about["layout"] == "timm ViT, version 1" and about["files"] == record["files"]
    assert about["training_size"] == 8 and about["layer_norm_epsilon"] == 1e-6
    conv = network.backbone.patches == "conv"
    assert ("not part of patch_embed.proj" in about["input"]) == conv
    assert about["timm"].get("tried_with", layouts.TIMM) == layouts.TIMM
    if whole:
        assert about["timm"]["arguments"]["final_norm"] is False
        images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
        np.save(tmp_path / "images.npy", images)
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(RELOAD),
             tmp_path / "run" / "export" / "encoder.stablehlo", tmp_path / "images.npy",
             tmp_path / "features.npz"],
            cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["cpu,cuda,tpu", "1"]
        got = np.load(tmp_path / "features.npz")
        live = jax.jit(built.encode)(state, images)
        assert np.std(live, 0).max() > 0.01
        np.testing.assert_allclose(got["many"], live, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got["one"], live[:1], rtol=1e-5, atol=1e-6)


def test_the_classifier_of_a_linear_evaluation_is_timms_head(tmp_path, capsys):
    workdir(tmp_path / "run", tiny.config("simclr", **tiny.VIT))
    want = linear_eval(tmp_path / "run", WIDTH)
    export(tmp_path / "run", export__format="npz")
    said = capsys.readouterr().out
    assert "loads into timm.models.VisionTransformer(**arguments) with the arguments in" in said
    assert "head: linear evaluation of step 3" in said
    arrays, metadata, _ = formats.read(tmp_path / "run" / "export" / "model.npz")
    np.testing.assert_array_equal(arrays["head.weight"], want["kernel"].T.astype(np.float32))
    np.testing.assert_array_equal(arrays["head.bias"], want["bias"].astype(np.float32))
    assert metadata["class_names"] == ["cat", "dog", "naïve"]
    (tmp_path / "run" / "linear_eval.npz").unlink()
    export(tmp_path / "run", export__format="npz")
    arrays, _, _ = formats.read(tmp_path / "run" / "export" / "model.npz")
    assert arrays["head.weight"].shape == (1000, WIDTH) and not arrays["head.weight"].any()


@pytest.mark.slow
def test_an_import_says_what_it_took(tmp_path, capsys):
    path = save(tmp_path / "v3.npz", vit_files.moco_v3())
    c = tiny.config("moco_v3", init_from=str(path), **tiny.VIT | {"head__layers": 3})
    record = import_weights(tiny.METHODS["moco_v3"], c, tmp_path / "run")
    assert record["head"] and record["predictor"]
    (note,) = record["notes"]
    assert note == (
        "of v3.npz, module.base_encoder.* is taken, the encoder that gradients trained, which MoCo "
        "v3's main_lincls.py uses"
    )
    found = weights.load_weights(tmp_path / "run")
    for name in vit_files.shapes().keys() - {"pos_embed"}:
        want = vit_files.moco_v3()[f"module.base_encoder.{name}"]
        np.testing.assert_array_equal(found.arrays[name], want)
    assert "holds the weights as step 0" in capsys.readouterr().out
