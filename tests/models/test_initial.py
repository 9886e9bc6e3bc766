"""Initialisation: each distribution against its formula, and which layer has which."""

import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from etils import epath

from common import config
from common.errors import UserError
from common.models import heads, initial, resnet
from common.models.batch_norm import BatchNorm
from common.run import saved_config
from common.setup import make_encoder_setup
from common.sharding import make_mesh


def uniform(bound):
    """`(deviation, largest value, distribution function)`."""
    return bound / np.sqrt(3), bound, lambda x: np.clip((x / bound + 1) / 2, 0, 1)


def normal(deviation, cut=np.inf):
    """Of a normal distribution truncated at that many deviations, then rescaled."""
    # Deviation of a standard normal between -2 and 2: sqrt(1 - 4 phi(2) / (Phi(2) - Phi(-2))).
    spread = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))
    inner = deviation / spread if np.isfinite(cut) else deviation
    below = np.vectorize(lambda x: (1 + math.erf(x / math.sqrt(2))) / 2)
    low = below(-cut) if np.isfinite(cut) else 0.0

    def cumulative(x):
        return np.clip((below(x / inner) - low) / (1 - 2 * low), 0, 1)

    return deviation, inner * cut, cumulative


def assert_drawn_from(values, law):
    """Mean 0, the deviation, the bound, and Kolmogorov-Smirnov at a level of 1e-6."""
    deviation, largest, cumulative = law
    x = np.sort(np.asarray(values, np.float64).ravel())
    n = len(x)
    assert n >= 1000  # else these bounds are too weak
    assert abs(x.mean()) < 5 * deviation / np.sqrt(n)
    np.testing.assert_allclose(x.std(), deviation, rtol=5 / np.sqrt(n))
    assert np.abs(x).max() <= largest * (1 + 1e-6)
    some = x[:: max(1, n // 500)]
    rank = np.arange(n)[:: max(1, n // 500)] / n
    assert np.abs(cumulative(some) - rank).max() < 2.7 / np.sqrt(n) + 1 / n


LAWS = {  # name -> law of a kernel with this fan-in and fan-out
    "he": lambda fan_in, fan_out: normal(np.sqrt(2 / fan_out)),
    "lecun": lambda fan_in, fan_out: normal(np.sqrt(1 / fan_in), cut=2),
    "torch": lambda fan_in, fan_out: uniform(1 / np.sqrt(fan_in)),
    "normal": lambda fan_in, fan_out: normal(0.01),
}


@pytest.mark.parametrize("name", LAWS)
def test_a_kernel_is_drawn_as_its_formula_says(name):
    assert LAWS.keys() == initial.KERNELS.keys()
    drawn = initial.KERNELS[name](jax.random.key(0), (3, 3, 20, 30))
    assert_drawn_from(drawn, LAWS[name](180, 270))


def test_a_bias_is_drawn_as_in_pytorch_or_is_zero():
    """U(-1/sqrt(k), 1/sqrt(k)), k = in_features: torch.nn.Linear's documentation."""
    for name in initial.KERNELS:
        draw = initial.bias(name, 25)
        got = draw(jax.random.key(0), (4000,), jnp.float32)
        assert got.shape == (4000,) and got.dtype == jnp.float32
        if name == "torch":
            assert_drawn_from(got, uniform(1 / 5))
        else:
            np.testing.assert_array_equal(got, 0)


@pytest.fixture
def marked(monkeypatch):
    """Constant kernels instead of random ones show which layer has which initialisation."""
    marks = {name: float(i) for i, name in enumerate(initial.KERNELS, 2)}
    for name, mark in marks.items():
        monkeypatch.setitem(initial.KERNELS, name, nn.initializers.constant(mark))
    names = {mark: name for name, mark in marks.items()}

    def start(module, *args):
        """Every kernel's and scale's value, kernels by the name of how they were drawn."""
        params = jax.jit(module.init, static_argnums=2)(jax.random.key(0), *args)["params"]
        found = {}
        for path, x in tiny.named_leaves(jax.device_get(params)).items():
            assert len(np.unique(x)) == 1 or path.endswith("['bias']"), path
            _, *parts, layer, leaf = path.replace("']", "").split("['")
            layer = f"head {layer}" if "head" in parts else layer
            if leaf != "bias":
                value = float(x.ravel()[0])
                value = names[value] if leaf == "kernel" else value
                assert found.setdefault(layer, value) == value, path  # in all blocks
        return found

    return start


IMAGE = jnp.zeros((1, 8, 8, 3))


def network(**changes):
    c = tiny.config("moco", model__stages=(1, 1), **changes)
    return heads.make_network(c, 8)


def test_a_network_starts_as_its_config_says(marked):
    convs = ["conv1", "conv2", "downsample_conv"]
    norms = {"stem_bn": 1, "bn1": 1, "downsample_bn": 1}
    assert marked(network(), IMAGE, False) == norms | {
        "stem_conv": "he", "bn2": 0, "head dense1": "lecun", "head dense2": "lecun",
    } | dict.fromkeys(convs, "he")  # fmt: skip
    torch = {"model__zero_init_residual": False, "model__stem_init": "torch", "head__init": "torch"}
    assert marked(network(**torch), IMAGE, False) == norms | {
        "stem_conv": "torch", "bn2": 1, "head dense1": "torch", "head dense2": "torch",
    } | dict.fromkeys(convs, "he")  # fmt: skip
    tensorflow = {"model__conv_init": "lecun", "head__init": "normal", "head__kind": "simclr"}
    assert marked(network(**tensorflow), IMAGE, False) == norms | {
        "stem_conv": "lecun", "bn2": 0, "head dense1": "normal", "head dense2": "normal",
        "head bn1": 1, "head bn2": 1,
    } | dict.fromkeys(convs, "lecun")  # fmt: skip


@pytest.mark.parametrize("zero", [True, False])
def test_bottlenecks_start_as_the_config_says_too(zero, marked):
    """Their widening convolutions, whose batch norm is folded in, are drawn elsewhere."""
    block = resnet.Block(2, 1, True, BatchNorm, jnp.float32, True, "lecun", zero)
    assert marked(block, jnp.zeros((1, 4, 4, 3)), False) == {
        "bn1": 1, "bn2": 1, "bn3": 0 if zero else 1, "downsample_bn": 1, "conv1": "lecun",
        "conv2": "lecun", "conv3": "lecun", "downsample_conv": "lecun",
    }  # fmt: skip


@pytest.mark.slow
def test_selective_kernels_start_as_the_config_says_too(marked):
    """Also the stem of three convolutions."""
    found = marked(network(**tiny.SK, model__conv_init="lecun", model__stem_init="torch"),
                   jnp.zeros((1, 16, 16, 3)), False)  # fmt: skip
    found = {name: value for name, value in found.items() if not name.startswith("head")}
    names = ("conv1", "conv", "squeeze", "select", "conv3", "avg_downsample_conv")
    norms = ("stem_bn1", "stem_bn2", "stem_bn3", "bn1", "bn", "squeeze_bn", "avg_downsample_bn")
    stem = ("stem_conv1", "stem_conv2", "stem_conv3")
    want = dict.fromkeys(names, "lecun") | dict.fromkeys(stem, "torch") | dict.fromkeys(norms, 1)
    assert found == want | {"bn3": 0}


def test_the_bias_of_a_head_is_drawn_by_its_fan_in():
    head = heads.ProjectionHead("moco_v2", hidden=1600, dim=1600, init_as="torch")
    params = jax.jit(head.init, static_argnums=2)(jax.random.key(0), jnp.zeros((1, 16)), False)
    for layer, fan_in in (("dense1", 16), ("dense2", 1600)):
        assert_drawn_from(params["params"][layer]["bias"], uniform(1 / np.sqrt(fan_in)))


@pytest.mark.parametrize("field", ["model__conv_init", "model__stem_init", "head__init"])
def test_an_unknown_initialisation_is_refused(field):
    with pytest.raises(
        UserError, match=rf'{field.replace("__", ".")}="pytorch" is unknown: .*torch'
    ):
        network(**{field: "pytorch"})


def test_a_run_is_evaluated_on_the_network_that_it_began_with(tmp_path):
    """Including one from before these fields existed; `untrained` draws the same network."""
    theirs = {"model__conv_init": "lecun", "model__stem_init": "torch", "head__init": "torch",
              "model__zero_init_residual": False}  # fmt: skip
    c = tiny.config("moco", **theirs)
    saved = config.as_dict(c)

    def opened():
        (tmp_path / "config.json").write_text(json.dumps(saved))
        found = saved_config.load(epath.Path(tmp_path), tiny.METHODS)
        return make_encoder_setup(found, make_mesh()).network

    assert opened() == heads.make_network(c, 8)
    for name in ("conv_init", "stem_init", "zero_init_residual"):
        del saved["model"][name]
    del saved["head"]["init"]
    del saved["model"]["encoder"], saved["vit"]
    plain = tiny.config("moco")
    assert opened() == heads.make_network(plain, 8)
    assert opened() != heads.make_network(c, 8)
    begun, newer = config.as_begun(c, saved)
    assert heads.make_network(begun, 8) == opened()
    assert sorted(newer) == [
        "head.init", "model.conv_init", "model.stem_init", "model.zero_init_residual",
    ]  # fmt: skip
    config.check_same_run(saved, config.as_dict(begun), "w")


@pytest.mark.torch
def test_pytorch_draws_its_layers_as_is_said_here():
    """Linear and Conv2d by default, and a convolution as torchvision's ResNets initialise it."""
    import torch

    torch.manual_seed(0)
    linear, conv = torch.nn.Linear(25, 4000), torch.nn.Conv2d(20, 30, 3)
    assert_drawn_from(linear.weight.detach().numpy(), LAWS["torch"](25, 4000))
    assert_drawn_from(linear.bias.detach().numpy(), uniform(1 / 5))
    assert_drawn_from(conv.weight.detach().numpy(), LAWS["torch"](180, 270))
    torch.nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    assert_drawn_from(conv.weight.detach().numpy(), LAWS["he"](180, 270))
