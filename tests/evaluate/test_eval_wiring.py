"""Which rows each mode of evaluation fits, chooses by and scores, and which label goes with which.

Solvers are replaced by ones that record what they were given.
"""

import dataclasses
import itertools
import json

import flax
import jax
import numpy as np
import pytest
import tiny
from known_splits import (
    CLASSES,
    SIZES,
    WIDTH,
    FirstPixels,
    State,
    ids_of,
    labelled,
    run_on_them,
    split,
    table,
    top1,
)
from test_knn import by_hand

from common.evaluate import embed_mode, knn, knn_mode, linear, linear_mode, logistic, transfer_mode
from common.evaluate.online import Evaluator
from common.models import probe
from common.sharding import make_mesh


@pytest.fixture
def opened(monkeypatch, tmp_path):
    return run_on_them(monkeypatch, tmp_path)


@flax.struct.dataclass
class Probed(State):
    """A state while training."""

    probe: probe.ProbeState


@dataclasses.dataclass
class Solver:
    """Replaces both solvers, and records what they are given.

    Attributes:
        fits: `(ids, labels, mean, scale)` of each fit; the last two are None for L-BFGS.
        choices: `(ids, labels)` that settings were chosen by.
        settings: of each fit, a list.
        found: the classifier of each fit, a random one.
        momentum: of the last fit by SGD, and whether it is Nesterov's.
    """

    fits: list = dataclasses.field(default_factory=list)
    choices: list = dataclasses.field(default_factory=list)
    settings: list = dataclasses.field(default_factory=list)
    found: list = dataclasses.field(default_factory=list)
    momentum: tuple[float, bool] | None = None

    def _found(self, count):
        rng = np.random.default_rng(len(self.found))
        kernel = rng.normal(size=(WIDTH, CLASSES)).astype(np.float32)
        self.found.append(linear.Classifier(kernel, np.zeros(CLASSES, np.float32)))
        return [self.found[-1]] * count

    def sgd(self, pairs, steps, candidates, size, classes, mean, scale, mesh, *momentum):
        rows = [jax.device_get(pair) for pair in itertools.islice(pairs, steps)]
        features, labels = (np.concatenate(x) for x in zip(*rows, strict=True))
        ids, first = np.unique(ids_of(features), return_index=True)  # of several epochs
        self.fits.append((ids, labels[first], mean, scale))
        self.settings.append(candidates)
        self.momentum = tuple(momentum)
        return self._found(len(candidates))

    def lbfgs(self, features, labels, classes, values, *_, **options):
        self.fits.append((ids_of(features), labels, None, None))  # it standardises what it is given
        self.settings.append(list(values))
        return [logistic.Fit(c, True) for c in self._found(len(values))]

    def best(self, classifiers, features, labels):
        assert classifiers == [self.found[-1]] * len(classifiers)
        self.choices.append((ids_of(features), labels))
        return 1


@pytest.fixture
def solver(monkeypatch):
    found = Solver()
    monkeypatch.setattr(linear, "fit", found.sgd)
    monkeypatch.setattr(logistic, "fit", found.lbfgs)
    monkeypatch.setattr(linear, "best", found.best)
    return found


def check_chosen_on_held_out_rows(solver, width=1.0):
    """Fitted on some rows, chosen on the others, then to all; SGD standardises by those fitted."""
    features, labels = table("train")
    (first, _, *_), (second, *_) = solver.fits
    ((held, _),) = solver.choices
    assert len(held) and not set(first) & set(held)
    assert sorted([*first, *held]) == sorted(second) == labelled("train").tolist()
    for ids, found in [fit[:2] for fit in solver.fits] + solver.choices:
        np.testing.assert_array_equal(found, labels[ids])
    for ids, _, mean, scale in [fit for fit in solver.fits if fit[2] is not None]:
        np.testing.assert_allclose(mean, features[ids].mean(0), rtol=1e-4)
        np.testing.assert_allclose(scale * width, 1 / features[ids].std(0), rtol=1e-4)
    assert solver.settings[1] == [solver.settings[0][1]]  # what was chosen


@pytest.mark.parametrize("variant", ["cached", "augmented", "lbfgs"])
def test_linear_eval_chooses_on_rows_that_were_not_fitted(opened, solver, variant):
    how = {"linear__optimizer": "lbfgs"} if variant == "lbfgs" else {"linear__variant": variant}
    how |= {"linear__epochs": 4, "linear__batch_size": 4, "linear__momentum": 0.5}
    how["linear__nesterov"] = variant == "cached"
    metrics, _ = linear_mode.run(opened(**how))
    assert solver.momentum == (None if variant == "lbfgs" else (0.5, variant == "cached"))
    check_chosen_on_held_out_rows(solver, width=1.0 if variant == "lbfgs" else WIDTH**0.5)
    assert metrics["top1"] == pytest.approx(top1(solver.found[-1], "test"))
    assert metrics["num_train"] == len(labelled("train"))
    assert metrics["num_test"] == len(labelled("test"))


def test_transfer_chooses_on_rows_that_were_not_fitted_and_scores_each_test_split(opened, solver):
    metrics, _ = transfer_mode.run(opened(transfer__sources="fake@train:test,fake@train:other"))
    for i, name in enumerate(("test", "other")):
        part = Solver(
            solver.fits[2 * i :][:2], solver.choices[i : i + 1], solver.settings[2 * i :][:2]
        )
        check_chosen_on_held_out_rows(part)
        result = metrics["data_sets"][i]
        assert result["top1"] == pytest.approx(top1(solver.found[2 * i + 1], name))
        assert result["num_test"] == len(labelled(name))


