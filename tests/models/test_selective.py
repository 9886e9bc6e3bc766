"""Selective kernels and ResNet-D against published sizes, and against loops in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_resnet import BLOCKS, drawn, np_conv, np_norm, np_pool, slow

from common.errors import UserError
from common.models import resnet
from common.models.batch_norm import BatchNorm
from common.models.convolution import average_pool
from common.models.selective import SelectiveKernels

SK = {"resnet_d": True, "sk_ratio": 0.0625}
# Millions of parameters of SimCLR v2's networks without head and classifier: counted from the
# layers of the authors' code, and as their README (google-research/simclr) has them.
COUNTED = {
    (50, 1, False): (23.51, 24), (50, 1, True): (35.22, 35), (50, 2, False): (93.91, 94),
    (50, 2, True): (140.31, 140), (101, 1, False): (42.50, 43), (101, 1, True): (64.66, 65),
    (101, 2, True): (257.13, 257), (152, 1, False): (58.14, 58), (152, 1, True): (88.94, 89),
    (152, 2, True): (353.40, 354), (152, 3, True): (794.70, 795),
}  # fmt: skip
CASES = [c if c == (50, 1, True) else slow(*c) for c in COUNTED]


def count_by_hand(depth, width, ratio):
    """Kernels, and two numbers a channel for each BN."""
    stem = [(3, width // 2, 3), (width // 2, width // 2, 3), (width // 2, width, 3)]
    total = sum(i * o * k * k + 2 * o for i, o, k in stem)
    channels = width
    for stage, blocks in enumerate(BLOCKS[depth]):
        f = width * 2**stage
        squeeze = max(int(f * ratio), 32)
        for block in range(blocks):
            layers = [(channels, f, 1), (f, 2 * f, 3), (f, squeeze, 1), (f, 4 * f, 1)]
            layers += [(channels, 4 * f, 1)] if block == 0 else []
            total += sum(i * o * k * k + 2 * o for i, o, k in layers) + squeeze * 2 * f
            channels = 4 * f
    return total


@pytest.mark.parametrize(("depth", "multiplier", "selective"), CASES)
def test_number_of_parameters_is_the_published_one(depth, multiplier, selective):
    model = resnet.ResNet(
        depth=depth, width_multiplier=multiplier, **(SK if selective else {})
    )  # fmt: skip
    image = jnp.zeros((1, 64, 64, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), image, False))["params"]
    found = sum(x.size for x in jax.tree.leaves(shapes))
    counted, readme = COUNTED[depth, multiplier, selective]
    assert found / 1e6 == pytest.approx(counted, abs=0.00501)
    assert found / 1e6 == pytest.approx(readme, abs=0.61)  # 354 is not how 353.40 is rounded
    if selective:
        assert found == count_by_hand(depth, 64 * multiplier, 0.0625)
    named = {name for layer in model.layers for name in layer}  # for layer_decay
    assert named == shapes.keys()


def np_batch_norm(x, groups, p):
    """Of a training pass: normalised by group, and the mean statistics of the groups."""
    out, means, variances = [], [], []
    for block in np.split(x, groups):
        mean, var = block.mean((0, 1, 2)), block.var((0, 1, 2))
        out.append((block - mean) / np.sqrt(var + 1e-5) * p["scale"] + p["bias"])
        means.append(mean)
        variances.append(var)
    return np.concatenate(out), np.mean(means, 0), np.mean(variances, 0)


def np_selective(x, p, s, stride, groups=0):
    """An image, a channel and a branch at a time; `groups`: of a training pass, 0 in evaluation.

    Returns:
        The output, and the mean batch statistics of both norms.
    """
    seen = {}

    def norm(x, name):
        if not groups:
            return np_norm(x, p[name], s[name])
        y, *seen[name] = np_batch_norm(x, groups, p[name])
        return y

    y = np.maximum(norm(np_conv(x, p["conv"]["kernel"], stride), "bn"), 0)
    f = y.shape[-1] // 2
    means = np.array([[(image[..., c] + image[..., f + c]).mean() for c in range(f)]
                      for image in y])  # fmt: skip
    squeezed = norm(means[:, None, None] @ p["squeeze"]["kernel"][0, 0], "squeeze_bn")
    logits = (np.maximum(squeezed, 0) @ p["select"]["kernel"][0, 0])[:, 0, 0]
    out = np.zeros((*y.shape[:3], f))
    for n in range(len(y)):
        for c in range(f):
            a, b = np.exp(logits[n, c]), np.exp(logits[n, f + c])
            out[n, ..., c] = (a * y[n, ..., c] + b * y[n, ..., f + c]) / (a + b)
    return out, seen


def unit(stride, groups=1, features=3, ratio=0.5):
    norm = functools.partial(BatchNorm, groups=groups, dtype=jnp.float64)
    return SelectiveKernels(features, stride, ratio, norm, jnp.float64)


@pytest.mark.parametrize(("stride", "groups"), [(1, 0), (2, 3)])
def test_the_unit_equals_numpy(stride, groups):
    """In evaluation and in training, with statistics of three groups inside the squeeze too."""
    x = np.random.default_rng(0).normal(1, 2, (6, 5, 5, 4))
    with jax.enable_x64(True):
        model = unit(stride, groups or 1)
        v = drawn(model, x, False)
        assert v["params"]["squeeze"]["kernel"].shape == (1, 1, 3, 32)  # never narrower
        apply = jax.jit(lambda v, x: model.apply(v, x, groups > 0, mutable=["batch_stats"]))
        got, new = apply(v, x)
    want, seen = np_selective(x, v["params"], v["batch_stats"], stride, groups)
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)
    for name, (mean, var) in seen.items():
        old, found = v["batch_stats"][name], new["batch_stats"][name]
        np.testing.assert_allclose(found["mean"], 0.9 * old["mean"] + 0.1 * mean, rtol=1e-10)
        np.testing.assert_allclose(found["var"], 0.9 * old["var"] + 0.1 * var, rtol=1e-10)
    assert len(seen) == (2 if groups else 0)


@pytest.mark.slow
def test_the_gradient_of_the_unit_equals_differences_of_the_loop():
    """Every tensor along a random direction, by central differences of the NumPy loop."""
    rng = np.random.default_rng(1)
    x, dy = rng.normal(1, 2, (6, 5, 5, 4)), rng.normal(size=(6, 3, 3, 3))
    with jax.enable_x64(True):
        model = unit(2, 2)
        v = drawn(model, x, False)

        def loss(params, x):
            variables = {"params": params, "batch_stats": v["batch_stats"]}
            return (model.apply(variables, x, True, mutable=["batch_stats"])[0] * dy).sum()

        grads = jax.device_get(jax.jit(jax.grad(loss, (0, 1)))(v["params"], x))
    trees = (v["params"], x)
    leaves, structure = jax.tree.flatten(trees)
    for i, gradient in enumerate(jax.tree.leaves(grads)):
        step = 1e-6 * rng.normal(size=leaves[i].shape)

        def moved(sign, i=i, step=step):
            params, x = jax.tree.unflatten(
                structure, [a + sign * step if j == i else a for j, a in enumerate(leaves)]
            )
            return (np_selective(x, params, None, 2, 2)[0] * dy).sum()

        np.testing.assert_allclose((gradient * step).sum(), (moved(1) - moved(-1)) / 2, rtol=1e-5)
        assert np.abs(gradient).max() > 1e-3


@pytest.mark.parametrize("branch", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_branch_that_has_all_the_weight_is_a_plain_convolution(branch):
    """Logits of +-1e9 make of the unit a 3x3 convolution with half of the kernel, norm, ReLU."""
    x = np.random.default_rng(2).normal(size=(2, 4, 4, 4))
    with jax.enable_x64(True):
        model = unit(1)
        v = drawn(model, x, False)
        sign = np.repeat([1.0, -1.0] if branch == 0 else [-1.0, 1.0], 3)
        p = v["params"] | {"select": {"kernel": np.full((1, 1, 32, 6), 1e9) * sign}}
        p["squeeze_bn"] = p["squeeze_bn"] | {"bias": np.full(32, 50.0)}  # ReLU passes it
        got = model.apply(v | {"params": p}, x, False)
    half = slice(3 * branch, 3 * branch + 3)
    y = np_conv(x, p["conv"]["kernel"][..., half], 1)
    norms = [{k: a[half] for k, a in tree["bn"].items()} for tree in (p, v["batch_stats"])]
    np.testing.assert_allclose(got, np.maximum(np_norm(y, *norms), 0), rtol=1e-10, atol=1e-12)


def test_average_pool_by_hand():
    """At stride 1 what is outside is not counted; at stride 2 it is zero, on odd sizes alone."""
    nine = jnp.arange(1.0, 10.0).reshape(1, 3, 3, 1)
    one = [[3.0, 4.0, 4.5], [6.0, 7.0, 7.5], [7.5, 8.5, 9.0]]
    np.testing.assert_array_equal(average_pool(nine, 1)[0, ..., 0], one)
    two = [[3.0, 9 / 4], [15 / 4, 9 / 4]]
    np.testing.assert_array_equal(average_pool(nine, 2)[0, ..., 0], two)
    sixteen = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(average_pool(sixteen, 2)[0, ..., 0], [[2.5, 4.5], [10.5, 12.5]])


def np_average(x, stride):
    """The same by numbers of pixels, or of places, in each window."""
    b, h, w, c = x.shape
    out = np.zeros((b, -(-h // stride), -(-w // stride), c))
    for i in range(out.shape[1]):
        for j in range(out.shape[2]):
            window = x[:, i * stride : i * stride + 2, j * stride : j * stride + 2]
            places = 4 if stride == 2 else window.shape[1] * window.shape[2]
            out[:, i, j] = window.sum((1, 2)) / places
    return out


def np_block(x, p, s, stride):
    """A block with a pooled shortcut if it has one; a bottleneck if it has selective kernels."""

    def layer(x, name, stride=1):
        y = np_conv(x, p[f"conv{name}"]["kernel"], stride)
        return np_norm(y, p[f"bn{name}"], s[f"bn{name}"])

    if "sk" in p:
        y = np_selective(np.maximum(layer(x, 1), 0), p["sk"], s["sk"], stride)[0]
        y = layer(y, 3)
    else:
        y = layer(np.maximum(layer(x, 1, stride), 0), 2)
    if "avg_downsample_conv" in p:
        x = np_conv(np_average(x, stride), p["avg_downsample_conv"]["kernel"], 1)
        x = np_norm(x, p["avg_downsample_bn"], s["avg_downsample_bn"])
    return np.maximum(x + y, 0)


@pytest.mark.parametrize(
    ("network", "size"),
    [
        ({"bottleneck": True, "sk_ratio": 0.5}, 18),  # maps of 5 x 5: odd
        slow({"stages": (2, 1)}, 16),
        slow({"stem": "cifar", "bottleneck": True, "sk_ratio": 0.5}, 6),
    ],
)
def test_the_encoder_equals_numpy(network, size):
    """The stem of three convolutions, pooled shortcuts in every stage's first block alone."""
    network = {"stages": (1, 1), "stem": "imagenet"} | network
    with jax.enable_x64(True):
        model = resnet.ResNet(width=4, resnet_d=True, dtype=jnp.float64, **network)
        x = np.random.default_rng(0).normal(size=(2, size, size, 3))
        v = drawn(model, x, False)
        got = jax.jit(lambda v, x: model.apply(v, x, False))(v, x)
    p, s = v["params"], v["batch_stats"]
    y = x
    stem = [("1", 2, 2), ("2", 1, 2), ("3", 1, 4)]
    for name, stride, width in stem if network["stem"] == "imagenet" else [("", 1, 4)]:
        y = np_conv(y, p[f"stem_conv{name}"]["kernel"], stride)
        assert y.shape[-1] == width
        y = np.maximum(np_norm(y, p[f"stem_bn{name}"], s[f"stem_bn{name}"]), 0)
    y = np_pool(y) if network["stem"] == "imagenet" else y
    for i, blocks in enumerate(network["stages"]):
        for j in range(blocks):
            name = f"layer{i + 1}_{j}"
            assert ("avg_downsample_conv" in p[name]) == (j == 0)
            y = np_block(y, p[name], s[name], 2 if i > 0 and j == 0 else 1)
    np.testing.assert_allclose(got, y.mean((1, 2)), rtol=1e-10)


