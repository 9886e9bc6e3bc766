"""PyTorch's forward pass against ours with the same weights, both ways, and PyTorch's files."""

import argparse
import functools
import warnings

import jax
import numpy as np
import pytest
import tiny
from test_export import export, variables, workdir

from common.errors import UserError
from common.models import layout, resnet
from common.run import formats
from common.train import weights
from common.train.import_weights import import_weights

pytestmark = [pytest.mark.torch, pytest.mark.optimised]

CASES = {
    "basic": {"stages": (2, 2), "width": 8, "stem": "imagenet"},
    "bottleneck": {"depth": 50, "width": 8, "stem": "imagenet"},
    "cifar": {"stages": (1, 1, 1), "width": 8, "stem": "cifar"},
    "patch2": {"stages": (1, 1), "width": 8, "stem": "patch2"},
    "patch4": {"stages": (1, 1), "width": 8, "stem": "patch4"},
    "resnet_d": {"stages": (2, 1), "width": 8, "stem": "imagenet", "resnet_d": True},
    "selective": {
        "stages": (1, 2, 1), "bottleneck": True, "width": 8, "stem": "imagenet", "resnet_d": True,
        "sk_ratio": 0.5,
    },
}  # fmt: skip


def torch_model(network, seed=0, classes=1000):
    import torch_resnet

    model = resnet.ResNet(**network)
    bottleneck, stages = model._layout()
    d = {name: network[name] for name in ("resnet_d", "sk_ratio") if name in network}
    first = layout.conv1(network["stem"], model.resnet_d)
    theirs = torch_resnet.ResNet(stages, bottleneck, network["width"], first, classes, **d)
    return torch_resnet.randomise(theirs, seed)


def forward(network, trees, images):
    """Our features of scaled images, float32 with no shortcut."""
    model = resnet.ResNet(**network)
    apply = jax.jit(functools.partial(model.apply, train=False))
    with jax.default_matmul_precision("highest"):
        return np.asarray(apply({"params": trees[0], "batch_stats": trees[1]}, images))


