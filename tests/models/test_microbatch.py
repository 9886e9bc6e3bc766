"""Micro-batches: the step of the whole batch, in the memory of a part."""

import functools
import re

import jax
import numpy as np
import pytest
import tiny

from common import config as configs
from common import contrast
from common.errors import UserError
from common.models import microbatch
from common.plan.collectives import KINDS
from common.train.step import cost

# Large enough for whole BN groups of more than one image on 8 devices in 4 micro-batches.
BATCH, GROUPS = 128, 32


@functools.cache
def run(method, devices, size, dtype="float64", symmetric=False, selective=False, memory=0):
    """Two steps in micro-batches of `size` images; SimCLR with bottlenecks, as in a ResNet-50."""
    changes = {"model__bottleneck": True}
    if method == "moco":
        changes = {"moco__symmetric": symmetric, "model__stages": (1,)}
    elif selective:
        changes = tiny.SK
    else:
        changes["simclr__memory_length"] = memory
    with jax.enable_x64(dtype == "float64"):
        c = tiny.config(
            method, batch_size=BATCH, microbatch=size, model__dtype=dtype,
            **(changes | {"model__bn_groups": GROUPS}),
        )  # fmt: skip
        return tiny.run(tiny.build(c, devices), steps=2)


def assert_same(got, want, relative=1e-9, absolute=1e-12):
    """Parameters, gradient, batch statistics, queue, probe, metrics of every step."""
    leaves = tiny.named_leaves(want.gradient())
    # Softmax does not see the bias of keys, nor batch norm that of the last norm before a head.
    unseen = ("['key']['bias']", "['backbone']['norm']['bias']")
    leaves = [x for name, x in leaves.items() if not name.endswith(unseen)]
    assert all(np.linalg.norm(x) > 1e-4 for x in leaves), "a gradient that says nothing"
    for a, b in zip(got.states[1:], want.states[1:], strict=True):
        tiny.assert_close(a, b, relative, absolute)
    for a, b in zip(got.metrics, want.metrics, strict=True):
        tiny.assert_close(a, b, relative, absolute)


def slow(*cases):
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


@functools.cache
def run_vit(method, devices, size, dtype="float64"):
    """Two steps of a ViT with drop path. Its heads have batch norm, over the whole global batch."""
    with jax.enable_x64(dtype == "float64"):
        c = tiny.config(
            method, batch_size=32, microbatch=size, model__bn_groups=1, model__dtype=dtype,
            **tiny.VIT,
        )  # fmt: skip
        return tiny.run(tiny.build(c, devices), steps=2)


GRID = [(m, n, p) for m in ("simclr", "moco") for n, p in ((1, 2), (2, 4), (8, 4))]
QUICK = [("simclr", 2, 4)]