def gradient(dtype, exact=None, **changes):
    """Features, statistics and gradient of a training pass of a network with everything."""
    model = resnet.ResNet(
        stages=(1, 1), bottleneck=True, width=4, bn_groups=2, resnet_d=True, sk_ratio=0.5,
        dtype=dtype, **changes,
    )  # fmt: skip
    kind = jnp.promote_types(dtype, jnp.float32)
    rng = np.random.default_rng(3)
    x, dy = rng.normal(0, 1, (16, 32, 32, 3)), rng.normal(size=(16, 32))
    v = drawn(model, x.astype(kind), False)

    def loss(params):
        variables = {"params": params, "batch_stats": v["batch_stats"]}
        y, new = model.apply(variables, jnp.asarray(x, kind), True, mutable=["batch_stats"])
        return (jnp.sin(y) * dy).sum(), (y, new)

    return model, loss, v["params"]


def outcome(dtype, **changes):
    _, loss, params = gradient(dtype, **changes)
    (_, aux), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return jax.device_get((aux, grads))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"remat": "convs"}, {"remat": "blocks"}, {"fold_norm": False}]
)  # fmt: skip
def test_what_is_stored_and_folded_does_not_change_the_function(changes):
    with jax.enable_x64(True):
        tiny.assert_close(outcome(jnp.float64, **changes), outcome(jnp.float64), 1e-10, 1e-12)


