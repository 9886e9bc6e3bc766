"""What a config asks for: published sizes, the draws of parameters, and what is refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_initial import assert_drawn_from, normal, uniform

from common.errors import UserError
from common.models import heads, positions, vit

# timm's vit_*_patch16_224 without the last layer of 1000 classes; those of torchvision for B and L.
# Both count the position table, learned or not, with a row for the class token.
PUBLISHED = {"Ti": 5_524_416, "S": 21_665_664, "B": 85_798_656, "L": 303_301_632}


def published(variant, **changes):
    """The encoder that a config's section "vit" asks for."""
    changes = {f"vit__{name}": value for name, value in changes.items()}
    c = tiny.config("simclr", model__encoder="vit", vit__variant=variant, **changes)
    return heads.make_network(c, 224).backbone


def abstract_params(m, size=224):
    images = jnp.zeros((1, size, size, 3))
    return jax.eval_shape(lambda: m.init(jax.random.key(0), images, False))["params"]


@pytest.mark.parametrize("variant", ["Ti", "S", "B", pytest.param("L", marks=pytest.mark.slow)])
def test_number_of_parameters_is_the_published_one(variant):
    m = published(variant, positions="learned")
    count = sum(x.size for x in jax.tree.leaves(abstract_params(m)))
    assert count == PUBLISHED[variant]
    if variant == "S":  # the fixed table is no parameter here
        count = sum(x.size for x in jax.tree.leaves(abstract_params(published("S", heads=12))))
        assert count + positions.sincos(14, 14, 384, True).size == PUBLISHED["S"]


def test_variants_and_the_fields_that_replace_parts_of_them():
    found = {name: published(name) for name in vit.VARIANTS}
    assert {name: (m.width, m.depth, m.heads, m.patch) for name, m in found.items()} == {
        "Ti": (192, 12, 3, 16), "S": (384, 12, 6, 16), "B": (768, 12, 12, 16),
        "L": (1024, 24, 16, 16),
    }  # fmt: skip
    assert found["S"].in_words() == "ViT-S/16, width 384, 6 heads"
    m = published("S", heads=12, depth=5, patch=8, mlp_ratio=3.0)
    assert (m.width, m.depth, m.heads, m.patch, m.mlp_ratio) == (384, 5, 12, 8, 3.0)
    assert m.in_words() == "ViT of 5 blocks, patch 8, width 384, 12 heads"
    # the convolutions of the stem stand for a block, unless the number of blocks is given
    assert [published("S", patches="conv", depth=d).depth for d in (0, 12)] == [11, 12]
    assert {p: published("S", patches=p).frozen for p in ("linear", "frozen", "conv")} == {
        "linear": (), "frozen": ("patches",), "conv": (),
    }  # fmt: skip
    assert [published("S", patches=p).has_batch_norm for p in ("frozen", "conv")] == [False, True]
    assert [published("S", drop_path=p).is_random for p in (0.0, 0.1)] == [False, True]


def test_parameters_are_drawn_as_moco_v3_draws_them():
    """Query, key and value each as a matrix of its own, the patches by p^2 x 3 inputs."""
    m = vit.ViT(width=384, depth=1, heads=6, patch=16, image_size=32, positions="learned")
    keys = jax.random.split(jax.random.key(0), 4)  # of which the vectors together are enough
    init = jax.jit(jax.vmap(lambda key: m.init(key, jnp.zeros((1, 32, 32, 3)), False)["params"]))
    params = jax.device_get(init(keys))
    block = params["block0"]
    for name in ("query", "key", "value", "out"):
        assert_drawn_from(block[name]["kernel"], uniform(0.0883883))  # sqrt(6 / (384 + 384))
    for a, b in (("query", "key"), ("query", "value"), ("key", "value")):
        assert (block[a]["kernel"] != block[b]["kernel"]).mean() > 0.99
    for name in ("mlp1", "mlp2"):
        assert_drawn_from(block[name]["kernel"], uniform(0.0559017))  # sqrt(6 / (384 + 1536))
    assert_drawn_from(params["patches"]["kernel"], uniform(0.0721688))  # sqrt(6 / (768 + 384))
    assert_drawn_from(params["token"], normal(1e-6))
    assert_drawn_from(params["positions"], normal(0.02))
    constants = {n: x for n, x in tiny.named_leaves(params).items() if "kernel" not in n}
    constants = {n: x for n, x in constants.items() if n not in ("['token']", "['positions']")}
    assert len(constants) == 3 * 2 + 7  # norms; biases of 4 + 2 + 1 layers
    for name, x in constants.items():
        np.testing.assert_array_equal(x, 1 if "scale" in name else 0, err_msg=name)


