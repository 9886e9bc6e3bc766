"""Which parameter gets weight decay, a trust ratio, or nothing at all: by what the optimiser does.

The lists below are to be read: a parameter that a change adds, or that changes its place, shows up
here.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from test_optim import make_config

from common import optim

RESNET_50 = """
backbone/layer*/bn*/bias
backbone/layer*/bn*/scale
backbone/layer*/conv*/kernel               decay ratio
backbone/layer*/downsample_bn/bias
backbone/layer*/downsample_bn/scale
backbone/layer*/downsample_conv/kernel     decay ratio
backbone/stem_bn/bias
backbone/stem_bn/scale
backbone/stem_conv/kernel                  decay ratio
"""
SIMCLR_V2 = """
backbone/layer*/avg_downsample_bn/bias
backbone/layer*/avg_downsample_bn/scale
backbone/layer*/avg_downsample_conv/kernel decay ratio
backbone/layer*/bn*/bias
backbone/layer*/bn*/scale
backbone/layer*/conv*/kernel               decay ratio
backbone/layer*/sk/bn/bias
backbone/layer*/sk/bn/scale
backbone/layer*/sk/conv/kernel             decay ratio
backbone/layer*/sk/select/kernel           decay ratio
backbone/layer*/sk/squeeze/kernel          decay ratio
backbone/layer*/sk/squeeze_bn/bias
backbone/layer*/sk/squeeze_bn/scale
backbone/stem_bn*/bias
backbone/stem_bn*/scale
backbone/stem_conv*/kernel                 decay ratio
"""
VIT_S = """
backbone/block*/key/bias
backbone/block*/key/kernel                 decay ratio
backbone/block*/mlp*/bias
backbone/block*/mlp*/kernel                decay ratio
backbone/block*/norm*/bias
backbone/block*/norm*/scale
backbone/block*/out/bias
backbone/block*/out/kernel                 decay ratio
backbone/block*/query/bias
backbone/block*/query/kernel               decay ratio
backbone/block*/value/bias
backbone/block*/value/kernel               decay ratio
backbone/norm/bias
backbone/norm/scale
backbone/patches/bias                      frozen
backbone/patches/kernel                    frozen
backbone/positions
backbone/token
"""
TRAINED_PATCHES = """
backbone/patches/bias
backbone/patches/kernel                    decay ratio
"""
STEM = """
backbone/patches/bn*/bias
backbone/patches/bn*/scale
backbone/patches/conv*/kernel              decay ratio
backbone/patches/project/bias
backbone/patches/project/kernel            decay ratio
"""
HEADS = {
    "simclr": """
head/bn1/bias
head/bn1/scale
head/bn2/scale
head/dense1/kernel                         decay ratio
head/dense2/kernel                         decay ratio
""",
    "moco_v1": """
head/dense1/bias
head/dense1/kernel                         decay ratio
""",
    "moco_v2": """
head/dense1/bias
head/dense1/kernel                         decay ratio
head/dense2/bias
head/dense2/kernel                         decay ratio
""",
    "moco_v3": """