@pytest.mark.slow
def test_bfloat16_is_near_to_float64():
    """Output, statistics and gradient of the unit; bfloat16 has eight bits, and flips few ReLUs."""
    rng = np.random.default_rng(4)
    x, dy = rng.normal(1, 2, (64, 6, 6, 8)), rng.normal(size=(64, 3, 3, 8))
    x = np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32))

    def found(dtype):
        kind = jnp.promote_types(dtype, jnp.float32)
        model = SelectiveKernels(
            8, 2, 0.0625, functools.partial(BatchNorm, groups=4, dtype=dtype), dtype
        )
        v = drawn(model, x, False)

        def loss(params, x):
            variables = {"params": params, "batch_stats": v["batch_stats"]}
            y, new = model.apply(variables, x, True, mutable=["batch_stats"])
            return (y * dy).sum(), (y.astype(kind), new)

        (_, aux), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
            v["params"], x.astype(kind)
        )
        return jax.device_get((*aux, grads))

    with jax.enable_x64(True):
        exact = found(jnp.float64)
    for got, want in zip(found(jnp.bfloat16), exact, strict=True):
        assert {a.dtype for a in jax.tree.leaves(got)} == {np.dtype(np.float32)}
        got, want = (
            np.concatenate([np.ravel(np.asarray(a, np.float64)) for a in jax.tree.leaves(tree)])
            for tree in (got, want)
        )
        assert np.linalg.norm(got - want) < 0.05 * np.linalg.norm(want)


