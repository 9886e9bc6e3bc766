"""ResNets against published sizes, and against the same layers written in NumPy."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from common.errors import UserError
from common.models import resnet
from common.models.batch_norm import BatchNorm
from common.models.convolution import conv, space_to_depth

# torchvision's models without their last layer of 1000 classes
PUBLISHED = {
    18: 11_176_512, 34: 21_284_672, 50: 23_508_032, 101: 42_500_160, 152: 58_143_808,
}  # fmt: skip
BLOCKS = {
    18: [2, 2, 2, 2], 34: [3, 4, 6, 3], 50: [3, 4, 6, 3],
    101: [3, 4, 23, 3], 152: [3, 8, 36, 3], 200: [3, 24, 36, 3],
}  # fmt: skip


def count_by_hand(depth, width=64):
    """Kernels and two numbers a channel for each BN, after He et al. 2016, table 1."""
    wide = 4 if depth >= 50 else 1
    total, channels = 7 * 7 * 3 * width + 2 * width, width
    for stage, blocks in enumerate(BLOCKS[depth]):
        mid = width * 2**stage
        for _ in range(blocks):
            layers = [(channels, mid, 1), (mid, mid, 3), (mid, 4 * mid, 1)]
            layers = layers if wide == 4 else [(channels, mid, 3), (mid, mid, 3)]
            layers += [(channels, wide * mid, 1)] if channels != wide * mid else []
            total += sum(i * o * k * k + 2 * o for i, o, k in layers)
            channels = wide * mid
    return total


def abstract_init(model, size=64):
    images = jnp.zeros((1, size, size, 3))
    return jax.eval_shape(lambda: model.init(jax.random.key(0), images, False))


def test_each_depth_has_its_blocks():
    assert {depth: [*blocks] for depth, (_, blocks) in resnet.DEPTHS.items()} == BLOCKS
    assert {depth for depth, (bottleneck, _) in resnet.DEPTHS.items() if bottleneck} == {
        50, 101, 152, 200}  # fmt: skip


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)  # tracing takes seconds


@pytest.mark.parametrize(
    ("depth", "multiplier"),
    [(18, 1), slow(34, 1), (50, 1), slow(101, 1), slow(152, 1), slow(200, 1), slow(50, 2)],
)
def test_number_of_parameters_is_the_published_one(depth, multiplier):
    model = resnet.ResNet(depth=depth, width_multiplier=multiplier)
    found = sum(x.size for x in jax.tree.leaves(abstract_init(model)["params"]))
    assert found == count_by_hand(depth, 64 * multiplier)
    if multiplier == 1 and depth in PUBLISHED:
        assert found == PUBLISHED[depth]
    if multiplier == 2:
        assert round(found / 1e6) == 94  # Chen et al. 2020, table 6: ResNet-50 (2x)


@pytest.mark.parametrize(
    ("stem", "size", "sides"),
    [
        ("imagenet", 224, (112, 56, 28, 14, 7)),
        ("imagenet", 65, (33, 17, 9, 5, 3)),  # odd sizes round up, as in PyTorch
        ("cifar", 32, (32, 32, 16, 8, 4)),
        ("patch2", 32, (16, 16, 8, 4, 2)),
        ("patch4", 28, (7, 7, 4, 2, 1)),
    ],
)
@pytest.mark.parametrize("bottleneck", [False, True])
def test_sides_and_channels_of_every_stage(bottleneck, stem, size, sides, monkeypatch):
    # a stage is what its first block makes of it
    monkeypatch.setitem(resnet.DEPTHS, 8, (bottleneck, (1, 1, 1, 1)))
    model = resnet.ResNet(depth=8, stem=stem, width=8)

    def forward():
        images = jnp.zeros((2, size, size, 3))
        variables = model.init(jax.random.key(0), images, False)
        return model.apply(variables, images, False, capture_intermediates=True)

    features, record = jax.eval_shape(forward)
    record = record["intermediates"]
    wide = 4 if bottleneck else 1
    shapes = [record["stem_conv"]["__call__"][0].shape]
    shapes += [record[f"layer{i + 1}_0"]["__call__"][0].shape for i in range(4)]
    channels = [8, *(8 * 2**i * wide for i in range(4))]
    assert shapes == [(2, s, s, c) for s, c in zip(sides, channels, strict=True)]
    assert features.shape == (2, model.feature_dim) == (2, 64 * wide)


def np_conv(x, kernel, stride):
    """PyTorch's Conv2d(padding=k // 2): zeros on both sides, then every `stride`-th window."""
    k = kernel.shape[0]
    p = k // 2
    x = np.pad(x, ((0, 0), (p, p), (p, p), (0, 0)))
    side = (x.shape[1] - k) // stride + 1
    out = np.zeros((x.shape[0], side, side, kernel.shape[3]))
    for i, j in itertools.product(range(side), repeat=2):
        window = x[:, i * stride : i * stride + k, j * stride : j * stride + k]
        out[:, i, j] = np.einsum("nhwc,hwco->no", window, kernel)
    return out


