"""The first layers of an ImageNet ResNet in the form for GPUs, against XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from common.models import fold, gpu_stem, resnet

PLAIN = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


@pytest.mark.parametrize("size", [3, 5, 7])
@pytest.mark.parametrize("shape", [(16, 12, 3), (8, 8, 3), (10, 6, 2)])
def test_a_convolution_of_blocks_is_the_convolution(size, shape):
    with jax.enable_x64(True):
        x, kernel = drawn(2, *shape), drawn(size, size, shape[-1], 5, seed=1)

        def plain(x, kernel):
            around = [(size // 2, size // 2)] * 2
            return jax.lax.conv_general_dilated(x, kernel, (2, 2), around, **PLAIN)

        want, want_gradient = jax.vjp(plain, x, kernel)
        got, gradient = jax.vjp(gpu_stem.conv_of_blocks, x, kernel)
        g = drawn(*want.shape, seed=2)
        tiny.assert_close((got, gradient(g)), (want, want_gradient(g)), 1e-12, 1e-12)


@pytest.mark.parametrize(
    "change",
    [
        {"size": 6}, {"x": (2, 15, 16, 4)}, {"strides": (2, 1)}, {"padding": [(3, 3), (2, 3)]},
        {"feature_group_count": 2}, {"rhs_dilation": (2, 2)}, {},
    ],
)  # fmt: skip
def test_what_does_not_fit_blocks_is_left_alone(change):
    more = {"size": 7, "x": (2, 16, 16, 4), "strides": (2, 2), "padding": [(3, 3), (3, 3)]} | change
    size, shape, strides, padding = (more.pop(n) for n in ("size", "x", "strides", "padding"))
    kernel = drawn(size, size, 4 // more.get("feature_group_count", 1), 8)

    def text(conv, platform="cuda"):
        step = jax.jit(lambda x, k: conv(x, k, strides, padding, **PLAIN, **more))
        lowered = step.trace(drawn(*shape), kernel).lower(lowering_platforms=(platform,))
        return [line for line in lowered.as_text().splitlines() if "stablehlo.conv" in line]

    same = text(gpu_stem.conv_general_dilated) == text(jax.lax.conv_general_dilated)
    assert same == bool(change)


def test_what_cudnn_reads_has_channels_in_eights():
    text = jax.jit(gpu_stem.conv_of_blocks).lower(
        jnp.zeros((1, 8, 8, 3), jnp.bfloat16), jnp.zeros((7, 7, 3, 4), jnp.bfloat16)
    )
    assert "tensor<4x4x16x4xbf16>" in text.as_text()


@pytest.mark.parametrize("values", ["all differ", "many are equal", "all below zero"])
def test_the_pool_that_stores_places_is_the_pool(values):
    with jax.enable_x64(True):
        x = drawn(2, 8, 12, 3)
        if values == "many are equal":
            x = jnp.round(x)
        if values == "all below zero":  # a padding of zeros would win
            x = -jnp.abs(x)
        want, want_gradient = jax.vjp(gpu_stem.plain_pool, x)
        got, places = gpu_stem.pool_with_places(x)
        g = drawn(*want.shape, seed=1)
        np.testing.assert_array_equal(got, want)
        np.testing.assert_allclose(gpu_stem.unpool(places, g), want_gradient(g)[0], 1e-14)
    assert places.dtype == jnp.uint8


@pytest.mark.parametrize("places", [[(2, 2)], [(3, 3)], [(0, 0), (7, 5)], "everywhere"])
def test_nan_is_not_lost_in_a_pool(places):
    x = np.array(drawn(1, 8, 8, 2))
    for h, w in np.ndindex(8, 8) if places == "everywhere" else places:
        x[0, h, w, 0] = np.nan
    want = gpu_stem.plain_pool(jnp.asarray(x))
    assert np.isnan(want).any()
    np.testing.assert_array_equal(gpu_stem.pool_with_places(jnp.asarray(x))[0], want)


def test_gradients_that_meet_are_added_before_they_are_rounded():
    x = np.zeros((1, 6, 6, 1), np.float32)
    x[0, 3, 3, 0] = 1  # is the largest of four windows
    g = np.full((1, 3, 3, 1), 2.0**-8, np.float32)
    g[0, 1, 1, 0] = 1  # 1 + 2^-8 is 1 in bfloat16
    _, places = gpu_stem.pool_with_places(jnp.asarray(x, jnp.bfloat16))
    found = gpu_stem.unpool(places, jnp.asarray(g, jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    assert float(found[0, 3, 3, 0]) == float(jnp.bfloat16(1 + 3 * 2.0**-8)) > 1


@pytest.mark.parametrize("size", [32, 30, 28])  # maps of 16, 15 and 14 pixels before the pool
@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_a_network_is_the_same_function_on_a_gpu(stem, size, monkeypatch):
    with jax.enable_x64(True):
        net = resnet.ResNet(stages=(1,), width=4, stem=stem, bn_groups=2, dtype=jnp.float64)
        x = drawn(4, size, size, 3)
        variables = tiny.draw_state(jax.eval_shape(lambda: net.init(jax.random.key(0), x, True)))

        def outcome():
            def loss(params):
                y, new = net.apply(variables | {"params": params}, x, True, mutable=["batch_stats"])
                return jnp.sin(y).sum(), (y, new)

            return jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(variables["params"]))

        want = outcome()
        taken = []
        as_a_gpu = lambda gpu, other, *arguments: taken.append(gpu) or gpu(*arguments)  # noqa: E731
        monkeypatch.setattr(gpu_stem, "on_gpu", as_a_gpu)
        tiny.assert_close(outcome(), want, 1e-11, 1e-11)
    assert bool(taken) == (stem == "imagenet")


def test_each_platform_gets_its_own():
    net = resnet.ResNet(stages=(1,), width=8, dtype=jnp.bfloat16)
    x = jnp.zeros((2, 32, 32, 3), jnp.bfloat16)
    variables = jax.eval_shape(lambda: net.init(jax.random.key(0), x, True))

    def loss(params, rest, x):
        return net.apply(rest | {"params": params}, x, True, mutable=["batch_stats"])[0].sum()

    params = variables["params"]
    rest = {"batch_stats": variables["batch_stats"]}
    step = jax.jit(jax.grad(loss)).trace(params, rest, x)
    text = {p: step.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda", "tpu")}
    for platform, found in text.items():
        gpu = platform == "cuda"
        assert ("select_and_scatter" in found) != gpu, platform
        assert ("x16xbf16>, tensor<4x4x16x8xbf16>)" in found) == gpu, platform  # of blocks
        assert ("x3xbf16>, tensor<7x7x3x8xbf16>)" in found) != gpu, platform


def test_a_folded_product_is_rounded_on_a_gpu_only():
    x, kernel = jnp.ones((1, 2, 2, 2, 4), jnp.bfloat16), jnp.ones((1, 4, 8))
    product = jax.jit(fold.product).trace(x, kernel)
    text = {p: product.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda", "tpu")}
    rounded = {p: "-> tensor<1x2x2x2x8xbf16>" in found for p, found in text.items()}
    assert rounded == {"cpu": False, "cuda": True, "tpu": False}, text["cuda"]
    assert fold.product(x, kernel).dtype == jnp.float32
