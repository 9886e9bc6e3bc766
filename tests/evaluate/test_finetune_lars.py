"""Fine-tuning as in SimCLR v2: LARS by hand, behind the first layer of a head of three.

The rule is that of the authors' tf2/lars_optimizer.py and model.py: no trust ratio for batch norms,
biases and the classifier; the learning rate inside the momentum, which is not Nesterov's.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from common.evaluate import finetune, finetune_recipe
from common.evaluate.finetune_recipe import Recipe
from common.models import classifier
from common.setup import make_encoder_setup
from common.sharding import make_mesh, to_global

LARS = Recipe("lars", 0.005, 0.0, "0 steps", scaling="sqrt")
DECAYED = dataclasses.replace(LARS, weight_decay=0.1, learning_rate=2.0, scaling="linear")
STEPS, BATCH = 3, 1024


def rule(name, p, g, v, t, peak=0.005 * 32, decay=0.0):
    """One step of one parameter: a new value, and its momentum. 32 is sqrt(1024)."""
    rate = peak * (1 + np.cos(np.pi * t / STEPS)) / 2
    if name.endswith("['kernel']"):
        g = g + decay * p
        if "classifier" not in name:
            norms = np.linalg.norm(p), np.linalg.norm(g)
            g = g * (0.001 * norms[0] / norms[1] if min(norms) > 0 else 1)
    v = 0.9 * v + rate * g
    return p - v, v


@pytest.mark.parametrize(
    ("recipe", "peak"), [(LARS, 0.16), (DECAYED, 8.0)], ids=["published", "decayed"]
)
def test_the_optimiser_by_hand(recipe, peak):
    """Of gradients that are given; the classifier starts at zero, and one kernel gets none."""
    with jax.enable_x64(True):
        compare(recipe, peak)


def compare(recipe, peak):
    rng = np.random.default_rng(0)
    shapes = {
        "network": {
            "backbone": {
                "conv": {"kernel": (3, 3, 2, 4)}, "bn": {"scale": (4,), "bias": (4,)},
                "idle": {"kernel": (2, 2)},
            },
            "head": {"dense1": {"kernel": (4, 4)}, "bn1": {"scale": (4,), "bias": (4,)}},
        },
        "classifier": {"kernel": (4, 3), "bias": (3,)},
    }  # fmt: skip
    is_leaf = {"is_leaf": lambda x: isinstance(x, tuple)}
    params = jax.tree.map(lambda shape: rng.normal(size=shape), shapes, **is_leaf)
    params["classifier"] = jax.tree.map(np.zeros_like, params["classifier"])
    tx = finetune_recipe.optimizer(recipe, BATCH, STEPS, 1)
    want = tiny.named_leaves(params)
    momentum = dict.fromkeys(want, 0.0)
    state, start, update = tx.init(params), dict(want), jax.jit(tx.update)
    for t in range(STEPS):
        grads = jax.tree.map(lambda x: rng.normal(size=x.shape), params)
        grads["network"]["backbone"]["idle"]["kernel"][:] = 0
        updates, state = update(grads, state, params)
        params = jax.tree.map(lambda p, u: np.asarray(p + u), params, updates)
        for name, g in tiny.named_leaves(grads).items():
            want[name], momentum[name] = rule(
                name, want[name], g, momentum[name], t, peak, recipe.weight_decay
            )
    for name, x in tiny.named_leaves(params).items():
        moved = np.abs(want[name] - start[name]).max()
        assert moved > 0 or (name.endswith("['idle']['kernel']") and not recipe.weight_decay)
        # optax computes learning rates in float32
        np.testing.assert_allclose(x, want[name], rtol=0, atol=1e-6 * moved, err_msg=name)


@pytest.mark.slow
def test_three_steps_by_hand():
    """Of every parameter and statistic, with the gradient of a loss that is written out here."""
    recipe = dataclasses.replace(LARS, learning_rate=0.5)  # 2 with 16 images
    with jax.enable_x64(True):
        c = tiny.config("simclr", model__dtype="float64", head__layers=3, model__bn_groups=4)
        setup = make_encoder_setup(c, make_mesh(jax.devices()[:1]))
        abstract = jax.eval_shape(setup.init_network, jax.random.key(0))
        params, stats = (tiny.draw_state(tree) for tree in abstract)
        tx = finetune_recipe.optimizer(recipe, 16, STEPS, STEPS)
        tuner = finetune.Finetuner(setup, "head1", 3, tx, recipe)
        state = tuner.init(params, stats)
        encoder = setup.network.backbone.clone(bn_groups=1)

        def loss(tree, stats, images, labels):
            """Encoder, Dense, batch norm of the whole batch, ReLU, classifier; cross-entropy."""
            features, new = encoder.apply(
                {"params": tree["network"]["backbone"], "batch_stats": stats["backbone"]},
                setup.scale(images), True, mutable=["batch_stats"],
            )  # fmt: skip
            head = tree["network"]["head"]
            h = features @ head["dense1"]["kernel"]
            mean, var = h.mean(0), ((h - h.mean(0)[None]) ** 2).mean(0)
            slope = head["bn1"]["scale"] / jnp.sqrt(var + 1e-5)
            h = (h - mean[None]) * slope[None] + head["bn1"]["bias"][None]
            last = tree["classifier"]
            logits = jnp.maximum(h, 0) @ last["kernel"] + last["bias"][None]
            log_p = logits - jnp.log(jnp.exp(logits).sum(1, keepdims=True))
            old = stats["head"]["bn1"]
            running = {"mean": 0.9 * old["mean"] + 0.1 * mean, "var": 0.9 * old["var"] + 0.1 * var}
            new = {"backbone": new["batch_stats"], "head": {"bn1": running}}
            return -log_p[jnp.arange(16), labels].mean(), new

        gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
        tree = jax.device_get(state.params)
        stats = classifier.used(stats, 1)
        assert tree["network"]["head"].keys() == {"dense1", "bn1"}
        momentum, rng = dict.fromkeys(tiny.named_leaves(tree), 0.0), np.random.default_rng(1)
        begin = tree
        for t in range(STEPS):
            images = rng.integers(0, 256, (16, 8, 8, 3), np.uint8)
            labels = rng.integers(0, 3, 16).astype(np.int32)
            (value, stats), grads = jax.device_get(gradient(tree, stats, images, labels))
            grads, new = tiny.named_leaves(grads), []
            for name, p in tiny.named_leaves(tree).items():
                p, momentum[name] = rule(name, p, grads[name], momentum[name], t, peak=2.0)
                new.append(p)
            tree = jax.tree.unflatten(jax.tree.structure(tree), new)
            state, got = tuner.step(state, images, labels)
            assert float(got) == pytest.approx(value, rel=1e-7)
        # optax computes learning rates in float32
        tiny.assert_close(jax.device_get(state.params), tree, relative=1e-7, absolute=1e-9)
        tiny.assert_close(jax.device_get(state.batch_stats), stats, relative=1e-7, absolute=1e-9)
        still = jax.tree.map(lambda a, b: np.array_equal(a, b), begin, tree)
        assert not any(jax.tree.leaves(still))


@pytest.mark.slow
def test_steps_are_the_same_on_any_number_of_devices():
    found = []
    with jax.enable_x64(True):
        for devices in (1, 8):
            c = tiny.config("simclr", model__dtype="float64", head__layers=3)
            setup = make_encoder_setup(c, make_mesh(jax.devices()[:devices]))
            abstract = jax.eval_shape(setup.init_network, jax.random.key(0))
            params, stats = (tiny.draw_state(tree) for tree in abstract)
            recipe = dataclasses.replace(LARS, learning_rate=0.5)
            tx = finetune_recipe.optimizer(recipe, 16, 4, 2)
            tuner = finetune.Finetuner(setup, "head1", 3, tx, recipe)
            state, losses = tuner.init(params, stats), []
            for t in range(4):
                batch = tiny.host_batch(c, t)
                pair = to_global(setup.mesh, (batch["images"][:, 0], batch["labels"]))
                state, loss = tuner.step(state, *pair)
                losses.append(float(loss))
            found.append(jax.device_get((state.params, state.batch_stats, losses)))
    tiny.assert_close(*found, relative=1e-8, absolute=1e-9)
