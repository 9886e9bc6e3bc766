"""Fine-tuning of vision transformers: recipes, learning rates by depth, and steps by hand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import opened_run
import optax
import pytest
import tiny

from common.cli.modes import MODES
from common.config import eval_config
from common.errors import UserError
from common.evaluate import batches, finetune, finetune_recipe
from common.evaluate.finetune_recipe import Recipe
from common.method import stream
from common.models import classifier, resnet, vit
from common.setup import make_encoder_setup
from common.sharding import make_mesh

VIT = tiny.VIT | {"vit__depth": 3, "head__layers": 3}
ADAMW = Recipe("adamw", 0.5, 0.1, "2 steps", 0.5, 0.3, 0.1)


def settings(**changes):
    c = eval_config().finetune
    c.update(changes)
    return c


def test_recipes():
    """SGD is as it was before there was a choice; 2.5e-4 x batch / 256 is 5e-4 x batch / 512."""
    assert Recipe.of(settings(), "resnet") == Recipe("sgd", 0.05, 0.0, "0 steps")
    deit = Recipe("adamw", 5e-4 / 2, 0.05, "5 %", drop_path=0.1, label_smoothing=0.1)
    assert Recipe.of(settings(), "vit") == deit
    of_resnet = Recipe.of(settings(optimizer="adamw"), "resnet")
    assert of_resnet == dataclasses.replace(deit, drop_path=0.0)
    assert Recipe.of(settings(optimizer="sgd"), "vit") == Recipe()
    lars = Recipe("lars", 0.005, 0.0, "0 steps", scaling="sqrt")  # simclr's README
    assert Recipe.of(settings(optimizer="lars"), "resnet") == lars
    assert lars.in_words() == "crops and flips, LARS"
    assert Recipe.of(settings(scaling="none"), "resnet") == Recipe(scaling="none")
    changes = {"learning_rate": 0.0, "weight_decay": 0.3, "warmup": "3 epochs", "layer_decay": 0.75,
               "drop_path": 0.0, "label_smoothing": 0.0, "mixup": 0.8, "cutmix": 1.0}  # fmt: skip
    assert Recipe.of(settings(**changes), "vit") == Recipe("adamw", **changes)
    words = "crops, flips, mixup 0.8 and cutmix 1, AdamW"
    assert Recipe("adamw", mixup=0.8, cutmix=1.0).in_words() == words
    assert Recipe().in_words() == "crops and flips, SGD with Nesterov momentum"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "lamb"}, 'eval.finetune.optimizer="lamb" is unknown'),
        ({"scaling": "square"}, 'eval.finetune.scaling="square" is unknown'),
        ({"drop_path": 0.1}, "drop_path=0.1 needs a vision transformer, found model.encoder=resne"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 cannot be used: expected a finite number, 0"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0 cannot be .* 0 or more and less than 1"),
        ({"mixup": math.inf}, "mixup=inf cannot be used"),
        ({"layer_decay": 1.5}, "layer_decay=1.5: expected more than 0 and at most 1"),
        ({"layer_decay": 0.0}, "layer_decay=0.0: expected more"),
    ],
)
def test_values_out_of_range(changes, message):
    with pytest.raises(UserError, match=message):
        Recipe.of(settings(**changes), "resnet")


def test_what_an_optimiser_cannot_do():
    with pytest.raises(UserError, match=r'warmup="3 epochs" is 12 steps, more than all 10 of the '):
        finetune_recipe.optimizer(Recipe(warmup="3 epochs"), 16, 10, 4)
    with pytest.raises(UserError, match=r"layer_decay=0.5 needs an encoder that names its layers"):
        finetune_recipe.optimizer(Recipe(layer_decay=0.5), 16, 10, 4)


def parameters(**changes):
    """Shapes of what is fine-tuned behind the head's first layer."""
    c = tiny.config("moco_v3", **changes)
    setup = make_encoder_setup(c, make_mesh(jax.devices()[:1]))
    params, _ = jax.eval_shape(setup.init_network, jax.random.key(0))
    return setup, classifier.start(setup.network, "head1", 3, params)


