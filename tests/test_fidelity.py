"""Steps as the authors' code takes them, each written again from what they publish.

The oracle has its own loss, gradient, optimiser and order of rows; only the network is shared.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from common.errors import UserError
from common.models import layout
from common.sharding import make_mesh
from common.train.prepare import Extent, prepare
from simclr_jax.method import SimCLR

STEPS = 5


class Pixels(nn.Module):
    """An encoder without parameters: the mean of each 2 x 2 block. It compiles in no time."""

    feature_dim: int = 48
    dtype: type = jnp.float32
    bn_groups: int = 1

    @nn.compact
    def __call__(self, images, train):
        b, h, w, c = images.shape
        return images.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4)).reshape(b, -1)


SETTINGS = {
    "optimizer__name": "lars", "optimizer__schedule": "cosine", "optimizer__scaling": "sqrt",
    "optimizer__learning_rate": 0.02, "optimizer__weight_decay": 1e-2, "simclr__loss_scale": 2.0,
    "optimizer__trust_coefficient": 0.1,  # theirs, 1e-3, hardly moves kernels in 5 steps
}  # fmt: skip


def simclr(devices):
    """SimCLR with its head of 2 layers, so with kernels, BN scales and a BN shift to train."""
    c = tiny.config("simclr", **SETTINGS)
    run = prepared(c, devices)
    network = run.setup.network.clone(backbone=Pixels())
    return tiny.attach(SimCLR(dataclasses.replace(run.setup, network=network)), run).method


def prepared(c, devices):
    """Of as many steps as are compared."""
    mesh = make_mesh(jax.devices()[:devices])
    run = prepare(tiny.METHODS[c.method], c, mesh, extent=Extent(STEPS, STEPS))
    return tiny.attach(run.method, run)


def two_cross_entropies(z, temperature):
    """Each half of the 2N rows has a softmax cross entropy, averaged over N; their sum."""
    n = len(z) // 2
    z = z / jnp.sqrt(jnp.sum(z * z, axis=1, keepdims=True))
    a, b = z[:n], z[n:]
    own = 1e9 * jnp.eye(n)
    halves = [
        jnp.concatenate([x @ y.T, x @ x.T - own * temperature], axis=1) / temperature
        for x, y in ((a, b), (b, a))
    ]
    return sum(-jnp.mean(jnp.diagonal(jax.nn.log_softmax(logits, axis=1))) for logits in halves)


def lars_by_name(params, grads, momenta, rate, decay, eta=0.1, momentum=0.9):
    """LARS of You et al. 2017 with the learning rate inside the momentum; BN is left out by name.

    float64, NumPy; all trees are flat, by path.
    """
    for name, p in params.items():
        g = np.asarray(grads[name], np.float64)
        trust = 1.0
        if "bn" not in name and "bias" not in name:
            g = g + decay * p
            trust = eta * np.sqrt((p * p).sum()) / np.sqrt((g * g).sum())
        momenta[name] = momentum * momenta.get(name, 0.0) + rate * trust * g
        params[name] = p - momenta[name]


@functools.cache
def theirs():
    """`(parameters before, after, loss of each step, length of each gradient)`."""
    method = simclr(1)
    state = tiny.draw_state(jax.eval_shape(method.init, jax.random.key(0)))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    params = {k: v.astype(np.float64) for k, v in tiny.named_leaves(state.params).items()}
    before, momenta, losses, norms = dict(params), {}, [], []

    @jax.jit
    @jax.value_and_grad
    def gradient(params, images):
        variables = {"params": params, "batch_stats": state.batch_stats}
        network = method.setup.network
        (_, z), _ = network.apply(variables, images, train=True, mutable=["batch_stats"])
        return two_cross_entropies(z, temperature=0.1)

    for t in range(STEPS):
        images = tiny.host_batch(method.run.config, t)["images"]
        images = np.concatenate([images[:, 0], images[:, 1]])  # all first views, all second views
        images = ((images / 255 - mean) / std).astype(np.float32)
        now = [p.astype(np.float32) for p in params.values()]
        loss, grads = gradient(jax.tree.unflatten(jax.tree.structure(state.params), now), images)
        rate = 0.02 * np.sqrt(16) / 2 * (1 + np.cos(np.pi * t / STEPS))
        grads = tiny.named_leaves(grads)
        lars_by_name(params, grads, momenta, rate, decay=1e-2)
        losses.append(float(loss))
        norms.append(np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads.values())))
    return before, params, losses, norms


@pytest.mark.parametrize("devices", [1, 8])
def test_five_steps_of_simclr_are_those_of_its_authors_code(devices):
    """In float32, to 1e-5 of the way that each parameter went; the loss that is logged is eq. 1."""
    before, after, losses, norms = theirs()
    run = tiny.run(simclr(devices), STEPS)
    got = tiny.named_leaves(run.states[-1].params)
    assert got.keys() == after.keys() and len(after) == 5
    for name, want in after.items():
        way = np.linalg.norm(want - before[name])
        assert way > 0.02 * np.linalg.norm(want), name
        assert np.linalg.norm(got[name] - want) <= 1e-5 * way, name
    np.testing.assert_allclose([m["loss"] for m in run.metrics], np.array(losses) / 2, rtol=1e-5)
    np.testing.assert_allclose([m["gradient_norm"] for m in run.metrics], norms, rtol=1e-5)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_that_is_not_positive_is_refused(scale):
    c = tiny.config("simclr", simclr__loss_scale=scale)
    with pytest.raises(UserError, match=r"loss_scale=.*: expected a finite number above 0, 1 for"):
        tiny.build(c, 1)


class InPyTorch:
    """A network of ours as PyTorch modules in float64, trained by autograd and optim.SGD."""

    def __init__(self, params, batch_stats):
        import torch
        import torch_resnet
        from torch import nn

        from benchmarks.torch_steps import CIFAR_STEM

        self.before = layout.to_torchvision(params["backbone"], batch_stats["backbone"])
        self.backbone = torch_resnet.ResNet((1, 1), False, 4, CIFAR_STEM, classes=1).double()
        arrays = {name: torch.tensor(x) for name, x in self.before.items()}
        self.backbone.load_state_dict(self.backbone.state_dict() | arrays)
        self.backbone.fc = nn.Identity()
        self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).double()
        for module, name in ((self.head[0], "dense1"), (self.head[2], "dense2")):
            module.weight.data = torch.tensor(params["head"][name]["kernel"].T)
            module.bias.data = torch.tensor(params["head"][name]["bias"])
        self.parameters = [*self.backbone.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.SGD(self.parameters, lr=0.1, momentum=0.9, weight_decay=1e-2)

    def __call__(self, images):
        """Unit vectors of bytes `[b, h, w, 3]`."""
        import torch

        mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
        x = torch.tensor(((images / 255 - mean) / std).transpose(0, 3, 1, 2))
        return torch.nn.functional.normalize(self.head(self.backbone(x)))

    def step(self, t, loss):
        for group in self.optimizer.param_groups:
            group["lr"] = 0.1 / 2 * (1 + np.cos(np.pi * t / STEPS))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def assert_equal(self, params, batch_stats, rows):
        """To 1e-11 of the way that each array went; `rows` images saw a batch norm together.

        Our running variance is PyTorch's without its n / (n - 1), n values a channel.
        """
        got = layout.to_torchvision(params["backbone"], batch_stats["backbone"])
        want = {n: x.numpy() for n, x in self.backbone.state_dict().items() if n in got}
        assert got.keys() == want.keys()
        for name, before in self.before.items():
            if name.endswith("running_var"):
                n = rows * (4 if name.startswith("layer2") else 8) ** 2
                kept = 0.9**STEPS * before
                want[name] = kept + (want[name] - kept) * (n - 1) / n
            error, way = (np.linalg.norm(want[name] - x) for x in (got[name], before))
            assert way > 0 and error <= 1e-11 * way, name
        for module, name in ((self.head[0], "dense1"), (self.head[2], "dense2")):
            found = params["head"][name]["kernel"].T, params["head"][name]["bias"]
            for x, y in zip(found, (module.weight, module.bias), strict=True):
                np.testing.assert_allclose(x, y.detach(), rtol=1e-9, atol=1e-12)


def in_float64(method, **changes):
    """Five steps of ours, with SGD that decays everything, as PyTorch's does."""
    c = tiny.config(
        method, model__dtype="float64", head__kind="moco_v2", optimizer__schedule="cosine",
        optimizer__learning_rate=0.1, optimizer__weight_decay=1e-2,
        optimizer__decay_bn_and_bias=True, **changes,
    )  # fmt: skip
    with jax.enable_x64(True):
        return tiny.run(prepared(c, 1).method, STEPS)


