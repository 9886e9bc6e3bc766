"""The TPU's attention kernel, run as XLA operations, against the equation in NumPy."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from common.models import attention, tpu_attention
from common.sharding import AXIS, batch_sharding, each_device, make_mesh

forward = functools.partial(tpu_attention.forward, interpret=True)
backward = functools.partial(tpu_attention.backward, interpret=True)


def drawn(b, n, heads, d, dtype=np.float32):
    """Queries, keys, values, and a cotangent; logits far from 0."""
    rows = np.random.default_rng(n).normal(size=(4, b, n, heads, d)) * 1.5
    return [jnp.asarray(x, dtype) for x in rows]


def by_hand(q, k, v, g):
    """Result and gradients in float64, equation by equation."""
    q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, g))
    scale = q.shape[-1] ** -0.5
    logits = np.einsum("bqhd,bkhd->bhqk", q, k) * scale
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = np.einsum("bqhd,bkhd->bhqk", g, v)
    d_logits = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale
    gradients = (
        np.einsum("bhqk,bkhd->bqhd", d_logits, k),
        np.einsum("bhqk,bqhd->bkhd", d_logits, q),
        np.einsum("bhqk,bqhd->bkhd", p, g),
    )
    return np.einsum("bhqk,bkhd->bqhd", p, v), gradients


# tokens of 96 pixels at patch 16, of 32 at 4, and one
@pytest.mark.parametrize(("n", "heads", "d"), [(37, 2, 64), (65, 3, 8), (1, 1, 4)])
def test_the_kernel_is_the_equation(n, heads, d):
    arrays = drawn(2, n, heads, d)
    want, gradients = by_hand(*arrays)
    np.testing.assert_allclose(jax.jit(forward)(*arrays[:3]), want, rtol=1e-4, atol=1e-5)
    for got, want in zip(jax.jit(backward)(*arrays), gradients, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)


def test_in_bfloat16_it_rounds_where_jax_does():
    """Its error against float64 is that of jax's own attention."""
    arrays = drawn(2, 50, 3, 64, jnp.bfloat16)
    want, gradients = by_hand(*arrays)

    def plain(*arrays):
        y, pull = jax.vjp(jax.nn.dot_product_attention, *arrays[:3])
        return y, *pull(arrays[3])

    def kernel(*arrays):
        return forward(*arrays[:3]), *backward(*arrays)

    def errors(function):
        found = jax.jit(function)(*arrays)
        assert all(x.dtype == jnp.bfloat16 for x in found)
        return [
            np.linalg.norm(np.asarray(x, np.float64) - y)
            for x, y in zip(found, (want, *gradients), strict=True)
        ]

    for ours, jax_s in zip(errors(kernel), errors(plain), strict=True):
        assert 0 < ours < 1.1 * jax_s


@pytest.mark.parametrize("b", [8, 3])
def test_on_a_mesh_each_device_runs_it_on_its_own_images(b):
    """Three images cannot be split over eight devices: then all do all, as in `init`."""
    mesh, arrays = make_mesh(), drawn(b, 5, 2, 8)
    want, gradients = by_hand(*arrays)
    if b % mesh.size == 0:
        arrays = jax.device_put(arrays, batch_sharding(mesh))

    def both(*arrays):
        return forward(*arrays[:3]), *backward(*arrays)

    compiled = jax.jit(both).lower(*arrays).compile()
    assert "all-gather" not in compiled.as_text()
    for got, one in zip(compiled(*arrays), (want, *gradients), strict=True):
        np.testing.assert_allclose(got, one, rtol=1e-4, atol=2e-5)


def lowered_for(platform, function, *arrays):
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=(platform,)).as_text()


def test_inside_a_shard_map_it_takes_the_rows_as_they_are():
    """As in micro-batches, whose gradients check that each array varies over the mesh."""
    mesh, (q, k, v, _) = make_mesh(), drawn(8, 5, 2, 8, jnp.bfloat16)
    rows = PartitionSpec(AXIS)
    run = each_device(lambda *x, axis: attention.attend(*x), mesh, rows, rows)

    def gradient(*arrays):
        return jax.grad(lambda *x: run(*x).astype(jnp.float32).sum(), (0, 1, 2))(*arrays)

    text = lowered_for("tpu", gradient, *jax.device_put((q, k, v), batch_sharding(mesh)))
    (kernel,) = (line for line in text.splitlines() if "tpu_custom_call" in line)
    assert kernel.rpartition("-> ")[2] == f"({', '.join(3 * ['tensor<1x5x16xbf16>'])})"


