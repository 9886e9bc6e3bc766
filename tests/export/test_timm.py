"""timm's ViTs against ours at full size, both ways. `-s` shows the figures of docs/export.md."""

import importlib.util
import json
import re
import sys

import jax
import numpy as np
import pytest
import tiny
from test_export import export, workdir
from test_torch import assert_parity, scaled

from common.models import layouts, vit
from common.run import formats
from common.train import weights

pytestmark = [pytest.mark.torch, pytest.mark.optimised]

SMALL = {"model__encoder": "vit", "vit__depth": 12, "vit__patch": 16, "data__image_size": 224}
CASES = {
    "MoCo v3's ViT-S/16": {"vit__heads": 12, "vit__patches": "frozen"},
    "mean of the patches": {"vit__pool": "mean", "vit__positions": "learned"},
    "DeiT's ViT-S/16, learned positions": {"vit__positions": "learned"},
}


@pytest.fixture(scope="module")
def timm():
    """Imported by those tests alone that run.

    timm imports torchvision, and that cannot be imported where its operators are built for another
    torch, e.g. PyPI's beside a CPU build of torch. None is used here: declarations will do.
    """
    torch = pytest.importorskip("torch")
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    operators = torch.library.Library("torchvision", "FRAGMENT")
    for _ in range(10):
        try:
            yield importlib.import_module("timm")
            return
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if not missing:
                raise
            operators.define(f"{missing[1]}(Tensor boxes, Tensor scores, float limit) -> Tensor")
            for name in [n for n in sys.modules if n.partition(".")[0] in ("timm", "torchvision")]:
                del sys.modules[name]


def as_torch(images):
    import torch

    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def theirs_of(model, images):
    import torch

    with torch.no_grad():
        return model.eval()(as_torch(images)).numpy()


def ours_of(encoder, params, images):
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(lambda x: encoder.apply({"params": params}, x, False))(images))


def test_the_version_is_the_one_that_exports_name(timm):
    assert timm.__version__ == layouts.TIMM


@pytest.mark.parametrize("case", CASES)
def test_ours_in_timm(timm, case, tmp_path, capsys):
    """As docs/export.md loads it: strictly, with the arguments of the metadata."""
    import safetensors.torch

    c = tiny.config("simclr", **SMALL | CASES[case])
    method, state = workdir(tmp_path / "run", c)
    export(tmp_path / "run", export__format="safetensors")
    path = tmp_path / "run" / "export" / "model.safetensors"
    about = json.loads(json.dumps(formats.read(path)[1]))["timm"]
    assert about["constructor"] == "timm.models.VisionTransformer"
    state_dict = safetensors.torch.load_file(path)
    encoder = method.setup.network.backbone
    params = jax.device_get(state.params["backbone"])
    # of another size timm resizes the positions, as we do
    for size, more in ((224, {}), (160, {"dynamic_img_size": True})):
        model = timm.models.VisionTransformer(**about["arguments"], **more)
        model.load_state_dict(state_dict, strict=True)
        model.reset_classifier(0)
        images = scaled(2, size)
        error = assert_parity(theirs_of(model, images), ours_of(encoder, params, images))
        with capsys.disabled():
            print(f"\n{case}, {size} px, timm {timm.__version__}: {error:.1e}")


def test_timms_named_constructor_takes_moco_v3s_heads(timm, tmp_path):
    """`create_model` by the published name; without num_heads the shapes fit and it is another."""
    encoder = vit.ViT(heads=12)
    images = scaled(2, 224)
    shapes = jax.eval_shape(lambda: encoder.init(jax.random.key(0), images, False))
    params = tiny.draw_state(shapes)["params"]
    arrays = layouts.of(encoder).to_other(params, {})
    formats.write(tmp_path / "m.npz", {n: np.float32(x) for n, x in arrays.items()}, {})
    import torch

    state_dict = {n: torch.from_numpy(x) for n, x in np.load(tmp_path / "m.npz").items()}
    want = ours_of(encoder, params, images)
    model = timm.create_model("vit_small_patch16_224", num_heads=12, num_classes=0)
    model.load_state_dict(state_dict, strict=True)
    assert_parity(theirs_of(model, images), want)
    wrong = timm.create_model("vit_small_patch16_224", num_classes=0)
    wrong.load_state_dict(state_dict, strict=True)
    assert np.abs(theirs_of(wrong, images) - want).max() > 1e-2 * np.abs(want).max()


