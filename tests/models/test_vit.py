"""Vision transformers against published sizes, and against the same equations in NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_initial import assert_drawn_from, normal, uniform
from test_resnet import np_conv, np_norm

from common.errors import UserError
from common.models import attention, heads, positions, vit
from common.models.resnet import space_to_depth

# timm's vit_*_patch16_224 without the last layer of 1000 classes; those of torchvision for B and L.
# Both count the position table, learned or not, with a row for the class token.
PUBLISHED = {"Ti": 5_524_416, "S": 21_665_664, "B": 85_798_656, "L": 303_301_632}
SIZES = {"width": 12, "depth": 3, "heads": 3, "mlp_ratio": 2.0, "patch": 4, "image_size": 8}


def model(**changes):
    return vit.ViT(**SIZES | changes)


def images_of(b=4, size=8, seed=1):
    return np.random.default_rng(seed).normal(size=(b, size, size, 3))


def drawn(module, *args):
    """Random variables, NumPy float64, none of them 0 or 1."""
    state = tiny.draw_state(jax.eval_shape(lambda: module.init(jax.random.key(0), *args)))
    return jax.tree.map(lambda x: x.astype(np.float64), state)


# The network, from Dosovitskiy et al. 2021, equations 1 to 4; in eval mode, or with the factors
# `keep [b, depth, 2]` of drop path.


def np_linear(x, p):
    return x @ p["kernel"] + p["bias"]


def np_layer_norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def np_gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def np_attention(x, p, count):
    """One image, one head, one query at a time."""
    out = np.zeros_like(x)
    size = x.shape[-1] // count
    q, k, v = (np_linear(x, p[name]) for name in ("query", "key", "value"))
    for image in range(len(x)):
        for h in range(count):
            part = slice(h * size, (h + 1) * size)
            for i in range(x.shape[1]):
                weights = np.exp(k[image, :, part] @ q[image, i, part] / math.sqrt(size))
                out[image, i, part] = weights / weights.sum() @ v[image, :, part]
    return np_linear(out, p["out"])


def np_block(x, p, count, keep=(1.0, 1.0)):
    first, second = (np.reshape(factor, (-1, 1, 1)) for factor in keep)
    x = x + first * np_attention(np_layer_norm(x, p["norm1"]), p, count)
    y = np_gelu(np_linear(np_layer_norm(x, p["norm2"]), p["mlp1"]))
    return x + second * np_linear(y, p["mlp2"])


def np_patches(x, p, side):
    """A patch is read row by row, each pixel's colours one after the other."""
    rows = range(0, x.shape[1], side)
    tokens = [x[:, r : r + side, c : c + side].reshape(len(x), -1) for r in rows for c in rows]
    return np_linear(np.stack(tokens, 1), p)


def np_conv_patches(x, p, s, layers):
    for i in range(1, layers + 1):
        x = np_conv(x, p[f"conv{i}"]["kernel"], 2)
        x = np.maximum(np_norm(x, p[f"bn{i}"], s[f"bn{i}"]), 0)
    return np_linear(x, p["project"]).reshape(len(x), -1, p["project"]["kernel"].shape[-1])


