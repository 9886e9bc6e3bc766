"""The encoder as StableHLO: a function of uint8 images that does not need this code."""

import jax
import jax.numpy as jnp
from jax import export

from common.evaluate.pretrained import Pretrained

PLATFORMS = ("cpu", "cuda", "tpu")


def serialize(opened: Pretrained) -> bytes:
    """The encoder of a run, serialised by `jax.export`.

    The function takes uint8 images `[b, h, w, 3]` of the run's size, for any b, and returns
    features `[b, d]` of `settings.layer`. It includes scaling, mean and std, and the weights. It is
    lowered for CPU, CUDA GPUs and TPU, and runs on one device (a jit around it may shard the
    batch). JAX guarantees to read it for at least six months.

    Args:
        opened: a run with weights.

    Returns:
        What `jax.export.deserialize(bytearray(data)).call(images)` takes.
    """
    size = opened.config.data.image_size
    state = jax.device_get(opened.state)  # constants of one device, however they were sharded

    def encode(images: jax.Array) -> jax.Array:
        return opened.method.encode(state, images, layer=opened.settings.layer)

    (b,) = export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((b, size, size, 3), jnp.uint8)
    return bytes(export.export(jax.jit(encode), platforms=PLATFORMS)(images).serialize())
