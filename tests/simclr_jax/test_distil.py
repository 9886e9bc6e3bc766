"""Distillation: its loss against other code, its step, its state, and what it refuses."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import opened_run
import optax
import pytest
import tiny

from common import config as configs
from common.cli import command_line
from common.errors import UserError
from common.evaluate import accuracy
from common.models import classifier
from common.sharding import make_mesh
from common.train.prepare import Extent, prepare
from simclr_jax.distil import Distil
from simclr_jax.distil_loss import distillation_loss, distillation_loss_with_metrics


def logits(seed, n=7, c=5, scale=3.0):
    return np.random.default_rng(seed).normal(scale=scale, size=(n, c))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 2.0])
def test_the_loss_is_that_of_numpy_and_of_optax(temperature):
    """Value, gradient and metrics, in float64. T = 2 shows the factor T^2, T = 1 hides it."""
    student, teacher, t = logits(0), logits(1), temperature
    p, q = softmax(teacher / t), softmax(student / t)
    entropy = -(p * np.log(p)).sum(-1).mean()
    with jax.enable_x64(True):
        grad = jax.value_and_grad(distillation_loss_with_metrics, argnums=(0, 1), has_aux=True)
        (loss, metrics), (got, of_teacher) = grad(jnp.array(student), jnp.array(teacher), t)
        kl = optax.kl_divergence(jax.nn.log_softmax(jnp.array(student) / t), jnp.array(p)).mean()
    kl = float(kl)
    np.testing.assert_allclose(loss, -(t**2) * (p * np.log(q)).sum(-1).mean(), rtol=1e-12)
    np.testing.assert_allclose(loss, t**2 * (kl + entropy), rtol=1e-12)
    np.testing.assert_allclose(got, t * (q - p) / len(p), rtol=1e-9, atol=1e-12)
    assert not np.any(of_teacher)
    want = {
        "agreement": (student.argmax(-1) == teacher.argmax(-1)).mean(),
        "teacher_confidence": softmax(teacher).max(-1).mean(),
        "teacher_entropy": entropy,
        "divergence": t**2 * kl,
    }
    assert metrics.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-9, err_msg=name)


def test_a_student_that_is_its_teacher_has_no_gradient():
    x = jnp.asarray(logits(0), jnp.float32)
    assert np.abs(jax.grad(distillation_loss)(x, x, 2.0)).max() < 1e-7
    assert np.abs(jax.grad(distillation_loss)(x, x[::-1], 2.0)).max() > 1e-2


def test_large_logits_and_low_precision_stay_finite():
    student, teacher = (jnp.asarray(logits(i, scale=300.0), jnp.bfloat16) for i in (0, 1))
    loss, metrics = distillation_loss_with_metrics(student, teacher, 0.1)
    grad = jax.grad(distillation_loss)(student, teacher, 0.1)
    assert loss.dtype == jnp.float32 and grad.dtype == jnp.bfloat16
    assert all(np.isfinite(x).all() for x in (loss, grad, *metrics.values()))


def test_logits_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="of the same images and classes"):
        distillation_loss(jnp.zeros((2, 3)), jnp.zeros((2, 4)))
    with pytest.raises(UserError, match=r"distil\.temperature=0"):
        distillation_loss(jnp.zeros((2, 3)), jnp.zeros((2, 3)), 0)


@pytest.mark.slow
def test_a_step_is_what_a_few_plain_lines_compute():
    """Loss of the student's and the teacher's own passes; the teacher is as it was, to the bit."""
    run = tiny.cached_run("distil", 1)
    method, first = run.method, run.states[0]
    images = tiny.host_batch(method.run.config, 0)["images"][:, 0]
    with jax.enable_x64(True):
        network = method.setup.network
        variables = {"params": first.params, "batch_stats": first.batch_stats}
        x = (images / 255 - np.array(method.setup.mean)) / np.array(method.setup.std)
        student = network.apply(variables, jnp.array(x), True, mutable=["batch_stats"])[0][1]
        t, arrays = method.teacher, first.teacher
        x = (images / 255 - np.array([0.5, 0.4, 0.3])) / np.array([0.2, 0.3, 0.25])
        inner = {"params": arrays["params"]["network"], "batch_stats": arrays["batch_stats"]}
        features = t.network.apply(inner, jnp.array(x), "head1", method="encode")
        last = arrays["params"]["classifier"]
        want = softmax((np.array(features) @ last["kernel"] + last["bias"]) / 2)
    student = np.array(student)
    loss = -4 * (want * np.log(softmax(student / 2))).sum(-1).mean()
    np.testing.assert_allclose(run.metrics[0]["loss"], loss, rtol=1e-9)
    for state in run.states[1:]:
        jax.tree.map(np.testing.assert_array_equal, state.teacher, first.teacher)


@pytest.mark.slow
def test_labels_of_the_images_teach_the_student_nothing():
    c = tiny.config("distil")
    method = tiny.build(c, 1)
    state, step, root = tiny.start(method)
    del state
    found = []
    for turn in range(2):
        state = tiny.place_state(method)
        for i in range(2):
            batch = tiny.host_batch(c, i)
            batch["labels"] = np.roll(batch["labels"], turn)
            state, _ = step(state, tiny.to_global(method.setup.mesh, batch), root)
        found.append(jax.device_get(state))
    jax.tree.map(np.testing.assert_array_equal, found[0].params, found[1].params)
    assert (found[0].probe.params["kernel"] != found[1].probe.params["kernel"]).any()


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_micro_batches_give_the_same_step(devices):
    """The teacher too works on parts of the batch."""
    with jax.enable_x64(True):
        whole, parts = (
            tiny.run(
                tiny.build(
                    tiny.config(
                        "distil", model__dtype="float64", model__bn_groups=8, microbatch=size
                    ),
                    devices,
                ),
                steps=2,
            )
            for size in (0, 4)
        )
    tiny.assert_close(parts.states[-1].params, whole.states[-1].params, 1e-9, 1e-12)
    np.testing.assert_allclose(parts.metrics[-1]["loss"], whole.metrics[-1]["loss"], rtol=1e-9)


def ready(**changes):
    return prepare(
        Distil, tiny.config("distil", **changes), make_mesh(jax.devices()[:1]),
        extent=Extent(8, 4, 3),
    )  # fmt: skip


def test_the_teachers_file_decides_on_the_classifier():
    run = ready(head__dim=0)
    assert run.config.head.dim == 3 and run.setup.network.head.dim == 3
    assert run.abstract.params["head"]["dense1"]["bias"].shape == (3,)
    assert "62.50 %" in run.method.notes["teacher"] and run.method.chance is None
    state = run.method.placed(tiny.draw_state(run.abstract))
    _, arrays = classifier.load(tiny.teacher())
    jax.tree.map(np.testing.assert_array_equal, state.teacher, arrays)


def test_an_encoder_needs_no_teacher(tmp_path, monkeypatch):
    """`make_encoder_setup` of a student whose teacher's file is gone."""
    run = opened_run.write(tmp_path / "run", "distil", distil__temperature=1.0)
    saved = json.loads((run / "config.json").read_text())
    saved["distil"]["teacher"] = "/gone.safetensors"
    saved["head"]["dim"] = 3
    (run / "config.json").write_text(json.dumps(saved))
    opened = opened_run.load(run, layer="projection")
    assert opened.state.params["head"]["dense1"]["bias"].shape == (3,)
    assert opened.method.classification is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distil__teacher": ""}, "distil.teacher is empty: give a fine-tuned network"),
        ({"distil__teacher": "/gone"}, "distil.teacher=/gone: there is no such file or directory"),
        ({"distil__temperature": 0.0}, "distil.temperature=0"),
        ({"head__kind": "simclr"}, "the head of a student is a linear classifier of its teacher's"),
        ({"head__dim": 4}, "head.dim=4: the head of a student"),
        ({"views": 3}, "views=3 and method distil, which takes 1 or 2"),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        ready(**changes)