def np_vit(x, variables, m, keep=None):
    p, token = variables["params"], m.pool == "token"
    if m.patches == "conv":
        x = np_conv_patches(x, p["patches"], variables["batch_stats"]["patches"], 2)
    else:
        x = np_patches(x, p["patches"], m.patch)
    if token:
        x = np.concatenate([np.repeat(p["token"], len(x), 0), x], 1)
    side = m.image_size // m.patch
    fixed = positions.sincos(side, side, m.width, token)
    x = x + (p["positions"] if m.positions == "learned" else fixed)
    for i in range(m.depth):
        x = np_block(x, p[f"block{i}"], m.heads, (1, 1) if keep is None else keep[:, i].T)
    return np_layer_norm(x, p["norm"])[:, 0] if token else x.mean(1)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_a_block_equals_numpy(scale):
    """Float64: GELU is not its tanh form; the small tokens have variances as small as epsilon."""
    rng = np.random.default_rng(2)
    x, keep = scale * rng.normal(size=(2, 5, 12)), rng.uniform(0.5, 2, (2, 2))
    with jax.enable_x64(True):
        block = vit.Block(heads=3, hidden=20, dtype=jnp.float64)
        params = drawn(block, jnp.asarray(x))["params"]
        params["out"]["kernel"] *= scale  # so that the second norm too gets small tokens
        params["out"]["bias"] *= scale
        apply = jax.jit(block.apply)
        got, kept = apply({"params": params}, x), apply({"params": params}, x, keep)
    np.testing.assert_allclose(got, np_block(x, params, 3), rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(kept, np_block(x, params, 3, keep.T), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"pool": "mean"}, {"positions": "learned"}, {"patches": "conv"},
        {"pool": "mean", "positions": "learned"}, {"patches": "frozen", "heads": 1},
    ],
)  # fmt: skip
def test_the_encoder_equals_numpy(changes):
    x = images_of()
    with jax.enable_x64(True):
        m = model(dtype=jnp.float64, **changes)
        variables = drawn(m, jnp.asarray(x), False)
        got = jax.jit(m.apply, static_argnums=2)(variables, x, False)
    assert got.shape == (4, m.feature_dim) == (4, 12) and got.dtype == np.float64
    np.testing.assert_allclose(got, np_vit(x, variables, m), rtol=1e-10, atol=1e-12)


def test_drop_path_in_the_encoder_equals_numpy():
    """Each block has its own factors, and each of its branches."""
    x = images_of(6)
    with jax.enable_x64(True):
        m = model(dtype=jnp.float64, drop_path=0.6)
        variables = drawn(m, jnp.asarray(x), False)
        keys = jax.random.split(jax.random.key(3), 6)
        got = jax.jit(m.apply, static_argnums=2)(variables, x, True, keys)
        keep = np.asarray(m.keep(keys, jnp.float64))
    assert len(np.unique(keep.reshape(len(keep), -1), axis=0)) > 1 and (keep == 0).any()
    np.testing.assert_allclose(got, np_vit(x, variables, m, keep), rtol=1e-10, atol=1e-12)


def test_attention_is_the_equation_in_every_type():
    """The path of float64 and jax's own, on the same numbers; logits far from 0."""
    rows = 3 * np.random.default_rng(4).normal(size=(3, 2, 7, 3, 4))
    # of bfloat16: weights and result rounded to 8 bits, and both times values of up to 10
    for dtype, close in ((jnp.float64, 1e-13), (jnp.float32, 1e-5), (jnp.bfloat16, 2 * 10 * 2**-8)):
        with jax.enable_x64(dtype == jnp.float64):
            q, k, v = (jnp.asarray(x, dtype) for x in rows)
            got = jax.jit(attention.attend)(q, k, v)
        assert got.dtype == dtype
        q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
        logits = np.einsum("bqhd,bkhd->bhqk", q, k) / 2
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        want = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=close)


def published(variant, **changes):
    """The encoder that a config's section "vit" asks for."""
    changes = {f"vit__{name}": value for name, value in changes.items()}
    c = tiny.config("simclr", model__encoder="vit", vit__variant=variant, **changes)
    return heads.make_network(c, 224).backbone


def abstract_params(m, size=224):
    images = jnp.zeros((1, size, size, 3))
    return jax.eval_shape(lambda: m.init(jax.random.key(0), images, False))["params"]


@pytest.mark.parametrize("variant", ["Ti", "S", "B", pytest.param("L", marks=pytest.mark.slow)])
def test_number_of_parameters_is_the_published_one(variant):
    m = published(variant, positions="learned")
    count = sum(x.size for x in jax.tree.leaves(abstract_params(m)))
    assert count == PUBLISHED[variant]
    if variant == "S":  # the fixed table is no parameter here
        count = sum(x.size for x in jax.tree.leaves(abstract_params(published("S", heads=12))))
        assert count + positions.sincos(14, 14, 384, True).size == PUBLISHED["S"]


