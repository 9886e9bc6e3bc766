"""The baseline of the ratios in docs/tpu.md: SimCLR in the obvious way.

    python -m benchmarks.tpu_baseline --topology=v5e:4x8 --batch=4096

A plain linen ResNet-50 (bfloat16 compute, float32 parameters, `nn.BatchNorm` over the global
batch), the projection head of SimCLR, the loss with all logits at once, SGD with momentum; both
views in one forward pass, 224 px, bfloat16 images, state donated, XLA's default options. Nothing of
`common/models` or `simclr_jax` is used. Prints what the TPU compiler reports for one chip as JSON.
"""

import argparse
import functools
import json
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from common.plan import measure
from common.sharding import batch_sharding, replicated

SIZE, DIM, TEMPERATURE = 224, 128, 0.1
_Norm = functools.partial(nn.BatchNorm, momentum=0.9, dtype=jnp.bfloat16)
_Conv = functools.partial(nn.Conv, use_bias=False, dtype=jnp.bfloat16)


class _Bottleneck(nn.Module):
    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = functools.partial(_Norm, use_running_average=False)
        y = nn.relu(norm()(_Conv(self.features, (1, 1))(x)))
        y = nn.relu(norm()(_Conv(self.features, (3, 3), (self.stride, self.stride))(y)))
        y = norm(scale_init=nn.initializers.zeros)(_Conv(4 * self.features, (1, 1))(y))
        if x.shape != y.shape:
            x = norm()(_Conv(4 * self.features, (1, 1), (self.stride, self.stride))(x))
        return nn.relu(x + y)


class _Network(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = _Conv(64, (7, 7), (2, 2))(x)
        x = nn.max_pool(nn.relu(_Norm(use_running_average=False)(x)), (3, 3), (2, 2), "SAME")
        for i, blocks in enumerate((3, 4, 6, 3)):
            for j in range(blocks):
                x = _Bottleneck(64 * 2**i, 2 if i and not j else 1)(x)
        x = x.mean((1, 2))
        x = nn.Dense(2048, use_bias=False, dtype=jnp.bfloat16)(x)
        x = nn.relu(_Norm(use_running_average=False)(x))
        x = nn.Dense(DIM, use_bias=False, dtype=jnp.bfloat16)(x)
        return _Norm(use_running_average=False, use_bias=False)(x).astype(jnp.float32)


def _loss(z: jax.Array, mesh: Mesh) -> jax.Array:
    """NT-Xent of `z [2n, d]`, rows 2i and 2i + 1 two views: own rows against all, gathered."""
    z = z / jnp.linalg.norm(z, axis=-1, keepdims=True)
    everyone = jax.lax.with_sharding_constraint(z, replicated(mesh))
    logits = z @ everyone.T / TEMPERATURE
    ids = jnp.arange(z.shape[0])
    logits = jnp.where(ids[:, None] == ids[None], -jnp.inf, logits)
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids ^ 1).mean()


def compile_for(batch: int, mesh: Mesh) -> dict[str, Any]:
    """`common.plan.measure.describe` of the step, and `compile_seconds`."""
    return compile_network(_Network(), optax.sgd(0.1, momentum=0.9), batch, mesh)


def compile_network(
    network: nn.Module, tx: optax.GradientTransformation, batch: int, mesh: Mesh
) -> dict[str, Any]:
    """As `compile_for`, of any network with batch norm, images to embeddings, and optimiser."""

    def init(key: jax.Array) -> tuple:
        variables = network.init(key, jnp.zeros((1, SIZE, SIZE, 3)))
        return variables["params"], variables["batch_stats"], tx.init(variables["params"])

    def step(state: tuple, images: jax.Array) -> tuple:
        params, stats, opt_state = state

        def loss_fn(params: Any) -> tuple:
            variables = {"params": params, "batch_stats": stats}
            z, new = network.apply(variables, images, mutable=["batch_stats"])
            return _loss(z, mesh), new["batch_stats"]

        (loss, new_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), new_stats, opt_state), loss

    here = replicated(mesh)
    state = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here),
        jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0))),
    )
    shape = (2 * batch, SIZE, SIZE, 3)
    images = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=batch_sharding(mesh))
    begin = time.process_time()
    compiled = jax.jit(step, donate_argnums=0, out_shardings=here).lower(state, images).compile()
    return measure.describe(compiled, mesh.size) | {"compile_seconds": time.process_time() - begin}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", default="v5e:4x8")
    parser.add_argument("--batch", type=int, default=4096)
    options = parser.parse_args()
    compile_step = functools.partial(compile_for, options.batch)
    print(json.dumps(measure.on_topology(compile_step, options.topology)))


if __name__ == "__main__":
    main()
