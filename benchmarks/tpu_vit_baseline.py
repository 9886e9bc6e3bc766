"""The baseline of the ratios for ViTs in docs/tpu.md: SimCLR on ViT-B/16 in the obvious way.

    python -m benchmarks.tpu_vit_baseline --topology=v5e:16x16 --batch=4096

Flax's own `MultiHeadDotProductAttention` and `LayerNorm`, bfloat16 compute, float32 parameters, the
exact GELU, learned positions, a class token, a head of three layers with batch norm, the loss with
all logits at once, AdamW; the rest as in `benchmarks/tpu_baseline.py`. Prints what the TPU compiler
reports for one chip as JSON.
"""

import argparse
import functools
import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from benchmarks import tpu_baseline
from common.plan import measure

WIDTH, DEPTH, HEADS, PATCH, HIDDEN, DIM = 768, 12, 12, 16, 4096, 256
_Dense = functools.partial(nn.Dense, dtype=jnp.bfloat16)
_LayerNorm = functools.partial(nn.LayerNorm, epsilon=1e-6, dtype=jnp.bfloat16)
_Norm = functools.partial(nn.BatchNorm, use_running_average=False, momentum=0.9, dtype=jnp.bfloat16)


class _Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = _LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(HEADS, dtype=jnp.bfloat16)(y, y)
        y = _Dense(4 * WIDTH)(_LayerNorm()(x))
        return x + _Dense(WIDTH)(nn.gelu(y, approximate=False))


class _Network(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(WIDTH, (PATCH, PATCH), (PATCH, PATCH), dtype=jnp.bfloat16)(x)
        x = x.reshape(x.shape[0], -1, WIDTH)
        token = self.param("token", nn.initializers.zeros, (1, 1, WIDTH)).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, WIDTH)), x], axis=1)
        table = self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        x = x + table.astype(x.dtype)
        for _ in range(DEPTH):
            x = _Block()(x)
        x = _LayerNorm()(x)[:, 0]
        for width in (HIDDEN, HIDDEN):
            x = nn.relu(_Norm()(_Dense(width, use_bias=False)(x)))
        return _Norm(use_bias=False)(_Dense(DIM, use_bias=False)(x)).astype(jnp.float32)


def compile_for(batch: int, mesh: Mesh) -> dict[str, Any]:
    """`common.plan.measure.describe` of the step, and `compile_seconds`."""
    return tpu_baseline.compile_network(
        _Network(), optax.adamw(1e-3, weight_decay=0.1), batch, mesh
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", default="v5e:16x16")
    parser.add_argument("--batch", type=int, default=4096)
    options = parser.parse_args()
    compile_step = functools.partial(compile_for, options.batch)
    print(json.dumps(measure.on_topology(compile_step, options.topology)))


if __name__ == "__main__":
    main()
