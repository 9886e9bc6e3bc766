"""Batch norm folded into a widening 1x1 convolution, against the two applied separately."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from common.models import fold
from common.models.batch_norm import BatchNorm
from common.models.resnet import Block


def outcome(fold_norm, dtype, groups=2, train=True, stride=2):
    """Output, new statistics, and gradients by parameters and input, of a bottleneck block.

    Its last convolution widens 4 to 16 channels, and its shortcut 8 to 16 with a stride.
    """
    norm = functools.partial(BatchNorm, groups=groups, dtype=dtype)
    block = Block(4, stride, True, norm, dtype, fold_norm)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(1.0, 2.0, (8, 6, 6, 8)), jnp.promote_types(dtype, jnp.float32))
    shapes = jax.eval_shape(lambda: block.init(jax.random.key(0), x, True))
    variables = tiny.draw_state(shapes)
    weights = rng.normal(size=(8, 6 // stride, 6 // stride, 16))

    def loss(params, x):
        y, new = block.apply(
            variables | {"params": params}, x, train, mutable=["batch_stats"]
        )  # fmt: skip
        return (jnp.sin(y.astype(x.dtype)) * weights).sum(), (y, new)

    (_, aux), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
        variables["params"], x
    )
    return jax.device_get((aux, grads))


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("train", [True, False])
def test_the_same_function_in_float64(groups, train):
    with jax.enable_x64(True):
        got, want = (outcome(f, jnp.float64, groups, train) for f in (True, False))
    tiny.assert_close(got, want, 1e-11, 1e-11)


@pytest.mark.slow
def test_bfloat16_costs_no_more_than_without():
    """Errors against float64, tensor by tensor: at most twice as large, except for tiny ones."""
    with jax.enable_x64(True):
        exact = tiny.named_leaves(outcome(False, jnp.float64))
    errors = {}
    for fold_norm in (True, False):
        found = tiny.named_leaves(outcome(fold_norm, jnp.bfloat16))
        assert found.keys() == exact.keys()
        errors[fold_norm] = {
            name: np.linalg.norm(found[name].astype(np.float64) - want) / np.linalg.norm(want)
            for name, want in exact.items()
        }
    for name, error in errors[True].items():
        assert error < 2 * errors[False][name] + 0.01, name


def test_moments_by_hand():
    with jax.enable_x64(True):
        x = np.random.default_rng(1).normal(3.0, 1.0, (2, 5, 3, 3, 4))
        kernel = np.random.default_rng(2).normal(size=(4, 9))
        mean, var = fold.output_moments(jnp.asarray(x), jnp.asarray(kernel))
        z = (x @ kernel).reshape(2, -1, 9)
        np.testing.assert_allclose(mean, z.mean(1), rtol=1e-12)
        np.testing.assert_allclose(var, z.var(1), rtol=1e-10)