def convolutions(jaxpr):
    """How many of them a program has, in its inner programs too."""
    found = sum(e.primitive.name == "conv_general_dilated" for e in jaxpr.eqns)
    inner = [getattr(x, "jaxpr", x) for e in jaxpr.eqns for v in e.params.values()
             for x in (v if isinstance(v, (tuple, list)) else [v])]  # fmt: skip
    return found + sum(convolutions(x) for x in inner if hasattr(x, "eqns"))


@pytest.mark.slow
def test_remat_of_convolutions_stores_those_of_the_unit():
    """With "convs" the backward pass computes none of them again, with "blocks" all in blocks."""
    counts = {}
    for remat in ("none", "convs", "blocks"):
        _, loss, params = gradient(jnp.float32, remat=remat, fold_norm=False)
        counts[remat] = convolutions(jax.make_jaxpr(jax.grad(loss, has_aux=True))(params).jaxpr)
    assert counts["convs"] < counts["blocks"]
    again = counts["blocks"] - counts["convs"]
    # convolutions of two blocks: 1x1, those of the unit (3x3, squeeze, select), and those behind
    # which the block ends, 1x1 and the shortcut's, whose outputs a norm still needs
    assert again == 2 * 6, counts


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"sk_ratio": 1.5}, r"sk_ratio=1.5: the squeeze has this share of the channels"),
        ({"stages": (1, 0)}, r"stages=\(1, 0\): every stage needs at least one block"),
        ({"sk_ratio": 0.0625}, r"sk_ratio=0.0625 without model.resnet_d: .*add --config.model"),
        (
            {"sk_ratio": 0.0625, "resnet_d": True},
            r"network of basic blocks: selective kernels",
        ),
        (
            {"bottleneck": True, "stages": ()},
            r"model.bottleneck is for the blocks of model",
        ),
    ],
)
def test_networks_that_there_are_not(changes, text):
    model = {f"model__{name}": value for name, value in changes.items()}
    with pytest.raises(UserError, match=text):
        resnet.make_encoder(tiny.config("simclr", **model).model)


def test_a_group_of_one_image_cannot_be_squeezed():
    """The squeeze has one value an image, however large the map is."""
    model, x = unit(1, groups=4), jnp.zeros((4, 8, 8, 4))
    with jax.enable_x64(True):
        v = drawn(model, x, False)
        with pytest.raises(UserError, match=r"has statistics of one value.*bn_groups to half"):
            jax.eval_shape(lambda v: model.apply(v, x, True, mutable=["batch_stats"]), v)


def test_in_words():
    assert resnet.ResNet(**SK, width_multiplier=2).in_words() == (
        "ResNet-50 width 128, ResNet-D, selective kernels 0.0625"
    )
    own = resnet.ResNet(stages=(1, 1), bottleneck=True, resnet_d=True)
    assert own.in_words() == "ResNet[1, 1] of bottlenecks width 64, ResNet-D"