@pytest.mark.torch
def test_five_steps_of_simclr_are_those_of_pytorch():
    import torch

    run = in_float64("simclr")
    start, end = run.states[0], run.states[-1]
    theirs, partner = InPyTorch(start.params, start.batch_stats), torch.arange(32).roll(16)
    for t in range(STEPS):
        images = tiny.host_batch(run.method.run.config, t)["images"]
        z = theirs(np.concatenate([images[:, 0], images[:, 1]]))
        logits = (z @ z.T / 0.1).fill_diagonal_(float("-inf"))
        loss = torch.nn.functional.cross_entropy(logits, partner)
        np.testing.assert_allclose(run.metrics[t]["loss"], loss.item(), rtol=1e-10)
        theirs.step(t, loss)
    theirs.assert_equal(end.params, end.batch_stats, rows=32)


@pytest.mark.torch
def test_five_steps_of_moco_are_those_of_pytorch():
    """He et al. 2020, algorithm 1, with the momentum update before the keys, as their code has it.

    One BN group, where shuffling changes nothing.
    """
    import torch

    run = in_float64("moco", moco__queue_length=48)
    start, end = run.states[0], run.states[-1]
    query = InPyTorch(start.params, start.batch_stats)
    key = InPyTorch(start.key_params, start.key_batch_stats)
    queue = torch.tensor(start.queue.keys.reshape(48, 8))
    for t in range(STEPS):
        images = tiny.host_batch(run.method.run.config, t)["images"]
        with torch.no_grad():
            for q, k in zip(query.parameters, key.parameters, strict=True):
                k.mul_(0.75).add_(q, alpha=0.25)
            keys = key(images[:, 1])
        q = query(images[:, 0])
        logits = torch.cat([(q * keys).sum(1, keepdim=True), q @ queue.T], 1) / 0.2
        loss = torch.nn.functional.cross_entropy(logits, torch.zeros(16, dtype=torch.long))
        np.testing.assert_allclose(run.metrics[t]["loss"], loss.item(), rtol=1e-10)
        query.step(t, loss)
        queue = queue.clone()
        queue[t * 16 % 48 :][:16] = keys
    query.assert_equal(end.params, end.batch_stats, rows=16)
    key.assert_equal(end.key_params, end.key_batch_stats, rows=16)
    np.testing.assert_allclose(end.queue.keys.reshape(48, 8), queue, rtol=1e-9, atol=1e-12)