def np_norm(x, params, stats):
    return (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * params["scale"] + params["bias"]


def np_pool(x):
    """MaxPool2d(3, stride=2, padding=1)."""
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    side = (x.shape[1] - 3) // 2 + 1
    out = [x[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((1, 2))
           for i, j in itertools.product(range(side), repeat=2)]  # fmt: skip
    return np.stack(out, 1).reshape(x.shape[0], side, side, -1)


def np_block(x, p, s, stride, bottleneck):
    strides = [1, stride, 1] if bottleneck else [stride, 1]
    y = x
    for i, step in enumerate(strides, 1):
        y = np_norm(np_conv(y, p[f"conv{i}"]["kernel"], step), p[f"bn{i}"], s[f"bn{i}"])
        y = y if i == len(strides) else np.maximum(y, 0)
    if "downsample_conv" in p:
        x = np_conv(x, p["downsample_conv"]["kernel"], stride)
        x = np_norm(x, p["downsample_bn"], s["downsample_bn"])
    return np.maximum(x + y, 0)


def drawn(model, *args):
    """Random variables of a module, NumPy float64, none of them 0 or 1."""
    return tiny.draw_state(jax.eval_shape(lambda: model.init(jax.random.key(0), *args)))


@pytest.mark.parametrize(("stem", "size"), [("imagenet", 16), ("cifar", 10), ("patch2", 12)])
def test_encoder_equals_numpy(stem, size):
    """Padding, strides, pooling, order of layers; "SAME" would pad all of these otherwise."""
    with jax.enable_x64(True):
        model = resnet.ResNet(stages=(1, 1), width=4, stem=stem, dtype=jnp.float64)
        x = np.random.default_rng(0).normal(size=(2, size, size, 3))
        variables = drawn(model, x, False)
        got = jax.jit(lambda v, x: model.apply(v, x, False))(variables, x)
    p, s = variables["params"], variables["batch_stats"]
    if stem == "patch2":  # the channels of a patch: row, column, colour
        x = np.stack([x[:, i::2, j::2] for i in range(2) for j in range(2)], 3)
        x = x.reshape(*x.shape[:3], 12)
    y = np_conv(x, p["stem_conv"]["kernel"], 2 if stem == "imagenet" else 1)
    y = np.maximum(np_norm(y, p["stem_bn"], s["stem_bn"]), 0)
    y = np_pool(y) if stem == "imagenet" else y
    y = np_block(y, p["layer1_0"], s["layer1_0"], 1, False)
    y = np_block(y, p["layer2_0"], s["layer2_0"], 2, False)
    np.testing.assert_allclose(got, y.mean((1, 2)), rtol=1e-10)


@pytest.mark.parametrize("stride", [1, 2])
def test_bottleneck_equals_numpy(stride):
    """v1.5: the 3x3 convolution has the stride."""
    with jax.enable_x64(True):
        norm = functools.partial(BatchNorm, dtype=jnp.float64)
        block = resnet.Block(2, stride, True, norm, jnp.float64)
        x = np.random.default_rng(1).normal(size=(2, 6, 6, 5))
        variables = drawn(block, x, False)
        got = jax.jit(lambda v, x: block.apply(v, x, False))(variables, x)
    want = np_block(x, variables["params"], variables["batch_stats"], stride, True)
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("bottleneck", "channels"), [(False, 4), (True, 16)])
def test_a_block_starts_as_the_identity(bottleneck, channels):
    block = resnet.Block(4, 1, bottleneck, BatchNorm, jnp.float32)
    x = np.abs(np.random.default_rng(0).normal(size=(2, 4, 4, channels))).astype(np.float32)

    @jax.jit
    def forward():
        variables = block.init(jax.random.key(0), x, False)
        return variables, block.apply(variables, x, True, mutable=["batch_stats"])[0]

    variables, got = forward()
    np.testing.assert_array_equal(got, x)
    last = "bn3" if bottleneck else "bn2"
    for name in ("bn1", "bn2", "bn3")[: 3 if bottleneck else 2]:
        np.testing.assert_array_equal(variables["params"][name]["scale"], float(name != last))


def test_kernels_start_with_the_variance_of_he_fan_out():
    layer = conv(256, 3)
    kernel = layer.init(jax.random.key(0), jnp.zeros((1, 4, 4, 64)))["params"]["kernel"]
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (9 * 256)), rtol=0.01)


