"""The gradients for a CPU against XLA's and against sums by hand."""

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
    [(37, 32, 3, 1, 8), (16, 32, 3, 2, 2), (9, 32, 1, 2, 2), (5, 8, 3, 1, 1), (1, 64, 7, 2, 1),
     (3, 7, 3, 2, 1), (3, 7, 1, 2, 1)],
)  # fmt: skip
def test_gradients_are_those_of_the_sums_by_hand(images, side, size, stride, pieces, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(images, side, side, 3))
    kernel = rng.normal(size=(size, size, 3, 4))
    out = -(-side // stride)
    g = rng.normal(size=(images, out, out, 4))
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


@pytest.mark.parametrize("options", [{"rhs_dilation": (2, 2)}, {"feature_group_count": 3}])
def test_what_is_not_ordinary_is_left_to_xla(options, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    x, kernel = (
        jnp.ones((2, 9, 9, 3)),
        jnp.ones((3, 3, 3 // options.get("feature_group_count", 1), 6)),
    )

    def text(conv):
        total = lambda k: conv(x, k, (1, 1), [(1, 1)] * 2, **OPTIONS, **options).sum()  # noqa: E731
        return jax.jit(jax.grad(total)).lower(kernel).as_text()

    assert text(cpu_conv.conv_general_dilated) == text(jax.lax.conv_general_dilated)


@pytest.mark.optimised
def test_in_a_loop_every_convolution_has_the_fast_form(monkeypatch):
    """XLA itself transposes only those outside loops into this form."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)

    def text(conv):
        def loss(k, x):
            return (conv(x, k, (2, 2), [(1, 1)] * 2, **OPTIONS) ** 2).sum()

        def step(_, k):
            return k - jax.grad(loss)(k, jnp.ones((4, 8, 8, 3)) * k.sum())

        loop = jax.jit(lambda k: jax.lax.fori_loop(0, 3, step, k))
        compiled = loop.lower(jnp.ones((3, 3, 3, 4))).compile().as_text()
        return [line for line in compiled.splitlines() if " convolution(" in line]

    ours, xlas = text(cpu_conv.conv_general_dilated), text(jax.lax.conv_general_dilated)
    assert ours and all("dim_labels=b01f_01io->b01f" in line for line in ours)
    assert not all(
        "dim_labels=b01f_01io->b01f" in line for line in xlas
    )  # else this module is not needed


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