def vit_teacher(folder):
    """Its header is all that is read."""
    c, arrays = classifier.load(tiny.teacher())
    with c.config.unlocked():
        c.config.model.encoder = "vit"
    classifier.save(folder / "vit.safetensors", c, arrays)
    return str(folder / "vit.safetensors")


def test_views_that_the_teacher_cannot_take_are_refused(tmp_path):
    path = tiny.teacher(stem="patch4")
    with pytest.raises(UserError, match=r"cannot take views of 10 pixels.*set augment.size=8"):
        ready(distil__teacher=path, data__image_size=10)
    path = vit_teacher(tmp_path)
    with pytest.raises(UserError, match="is a ViT for images of 8 pixels, and the views have 16"):
        ready(distil__teacher=path, data__image_size=16)


def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch):
    run = ready()
    header = run.method.teacher
    run.method.teacher = dataclasses.replace(header, info={"digest": "other"})
    with pytest.raises(UserError, match="has changed while it was read: start again"):
        run.method.placed(tiny.draw_state(run.abstract))


@pytest.mark.parametrize(
    ("names", "source", "found"),
    [
        (("a", "b"), ("a", "b"), ""),
        (("0", "1"), ("a", "b"), ""),
        (("a", "b"), (), ""),
        (("a", "b"), ("0", "1"), ""),
        (("a", "b"), ("b", "a"), "other classes: its class 0 is 'b' and not 'a'"),
        (("a", "b", "c"), ("a", "b"), "2 classes and not 3"),
    ],
)
def test_classes_are_compared_by_name_and_order(names, source, found):
    class Classes:
        class_names, num_classes = source, len(source) or 2

    assert accuracy.unlike(names, Classes) == found