def test_transfer_without_sources_is_to_the_runs_own_splits(opened, solver):
    metrics, _ = transfer_mode.run(opened())
    check_chosen_on_held_out_rows(solver)
    assert metrics["top1"] == pytest.approx(top1(solver.found[-1], "test"))
    assert (metrics["train_split"], metrics["test_split"]) == ("train", "test")


def test_linear_eval_stops_if_the_encoder_changes_while_a_classifier_is_trained(
    opened, solver, monkeypatch
):
    run = dataclasses.replace(opened(), state=State({"scale": np.float32(1 / 256)}, {}))

    def fit(*args):
        run.state.params["scale"] = np.float32(1 / 255)
        return solver.sgd(*args)

    monkeypatch.setattr(linear, "fit", fit)
    with pytest.raises(RuntimeError, match="the frozen encoder changed"):
        linear_mode.run(run)


def test_settings_of_knn_reach_it(opened, monkeypatch):
    given = {}
    inner = knn.knn_scores
    monkeypatch.setattr(
        knn, "knn_scores", lambda *args, **options: given.update(options) or inner(*args, **options)
    )
    options = {"k": 4, "temperature": 0.25, "metric": "euclidean", "center": True}
    knn_mode.run(opened(**{f"knn__{name}": value for name, value in options.items()}))
    assert {name: given[name] for name in options} == options


def test_scores_while_training_leave_out_rows_without_a_label():
    """kNN and the probe, on the test split by the votes of train."""
    c = tiny.config("simclr", evaluate__knn_k=5)
    model = probe.make_probe(c.probe, CLASSES, 8)
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(WIDTH, CLASSES)).astype(np.float32)
    trained = model.init(jax.random.key(0), WIDTH)
    trained = trained.replace(params=trained.params | {"kernel": kernel})
    state = Probed({"scale": np.float32(1 / 256)}, {}, trained)
    mesh = make_mesh(jax.devices()[:2])
    score = Evaluator(
        c.evaluate, mesh, FirstPixels(), model, split("train"), split("test"),
        batch_size=c.batch_size, image_size=c.data.image_size,
    )  # fmt: skip
    got = score(state)
    # running statistics of 0 and 1
    classifier = linear.Classifier(kernel, np.zeros(CLASSES))
    assert got["probe_test_top1"] == pytest.approx(top1(classifier, "test"))
    want = by_hand(*table("train"), *table("test"), 5, 0.1, False)
    assert got["knn_top1"] == pytest.approx(want)


@pytest.mark.parametrize("train", ["train", "other"])
def test_knn_scores_the_test_split_by_the_votes_of_the_train_split(opened, train):
    metrics, _ = knn_mode.run(opened(train, knn__k=5, knn__temperature=0.5, knn__center=True))
    want = by_hand(*table(train), *table("test"), 5, 0.5, True)
    assert metrics["top1"] == pytest.approx(want)
    assert metrics["top1"] != pytest.approx(by_hand(*table("test"), *table(train), 5, 0.5, True))
    sizes = len(labelled(train)), len(labelled("test"))
    assert (metrics["num_train"], metrics["num_test"]) == sizes


def test_the_layer_asked_for_is_the_one_evaluated(opened):
    features, labels, ids = opened(layer="head1").extract(split("test"))
    np.testing.assert_allclose(features, table("test", WIDTH)[0])
    np.testing.assert_array_equal(labels, table("test")[1])
    np.testing.assert_array_equal(ids, np.arange(SIZES["test"]))


@pytest.mark.parametrize("name", ["", "other"])
def test_embed_writes_the_test_split_or_the_one_asked_for(opened, name, tmp_path):
    embed_mode.run(opened(embed__split=name, embed__report=False))
    name = name or "test"
    with np.load(tmp_path / f"features-fake-{name}.npz") as found:
        np.testing.assert_allclose(found["features"], table(name)[0])
        np.testing.assert_array_equal(found["labels"], table(name)[1])
        np.testing.assert_array_equal(found["ids"], np.arange(SIZES[name]))


@pytest.mark.parametrize(
    ("changes", "stem"),
    [({"features": "pixels"}, "-pixels"), ({"layer": "head1"}, "-head1")],
    ids=["pixels", "layer"],
)
def test_embed_of_another_encoder_or_layer_has_files_of_its_own(opened, changes, stem, tmp_path):
    run = opened(embed__report=False, **changes)
    if "features" in changes:
        run.__dict__.pop("encoder")  # it is of the backbone
    metrics, _ = embed_mode.run(run)
    assert metrics["files"] == [f"features-fake-test{stem}.{kind}" for kind in ("npz", "csv")]
    with np.load(tmp_path / metrics["files"][0]) as found:
        if "layer" in changes:
            np.testing.assert_allclose(found["features"], table("test", WIDTH)[0])
        else:
            images = split("test").views(np.arange(SIZES["test"]), 8)
            np.testing.assert_array_equal(found["features"], images.reshape(len(images), -1))
        about = json.loads(str(found["about"]))
    assert about.get("layer") == (None if "features" in changes else "head1")


def test_embed_of_some_examples_spreads_them_over_the_split(opened, tmp_path):
    metrics, _ = embed_mode.run(opened(embed__examples=9, embed__report=False))
    some = np.arange(9) * SIZES["test"] // 9
    with np.load(tmp_path / "features-fake-test-9images.npz") as found:
        np.testing.assert_array_equal(found["ids"], some)
        np.testing.assert_allclose(found["features"], table("test")[0][some])
        np.testing.assert_array_equal(found["labels"], table("test")[1][some])
    assert metrics["labelled"] == (table("test")[1][some] >= 0).sum() < 9
