"""How a layer's parameters are drawn before the first step, under the names that configs use.

Fan-in is the number of inputs of one output (k x k x channels for a convolution), fan-out the
number of outputs that one input contributes to.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

KERNELS: dict[str, Callable] = {
    # N(0, 2 / fan-out): He et al. 2015, eq. 14. Convolutions of torchvision's ResNets.
    "he": nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
    # Variance 1 / fan-in, normal, cut off at two deviations: Flax's default, and that of
    # VarianceScaling in Keras, which SimCLR's code gives its convolutions.
    "lecun": nn.initializers.lecun_normal(),
    # Uniform within +-1 / sqrt(fan-in), the bias too: what PyTorch's Linear and Conv2d do.
    "torch": nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
    # N(0, 0.01^2): linear layers of SimCLR's code.
    "normal": nn.initializers.normal(0.01),
}


def bias(name: str, fan_in: int) -> Callable:
    """The initialiser for the bias of a layer with the kernel initialiser `KERNELS[name]`.

    Args:
        name: one of `KERNELS`.
        fan_in: of the layer, >= 1.
    """
    if name != "torch":
        return nn.initializers.zeros

    def uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -1, 1) / math.sqrt(fan_in)

    return uniform