def parsed(*arguments, config="configs/simclr_cifar10.py:cpu"):
    from absl import flags

    values = flags.FlagValues()
    command_line.define(["knn"], values)
    command_line.parse(
        ["main.py", f"--config={config}", "--workdir=w", *arguments], values, tiny.METHODS
    )
    return values.config


@pytest.mark.parametrize("mode", ["distil", "plan"])
@pytest.mark.parametrize("config", ["simclr_cifar10.py:cpu", "moco_v3_tpu.py", "moco_tpu.py"])
def test_the_mode_takes_any_config(mode, config):
    before = parsed(config=f"configs/{config}")
    c = parsed(
        f"--mode={mode}", "--config.distil.teacher=T", "--config.optimizer.weight_decay=0.5",
        config=f"configs/{config}",
    )  # fmt: skip
    assert c.method == "distil" and before.method not in c
    assert c.distil.to_dict() == {"teacher": "T", "temperature": 1.0}
    assert (c.views, c.head.kind, c.head.dim) == (1, "moco_v1", 0)
    colours = ("jitter", "grey", "blur", "solarise", "rotate")
    assert [c.augment[n] for n in colours] == [0.0] * 5  # None would be the preset's
    assert set(c.augment_view2.values()) == {None} and c.optimizer.weight_decay == 0.5
    for name in ("model", "data", "vit", "checkpoint", "evaluate"):
        assert c[name] == before[name]
    for name in ("preset", "crop", "area_min", "size", "mean", "std", "flip"):
        assert c.augment[name] == before.augment[name]
    assert (c.batch_size, c.duration) == (before.batch_size, before.duration)
    assert configs.as_dict(c)  # nothing is left of what it cannot resolve


def test_the_mode_refuses_fields_of_the_method_it_replaces():
    message = "simclr.temperature is a field of the method simclr, of which --mode=distil"
    with pytest.raises(UserError, match=message):
        parsed("--mode=distil", "--config.simclr.temperature=0.5")