def test_convolutions_of_the_stem_are_pytorchs():
    """Four of stride 2, of d/8 ... d channels without bias, and a 1x1 one with: default draws."""
    m = vit.ViT(width=64, depth=1, heads=2, image_size=32, patches="conv")
    init = jax.jit(lambda key: m.init(key, jnp.zeros((1, 32, 32, 3)), False))
    found = jax.device_get(jax.vmap(init)(jax.random.split(jax.random.key(0), 16)))
    stem = found["params"]["patches"]
    shapes = {name: x.shape[1:] for name, x in tiny.named_leaves(stem).items() if "bn" not in name}
    channels = [3, 8, 16, 32, 64]
    assert shapes == {
        f"['conv{i + 1}']['kernel']": (3, 3, channels[i], channels[i + 1]) for i in range(4)
    } | {"['project']['kernel']": (64, 64), "['project']['bias']": (64,)}
    for i in range(4):
        kernel = stem[f"conv{i + 1}"]["kernel"]
        assert_drawn_from(kernel, uniform(1 / math.sqrt(9 * channels[i])))
    for name in ("kernel", "bias"):
        assert_drawn_from(stem["project"][name], uniform(1 / 8))
    assert stem.keys() >= {"bn1", "bn2", "bn3", "bn4"} == found["batch_stats"]["patches"].keys()


@pytest.mark.parametrize(
    ("changes", "size", "words"),
    [
        ({"variant": "H"}, 224, 'vit.variant="H" is unknown: .*Ti, S, B, L'),
        ({"pool": "max"}, 224, 'vit.pool="max" is unknown: .*token, mean'),
        ({"positions": "rope"}, 224, 'vit.positions="rope" is unknown: .*sincos, learned'),
        ({"patches": "conf"}, 224, 'vit.patches="conf" is unknown: .*did you mean "conv"'),
        ({"heads": 7}, 224, "vit.width=384 and heads=7: expected a width that is a multiple"),
        ({"width": 18, "heads": 3}, 224, "vit.width=18 and heads=3: .* and of 4 for sincos"),
        ({}, 100, "vit.patch=16: the sides of views, 100 pixels, are no multiple of it; choose"),
        ({"patches": "conv", "patch": 14}, 224, "halves the image again .* found patch=14"),
        ({"patches": "conv", "patch": 1}, 224, "halves the image again .* found patch=1 "),
        ({"patches": "conv", "width": 12, "heads": 3}, 224, "width=12: expected a patch of 2, 4"),
        ({"mlp_ratio": 0.0}, 224, "vit.mlp_ratio=0.0 leaves a perceptron of width 384 without"),
        ({"drop_path": 1.0}, 224, "vit.drop_path=1.0: expected 0 or more, and less than 1"),
        ({"drop_path": -0.1}, 224, "vit.drop_path=-0.1: expected 0 or more"),
    ],
)  # fmt: skip
def test_what_is_no_vit_is_refused(changes, size, words):
    c = tiny.config("simclr", **{f"vit__{name}": value for name, value in changes.items()})
    with pytest.raises(UserError, match=words):
        vit.make_encoder(c.model, c.vit, size)
    learned = {"width": 18, "heads": 3, "positions": "learned"}  # needs no multiple of 4
    assert published("S", **learned).width == 18
