"""Softmax attention of all tokens of an image with each other."""

import jax
import jax.numpy as jnp


def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """`softmax(query key' / sqrt(d)) value`, Vaswani et al. 2017, eq. 1.

    Args:
        query, key, value: `[b, tokens, heads, d]`, of one type.

    Returns:
        `[b, tokens, heads, d]` of that type; logits and softmax are at least float32.
    """
    if query.dtype == jnp.float64:  # of tests; jax's own softmax is float32
        return dense(query, key, value)
    return jax.nn.dot_product_attention(query, key, value)


def dense(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """`attend`, written down as the equation."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), value)
