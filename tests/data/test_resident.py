"""The data set in device memory, several steps at a time, whole runs of it, and no TensorFlow."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_end_to_end import (
    Killed,
    assert_same_run,
    bad,
    folder,
    kill_before,
    lines,
    run,
    small,
)

from common import config as configs
from common.data.augment import draws, on_device
from common.data.feed import pipeline, resident
from common.data.feed.recipe import FeedRecipe
from common.data.order import order
from common.data.sources.opening import open_source
from common.errors import UserError
from common.plan import collectives
from common.sharding import make_mesh, replicated, to_global
from common.train import dispatch
from common.train.summary import PICTURES

__all__ = ["folder"]  # a fixture
ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_spans_end_where_something_is_due():
    assert list(dispatch.spans(0, 7, 1, lambda _: False)) == [(i, i) for i in range(1, 8)]
    fifth = dispatch.spans(2, 12, 4, lambda step: step % 5 == 0)
    assert list(fifth) == [(3, 5), (6, 9), (10, 10), (11, 12)]
    assert list(dispatch.spans(7, 7, 4, lambda _: True)) == []


def setting(most=3, **changes):
    """A run of batches of 8 from 20 embedded images of 28 pixels, views of 8."""
    c = tiny.config("simclr", batch_size=8, data__augment_on="device", augment__preset="cifar",
                    data__source="embedded", steps_per_dispatch=most, **changes)  # fmt: skip
    source = open_source(c.data, "train")
    source.images, source.labels = source.images[:20], source.labels[:20]
    source.num_examples = 20
    return c, source


def test_what_the_host_sends_is_what_it_would_have_used():
    """Ids and draws, over the end of an epoch (of 2 steps), in each of two processes."""
    c, source = setting()
    a = FeedRecipe.of(c).views
    for rows in (np.arange(8), np.arange(4), np.arange(4, 8)):
        batches = pipeline.train_batches(source, FeedRecipe.of(c), rows=rows, start_step=3)
        (_, first), (ids, second) = batches.take(1), batches.take(3)
        np.testing.assert_array_equal(ids.T, second["ids"][:, :3])
        assert (batches.position, batches.readers, batches.steps_per_epoch) == (7, 0, 2)
        assert (first["steps"], second["steps"]) == (1, 3)
        assert not first["ids"][:, 1:].any() and not first["parameters"][:, 1:].any()
        got = [(first, 0), *((second, i) for i in range(3))]
        for step, (batch, i) in enumerate(got, start=3):
            epoch, t = divmod(step, 2)
            ids = order(c.seed, epoch, 20)[8 * t :][rows]
            np.testing.assert_array_equal(batch["ids"][:, i], ids)
            want, _ = draws.draw_views(a, c.seed, epoch, ids, (28, 28))
            np.testing.assert_array_equal(batch["parameters"][:, i], want)


def checksum(state, batch, key):
    """A train step that only looks at its batch."""
    weights = jnp.sin(jnp.arange(batch["images"].size, dtype=jnp.float32))
    images = batch["images"].astype(jnp.float32).reshape(-1)
    loss = (images * weights).mean() + (state + 1) * batch["labels"].mean()
    return state + 1, {"loss": loss, "state": state * 1.0}


@pytest.mark.optimised
@pytest.mark.parametrize("devices", [1, 8])
def test_a_dispatch_takes_its_steps(devices):
    """Each step sees the views of its own ids; what it was not told to take, it does not."""
    c, source = setting()
    mesh, a = make_mesh(jax.devices()[:devices]), FeedRecipe.of(c).views
    data = resident.load(source, mesh)
    assert data["data_images"].sharding == replicated(mesh)
    batches = pipeline.train_batches(source, FeedRecipe.of(c), rows=np.arange(8))
    step = jax.jit(dispatch.program(checksum, FeedRecipe.of(c), mesh))
    state, key = jax.device_put((jnp.float32(0), jax.random.key(0)), replicated(mesh))
    shapes = dispatch.batch_shapes(FeedRecipe.of(c), mesh, data)
    program = step.lower(state, shapes, key).compile()
    moved = collectives.read(program.as_text(), devices)
    assert sum(x.bytes for x in moved) < 100  # sums of the checksum, no image

    views = jax.jit(lambda x, p: on_device.to_bytes(on_device.augment_pixels(x, p, a)))
    taken = 0
    for count in (1, 3, 2):
        with jax.transfer_guard("disallow"):
            batch = to_global(mesh, batches.take(count)[1]) | data
            state, metrics = program(state, batch, key)
        losses = np.asarray(metrics["each"]["loss"])
        for i in range(count):
            epoch, t = divmod(taken, 2)
            ids = order(c.seed, epoch, 20)[8 * t : 8 * t + 8]
            parameters, _ = draws.draw_views(a, c.seed, epoch, ids, (28, 28))
            images = views(source.images[ids], parameters)
            want = checksum(float(taken), {"images": images, "labels": source.labels[ids]}, None)
            np.testing.assert_allclose(losses[i], want[1]["loss"], rtol=1e-4)
            taken += 1
        assert not losses[count:].any()
        assert metrics["loss"] == losses[count - 1] and metrics["state"] == taken - 1
    assert float(state) == 6


def test_a_step_sees_what_the_device_makes_of_cropped_views():
    """With augment_on="both": colours by the parameters that came along, labels as they came."""
    c = tiny.config("simclr", batch_size=8, data__augment_on="both", augment__preset="cifar")
    mesh, a = make_mesh(jax.devices()[:1]), FeedRecipe.of(c).views
    batch = tiny.host_batch(c, 0)
    batch["parameters"], _ = draws.draw_views(a, c.seed, 0, np.arange(8), (8, 8))
    assert batch.keys() == dispatch.batch_shapes(FeedRecipe.of(c), mesh).keys()
    loss = jax.jit(dispatch.program(checksum, FeedRecipe.of(c), mesh))(
        0.0, to_global(mesh, batch), None
    )[1]["loss"]
    colour = jax.jit(lambda x, p: on_device.augment_colour(x, p, a))
    made = on_device.to_bytes(colour(batch["images"], batch["parameters"]))
    want, without = (
        checksum(0.0, {"images": jnp.asarray(x), "labels": batch["labels"]}, None)[1]["loss"]
        for x in (made, batch["images"])
    )
    np.testing.assert_allclose(loss, want, rtol=1e-4)
    assert abs(want - without) > 1e-2 * abs(want)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["simclr", "moco"])
def test_a_killed_run_continues_bit_by_bit(method, tmp_path, monkeypatch):
    """Steps 1, 2-4, 5-7 in one go; from step 4 on 5, 6-7. The last bits do not tell."""
    # small steps: rounding on other devices does not grow
    c = small(method, data__augment_on="device", data__fake_classes=2, steps_per_dispatch=3,
              log_every=7, checkpoint__every="4 steps", evaluate__every="7 steps",
              optimizer__learning_rate=0.005)  # fmt: skip
    run(c, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_before(patch, 3)
        run(c, tmp_path / "broken")
    assert [p.name for p in (tmp_path / "broken" / "checkpoints").iterdir()] == ["4"]
    run(c, tmp_path / "broken")
    assert_same_run(c, tmp_path / "broken", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["simclr", "moco"])
def test_several_steps_at_a_time_are_the_same_run_on_other_devices(method, tmp_path):
    """But for the last bits, which a small learning rate keeps small."""
    losses = []
    for most, devices in ((3, 2), (1, 4)):
        c = small(method, data__augment_on="device", steps_per_dispatch=most,
                  evaluate__every="0 steps", data__test_split="",
                  optimizer__learning_rate=0.005)  # fmt: skip
        run(c, tmp_path / f"{most}", devices)
        losses.append([r["loss"] for r in lines(tmp_path / f"{most}") if "loss" in r])
    assert len(losses[0]) == 4
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.slow
def test_colour_on_the_device_trains(folder, tmp_path):
    """JPEGs of several shapes, which the host only crops."""
    c = small("simclr", folder, data__augment_on="both", duration="2 steps",
              data__test_split="", evaluate__pictures=True)  # fmt: skip
    run(c, tmp_path)
    assert (tmp_path / "augmented_pairs.png").exists()
    assert [r["step"] for r in lines(tmp_path) if "loss" in r] == [1, 2]
    source = open_source(c.data, "train")
    ids, batch = pipeline.train_batches(source, FeedRecipe.of(c), rows=np.arange(8)).take(1)
    c.data.augment_on = "host"
    whole = next(pipeline.train_batches(source, FeedRecipe.of(c), rows=np.arange(8)))
    np.testing.assert_array_equal(ids, whole["ids"][None])
    want, _ = draws.draw_views(FeedRecipe.of(c).views, c.seed, 0, whole["ids"], None)
    np.testing.assert_array_equal(batch["parameters"], want)
    assert batch.keys() == {"images", "labels", "parameters"}
    assert batch["images"].shape == whole["images"].shape == (8, 2, 8, 8, 3)


def test_mistakes(folder, tmp_path):
    words = ["data.augment_on=device", "images of one shape", "both or host"]
    bad(tmp_path, words, folder=folder, data__augment_on="device")
    bad(tmp_path, ["augment_on='gpu'", "both"], data__augment_on="gpu")
    bad(tmp_path, ["steps_per_dispatch=2", "augment_on=device"], steps_per_dispatch=2)
    saved = configs.as_dict(small("simclr", data__augment_on="device"))
    free = configs.as_dict(small("simclr", data__augment_on="device", steps_per_dispatch=9))
    configs.check_same_run(saved, free, "w")
    with pytest.raises(UserError, match=r"data.augment_on \(was 'device', now 'both'\)"):
        configs.check_same_run(
            saved, configs.as_dict(small("simclr", data__augment_on="both")), "w"
        )


SCRIPT = """
import sys, tiny, jax
from common.data.sources import shard_writer
from common.evaluate.online import make_evaluator
from common.train.loop import train
from simclr_jax.method import SimCLR
c = tiny.config("simclr", data__source="embedded", data__augment_on="device", steps_per_dispatch=2,
                data__image_size=12, duration="3 steps", evaluate__knn_examples=40)