def torch_features(model, images):
    import torch

    with torch.no_grad():
        return model.features(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()


def assert_parity(got, want):
    """Within 1e-4 of the largest output, and of outputs that differ from image to image."""
    assert got.shape == want.shape and want.std(0).max() > 1e-2 * np.abs(want).max()
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error < 1e-4
    return error


def scaled(n=3, size=40):
    """Images of noise, each of another brightness: a mean over noise alone is the same for all."""
    rng = np.random.default_rng(0)
    return rng.normal(rng.normal(size=(n, 1, 1, 3)), 1, (n, size, size, 3)).astype(np.float32)


@pytest.mark.parametrize("case", CASES)
def test_ours_in_pytorch(case, tmp_path):
    """Through both files and a strict `load_state_dict`."""
    import safetensors.torch
    import torch

    network = CASES[case]
    trees, images = variables(**network), scaled()
    want = forward(network, trees, images)
    arrays = layout.to_torchvision(*trees)
    d = want.shape[1]
    counters = {f"{n}.num_batches_tracked": np.array(4) for n in layout.batch_norms(arrays)}
    last = {"fc.weight": np.ones((10, d), np.float32), "fc.bias": np.ones(10, np.float32)}
    for suffix in ("safetensors", "npz"):
        formats.write(tmp_path / f"m.{suffix}", arrays | counters | last, {"step": 4})
    files = (
        safetensors.torch.load_file(tmp_path / "m.safetensors"),
        {k: torch.from_numpy(v) for k, v in np.load(tmp_path / "m.npz").items()},
    )
    for state_dict in files:
        model = torch_model(network, classes=10)
        assert model.load_state_dict(state_dict, strict=True)
        assert_parity(torch_features(model, images), want)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("case", CASES)
def test_pytorchs_in_ours(case, suffix, tmp_path):
    """Forward pass, and the way back to PyTorch bit by bit."""
    import safetensors.torch
    import torch

    network = CASES[case]
    theirs, images = torch_model(network, seed=1), scaled()
    path = tmp_path / f"w.{suffix}"
    if suffix == "pth":
        torch.save(theirs.state_dict(), path)
    else:
        safetensors.torch.save_file(theirs.state_dict(), path)
    found = weights.load_weights(path)
    assert found.unused == ("fc.bias", "fc.weight")
    trees = layout.from_torchvision(found.arrays)
    assert_parity(forward(network, trees, images), torch_features(theirs, images))
    back = layout.to_torchvision(*trees)
    for name, tensor in theirs.state_dict().items():
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked"):
            assert torch.equal(torch.from_numpy(back[name].copy()), tensor)


def test_a_linear_evaluation_classifies_in_pytorch(tmp_path):
    """uint8 images through the scaling of the metadata, the network, and `fc`."""
    import safetensors.torch
    import torch
    import torch_resnet

    c = tiny.config("simclr")
    method, state = workdir(tmp_path / "run", c)
    rng = np.random.default_rng(2)
    kernel, bias = rng.normal(size=(8, 3)), rng.normal(size=3)
    np.savez(tmp_path / "run" / "linear_eval.npz", kernel=kernel, bias=bias,
             class_names=["a", "b", "c"], step=3)  # fmt: skip
    export(tmp_path / "run", export__format="safetensors")
    path = tmp_path / "run" / "export" / "model.safetensors"
    _, metadata, _ = formats.read(path)
    model = torch_resnet.ResNet(
        metadata["stages"], metadata["bottleneck"], metadata["width"], metadata["conv1"], 3
    )
    model.load_state_dict(safetensors.torch.load_file(path), strict=True)
    images = rng.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    x = (images / 255 - metadata["mean"]) / metadata["std"]
    x = torch.from_numpy(x.transpose(0, 3, 1, 2).astype(np.float32))
    with torch.no_grad():
        got = model.eval()(x).numpy()
    features = np.asarray(jax.jit(method.encode)(state, images))
    assert_parity(got, features @ kernel + bias)


def test_the_authors_checkpoint_starts_a_run(tmp_path):
    """Everything that their script saves is read without unpickling anything but tensors."""
    import torch

    network = {"stages": (1, 1), "width": 4, "stem": "cifar"}  # of tiny.config
    encoders = {}
    for i, name in enumerate(("encoder_q", "encoder_k")):
        model = torch_model(network, seed=i)
        model.fc = torch.nn.Sequential(
            torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8)
        )
        encoders[f"module.{name}"] = model
    state = {f"{p}.{n}": x for p, m in encoders.items() for n, x in m.state_dict().items()}
    queue = {"module.queue": torch.randn(8, 40), "module.queue_ptr": torch.zeros(1).long()}
    optimizer = torch.optim.SGD(encoders["module.encoder_q"].parameters(), 0.1).state_dict()
    checkpoint = {"epoch": 200, "arch": "resnet50", "state_dict": state | queue}
    torch.save(checkpoint | {"optimizer": optimizer}, tmp_path / "moco.pth.tar")
    c = tiny.config("moco", init_from=str(tmp_path / "moco.pth.tar"), model__bn_groups=4)
    record = import_weights(tiny.METHODS["moco"], c, tmp_path / "run")
    assert record["head"] and all(not n.startswith("module.encoder_q") for n in record["unused"])
    found = weights.load_weights(tmp_path / "run")
    query = encoders["module.encoder_q"]
    images = scaled(size=8)
    got = forward(network, layout.from_torchvision(found.arrays), images)
    assert_parity(got, torch_features(query, images))
    kernel = found.head[0]["dense2"]["kernel"]
    np.testing.assert_array_equal(kernel, query.fc[2].weight.detach().numpy().T)


class Trap:
    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('sprung').touch()",))


def test_half_precision_and_wrapped_state_dicts(tmp_path):
    import torch

    theirs = torch_model(CASES["cifar"])
    half = {n: x.bfloat16() if x.is_floating_point() else x
            for n, x in theirs.state_dict().items()}  # fmt: skip
    torch.save({"model": half, "epoch": 3}, tmp_path / "half.pt")
    found = weights.load_weights(tmp_path / "half.pt")
    want = half["layer1.0.conv1.weight"].float().numpy()
    np.testing.assert_array_equal(found.arrays["layer1.0.conv1.weight"], want)