def test_variants_and_the_fields_that_replace_parts_of_them():
    found = {name: published(name) for name in vit.VARIANTS}
    assert {name: (m.width, m.depth, m.heads, m.patch) for name, m in found.items()} == {
        "Ti": (192, 12, 3, 16), "S": (384, 12, 6, 16), "B": (768, 12, 12, 16),
        "L": (1024, 24, 16, 16),
    }  # fmt: skip
    assert found["S"].in_words() == "ViT-S/16, width 384, 6 heads"
    m = published("S", heads=12, depth=5, patch=8, mlp_ratio=3.0)
    assert (m.width, m.depth, m.heads, m.patch, m.mlp_ratio) == (384, 5, 12, 8, 3.0)
    assert m.in_words() == "ViT of 5 blocks, patch 8, width 384, 12 heads"
    # the convolutions of the stem stand for a block, unless the number of blocks is given
    assert [published("S", patches="conv", depth=d).depth for d in (0, 12)] == [11, 12]
    assert {p: published("S", patches=p).frozen for p in ("linear", "frozen", "conv")} == {
        "linear": (), "frozen": ("patches",), "conv": (),
    }  # fmt: skip
    assert [published("S", patches=p).has_batch_norm for p in ("frozen", "conv")] == [False, True]
    assert [published("S", drop_path=p).is_random for p in (0.0, 0.1)] == [False, True]


def test_parameters_are_drawn_as_moco_v3_draws_them():
    """Query, key and value each as a matrix of its own, the patches by p^2 x 3 inputs."""
    m = vit.ViT(width=384, depth=1, heads=6, patch=16, image_size=32, positions="learned")
    keys = jax.random.split(jax.random.key(0), 4)  # of which the vectors together are enough
    init = jax.jit(jax.vmap(lambda key: m.init(key, jnp.zeros((1, 32, 32, 3)), False)["params"]))
    params = jax.device_get(init(keys))
    block = params["block0"]
    for name in ("query", "key", "value", "out"):
        assert_drawn_from(block[name]["kernel"], uniform(0.0883883))  # sqrt(6 / (384 + 384))
    for a, b in (("query", "key"), ("query", "value"), ("key", "value")):
        assert (block[a]["kernel"] != block[b]["kernel"]).mean() > 0.99
    for name in ("mlp1", "mlp2"):
        assert_drawn_from(block[name]["kernel"], uniform(0.0559017))  # sqrt(6 / (384 + 1536))
    assert_drawn_from(params["patches"]["kernel"], uniform(0.0721688))  # sqrt(6 / (768 + 384))
    assert_drawn_from(params["token"], normal(1e-6))
    assert_drawn_from(params["positions"], normal(0.02))
    constants = {n: x for n, x in tiny.named_leaves(params).items() if "kernel" not in n}
    constants = {n: x for n, x in constants.items() if n not in ("['token']", "['positions']")}
    assert len(constants) == 3 * 2 + 7  # norms; biases of 4 + 2 + 1 layers
    for name, x in constants.items():
        np.testing.assert_array_equal(x, 1 if "scale" in name else 0, err_msg=name)


def test_convolutions_of_the_stem_are_pytorchs():
    """Four of stride 2, of d/8 ... d channels without bias, and a 1x1 one with: default draws."""
    m = vit.ViT(width=64, depth=1, heads=2, image_size=32, patches="conv")
    init = jax.jit(lambda key: m.init(key, jnp.zeros((1, 32, 32, 3)), False))
    found = jax.device_get(jax.vmap(init)(jax.random.split(jax.random.key(0), 16)))
    stem = found["params"]["patches"]
    shapes = {name: x.shape[1:] for name, x in tiny.named_leaves(stem).items() if "bn" not in name}
    channels = [3, 8, 16, 32, 64]
    assert shapes == {
        f"['conv{i + 1}']['kernel']": (3, 3, channels[i], channels[i + 1]) for i in range(4)
    } | {"['project']['kernel']": (64, 64), "['project']['bias']": (64,)}
    for i in range(4):
        kernel = stem[f"conv{i + 1}"]["kernel"]
        assert_drawn_from(kernel, uniform(1 / math.sqrt(9 * channels[i])))
    for name in ("kernel", "bias"):
        assert_drawn_from(stem["project"][name], uniform(1 / 8))
    assert stem.keys() >= {"bn1", "bn2", "bn3", "bn4"} == found["batch_stats"]["patches"].keys()