shard_writer.write(c.data, sys.argv[1] + "/shards")
c.data.source = "shards:" + sys.argv[1] + "/shards"
train(SimCLR, c, sys.argv[1] + "/run", make_evaluator)
assert not {"tensorflow", "tensorflow_datasets"} & set(sys.modules)
"""


@pytest.mark.slow
def test_a_whole_run_from_shards_needs_no_tensorflow(tmp_path):
    """Prepared, loaded, trained, scored at another size than the images', drawn, logged."""
    for name in ("tensorflow", "tensorflow_datasets"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('must not be imported')\n")
    path = os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "tests")))
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], text=True,
                          env=env | {"PYTHONPATH": path}, capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "on the device, which holds the dataset" in done.stderr
    work = tmp_path / "run"
    summary = json.loads((work / "summary.json").read_text())
    assert summary["steps"] == 3 and 0 <= summary["knn_top1"] <= 1
    assert {p.name for p in work.glob("*.png")} == set(PICTURES)
    assert list((work / "tensorboard").iterdir())
    sizes = [p.stat().st_size for p in (tmp_path / "shards").glob("*.npz")]
    assert sizes and max(sizes) < 62_000_000


def test_memory_that_does_not_suffice_is_one_line(monkeypatch):
    _, source = setting()

    class Device:
        def memory_stats(self):
            return {"bytes_limit": 90_000}

    class Mesh:
        local_devices = (Device(),)

    with pytest.raises(UserError, match=r"fashion_mnist \(train\) .* can keep there; choose both"):
        resident.load(source, Mesh())
