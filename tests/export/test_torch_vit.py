"""PyTorch's ViT against ours with the same weights in float64, both ways, and PyTorch's files."""

import argparse

import jax
import numpy as np
import pytest
import tiny
import vit_files
from test_torch import scaled
from test_vit_weights import NETWORK, network_of, variables
from vit_files import DEPTH, GRID, HIDDEN, WIDTH

from common.models import layouts
from common.train import weights
from common.train.import_weights import import_weights

pytestmark = [pytest.mark.torch, pytest.mark.optimised]

CASES = {
    "token": {},
    "learned": {"positions": "learned"},
    "mean": {"pool": "mean"},
    "conv": {"patches": "conv"},
}


def torch_model(seed=0, pool="token", patches="linear", positions="sincos", **more):
    import torch_vit

    model = torch_vit.ViT(
        WIDTH, DEPTH, NETWORK["heads"], HIDDEN, NETWORK["patch"], GRID, pool == "token",
        patches == "conv", **more,
    )  # fmt: skip
    torch_vit.randomise(model, seed)
    if positions == "sincos":
        table = vit_files.fixed()[:, int(pool != "token") :]
        model.load_state_dict({"pos_embed": as_torch(table)}, strict=False)
    return model.double()


def as_torch(array):
    import torch

    return torch.from_numpy(np.array(array))


def theirs_of(model, images):
    return model(as_torch(images.transpose(0, 3, 1, 2)))


def relative(got, want):
    """The largest difference, as a share of the largest number, which differ among images."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape and want.std(0).max() > 1e-2 * np.abs(want).max()
    return np.abs(got - want).max() / np.abs(want).max()


@pytest.mark.parametrize("case", CASES)
def test_features_and_gradients_both_ways(case):
    """In float64; the fixed positions of a file are its own float32 numbers."""
    network = CASES[case]
    images = scaled(size=8).astype(np.float64)
    with jax.enable_x64():
        # theirs in ours
        model = torch_model(seed=1, **network)
        ours, *_ = variables(dtype=np.float64, **network)
        arrays = {n: x.numpy() for n, x in model.state_dict().items()
                  if not n.endswith("num_batches_tracked")}  # fmt: skip
        own = layouts.of(ours)
        arrays, _ = own.fitted(arrays, {"heads": 3}, "file")
        params, stats = own.from_other(arrays)

        def loss(params, images):
            features = ours.apply({"params": params, "batch_stats": stats}, images, False)
            return (features * weight).sum(), features

        weight = np.random.default_rng(3).normal(size=(3, WIDTH))
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        (_, got), (grads, wanted) = step(params, images)
        assert got.dtype == np.float64
        x = as_torch(images.transpose(0, 3, 1, 2)).requires_grad_()
        want = model(x)
        (want * as_torch(weight)).sum().backward()
        # (float32's rounding of the table, where it is fixed)
        bound = 1e-11 if network.get("positions") == "learned" else 1e-6
        assert relative(got, want.detach().numpy()) < bound
        assert relative(wanted, x.grad.permute(0, 2, 3, 1).numpy()) < bound
        names = own.to_other(grads, stats)
        tensors = dict(model.named_parameters())
        if ours.positions == "sincos":
            del tensors["pos_embed"]
        assert tensors.keys() <= names.keys()
        for name, tensor in tensors.items():
            grad = tensor.grad.numpy()  # that of a key's bias is 0 but for rounding
            error = bound * np.abs(grad).max() + 1e-12
            np.testing.assert_allclose(names[name], grad, rtol=0, atol=error, err_msg=name)
        # ours in theirs
        ours, *trees = variables(dtype=np.float64, **network)
        arrays = own.to_other(*trees)
        counters = {n: x for n, x in model.state_dict().items() if "num_batches" in n}
        model.load_state_dict({n: as_torch(x) for n, x in arrays.items()} | counters, strict=True)
        got = ours.apply({"params": trees[0], "batch_stats": trees[1]}, images, False)
        assert relative(theirs_of(model, images).detach(), got) < 1e-11


def loaded(path, **changes):
    """Our encoder with the weights of a file: a function of scaled images."""
    shapes = network_of("simclr", **changes)
    params, stats, _ = weights.fit(weights.load_weights(path), *shapes)
    trees = {"params": params["backbone"], "batch_stats": stats.get("backbone", {})}
    return lambda images: jax.jit(lambda x: shapes[2].apply(trees, x, False))(images)


def test_dinov2s_layer_scale(tmp_path):
    """The same function, through a file of float32 with a mask token."""
    import torch

    model = torch_model(seed=2, positions="learned", layer_scale=True)
    state = {n: x.float() for n, x in model.state_dict().items()}
    torch.save(state | {"mask_token": torch.ones(1, WIDTH)}, tmp_path / "v2.pth")
    images = scaled(size=8)
    with jax.default_matmul_precision("highest"):
        got = loaded(tmp_path / "v2.pth", vit__positions="learned")(images)
    want = theirs_of(model.float(), images).detach()
    assert relative(got, want) < 1e-5


def test_dinos_checkpoint_with_its_command_line(tmp_path):
    """Everything that main_dino.py saves, of which only tensors and plain values are read."""
    import torch

    teacher, student = (torch_model(seed, positions="learned").float() for seed in (1, 2))
    head = {"head.mlp.0.weight": torch.ones(4, WIDTH)}
    checkpoint = {
        "student": {f"module.backbone.{n}": x for n, x in student.state_dict().items()},
        "teacher": {f"backbone.{n}": x for n, x in teacher.state_dict().items()} | head,
        "optimizer": torch.optim.AdamW(student.parameters()).state_dict(),
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", patch_size=16, norm_last_layer=True),
        "dino_loss": {"center": torch.zeros(1, 8)},
    }
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    images = scaled(size=8)
    with jax.default_matmul_precision("highest"):
        got = loaded(tmp_path / "checkpoint.pth", vit__positions="learned")(images)
    assert relative(got, theirs_of(teacher, images).detach()) < 1e-5
    found = weights.load_weights(tmp_path / "checkpoint.pth")
    assert found.prefix == "teacher.backbone." and "teacher.head.mlp.0.weight" in found.unused


def test_moco_v3s_checkpoint_starts_a_run(tmp_path):
    """Everything that main_moco.py saves; in half precision, as some pass it on."""
    import torch

    arrays = {n: as_torch(x) for n, x in vit_files.moco_v3().items()}
    for kind in (torch.float32, torch.float16):
        state = {n: x.to(kind) if x.is_floating_point() else x for n, x in arrays.items()}
        saved = {"epoch": 300, "arch": "vit_small", "state_dict": state, "optimizer": {},
                 "scaler": {"scale": 65536.0}}  # fmt: skip
        path = tmp_path / f"vit-s-300ep-{kind}.pth.tar"
        torch.save(saved, path)
        found = weights.load_weights(path)
        params, _, with_head = weights.fit(found, *network_of("moco_v3", head__layers=3))
        assert with_head and "predictor" in params
        name = "module.base_encoder.blocks.1.attn.proj.weight"
        got = params["backbone"]["block1"]["out"]["kernel"]
        np.testing.assert_array_equal(got.T, state[name].float())
    c = tiny.config("moco_v3", init_from=str(path), **tiny.VIT | {"head__layers": 3})
    record = import_weights(tiny.METHODS["moco_v3"], c, tmp_path / "run")
    assert record["head"] and record["predictor"]