VIT_SCALES = {
    "network backbone patches": 0.0625, "network backbone token": 0.0625,
    "network backbone positions": 0.0625, "network backbone block0": 0.125,
    "network backbone block1": 0.25, "network backbone block2": 0.5, "network backbone norm": 1,
    "network head dense1": 1, "network head bn1": 1, "classifier kernel": 1, "classifier bias": 1,
}  # fmt: skip
RESNET_SCALES = {
    "network backbone stem_conv": 0.125, "network backbone stem_bn": 0.125,
    "network backbone layer1_0": 0.25, "network backbone layer2_0": 0.5,
    "network head dense1": 1, "network head bn1": 1, "classifier kernel": 1, "classifier bias": 1,
}  # fmt: skip
SK_SCALES = {name: rate for name, rate in RESNET_SCALES.items() if "stem" not in name} | {
    f"network backbone stem_{kind}{i}": 0.125 for kind in ("conv", "bn") for i in (1, 2, 3)
}


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        (VIT | {"vit__positions": "learned"}, VIT_SCALES),
        ({}, RESNET_SCALES),
        pytest.param(tiny.SK, SK_SCALES, marks=pytest.mark.slow),
    ],
    ids=["vit", "resnet", "selective kernels"],
)
def test_learning_rates_fall_with_the_distance_from_the_output(changes, want):
    setup, params = parameters(**changes)
    layers = setup.network.backbone.layers
    found = {}
    for path, value in jax.tree_util.tree_leaves_with_path(
        finetune_recipe.scales(params, 0.5, layers)
    ):
        found.setdefault(" ".join(key.key for key in path[:3]), set()).add(value)
    assert found == {name: {value} for name, value in want.items()}
    # whole updates are scaled, decay too
    params = tiny.draw_state(jax.eval_shape(lambda: jax.tree.map(jnp.zeros_like, params)))
    plain, scaled = (
        finetune_recipe.optimizer(dataclasses.replace(ADAMW, layer_decay=d), 16, 4, 2, layers)
        for d in (1.0, 0.5)
    )

    @jax.jit
    def updates(params):
        return [tx.update(params, tx.init(params), params)[0] for tx in (scaled, plain)]

    a, b = map(tiny.named_leaves, updates(params))
    for path, value in b.items():
        names = path.strip("[]'").split("']['")
        assert np.abs(value).max() > 0
        np.testing.assert_array_equal(a[path], want[" ".join(names[:3])] * value, err_msg=path)


def test_layers_of_the_published_networks():
    assert [len(resnet.ResNet(depth=d).layers) for d in (18, 50, 101)] == [9, 17, 34]
    names = vit.ViT(depth=12).layers
    assert len(names) == 13 and names[12] == ("block11",)


def one_device(dtype="float64", **changes):
    c = tiny.config("moco_v3", model__dtype=dtype, **(VIT | changes))
    setup = make_encoder_setup(c, make_mesh(jax.devices()[:1]))
    abstract = jax.eval_shape(setup.init_network, jax.random.key(0))
    return setup, *(tiny.draw_state(tree) for tree in abstract)


def adamw_by_hand(p, g, memory, t, scale, decays):
    """Loshchilov & Hutter 2019, algorithm 2; 2 steps of warm-up, the cosine starts at its top."""
    rate = scale * 0.5 * 8 / 256 * min((t + 1) / 3, 1)
    m, v = memory
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    step = m / (1 - 0.9 ** (t + 1)) / (np.sqrt(v / (1 - 0.999 ** (t + 1))) + 1e-8)
    return p - rate * (step + 0.1 * decays * p), (m, v)


@pytest.mark.slow
def test_three_steps_by_hand():
    """Of every parameter, with drop path; the patches, frozen in pretraining, move as well."""
    with jax.enable_x64(True):
        setup, params, batch_stats = one_device(vit__drop_path=0.6)
        tx = finetune_recipe.optimizer(ADAMW, 8, 3, 3, setup.network.backbone.layers)
        tuner = finetune.Finetuner(setup, "backbone", 3, tx, ADAMW, seed=4)
        state = tuner.init(params, batch_stats)
        encoder = setup.network.backbone.clone(drop_path=0.3)

        def loss(tree, images, labels, keys):
            """-sum over classes of (0.9 one-hot + 0.1 / 3) log p."""
            variables = {"params": tree["network"]["backbone"]}
            features = encoder.apply(variables, setup.scale(images), True, keys)
            logits = features @ tree["classifier"]["kernel"] + tree["classifier"]["bias"][None]
            log_p = logits - jnp.log(jnp.exp(logits).sum(1, keepdims=True))
            own = log_p[jnp.arange(8), labels]
            return -(0.9 * own + 0.1 * log_p.mean(1)).mean()

        gradient = jax.jit(jax.value_and_grad(loss))
        tree = jax.device_get(state.params)
        paths = [
            jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)
        ]
        memory = [(0.0, 0.0)] * len(paths)
        rng = np.random.default_rng(0)
        for t in range(3):
            images = rng.integers(0, 256, (8, 8, 8, 3), np.uint8)
            labels = rng.integers(0, 3, 8).astype(np.int32)
            keys = jax.random.split(stream(jax.random.key(4), jnp.int32(t), "drop_path"), 8)
            value, grads = jax.device_get(gradient(tree, images, labels, keys))
            leaves, new = jax.tree.leaves(tree), []
            for i, (path, p, g) in enumerate(
                zip(paths, leaves, jax.tree.leaves(grads), strict=True)
            ):
                name = " ".join(path.strip("[]'").split("']['")[:3])
                decays = path.endswith("['kernel']")
                p, memory[i] = adamw_by_hand(p, g, memory[i], t, VIT_SCALES[name], decays)
                new.append(p)
            tree = jax.tree.unflatten(jax.tree.structure(tree), new)
            state, got = tuner.step(state, images, labels)
            assert float(got) == pytest.approx(value, rel=1e-7)
        # optax computes learning rates in float32
        tiny.assert_close(jax.device_get(state.params), tree, relative=1e-7, absolute=1e-8)
        assert int(state.step) == 3 and state.batch_stats == {}
        moved = state.params["network"]["backbone"]["patches"]["kernel"]
        assert np.abs(moved - params["backbone"]["patches"]["kernel"]).min() > 1e-7