head/bn1/bias
head/bn1/scale
head/dense1/kernel                         decay ratio
head/dense2/kernel                         decay ratio
predictor/bn1/bias
predictor/bn1/scale
predictor/dense1/kernel                    decay ratio
predictor/dense2/kernel                    decay ratio
""",
}
FIELDS = {"schedule": "constant", "scaling": "none", "learning_rate": 1.0, "momentum": 0.0}


def network(kind="simclr", **changes):
    """The network of a method that has such heads, and its parameters as shapes."""
    method = {"moco_v1": "moco", "moco_v2": "moco"}.get(kind, kind)
    c = tiny.config(method, head__kind=kind, data__image_size=32, **changes)
    setup = tiny.build(c, 1).setup
    return setup.network, jax.eval_shape(setup.init_network, jax.random.key(0))[0]


def vit(patches="frozen", **changes):
    return {
        "model__encoder": "vit", "vit__variant": "S", "vit__patches": patches,
        "vit__positions": "learned",
    } | changes  # fmt: skip


def update(params, frozen, grads, **fields):
    tx, _ = optim.make_optimizer(*make_config(**FIELDS | fields), 10, 10, frozen)
    return tx.update(grads, tx.init(params), params)[0]


def short(path):
    """ "backbone/layer*/conv*/kernel" of any such convolution of an encoder."""
    first, *rest = re.findall(r"'(\w+)'", path)
    name = "/".join([first, *rest])
    numbered = r"(layer|block|conv|bn|mlp|norm)[\d_]+(?=/|$)"
    return re.sub(numbered, r"\1*", name) if first == "backbone" else name


def what_happens(net, shapes):
    """What the optimiser does to each parameter, a line a name: layers of a kind on one line."""
    # of each kind the first and the last one; only name and rank can matter, not the size
    paths = [*tiny.named_leaves(jax.tree.map(lambda x: 0, shapes))]
    some = {short(path): path for path in paths}.values()
    some = {*some, *{short(path): path for path in reversed(paths)}.values()}
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: np.full([2] * x.ndim, 3.0, np.float32)
        if jax.tree_util.keystr(path) in some else None, shapes,
    )  # fmt: skip
    zero, two = (jax.tree.map(lambda x, v=v: np.full_like(x, v), params) for v in (0, 2))
    step = functools.partial(update, params, net.frozen)
    decays = tiny.named_leaves(step(zero, name="sgd", weight_decay=0.5))
    scales = tiny.named_leaves(step(two, name="lars", weight_decay=0.0, trust_coefficient=0.25))
    moves = tiny.named_leaves(step(two, name="sgd", weight_decay=0.0))
    assert moves.keys() == some
    found = {}
    for path in moves:
        name = short(path)
        decay, scale, move = (float(x[path].ravel()[0]) for x in (decays, scales, moves))
        # -0.5 x 3 of decay; of LARS 2 x 0.25 |3| / |2|, or 2 as it is
        words = {0.0: "", -1.5: " decay"}[decay] + {-0.75: " ratio", -2.0: "", 0.0: " frozen"}[
            scale
        ]
        assert (move == 0) == ("frozen" in words), name
        assert found.setdefault(name, words.strip()) == words.strip(), name  # in all layers
    return "\n".join(f"{name:<42} {words}".strip() for name, words in sorted(found.items()))


def listed(*texts):
    lines = [line for text in texts for line in text.strip().splitlines()]
    return "\n".join(f"{name:<42} {' '.join(words)}".strip() for name, *words in
                     sorted(line.split() for line in lines))  # fmt: skip


def test_what_each_parameter_of_a_resnet_50_gets():
    imagenet = {"model__stages": (), "model__depth": 50, "model__stem": "imagenet"}
    assert what_happens(*network(**imagenet)) == listed(RESNET_50, HEADS["simclr"])


@pytest.mark.slow
def test_what_each_parameter_of_a_network_with_selective_kernels_gets():
    third = "head/bn2/bias\nhead/bn3/scale\nhead/dense3/kernel decay ratio"
    assert what_happens(*network(**tiny.SK)) == listed(SIMCLR_V2, HEADS["simclr"], third)


@pytest.mark.parametrize("kind", HEADS)
def test_what_each_parameter_of_a_head_gets(kind):
    lines = what_happens(*network(kind, model__stages=(1,))).splitlines()
    lines = [line for line in lines if not line.startswith("backbone")]
    assert "\n".join(lines) == listed(HEADS[kind])


@pytest.mark.slow
def test_what_each_parameter_of_a_vit_s_gets():
    head = HEADS["moco_v3"]
    assert what_happens(*network("moco_v3", **vit())) == listed(VIT_S, head)
    thawed = VIT_S.replace(" frozen", "").replace("backbone/patches/", "#")
    thawed = "\n".join(line for line in thawed.splitlines() if not line.startswith("#"))
    found = what_happens(*network("moco_v3", **vit("linear")))
    assert found == listed(thawed, TRAINED_PATCHES, head)
    assert what_happens(*network("moco_v3", **vit("conv"))) == listed(thawed, STEM, head)
    plain = vit("linear", vit__positions="sincos", vit__pool="mean")
    fewer = "\n".join(
        line for line in thawed.splitlines()
        if not re.match("backbone/(norm/|token|positions)", line)
    )  # fmt: skip
    assert what_happens(*network("moco_v3", **plain)) == listed(fewer, TRAINED_PATCHES, head)


def drawn_like(shapes, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


@functools.cache
def small():
    """Paths of the frozen parameters of a small ViT, and the shapes of some of all."""
    net, shapes = network("moco_v3", **tiny.VIT)
    encoder = {name: shapes["backbone"][name] for name in ("patches", "token", "norm")}
    encoder["block1"] = {"query": shapes["backbone"]["block1"]["query"]}
    return net.frozen, {"backbone": encoder, "predictor": shapes["predictor"]}


def after(steps, name, decay_all, clip, scale=1.0):
    """Parameters before and after some steps with random gradients, those of the patches scaled."""
    frozen, shapes = small()
    params = first = drawn_like(shapes, 0)
    fields = {"name": name, "decay_bn_and_bias": decay_all, "clip_norm": clip}
    fields |= {"weight_decay": 0.1, "learning_rate": 0.1, "momentum": 0.9}
    tx, _ = optim.make_optimizer(*make_config(**FIELDS | fields), 10, 10, frozen)
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(steps):
        grads = drawn_like(shapes, 1 + step)
        grads["backbone"]["patches"] = jax.tree.map(
            lambda g: np.float32(scale) * g, grads["backbone"]["patches"]
        )
        updates, state = update(grads, state, params)
        params = jax.device_get(optax.apply_updates(params, updates))
    return first, params


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("decay_all", [False, True])
@pytest.mark.parametrize("name", ["adamw", "lars", "sgd"])
def test_ten_steps_leave_frozen_parameters_as_they_were_drawn(name, decay_all, clip):
    before, last = map(tiny.named_leaves, after(10, name, decay_all, clip))
    kept = {path for path in before if before[path].tobytes() == last[path].tobytes()}
    assert kept == {f"['backbone']['patches']['{leaf}']" for leaf in ("kernel", "bias")}
    assert all(np.isfinite(x).all() for x in last.values())


@pytest.mark.parametrize("name", ["adamw", "lars", "sgd"])
def test_gradients_of_frozen_parameters_have_no_part_in_the_norm_that_is_clipped(name):
    """Nor in anything else: they may be a million times larger."""
    for plain, huge in zip(
        *(map(jax.tree.leaves, after(2, name, False, 0.5, scale)) for scale in (1.0, 1e6)),
        strict=True,
    ):
        for a, b in zip(plain, huge, strict=True):
            np.testing.assert_array_equal(a, b)


def test_zero_gradients_alone_would_not_keep_a_parameter():
    """Why `frozen` is a place in the optimiser: decay moves what has no gradient."""
    params = {"kernel": jnp.ones((2, 2))}
    grads = jax.tree.map(jnp.zeros_like, params)
    for name in ("adamw", "lars", "sgd"):
        moved = update(params, (), grads, name=name, weight_decay=0.1)
        assert float(jnp.abs(moved["kernel"]).min()) > 0


def test_the_norm_that_is_logged_is_of_the_gradient_that_trains():
    frozen, shapes = small()
    grads = drawn_like(shapes, 3)
    found = optim.trained(grads, frozen)
    names = tiny.named_leaves(grads).keys() - tiny.named_leaves(found).keys()
    assert names == {f"['backbone']['patches']['{leaf}']" for leaf in ("kernel", "bias")}
    want = np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(found)))
    net = tiny.build(tiny.config("simclr", **tiny.VIT), 1).setup
    state = tiny.draw_state(jax.eval_shape(net.init, *jax.random.split(jax.random.key(0))))
    grads = drawn_like(state.params, 4)
    rows = np.zeros((4, 12), np.float32), np.zeros(4, np.int32)
    metrics = jax.jit(net.next_state)(state, grads, state.batch_stats, *rows)[1]
    patches = grads["backbone"].pop("patches")
    for name, tree in (("gradient_norm", grads), ("gradient_norm_patches", patches)):
        want = np.sqrt(sum((x.astype(np.float64) ** 2).sum() for x in jax.tree.leaves(tree)))
        np.testing.assert_allclose(metrics[name], want, rtol=1e-5)