def test_without_a_tpu_attention_is_jax_s_own():
    """In bfloat16 too, with its gradients; and in a program for a TPU it is the kernel."""
    q, k, v, g = drawn(2, 7, 3, 8, jnp.bfloat16)
    y, pull = jax.vjp(jax.nn.dot_product_attention, q, k, v)
    got, ours = jax.vjp(attention.attend, q, k, v)
    np.testing.assert_array_equal(got, y)
    for a, b in zip(ours(g), pull(g), strict=True):
        np.testing.assert_array_equal(a, b)

    def loss(*arrays):
        return attention.attend(*arrays).astype(jnp.float32).sum()

    gradient = jax.grad(loss, argnums=(0, 1, 2))
    found = {p: lowered_for(p, gradient, q, k, v).count("tpu_custom_call") for p in ("tpu", "cpu")}
    assert found == {"tpu": 1, "cpu": 0}, "the backward pass needs no result of the forward pass"


def test_what_does_not_fit_takes_the_plain_path():
    """257 tokens of a ViT-L fit; patches of 4 pixels of an image of 256 do not."""
    assert tpu_attention.fits(jax.ShapeDtypeStruct((1, 257, 16, 64), jnp.bfloat16))
    many = jax.ShapeDtypeStruct((1, 4097, 6, 64), jnp.bfloat16)
    assert not tpu_attention.fits(many)
    assert "tpu_custom_call" not in lowered_for("tpu", attention.attend, many, many, many)


@pytest.mark.parametrize(("kind", "calls"), [("TPU v3", 0), ("TPU v4", 1)])
def test_tpus_that_cannot_run_the_kernel_take_the_plain_path(kind, calls):
    """Their plans would not compile (libtpu 0.0.42.1)."""
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    x = jax.ShapeDtypeStruct((2, 5, 2, 8), jnp.bfloat16, sharding=sharding)

    def encode(x):
        return attention.attend(x, x, attention.row_major(x[:, :, 0])[:, :, None] + x)

    text = lowered_for("tpu", encode, x)
    for name in ("tpu_custom_call", "LayoutConstraint"):
        assert text.count(name) == calls


def test_tokens_are_in_order_in_the_memory_of_a_tpu():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 8)), jnp.bfloat16)

    def loss(x):
        return (attention.row_major(x) ** 2).sum()

    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(x), 2 * x)
    found = {p: lowered_for(p, jax.grad(loss), x).count("LayoutConstraint") for p in ("tpu", "cpu")}
    assert found == {"tpu": 2, "cpu": 0}  # of the gradient too


def test_on_a_mesh_each_device_orders_its_own_tokens():
    """Else the compiler gathers those of all chips on some slices, such as v5p:4x4x4."""
    sharding = jax.sharding.NamedSharding(make_mesh(), PartitionSpec(AXIS))
    x = jax.ShapeDtypeStruct((16, 5, 8), jnp.bfloat16, sharding=sharding)
    lines = lowered_for("tpu", attention.row_major, x).splitlines()
    (line,) = (line for line in lines if "LayoutConstraint" in line)
    assert "tensor<2x5x8xbf16>" in line  # of one device of eight


def test_an_exported_function_has_neither():
    """It takes any number of images, which no kernel does."""
    (b,) = jax.export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((b, 5, 2, 8), jnp.bfloat16)

    def encode(x):
        return attention.attend(x, x, attention.row_major(x[:, :, 0])[:, :, None] + x)

    exported = jax.export.export(jax.jit(encode), platforms=("cpu", "tpu"))(x)
    assert "dot_general" in exported.mlir_module()
    for name in ("tpu_custom_call", "LayoutConstraint"):
        assert name not in exported.mlir_module()