def test_the_stem_sees_its_groups_of_the_batch():
    x = images_of(8).astype(np.float32)
    variables, rows = None, []
    for groups, part in ((2, x), (1, x[:4]), (1, x[4:])):
        m = model(depth=1, patches="conv", bn_groups=groups)
        variables = variables or drawn(m, jnp.asarray(x), False)
        apply = jax.jit(m.apply, static_argnums=2, static_argnames="mutable")
        y, new = apply(variables, part, True, mutable=("batch_stats",))
        rows.append((y, new["batch_stats"]))
    whole, *halves = rows
    np.testing.assert_allclose(
        whole[0], np.concatenate([y for y, _ in halves]), rtol=1e-4, atol=1e-5
    )
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *(stats for _, stats in halves))
    tiny.assert_close(whole[1], mean, 1e-5, 1e-6)


def test_images_of_another_size_get_resized_positions():
    """A learned table of 2 x 2 for a grid of 3 x 4, as the network of that table by hand."""
    x = np.random.default_rng(5).normal(size=(2, 12, 16, 3))
    with jax.enable_x64(True):
        m = model(depth=1, dtype=jnp.float64, positions="learned")
        variables = drawn(m, jnp.zeros((1, 8, 8, 3)), False)
        got = jax.jit(m.apply, static_argnums=2)(variables, x, False)
        p = variables["params"]
        table = positions.resized(jnp.asarray(p["positions"]), (3, 4), 1)
        patches = np.asarray(space_to_depth(jnp.asarray(x), 4)).reshape(2, 12, -1)
    tokens = [np.repeat(p["token"], 2, 0), np_linear(patches, p["patches"])]
    y = np_block(np.concatenate(tokens, 1) + np.asarray(table), p["block0"], 3)
    np.testing.assert_allclose(got, np_layer_norm(y, p["norm"])[:, 0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "size", "words"),
    [
        ({"variant": "H"}, 224, 'vit.variant="H" is unknown: .*Ti, S, B, L'),
        ({"pool": "max"}, 224, 'vit.pool="max" is unknown: .*token, mean'),
        ({"positions": "rope"}, 224, 'vit.positions="rope" is unknown: .*sincos, learned'),
        ({"patches": "conf"}, 224, 'vit.patches="conf" is unknown: .*did you mean "conv"'),
        ({"heads": 7}, 224, "vit.width=384 and heads=7: expected a width that is a multiple"),
        ({"width": 18, "heads": 3}, 224, "vit.width=18 and heads=3: .* and of 4 for sincos"),
        ({}, 100, "vit.patch=16 does not divide the views of 100 pixels: choose a divisor"),
        ({"patches": "conv", "patch": 14}, 224, "halves the image again .* found patch=14"),
        ({"patches": "conv", "patch": 1}, 224, "halves the image again .* found patch=1 "),
        ({"patches": "conv", "width": 12, "heads": 3}, 224, "width=12: expected a patch of 2, 4"),
        ({"mlp_ratio": 0.0}, 224, "vit.mlp_ratio=0.0 leaves a perceptron of width 384 without"),
        ({"drop_path": 1.0}, 224, "vit.drop_path=1.0: expected 0 or more, and less than 1"),
        ({"drop_path": -0.1}, 224, "vit.drop_path=-0.1: expected 0 or more"),
    ],
)  # fmt: skip
def test_what_is_no_vit_is_refused(changes, size, words):
    c = tiny.config("simclr", **{f"vit__{name}": value for name, value in changes.items()})
    with pytest.raises(UserError, match=words):
        vit.make_encoder(c.model, c.vit, size)
    learned = {"width": 18, "heads": 3, "positions": "learned"}  # needs no multiple of 4
    assert published("S", **learned).width == 18
