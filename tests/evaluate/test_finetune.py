"""Fine-tuning: which examples and labels it sees, how long it takes, and its step by hand."""

import dataclasses
import itertools
import types

import jax
import numpy as np
import optax
import pytest
import tiny
from known_splits import (
    CLASSES,
    WIDTH,
    FirstPixels,
    State,
    ids_of,
    labelled,
    run_on_them,
    table,
    top1,
)
from test_linear import softmax

from common.data.feed.recipe import FeedRecipe
from common.data.sources import subset
from common.errors import UserError
from common.evaluate import batches, finetune, finetune_mode, finetune_recipe, linear
from common.evaluate.finetune_recipe import Recipe
from common.run.writer import NonFiniteLossError
from common.setup import make_encoder_setup
from common.sharding import make_mesh, to_global


@pytest.fixture
def opened(monkeypatch, tmp_path):
    return run_on_them(monkeypatch, tmp_path)


class Tuner:
    """Replaces `Finetuner`, and records what it is given."""

    def __init__(self, setup, layer, num_classes, tx, recipe, seed):
        self.given = {"layer": layer, "tx": tx, "recipe": recipe, "seed": seed}
        self.kernel = np.random.default_rng(0).normal(size=(WIDTH, CLASSES)).astype(np.float32)
        Tuner.last = self

    def init(self, params, batch_stats):
        self.given["params"] = params
        return "as pretrained"

    def train(self, state, batches, steps, batch_size):
        assert state == "as pretrained"
        pairs = [jax.device_get(pair) for pair in itertools.islice(batches, steps)]
        images, self.labels = (np.concatenate(x) for x in zip(*pairs, strict=True))
        self.features = images.reshape(len(images), -1)[:, :WIDTH].astype(np.float32) / 256
        self.steps, self.batch_size = steps, batch_size
        return "tuned"

    def logits(self, state, images):
        assert state == "tuned"
        return FirstPixels().encode(State({"scale": 1 / 256}, {}), images) @ self.kernel


@pytest.fixture
def tuner(monkeypatch):
    monkeypatch.setattr(finetune, "Finetuner", Tuner)
    yield Tuner
    Tuner.last = None


