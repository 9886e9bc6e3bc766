"""Projection heads against NumPy, layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from common.errors import UserError
from common.models import heads

RNG = np.random.default_rng(0)


def drawn(module, *args):
    return tiny.draw_state(jax.eval_shape(lambda: module.init(jax.random.key(0), *args)))


def shapes(params):
    return {name: x.shape for name, x in tiny.named_leaves(params).items()}


def dense(x, p):
    return x @ p["kernel"] + p.get("bias", 0.0)


def norm(x, p, statistics):
    mean, var = statistics
    return (x - mean) / np.sqrt(var + 1e-5) * p.get("scale", 1.0) + p.get("bias", 0.0)


def test_moco_v1_is_one_linear_map():
    x = RNG.normal(size=(4, 6)).astype(np.float32)
    head = heads.ProjectionHead("moco_v1", layers=2, dim=3)  # the number of layers is the kind's
    params = drawn(head, x, True)["params"]
    assert shapes(params) == {"['dense1']['kernel']": (6, 3), "['dense1']['bias']": (3,)}
    got = head.apply({"params": params}, x, True)
    np.testing.assert_allclose(got, dense(x, params["dense1"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("hidden", "width"), [(0, 6), (5, 5)])
def test_moco_v2_is_two_linear_maps_with_a_relu_between(hidden, width):
    x = RNG.normal(size=(4, 6)).astype(np.float32)
    head = heads.ProjectionHead("moco_v2", hidden=hidden, dim=3)
    params = drawn(head, x, True)["params"]
    assert shapes(params) == {
        "['dense1']['kernel']": (6, width), "['dense1']['bias']": (width,),
        "['dense2']['kernel']": (width, 3), "['dense2']['bias']": (3,),
    }  # fmt: skip
    want = dense(np.maximum(dense(x, params["dense1"]), 0), params["dense2"])
    np.testing.assert_allclose(head.apply({"params": params}, x, True), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "last"),
    [("simclr", "scale"), ("moco_v3", "neither"), ("moco_v3", "no norm")],
)
@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("train", [True, False])
def test_heads_with_batch_norm_are_linear_bn_relu_and_end_as_their_kind(kind, last, layers, train):
    """The last BN has a scale and no shift, or neither; or there is none (a predictor)."""
    x = RNG.normal(size=(8, 6)).astype(np.float32)
    head = heads.ProjectionHead(
        kind, layers=layers, hidden=5, dim=3, last_norm=last != "no norm"
    )  # fmt: skip
    assert head.has_batch_norm
    variables = drawn(head, x, False)
    params, stats = variables["params"], variables["batch_stats"]
    widths = [6, *[5] * (layers - 1), 3]
    want = {}
    for i in range(1, layers + 1):
        want[f"['dense{i}']['kernel']"] = (widths[i - 1], widths[i])
        if i < layers or last == "scale":
            want[f"['bn{i}']['scale']"] = (widths[i],)
        if i < layers:
            want[f"['bn{i}']['bias']"] = (widths[i],)
    assert shapes(params) == want
    y = x
    for i in range(1, layers + 1):
        y = dense(y, params[f"dense{i}"])
        if i < layers or last != "no norm":
            running = stats[f"bn{i}"]["mean"], stats[f"bn{i}"]["var"]
            y = norm(y, params.get(f"bn{i}", {}), (y.mean(0), y.var(0)) if train else running)
        y = np.maximum(y, 0) if i < layers else y
    got, _ = head.apply(variables, x, train, mutable=["batch_stats"])
    np.testing.assert_allclose(got, y, rtol=1e-4, atol=1e-4)


def test_a_single_layer_without_norm_lets_no_row_see_another():
    for layers, norm_of_last, want in ((1, False, False), (1, True, True), (2, False, True)):
        head = heads.ProjectionHead("moco_v3", layers=layers, last_norm=norm_of_last)
        assert head.has_batch_norm is want
    network, _, _ = tiny_network("moco_v2")
    vit = tiny_network("moco_v2", **tiny.VIT)[0]
    assert network.has_batch_norm and not vit.has_batch_norm
    assert vit.clone(predictor=head).has_batch_norm


def test_the_predictor_follows_the_head_in_training_and_no_feature_depends_on_it():
    network, _, images = tiny_network("moco_v3")
    predictor = heads.ProjectionHead("moco_v3", hidden=5, dim=8, last_norm=False)
    network = network.clone(predictor=predictor)
    variables = drawn(network, images, False)
    assert variables["params"].keys() == {"backbone", "head", "predictor"}
    z = RNG.normal(size=(4, 8)).astype(np.float32)
    got, new = network.apply(variables, z, method="predict", mutable=["batch_stats"])
    mine = {kind: tree["predictor"] for kind, tree in variables.items()}
    want, stats = predictor.apply(mine, z, True, mutable=["batch_stats"])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    tiny.assert_close(new["batch_stats"]["predictor"], stats["batch_stats"], 1e-5, 1e-6)
    without = {kind: {k: x for k, x in tree.items() if k != "predictor"}
               for kind, tree in variables.items()}  # fmt: skip
    encoded = [
        network.apply(v, images, "projection", method="encode") for v in (variables, without)
    ]
    np.testing.assert_array_equal(*encoded)


def test_groups_reach_the_head():
    """The statistics of the second half do not affect the first."""
    x = RNG.normal(size=(8, 6)).astype(np.float32)
    variables = None
    rows = []
    for groups, inputs in ((2, x), (1, x[:4]), (1, x[4:])):
        head = heads.ProjectionHead("simclr", hidden=5, dim=3, bn_groups=groups)
        variables = variables or drawn(head, x, False)
        apply = jax.jit(head.apply, static_argnums=2, static_argnames="mutable")
        rows.append(apply(variables, inputs, True, mutable=("batch_stats",))[0])
    np.testing.assert_allclose(rows[0], np.concatenate(rows[1:]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", heads.HEADS)
def test_bfloat16_head_gives_float32_embeddings_from_bfloat16_products(kind):
    head = heads.ProjectionHead(kind, dim=3, dtype=jnp.bfloat16)

    def forward():
        x = jnp.zeros((4, 6))
        variables = head.init(jax.random.key(0), x, False)
        return variables, *head.apply(
            variables, x, True, mutable=["batch_stats", "intermediates"], capture_intermediates=True
        )

    variables, y, new = jax.eval_shape(forward)
    kept = jax.tree.leaves([variables, y, new.get("batch_stats", {})])
    assert {x.dtype for x in kept} == {np.dtype(np.float32)}
    inner = new["intermediates"]["dense1"]["__call__"][0]
    assert inner.dtype == jnp.bfloat16


def tiny_network(kind="simclr", layers=2, **changes):
    changes = {"model__stages": (1,)} | changes
    c = tiny.config("simclr", head__kind=kind, head__layers=layers, **changes)
    network = heads.make_network(c, 8)
    images = np.random.default_rng(1).normal(size=(3, 8, 8, 3)).astype(np.float32)
    return network, drawn(network, images, False), images


def test_encode_stops_after_the_layer_asked_for():
    network, variables, images = tiny_network(layers=3)

    @jax.jit
    def everything(variables):
        names = ("backbone", "head1", "head2", "head3", "projection")
        encoded = {n: network.apply(variables, images, n, method="encode") for n in names}
        return encoded, network.apply(variables, images, False)

    encoded, (features, embeddings) = everything(variables)
    encode = encoded.get
    np.testing.assert_array_equal(encode("backbone"), features)
    head, stats = variables["params"]["head"], variables["batch_stats"]["head"]
    y = np.asarray(features)
    for i in (1, 2, 3):
        running = stats[f"bn{i}"]["mean"], stats[f"bn{i}"]["var"]
        y = norm(dense(y, head[f"dense{i}"]), head[f"bn{i}"], running)
        y = np.maximum(y, 0) if i < 3 else y
        np.testing.assert_allclose(encode(f"head{i}"), y, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(encode("projection"), embeddings)
    np.testing.assert_array_equal(encode("head3"), embeddings)


@pytest.mark.parametrize("layer", ["head0", "head3", "backbon"])
def test_layers_that_are_not_there_are_named_in_the_error(layer):
    network, variables, images = tiny_network()
    with pytest.raises(
        UserError, match=f"'{layer}' is unknown: .*backbone, head1, head2, projection"
    ):
        jax.eval_shape(lambda: network.apply(variables, images, layer, method="encode"))


def test_unknown_heads_and_heads_without_layers_are_refused():
    with pytest.raises(UserError, match=r'head.kind="mlp".*simclr, moco_v1, moco_v2'):
        tiny_network(kind="mlp")
    with pytest.raises(UserError, match=r"head.layers=0: a head needs at least one"):
        tiny_network(layers=0)
    with pytest.raises(UserError, match=r"head.dim=0: embeddings need at least one dimension"):
        tiny_network(head__dim=0)
    with pytest.raises(UserError, match=r'model.encoder="vti" is unknown: .*resnet, vit'):
        tiny_network(model__encoder="vti")
    with pytest.raises(UserError, match=r'model.remat="block" is unknown: .*none, convs, blocks'):
        tiny_network(model__remat="block")
