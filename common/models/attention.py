"""Softmax attention of all tokens of an image with each other."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from common.models import tpu_attention
from common.models.platform import on_tpu


def attend(query: jax.Array, key: jax.Array, value: jax.Array, kernel: bool = True) -> jax.Array:
    """`softmax(query key' / sqrt(d)) value`, Vaswani et al. 2017, eq. 1.

    Args:
        query: `[b, tokens, heads, d]`.
        key: likewise.
        value: likewise.
        kernel: in bfloat16, let a TPU keep logits and probabilities on the chip
            (`common/models/tpu_attention.py`). The backward pass then computes the probabilities
            again, on every platform, and there is no forward-mode derivative. (TPU v2 and v3 are
            too old for it.)

    Returns:
        `[b, tokens, heads, d]` of that type; logits and softmax are at least float32.
    """
    if query.dtype == jnp.float64:  # of tests; jax's own softmax is float32
        return dense(query, key, value)
    if kernel and _is_ours(query) and tpu_attention.fits(query):
        return _recomputed(query, key, value)
    return jax.nn.dot_product_attention(query, key, value)


def row_major(tokens: jax.Array) -> jax.Array:
    """`tokens [b, n, width]`; in a program for a TPU with these axes in this order in memory.

    It is the order that the kernel takes. Left to itself, XLA for TPUs puts the tokens of a ViT
    first between two blocks, and the norms, which would be parts of products, stand alone.
    """
    if not _is_ours(tokens):
        return tokens

    def local(x: jax.Array) -> jax.Array:
        return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

    def on_a_tpu(x: jax.Array) -> jax.Array:
        ordered: jax.Array = tpu_attention.on_own_images(local, x)
        return ordered

    return on_tpu(on_a_tpu, lambda x: x, tokens)


def _is_ours(x: jax.Array) -> bool:
    """Not in an exported function, which takes any number of images and has no kernels."""
    return x.dtype == jnp.bfloat16 and isinstance(x.shape[0], int) and tpu_attention.runs_on(x)


def dense(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """`attend`, written down as the equation."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), value)


@jax.custom_vjp
def _recomputed(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    plain: Callable = jax.nn.dot_product_attention
    return on_tpu(tpu_attention.forward, plain, query, key, value)


def _backward(stored: tuple[jax.Array, ...], g: jax.Array) -> tuple[jax.Array, ...]:
    def plain(query: jax.Array, key: jax.Array, value: jax.Array, g: jax.Array) -> tuple:
        return jax.vjp(jax.nn.dot_product_attention, query, key, value)[1](g)

    return on_tpu(tpu_attention.backward, plain, *stored, g)


_recomputed.defvjp(lambda *arrays: (_recomputed(*arrays), arrays), _backward)