def test_finetune_trains_on_the_chosen_labels_and_scores_the_test_split(opened, tuner, monkeypatch):
    monkeypatch.setattr(finetune_recipe, "optimizer", lambda *args: args)
    run = opened(finetune__fraction=0.5, finetune__epochs=4, finetune__batch_size=5, seed=3)
    run.settings.finetune.weight_decay = 0.25
    metrics, _ = finetune_mode.run(run)
    labels = table("train")[1]
    chosen = subset.balanced(labels, 0.5, CLASSES, seed=3)
    got = tuner.last
    ids = ids_of(got.features)
    assert sorted(set(ids)) == chosen.tolist()
    np.testing.assert_array_equal(got.labels, labels[ids])
    # a batch of 5 does not fit 2 devices
    assert (got.steps, got.batch_size) == (4 * (len(chosen) // 4), 4)
    recipe, layers = Recipe(weight_decay=0.25), (("stem_conv", "stem_bn"), ("layer1_0",))
    assert got.given["tx"] == (recipe, 4, got.steps, got.steps / 4, (*layers, ("layer2_0",)))
    assert (got.given["recipe"], got.given["seed"]) == (recipe, 3)
    assert metrics.items() >= dataclasses.asdict(recipe).items()
    assert got.given["params"] is run.state.params and got.given["layer"] == "backbone"
    assert metrics["top1"] == pytest.approx(top1(linear.Classifier(got.kernel, 0), "test"))
    assert (metrics["num_train"], metrics["num_test"]) == (len(chosen), len(labelled("test")))


@pytest.mark.parametrize(("fraction", "epochs"), [(0.01, 60), (0.02, 30)])
def test_finetune_takes_60_epochs_up_to_1_per_cent_of_the_labels(opened, tuner, fraction, epochs):
    """Chen et al. 2020, B.5: 60 epochs for 1 %, 30 for 10 %."""
    run = opened("large", finetune__fraction=fraction, finetune__epochs=0)
    metrics, _ = finetune_mode.run(run)
    assert metrics["epochs"] == epochs
    assert tuner.last.steps == epochs * (metrics["num_train"] // tuner.last.batch_size)


def test_labels_train_on_crops_and_flips_of_the_run_and_nothing_else():
    c = tiny.config("simclr", augment__preset="simclr", augment__size=6)
    c.augment.update(rotate=0.5, solarise=0.3)
    c.augment_view2.update(blur=0.7, area_min=0.5)
    made = batches.crop_and_flip(c, 4, seed=9)
    assert (made.batch_size, made.seed, c.batch_size, c.seed) == (4, 9, 16, 0)
    before = FeedRecipe.of(c).views[0]
    want = {name: 0.0 for name in ("jitter", "grey", "blur", "solarise", "rotate")}
    assert all(getattr(before, name) > 0 for name in want)
    for view in made.views:
        assert view == dataclasses.replace(before, size=8, **want)  # as large as test images
    other = batches.crop_and_flip(c, 4, seed=9, image_size=12, area_min=0.25)
    want |= {"size": 12, "area_min": 0.25}
    assert other.views == (dataclasses.replace(before, **want),) * 2
    c.augment.area_max = 0.5
    with pytest.raises(UserError, match=r"area_min=0.75 is no share of an image: .* at most 0.5"):
        batches.crop_and_flip(c, 4, seed=9, area_min=0.75)


@pytest.mark.parametrize("loss", [np.nan, np.inf])
def test_fine_tuning_stops_at_a_loss_that_is_not_finite(loss):
    losses = iter([1.0, 0.5, loss, 0.1, 0.1])
    tuner = types.SimpleNamespace(step=lambda state, *batch: (state, next(losses)))
    with pytest.raises(NonFiniteLossError, match=r"is (nan|inf) at step 3: .*learning_rate"):
        finetune.Finetuner.train(tuner, None, itertools.repeat((None, None)), 5, batch_size=4)


class Matrix:
    """A network that is one matrix."""

    class backbone:
        feature_dim, dtype, is_random = 5, np.float32, False

    def with_groups(self, groups):
        return self

    def depth_of(self, layer):
        return 0

    def apply(self, variables, images, layer, train=False, keys=None, method=None, mutable=()):
        assert keys is None
        features = images.reshape(len(images), -1) @ variables["params"]["backbone"]["kernel"]
        return (features, {}) if mutable else features


def by_hand(network, classifier, bias, x, y):
    """Cross-entropy over the labelled rows, and the three gradients."""
    known = y >= 0
    features = x @ network
    p = softmax(features @ classifier + bias)
    error = (p - np.eye(CLASSES)[y]) * known[:, None] / max(known.sum(), 1)
    loss = -np.log(p[np.arange(len(y)), y])[known].sum() / max(known.sum(), 1)
    return loss, x.T @ (error @ classifier.T), features.T @ error, error.sum(0)


def test_rows_without_a_label_do_not_count_in_a_step():
    """Steps on two devices, one of which has most of the labels, by hand; then none has any."""

    mesh = make_mesh(jax.devices()[:2])
    setup = dataclasses.replace(make_encoder_setup(tiny.config("simclr"), mesh), network=Matrix())
    tuner = finetune.Finetuner(setup, "backbone", CLASSES, optax.sgd(0.1))
    rng = np.random.default_rng(0)
    network = rng.normal(size=(8 * 8 * 3, 5)) / 10
    classifier, bias = np.zeros((5, CLASSES)), np.zeros(CLASSES)
    state = tuner.init({"backbone": {"kernel": network.astype(np.float32)}}, {})
    labels = np.array([[2, 0, 1, 2, 2, -1, -1, 0], [-1, -1, 1, -1, 0, 2, 1, 1], [-1] * 8])
    for y in labels:
        images = rng.integers(0, 256, (8, 8, 8, 3), np.uint8)
        x = ((images / 255 - tuner.setup.mean) / tuner.setup.std).reshape(8, -1)
        loss, *gradients = by_hand(network, classifier, bias, x, y)
        network, classifier, bias = (
            w - 0.1 * g for w, g in zip((network, classifier, bias), gradients, strict=True)
        )
        state, got = tuner.step(state, *to_global(mesh, (images, y.astype(np.int32))))
        assert float(got) == pytest.approx(loss, rel=1e-4)
        found = (
            state.params["network"]["backbone"]["kernel"],
            *(state.params["classifier"][name] for name in ("kernel", "bias")),
        )
        for a, b in zip(found, (network, classifier, bias), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert np.abs(gradients[0]).max() == 0 and loss == 0  # of the last step


def test_a_batch_that_the_runs_bn_groups_do_not_divide_is_one_group():
    c = tiny.config("simclr", model__bn_groups=4)
    setup = make_encoder_setup(c, make_mesh(jax.devices()[:1]))
    tuner = finetune.Finetuner(setup, "head1", CLASSES, optax.sgd(0.1))
    params, batch_stats = jax.eval_shape(tuner.setup.init_network, jax.random.key(0))
    params, batch_stats = (tiny.draw_state(tree) for tree in (params, batch_stats))
    state = tuner.init(params, batch_stats)
    images, labels = np.zeros((6, 8, 8, 3), np.uint8), np.zeros(6, np.int32)
    _, loss = jax.eval_shape(tuner.step, state, images, labels)
    assert loss.shape == () and c.model.bn_groups == 4  # the run's own config stays
    assert tuner.setup.network.backbone.bn_groups == tuner.setup.network.head.bn_groups == 1


def test_a_network_without_batch_statistics_is_fine_tuned():
    """All of it, what pretraining has frozen too."""
    c = tiny.config("simclr", head__kind="moco_v2", **tiny.VIT)
    setup = make_encoder_setup(c, make_mesh(jax.devices()[:1]))
    tuner = finetune.Finetuner(setup, "head1", CLASSES, optax.sgd(0.1))
    params, batch_stats = jax.eval_shape(tuner.setup.init_network, jax.random.key(0))
    assert batch_stats == {}
    state = tuner.init(tiny.draw_state(params), batch_stats)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 8, 8, 3), np.uint8)
    before = jax.device_get(state.params)
    for _ in range(2):  # the classifier starts at 0, and lets no gradient through before it moves
        state, loss = tuner.step(state, images, np.arange(6, dtype=np.int32) % CLASSES)
    assert np.isfinite(loss) and state.batch_stats == {}
    changed = jax.tree.map(lambda a, b: np.any(a != b), before, jax.device_get(state.params))
    moved = tiny.named_leaves(changed)
    assert all(x for name, x in moved.items() if not name.endswith("['key']['bias']"))