def test_patches_that_pretraining_keeps():
    """The other half of what the steps by hand show."""
    c = tiny.config("moco_v3", optimizer__name="adamw", optimizer__weight_decay=0.1, **VIT)
    setup = tiny.prepared(c, 1).setup
    params = tiny.draw_state(jax.eval_shape(setup.init_network, jax.random.key(0))[0])
    update = jax.jit(lambda p: setup.tx.update(p, setup.tx.init(p), p)[0])
    moved = {k: np.abs(u).max() > 0 for k, u in tiny.named_leaves(update(params)).items()}
    kept = {"['backbone']['patches']['bias']", "['backbone']['patches']['kernel']"}
    assert {name for name, value in moved.items() if not value} == kept


def test_drop_path_is_the_fine_tunings_and_of_training_only():
    """That of training is in the steps by hand, of a run with 0.6."""
    setup, params, batch_stats = one_device("float32", vit__drop_path=0.6)
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), np.uint8)
    tuner = finetune.Finetuner(setup, "backbone", 3, optax.sgd(0.1), ADAMW)
    assert tuner.setup.network.backbone.drop_path == 0.3
    state = tuner.init(params, batch_stats)
    kernel = np.random.default_rng(1).normal(size=(12, 3)).astype(np.float32)
    state.params["classifier"]["kernel"] = jnp.asarray(kernel)
    features = jax.jit(lambda x: setup.encode(params, batch_stats, x, "backbone"))(images)
    np.testing.assert_allclose(tuner.logits(state, images), features @ kernel, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["backbone", "projection"])
def test_steps_are_the_same_on_any_number_of_devices(layer):
    """With all that draws or mixes: the draws are of the step, and the batch is the global one."""
    recipe = dataclasses.replace(ADAMW, mixup=0.8, cutmix=1.0)
    found = []
    with jax.enable_x64(True):
        for devices in (1, 8):
            c = tiny.config("moco_v3", model__dtype="float64", **VIT)
            setup = make_encoder_setup(c, make_mesh(jax.devices()[:devices]))
            abstract = jax.eval_shape(setup.init_network, jax.random.key(0))
            params, batch_stats = (tiny.draw_state(tree) for tree in abstract)
            tx = finetune_recipe.optimizer(recipe, 16, 4, 2, setup.network.backbone.layers)
            tuner = finetune.Finetuner(setup, layer, 3, tx, recipe, seed=2)
            state, losses = tuner.init(params, batch_stats), []
            for t in range(4):
                batch = tiny.host_batch(c, t)
                pair = batches.to_global(setup.mesh, (batch["images"][:, 0], batch["labels"]))
                state, loss = tuner.step(state, *pair)
                losses.append(float(loss))
            assert state.params["network"]["backbone"]["token"].sharding.is_fully_replicated
            found.append(jax.device_get((state.params, state.batch_stats, losses)))
    tiny.assert_close(*found, relative=1e-8, absolute=1e-9)


@pytest.mark.slow
def test_every_mode_takes_a_vision_transformer(tmp_path):
    """Without batch norm in the encoder, or any; at the size of the run, and at another."""
    for name, method, changes in (
        ("v3", "moco_v3", VIT), ("moco", "moco", VIT | {"vit__pool": "mean"}),
    ):  # fmt: skip
        run = opened_run.write(tmp_path / name, method, **changes)
        asked = [
            ("knn", {}), ("linear_eval", {"linear__variant": "cached"}),
            ("linear_eval", {"linear__variant": "augmented", "linear__nesterov": False}),
            ("finetune", {}), ("finetune", {"layer": "head1", "finetune__layer_decay": 0.65}),
            ("finetune", {"layer": "projection", "finetune__optimizer": "sgd"}),
            ("finetune", {"finetune__mixup": 0.8, "finetune__cutmix": 1.0, "image_size": 12}),
            ("transfer", {}), ("embed", {}), ("knn", {"image_size": 12}),
        ]  # fmt: skip
        for mode, more in asked:
            opened = opened_run.load(run, 2, **more)
            before = opened_run.leaves(opened.state.params)
            metrics, _ = MODES[mode](opened)
            after = opened_run.leaves(opened.state.params)
            assert all(after[k].tobytes() == v.tobytes() for k, v in before.items()), mode
            assert metrics["examples"] if mode == "embed" else 0 <= metrics["top1"] <= 1