@pytest.mark.parametrize("groups", [1, 3])
def test_batch_norm_and_its_gradient_equal_numpy(groups):
    """Statistics of each group; running ones with the mean over groups; the dense derivative."""
    rng = np.random.default_rng(2)
    x, dy = rng.normal(2, 3, (6, 2, 2, 5)), rng.normal(size=(6, 2, 2, 5))
    with jax.enable_x64(True):
        norm = BatchNorm(groups=groups, dtype=jnp.float64)
        variables = drawn(norm, x, False)
        p, s = variables["params"], variables["batch_stats"]

        def forward(params, x):
            variables = {"params": params, "batch_stats": s}
            y, new = norm.apply(variables, x, True, mutable=["batch_stats"])
            return (y * dy).sum(), (y, new["batch_stats"])

        (dp, dx), (y, new) = jax.jit(jax.grad(forward, (0, 1), has_aux=True))(p, x)
    rows = x.reshape(groups, -1, 5), dy.reshape(groups, -1, 5)
    want, d_want, means, variances, d_scale = [], [], [], [], 0
    for block, cotangent in zip(*rows, strict=True):
        mean, var = block.mean(0), block.var(0)
        hat = (block - mean) / np.sqrt(var + 1e-5)
        want.append(hat * p["scale"] + p["bias"])
        inner = cotangent - cotangent.mean(0) - hat * (cotangent * hat).mean(0)
        d_want.append(p["scale"] / np.sqrt(var + 1e-5) * inner)
        d_scale = d_scale + (cotangent * hat).sum(0)
        means.append(mean)
        variances.append(var)
    np.testing.assert_allclose(y, np.stack(want).reshape(x.shape), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(dx, np.stack(d_want).reshape(x.shape), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(dp["scale"], d_scale, rtol=1e-10)
    np.testing.assert_allclose(dp["bias"], dy.sum((0, 1, 2)), rtol=1e-10)
    np.testing.assert_allclose(new["mean"], 0.9 * s["mean"] + 0.1 * np.mean(means, 0), rtol=1e-12)
    np.testing.assert_allclose(new["var"], 0.9 * s["var"] + 0.1 * np.mean(variances, 0), rtol=1e-10)


def test_batch_norm_of_one_group_is_flax_batch_norm():
    x = np.random.default_rng(3).normal(1, 2, (8, 3, 3, 4)).astype(np.float32)
    ours, theirs = BatchNorm(), nn.BatchNorm(momentum=0.9)
    variables = drawn(ours, x, False)
    for train in (True, False):
        got, new = ours.apply(variables, x, train, mutable=["batch_stats"])
        want, reference = theirs.apply(
            variables, x, use_running_average=not train, mutable=["batch_stats"]
        )
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        tiny.assert_close(new, reference, 1e-6, 0)


def test_a_constant_channel_does_not_become_nan():
    """E[x^2] - E[x]^2 rounds below zero here."""
    x = np.full((64, 1), 1234.567, np.float32)
    norm = BatchNorm()
    variables = norm.init(jax.random.key(0), x, False)
    y, new = norm.apply(variables, x, True, mutable=["batch_stats"])
    assert np.isfinite(y).all() and new["batch_stats"]["var"][0] >= 0.9


def test_bfloat16_computes_in_it_and_keeps_the_rest_in_float32():
    model = resnet.ResNet(stages=(1, 1), width=4, dtype=jnp.bfloat16)

    def forward():
        images = jnp.zeros((4, 16, 16, 3))
        variables = model.init(jax.random.key(0), images, False)
        features, new = model.apply(
            variables, images, True, mutable=["batch_stats", "intermediates"],
            capture_intermediates=lambda m, _: isinstance(m, (nn.Conv, resnet.Block)),
        )  # fmt: skip
        return variables, features, new

    variables, features, new = jax.eval_shape(forward)
    kept = jax.tree.leaves([variables, features, new["batch_stats"]])
    assert {x.dtype for x in kept} == {np.dtype(np.float32)}
    assert {x.dtype for x in jax.tree.leaves(new["intermediates"])} == {jnp.dtype(jnp.bfloat16)}


def test_statistics_of_bfloat16_inputs_are_summed_in_float32():
    x = jnp.asarray(np.random.default_rng(4).normal(3, 1, (4096, 2)), jnp.bfloat16)
    norm = BatchNorm(dtype=jnp.bfloat16)
    variables = norm.init(jax.random.key(0), x, False)
    y, new = norm.apply(variables, x, True, mutable=["batch_stats"])
    exact = np.asarray(x).astype(np.float64)
    np.testing.assert_allclose(new["batch_stats"]["mean"], 0.1 * exact.mean(0), rtol=1e-5)
    np.testing.assert_allclose(new["batch_stats"]["var"], 0.9 + 0.1 * exact.var(0), rtol=1e-5)
    assert y.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model__stages": (), "model__depth": 51}, r"model.depth=51.*\[18, 34, 50"),
        ({"model__stem": "cfar"}, 'model.stem="cfar" is unknown: .*did you mean "cifar"'),
    ],
)
def test_unknown_networks_are_refused(changes, text):
    with pytest.raises(UserError, match=text):
        resnet.make_encoder(tiny.config("simclr", **changes).model)


def test_groups_that_do_not_divide_the_batch_and_odd_patches_are_refused():
    x = jnp.zeros((6, 4))
    norm = BatchNorm(groups=4)
    variables = norm.init(jax.random.key(0), x, False)
    with pytest.raises(UserError, match=r"bn_groups=4 does not divide the 6 .* 1, 2, 3, 6"):
        norm.apply(variables, x, True, mutable=["batch_stats"])
    with pytest.raises(UserError, match="image size that is a multiple of 4, found 30x28: set"):
        space_to_depth(jnp.zeros((1, 30, 28, 3)), 4)


def test_statistics_of_one_value_are_refused():
    """In training only; one image with a map of two values has some."""
    norm, rows = BatchNorm(groups=4), jnp.arange(8.0)
    for x, refused in ((rows.reshape(4, 1, 1, 2), True), (rows.reshape(4, 2, 1, 1), False),
                       (rows.reshape(8, 1, 1, 1), False), (rows.reshape(4, 2), True)):  # fmt: skip
        variables = norm.init(jax.random.key(0), x, False)
        assert np.isfinite(norm.apply(variables, x, False)).all()
        if not refused:
            y, _ = norm.apply(variables, x, True, mutable=["batch_stats"])
            assert np.abs(y).min() > 0.9  # of two values, one is above and one below their mean
            continue
        with pytest.raises(UserError, match=r"has statistics of one value.*bn_groups to half"):
            norm.apply(variables, x, True, mutable=["batch_stats"])


def bottlenecks(fold_norm, dtype, groups=1):
    """Two bottleneck blocks: with a strided downsampling convolution, and without."""
    norm = functools.partial(BatchNorm, groups=groups, dtype=dtype)

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            for stride in (2, 1):
                x = resnet.Block(4, stride, True, norm, dtype, fold_norm)(x, train)
            return x

    return Two()


def loss_and_gradient(model, variables, x, dy):
    def forward(params, x):
        variables_ = {"params": params, "batch_stats": variables["batch_stats"]}
        y, new = model.apply(variables_, x, True, mutable=["batch_stats"])
        return (y.astype(dy.dtype) * dy).sum(), (y, new["batch_stats"])

    (_, (y, new)), grads = jax.jit(jax.value_and_grad(forward, (0, 1), has_aux=True))(
        variables["params"], x
    )
    return {"y": y, "stats": new, "grads": grads}


@pytest.mark.slow  # `test_fold.py` compares one block
@pytest.mark.parametrize("groups", [1, 4])
def test_folded_norm_is_the_same_function(groups):
    """Values, statistics and gradients of convolution and batch norm one after the other."""
    rng = np.random.default_rng(5)
    x, dy = rng.normal(1, 2, (8, 6, 6, 8)), rng.normal(size=(8, 3, 3, 16))
    with jax.enable_x64(True):
        plain, folded = (bottlenecks(fold, jnp.float64, groups) for fold in (False, True))
        variables = drawn(plain, x, False)
        assert jax.tree.structure(variables) == jax.tree.structure(drawn(folded, x, False))
        want, got = (loss_and_gradient(m, variables, x, dy) for m in (plain, folded))
        tiny.assert_close(got, want, 1e-10, 1e-12)
        evaluate = [jax.jit(m.apply, static_argnums=2)(variables, x, False)
                    for m in (plain, folded)]  # fmt: skip
        np.testing.assert_allclose(*evaluate, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_folded_norm_in_bfloat16_is_as_near_to_the_truth_as_the_plain_one():
    """Error of the outputs, of the statistics and of the whole gradient against float64."""
    rng = np.random.default_rng(6)
    x, dy = rng.normal(1, 2, (64, 6, 6, 8)), rng.normal(size=(64, 3, 3, 16))
    x = np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32))
    with jax.enable_x64(True):
        exact = bottlenecks(False, jnp.float64)
        variables = drawn(exact, x, False)
        truth = loss_and_gradient(exact, variables, x.astype(np.float64), dy)
    variables, dy = jax.tree.map(np.float32, (variables, dy))

    def error(fold_norm):
        found = loss_and_gradient(bottlenecks(fold_norm, jnp.bfloat16), variables, x, dy)
        flat = {k: np.concatenate([np.ravel(np.asarray(leaf, np.float64))
                                   for leaf in jax.tree.leaves(v)])
                for k, v in found.items()}  # fmt: skip
        want = {k: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(v)])
                for k, v in truth.items()}  # fmt: skip
        return {k: np.linalg.norm(flat[k] - want[k]) / np.linalg.norm(want[k]) for k in want}

    plain, folded = error(False), error(True)
    assert max(plain.values()) < 0.2  # bfloat16 has eight bits, and flips a few ReLUs
    for name in plain:
        assert folded[name] < 1.25 * plain[name], (name, folded, plain)