def randomised(model, seed=0):
    import torch

    torch.manual_seed(seed)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if name.endswith("bias") or "pos_embed" in name or "cls_token" in name:
                x.uniform_(-0.5, 0.5)
            elif name.endswith("gamma") or "norm" in name:
                x.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize(
    ("name", "more", "network", "size"),
    [
        ("vit_small_patch16_224", {}, {"heads": 6}, 224),
        ("vit_small_patch16_224", {}, {"heads": 6}, 160),  # and the positions resized on import
        ("vit_small_patch14_dinov2", {"img_size": 518}, {"heads": 6, "patch": 14}, 224),
    ],
)
def test_timms_in_ours(timm, name, more, network, size, tmp_path):
    """With learned positions; DINOv2's layer scale is part of the maps."""
    import torch

    model = randomised(timm.create_model(name, num_classes=10, **more))
    torch.save(model.state_dict(), tmp_path / "w.pth")
    encoder = vit.ViT(positions="learned", image_size=size, **network)
    images = scaled(2, size)
    shapes = jax.eval_shape(lambda: encoder.init(jax.random.key(0), images, False))["params"]
    found = weights.load_weights(tmp_path / "w.pth")
    assert found.unused == ("head.bias", "head.weight")
    params, _, _ = weights.fit(found, {"backbone": shapes}, {}, encoder)
    again = timm.create_model(name, num_classes=0, dynamic_img_size=True, **more)
    again.load_state_dict({n: x for n, x in model.state_dict().items() if "head" not in n})
    assert_parity(ours_of(encoder, params["backbone"], images), theirs_of(again, images))


def timm_resnet(width, stages, classes):
    """As docs/export.md builds it, with the pool that timm leaves out at stride 1."""
    from timm.models.resnet import ResNet
    from timm.models.sknet import SelectiveKernelBottleneck
    from torch import nn

    kernels = {"kernel_size": [3, 3], "split_input": False, "rd_ratio": 1 / 16, "rd_divisor": 32}
    model = ResNet(
        SelectiveKernelBottleneck, stages, stem_width=width // 2, stem_type="deep", avg_down=True,
        channels=[width * 2**i for i in range(4)], block_args={"sk_kwargs": kernels},
        num_classes=classes,
    )  # fmt: skip
    outside = nn.ReplicationPad2d((0, 1, 0, 1))  # pixels that the mean does not count
    model.layer1[0].downsample[0] = nn.Sequential(outside, nn.AvgPool2d(2, 1))
    return model


def test_selective_kernels_in_timm(timm, tmp_path):
    """A strict `load_state_dict` of an export; in evaluation, and the statistics of training."""
    import safetensors.torch
    import torch

    network = {
        "model__stages": (1, 2, 1, 1), "model__bottleneck": True, "model__width": 8,
        "model__stem": "imagenet", "model__resnet_d": True, "model__sk_ratio": 0.0625,
    }  # fmt: skip
    c = tiny.config("simclr", data__image_size=64, **network)
    method, state = workdir(tmp_path / "run", c)
    np.savez(tmp_path / "run" / "linear_eval.npz", kernel=np.ones((256, 7)), bias=np.ones(7),
             class_names=list("abcdefg"), step=3)  # fmt: skip
    export(tmp_path / "run", export__format="safetensors")
    path = tmp_path / "run" / "export" / "model.safetensors"
    about = formats.read(path)[1]
    assert about["resnet_d"] and about["selective_kernels"] and not about["torchvision"]
    model = timm_resnet(about["width"], about["stages"], 7)
    model.load_state_dict(safetensors.torch.load_file(path), strict=True)
    model.reset_classifier(0)
    encoder, images = method.setup.network.backbone, scaled(4, 64)
    variables = {
        "params": jax.device_get(state.params["backbone"]),
        "batch_stats": jax.device_get(state.batch_stats["backbone"]),
    }
    apply = jax.jit(
        lambda x, train: encoder.apply(variables, x, train, mutable=["batch_stats"]),
        static_argnums=1,
    )
    with jax.default_matmul_precision("highest"):
        assert_parity(theirs_of(model, images), np.asarray(apply(images, False)[0]))
        features, new = apply(images, True)
    with torch.no_grad():
        assert_parity(model.train()(as_torch(images)).numpy(), np.asarray(features))
    want = new["batch_stats"]["layer4_0"]["sk"]["squeeze_bn"]
    found = model.layer4[0].conv2.attn.bn
    np.testing.assert_allclose(found.running_mean.numpy(), want["mean"], rtol=1e-3, atol=1e-4)