@pytest.mark.parametrize(
    ("method", "devices", "parts"), QUICK + slow(*(c for c in GRID if c not in QUICK))
)
def test_a_step_in_parts_is_the_step(method, devices, parts):
    """Float64, per tensor 1e-9, against the whole batch at once on one device."""
    got = run(method, devices, BATCH // parts)
    assert got.method.setup.microbatches == parts
    assert_same(got, run(method, 1, 0))


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_the_squeeze_of_selective_kernels_sees_groups_too(devices):
    got = run("simclr", devices, BATCH // 4, selective=True)
    assert_same(got, run("simclr", 1, 0, selective=True))


VITS = [(m, n, p) for m in ("simclr", "moco_v3") for n, p in ((1, 2), (2, 4), (8, 4))]


@pytest.mark.parametrize(("method", "devices", "parts"), slow(*VITS))
def test_without_batch_norm_in_the_encoder_any_part_will_do(method, devices, parts):
    """One BN group for the heads, which are not split; an image's draws do not depend on its part.

    Down to parts of one image a device.
    """
    got = run_vit(method, devices, 32 // parts)
    assert got.method.setup.microbatches == parts
    assert got.method.setup.network.backbone.is_random
    assert (
        got.states[0].batch_stats.keys() >= {"head"} and "backbone" not in got.states[0].batch_stats
    )
    assert_same(got, run_vit(method, 1, 0))


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_both_directions_of_moco(devices):
    """The statistics of the first pass are where the second one starts."""
    got = run("moco", devices, BATCH // 4, symmetric=True)
    assert_same(got, run("moco", 1, 0, symmetric=True))


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_the_memory_of_simclr(devices):
    """Its encoder goes through the parts too."""
    got = run("simclr", devices, BATCH // 4, memory=300)
    assert got.states[-1].queue.keys.shape == (2, 2 * BATCH, 8)
    assert_same(got, run("simclr", 1, 0, memory=300))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["simclr", "moco"])
def test_the_gradient_in_float32(method):
    got, want = (
        np.concatenate(
            [x.ravel() for x in jax.tree.leaves(run(method, n, m, "float32").gradient())]
        )
        for n, m in ((2, BATCH // 4), (2, 0))
    )
    assert got.dtype == np.float32
    assert np.linalg.norm(got - want) <= 1e-4 * np.linalg.norm(want)


@pytest.mark.parametrize(("method", "devices", "parts"), QUICK + slow(("moco", 4, 2)))
def test_it_compiles_once_and_sends_nothing_inside_the_loop(method, devices, parts):
    got = run(method, devices, BATCH // parts)
    assert got.traces == 1 and got.first == got.last
    inner, entry = got.step_fn.as_text().split("\nENTRY ")
    collective = re.compile(rf" ({'|'.join(KINDS)})(-start)?\(")
    assert collective.search(entry) and not collective.search(inner)


def test_the_work_of_a_loop_is_counted_as_often_as_it_runs():
    """Forward, forward again, backward (twice a forward) instead of forward, backward."""
    parts, whole = (cost(run("simclr", 2, 32).step_fn, 4), cost(run("simclr", 1, 0).step_fn))
    assert 1.2 < 2 * parts["flops"] / whole["flops"] < 1.5


def compiled(batch, size):
    """A step on one device whose activations are nearly all of its memory, BN groups of 8."""
    c = tiny.config(
        "simclr", batch_size=batch, microbatch=size, model__bn_groups=batch // 8,
        model__width=16, model__stages=(1,), data__image_size=16,
    )  # fmt: skip
    method = tiny.build(c, 1)
    return tiny.compile_step(method.train_step, method.run)


@pytest.mark.optimised
@pytest.mark.slow
def test_memory_grows_with_the_part_and_not_with_the_batch(monkeypatch):
    """512 images in parts of 16 take an eighth of what 128 take at once, and a little more."""
    monkeypatch.setattr(contrast, "BLOCK_SIZE", 64)  # a tile of the default size would hide it
    parts, whole = (
        compiled(*sizes).memory_analysis().temp_size_in_bytes for sizes in ((512, 16), (128, 0))
    )
    assert parts < 1.1 * whole / 8, (parts, whole)


def config(batch, size, groups):
    return tiny.config("simclr", batch_size=batch, microbatch=size, model__bn_groups=groups)


@pytest.mark.parametrize(
    ("batch", "size", "groups", "devices", "parts"),
    [
        (64, 0, 1, 8, 1), (64, 64, 1, 8, 1), (64, 32, 8, 4, 2), (64, 16, 64, 4, 4),
        (4096, 256, 16, 1, 16), (64, 16, None, 8, 4), (64, 8, None, 8, 8),
    ],
)  # fmt: skip
def test_number_of_parts(batch, size, groups, devices, parts):
    assert microbatch.count(batch, size, groups, devices) == parts


@pytest.mark.parametrize(
    ("batch", "size", "groups", "devices", "message"),
    [
        (64, 24, 8, 1, "microbatch=24: expected a divisor of batch_size=64 that can be split over "
                       "1 device.* choose 8, 16, 32 or 0"),
        (64, 4, 64, 8, "over 8 device.* choose 8, 16, 32 or 0"),
        (64, 128, 8, 1, "microbatch=128: .* choose 8, 16, 32 or 0"),
        (64, 16, 1, 1, "model.bn_groups=1 with 4 micro-batches .* set model.bn_groups to a "
                       r"multiple of 4 \(4, 8, 16 or 32\), or microbatch=0"),
        (64, 16, 8, 4, r"on 4 device.* a multiple of 16 \(16, 32 or 64\), or"),
        (24, 8, 4, 1, r"a multiple of 3 \(3, 6, 12 or 24\), or"),
    ],
)  # fmt: skip
def test_what_cannot_be_exact_is_refused(batch, size, groups, devices, message):
    with pytest.raises(UserError, match=message):
        tiny.build(config(batch, size, groups), devices)


def test_only_batch_norm_of_the_encoder_asks_for_groups():
    """The head has it too, and is not split."""
    c = functools.partial(tiny.config, "simclr", batch_size=32, microbatch=8, **tiny.VIT)
    assert tiny.build(c(), 2).setup.microbatches == 4
    with pytest.raises(UserError, match=r"model.bn_groups=1 with 4 micro-batches .* multiple of 8"):
        tiny.build(c(vit__patches="conv"), 2)
    with pytest.raises(UserError, match=r"microbatch=4: .* over 8 device.* choose 8, 16 or 0"):
        tiny.build(c(microbatch=4), 8)


def test_a_negative_size_is_refused_and_any_other_may_follow_on_resume():
    with pytest.raises(UserError, match="microbatch=-1 is too small: expected at least 0"):
        configs.check(config(64, -1, 8))
    before, after = (configs.as_dict(config(64, size, 8)) for size in (0, 16))
    configs.check_same_run(before, after, "workdir")
