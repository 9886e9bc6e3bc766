"""The kernel gradient in pieces of the batch is the gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.models import cpu_conv

OPTIONS = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def by_hand(x, g, size, stride):
    """Sum over images and positions, tap by tap, in NumPy."""
    pad = size // 2
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    h, w = g.shape[1:3]
    taps = [
        np.einsum(
            "bhwc,bhwd->cd", x[:, i : i + stride * h : stride, j : j + stride * w : stride], g
        )
        for i in range(size)
        for j in range(size)
    ]
    return np.reshape(taps, (size, size, x.shape[-1], g.shape[-1]))


@pytest.mark.parametrize(
    ("images", "side", "size", "stride", "pieces"),
    [(37, 32, 3, 1, 8), (16, 32, 3, 2, 2), (9, 32, 1, 2, 2), (5, 8, 3, 1, 1), (1, 64, 7, 2, 1)],
)
def test_gradients_are_those_of_the_sums_by_hand(images, side, size, stride, pieces, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(images, side, side, 3))
    kernel = rng.normal(size=(size, size, 3, 4))
    g = rng.normal(size=(images, side // stride, side // stride, 4))
    pad = [(size // 2, size // 2)] * 2

    with jax.enable_x64(True):

        def total(conv, x, kernel):
            return (conv(x, kernel, (stride, stride), pad, **OPTIONS) * g).sum()

        ours = jax.jit(jax.grad(lambda *a: total(cpu_conv.conv_general_dilated, *a), (0, 1)))
        xlas = jax.jit(jax.grad(lambda *a: total(jax.lax.conv_general_dilated, *a), (0, 1)))
        args = jnp.asarray(x), jnp.asarray(kernel)
        dx, dkernel = ours(*args)
        np.testing.assert_allclose(dx, xlas(*args)[0], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(dkernel, by_hand(x, g, size, stride), rtol=1e-9, atol=1e-9)
        convolutions = ours.lower(*args).as_text().count("stablehlo.convolution")
    assert convolutions == 1 + pieces  # that of dx, and the pieces; the value itself is not needed


def test_other_platforms_and_several_devices_get_what_xla_does(monkeypatch):
    x, kernel = jnp.ones((16, 32, 32, 3)), jnp.ones((3, 3, 3, 4))

    def text(conv, platform):
        step = jax.jit(jax.grad(lambda k: conv(x, k, (1, 1), [(1, 1)] * 2, **OPTIONS).sum())).trace(
            kernel
        )
        return step.lower(lowering_platforms=(platform,)).as_text()

    count = text(jax.lax.conv_general_dilated, "tpu").count("stablehlo.convolution")
    assert text(cpu_conv.conv_general_dilated, "cpu").count("stablehlo.convolution") == count
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert text(cpu_conv.conv_general_dilated, "tpu").count("stablehlo.convolution") == count
    assert text(cpu_conv.conv_general_dilated, "cpu").count("stablehlo.convolution") > count
