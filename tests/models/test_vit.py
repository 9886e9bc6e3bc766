"""Vision transformers against the same equations in NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_resnet import np_conv, np_norm

from common.models import attention, positions, vit
from common.models.resnet import space_to_depth

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