def test_pytorch_files_that_are_no_weights_are_refused_and_run_nothing(tmp_path, monkeypatch):
    import pickle

    import torch

    monkeypatch.chdir(tmp_path)
    model = torch_model(CASES["cifar"])
    whole, cut = tmp_path / "whole.pth", tmp_path / "cut.pth"
    torch.save(model, whole)
    torch.save({"state_dict": model.state_dict(), "trap": Trap()}, tmp_path / "trap.pth")
    arguments = argparse.Namespace(arch="resnet50", trap=Trap())  # DINO saves such
    torch.save({"state_dict": model.state_dict(), "args": arguments}, tmp_path / "args.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps({"x": Trap()}, protocol=2))
    torch.save(model.state_dict(), cut)
    cut.write_bytes(cut.read_bytes()[:-1000])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "noise.pth").write_bytes(bytes(range(256)))
    torch.save([1, 2], tmp_path / "list.pth")
    with warnings.catch_warnings(action="ignore"):  # it is deprecated
        torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "script.pth")
    for name, text in (
        ("whole", "holds more than tensors, which could run code"),
        ("trap", "holds more than tensors, which could run code"),
        ("args", "holds more than tensors, which could run code"),
        ("old", "holds more than tensors, which could run code"),
        ("cut", "cannot be read as .pth"),
        ("empty", "is empty: fetch or write it again"),
        ("noise", "holds more than tensors, .* or is damaged"),
        ("list", "holds no state_dict"),
        ("script", "is a TorchScript program: save its state_dict"),
    ):
        with pytest.raises(UserError, match=text) as raised:
            weights.load_weights(tmp_path / f"{name}.pth")
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("depth", [18, 50])
def test_full_size(depth, capsys):
    """The published networks at 224 px; `-s` shows the figure that docs/export.md quotes."""
    import torch

    network = {"depth": depth, "width": 64, "stem": "imagenet"}
    trees, images = variables(**network), scaled(2, 224)
    want = forward(network, trees, images)
    model = torch_model(network)
    arrays = {n: torch.from_numpy(x.copy()) for n, x in layout.to_torchvision(*trees).items()}
    model.load_state_dict(model.state_dict() | arrays, strict=True)
    error = assert_parity(torch_features(model, images), want)
    with capsys.disabled():
        scale = np.abs(want).max()
        print(
            f"\nResNet-{depth}, 224 px: max |difference| = {error:.1e} of the largest {scale:.3g}"
        )


def test_the_loop_that_ours_is_compared_with_has_the_same_loss():
    import torch

    from benchmarks import torch_steps
    from simclr_jax.loss import nt_xent

    z = np.random.default_rng(0).normal(size=(8, 2, 16)).astype(np.float32)
    z /= np.linalg.norm(z, axis=-1, keepdims=True)
    theirs = torch_steps.nt_xent(torch.from_numpy(np.concatenate([z[:, 0], z[:, 1]])), 0.1)
    np.testing.assert_allclose(theirs, nt_xent(z[:, 0], z[:, 1], 0.1), rtol=1e-5)


def test_the_augmentation_that_ours_is_compared_with():
    import torch

    from benchmarks import torch_steps

    rng = np.random.default_rng(0)
    images = torch_steps.planes(torch.from_numpy(rng.integers(0, 256, (64, 32, 32, 3), np.uint8)))
    views = torch_steps.augmented(images)
    assert views.shape == images.shape and 0 <= views.min() and views.max() <= 1
    grey = (views.amax(1) - views.amin(1)).amax((1, 2)) < 1e-6
    assert 3 <= grey.sum() <= 25  # of 64, each with probability 0.2
    torch.testing.assert_close(torch_steps._hue(images, torch.ones(64)), images, rtol=0, atol=1e-5)
    turned = torch_steps._hue(images, torch.full((64,), 0.1))
    luma = torch.tensor(torch_steps.LUMA).view(1, 3, 1, 1)
    torch.testing.assert_close((turned * luma).sum(1), (images * luma).sum(1), rtol=0, atol=1e-5)
    assert (turned - images).abs().max() > 0.1
