"""Options of the compiler: given where they are known, left out where they are not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from common.evaluate import features
from common.evaluate.features import jit_encoder
from common.fields import CONFIG
from common.sharding import make_mesh
from common.train import step, xla_options


def test_each_platform_gets_its_own():
    assert xla_options.compiler_options("gpu") is None
    assert xla_options.compiler_options("gpu", "resnet") is None
    assert set(xla_options.TPU_OPTIONS) == set(CONFIG["model"]["encoder"].one_of)
    for encoder, options in xla_options.TPU_OPTIONS.items():
        assert xla_options.compiler_options("tpu", encoder) == options
    assert xla_options.compiler_options("tpu") is None


@pytest.mark.parametrize("name", ["xla_cpu_no_such_option", "xla_cpu_experimental_ynn_fusion_type"])
def test_an_option_or_value_that_xla_does_not_know_is_left_out(name, monkeypatch):
    monkeypatch.setattr(xla_options, "CPU_OPTIONS", {name: "NO_SUCH_VALUE"})
    assert xla_options.compiler_options("cpu") is None


def test_they_reach_the_compiler(monkeypatch):
    """One that XLA does not know, given all the same, is refused by it."""
    for module in (features, step):
        monkeypatch.setattr(module, "compiler_options", lambda *a, **b: {"no_such_option": "1"})
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        jit_encoder(lambda state, images: images, make_mesh())(None, np.zeros(8))
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        tiny.run(tiny.build(tiny.config("simclr")))


@pytest.mark.optimised
def test_the_encoder_has_its_features_with_and_without(monkeypatch):
    """Eigen's convolution and YNNPACK's, where XLA has a choice, agree."""

    def encode(kernel, images):
        x = images.astype(jnp.float32)
        x = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return x.mean((1, 2))

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 16, 16, 32), np.uint8)
    kernel = rng.normal(size=(3, 3, 32, 32)).astype(np.float32)
    mesh, found = make_mesh(jax.devices()[:1]), []
    for options in (xla_options.CPU_OPTIONS, {}):
        monkeypatch.setattr(xla_options, "CPU_OPTIONS", options)
        found.append(jit_encoder(encode, mesh)(kernel, images))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4, atol=1e-3)
