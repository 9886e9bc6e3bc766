"""Steps as the authors' code takes them, each written again from what they publish.

The oracle has its own loss, gradient, optimiser and order of rows; only the network is shared.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from common.errors import UserError
from common.models import layout
from common.models.encoder import Encoder
from common.sharding import make_mesh
from common.train.prepare import Extent, prepare
from simclr_jax.method import SimCLR

STEPS = 5


class Pixels(Encoder):
    """An encoder without parameters: the mean of each 2 x 2 block. It compiles in no time."""

    feature_dim: int = 48
    dtype: type = jnp.float32

    def __call__(self, images, train, keys=None):
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
    """A network of ours as PyTorch modules in float64, trained by autograd and torch.optim."""

    def __init__(self, params, batch_stats, make_optimizer=None):
        import torch
        import torch_resnet
        from torch import nn

        from benchmarks.torch_steps import CIFAR_STEM

        self.before = layout.to_torchvision(params["backbone"], batch_stats["backbone"])
        self.backbone = torch_resnet.ResNet((1, 1), False, 4, CIFAR_STEM, classes=1).double()
        arrays = {name: torch.tensor(x) for name, x in self.before.items()}
        self.backbone.load_state_dict(self.backbone.state_dict() | arrays)
        self.backbone.fc = nn.Identity()
        self.heads = {
            part: Layers(params[part], batch_stats.get(part, {}))
            for part in ("head", "predictor")
            if part in params
        }
        self.parameters = [*self.backbone.parameters()]
        self.parameters += [p for head in self.heads.values() for p in head.module.parameters()]
        make_optimizer = make_optimizer or functools.partial(
            torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2
        )
        self.optimizer = make_optimizer(self.parameters)
        self.peak = self.optimizer.param_groups[0]["lr"]

    def __call__(self, images, part="head"):
        """Unit vectors of bytes `[b, h, w, 3]`, of the head or of the predictor behind it."""
        import torch

        mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
        x = torch.tensor(((images / 255 - mean) / std).transpose(0, 3, 1, 2))
        z = self.heads["head"].module(self.backbone(x))
        return torch.nn.functional.normalize(z if part == "head" else self.heads[part].module(z))

    def step(self, t, loss):
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak / 2 * (1 + np.cos(np.pi * t / STEPS))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def assert_equal(self, params, batch_stats, rows, passes=1):
        """To 1e-11 of the way that each array went; `rows` images saw a batch norm together.

        `passes` a step. Our running variance is PyTorch's without its n / (n - 1), n values a
        channel.
        """
        got = layout.to_torchvision(params["backbone"], batch_stats["backbone"])
        want = {n: x.numpy() for n, x in self.backbone.state_dict().items() if n in got}
        assert got.keys() == want.keys()
        kept = 0.9 ** (STEPS * passes)
        for name, before in self.before.items():
            if name.endswith("running_var"):
                n = rows * (4 if name.startswith("layer2") else 8) ** 2
                want[name] = kept * before + (want[name] - kept * before) * (n - 1) / n
            error, way = (np.linalg.norm(want[name] - x) for x in (got[name], before))
            assert way > 0 and error <= 1e-11 * way, name
        for part, head in self.heads.items():
            head.assert_equal(params[part], batch_stats.get(part, {}), rows, kept)


class Layers:
    """A head of ours as PyTorch modules: linear maps, batch norms and ReLUs, from its arrays."""

    def __init__(self, params, batch_stats):
        import torch
        from torch import nn

        self.before, modules = dict(tiny.named_leaves(batch_stats)), []
        self.names, depth = [], len([name for name in params if name.startswith("dense")])
        for i in range(1, depth + 1):
            dense, norm = params[f"dense{i}"], batch_stats.get(f"bn{i}")
            linear = nn.Linear(*dense["kernel"].shape, bias="bias" in dense)
            linear.weight.data = torch.tensor(dense["kernel"].T)
            if "bias" in dense:
                linear.bias.data = torch.tensor(dense["bias"])
            self.names.append((f"dense{i}", linear))
            if norm is not None:
                scale = params.get(f"bn{i}")
                bn = nn.BatchNorm1d(len(norm["mean"]), affine=scale is not None)
                bn.running_mean, bn.running_var = (torch.tensor(norm[k]) for k in ("mean", "var"))
                if scale is not None:
                    bn.weight.data, bn.bias.data = (
                        torch.tensor(scale[k]) for k in ("scale", "bias")
                    )
                self.names.append((f"bn{i}", bn))
            modules += [module for name, module in self.names if name.endswith(str(i))]
            modules += [nn.ReLU()] if i < depth else []
        self.module = nn.Sequential(*modules).double()

    def assert_equal(self, params, batch_stats, rows, kept):
        for name, module in self.names:
            found = params.get(name, {})
            if name.startswith("dense"):
                pairs = [(found["kernel"].T, module.weight)]
            else:
                pairs = [(found["scale"], module.weight)] if found else []
                mean, var = batch_stats[name]["mean"], batch_stats[name]["var"]
                start = kept * self.before[f"['{name}']['var']"]
                var = start + (var - start) * rows / (rows - 1)
                pairs += [(mean, module.running_mean), (var, module.running_var)]
            pairs += [(found["bias"], module.bias)] if "bias" in found else []
            for x, y in pairs:
                np.testing.assert_allclose(x, y.detach(), rtol=1e-9, atol=1e-12, err_msg=name)


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


@pytest.mark.torch
def test_five_steps_of_moco_v3_are_those_of_pytorch():
    """Chen et al. 2021, algorithm 1, in the order of their code, with AdamW that decays all."""
    import torch

    c = tiny.config(
        "moco_v3", model__dtype="float64", optimizer__schedule="cosine", optimizer__name="adamw",
        optimizer__learning_rate=0.01, optimizer__weight_decay=0.1,
        optimizer__decay_bn_and_bias=True, moco_v3__momentum=0.8,
    )  # fmt: skip
    with jax.enable_x64(True):
        run = tiny.run(prepared(c, 1).method, STEPS)
    start, end = run.states[0], run.states[-1]
    adamw = functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
    query = InPyTorch(start.params, start.batch_stats, adamw)
    key = InPyTorch(start.key_params, start.key_batch_stats)
    own = torch.arange(16)
    for t in range(STEPS):
        images = tiny.host_batch(run.method.run.config, t)["images"]
        q1, q2 = (query(images[:, view], "predictor") for view in (0, 1))
        m = 1 - 0.2 * (1 + np.cos(np.pi * t / STEPS)) / 2
        with torch.no_grad():
            for q, k in zip(query.parameters, key.parameters, strict=False):  # (no predictor)
                k.mul_(m).add_(q, alpha=1 - m)
            k1, k2 = (key(images[:, view]) for view in (0, 1))
        loss = sum(
            2 * 0.2 * torch.nn.functional.cross_entropy(q @ k.T / 0.2, own)
            for q, k in ((q1, k2), (q2, k1))
        )
        np.testing.assert_allclose(run.metrics[t]["loss"], loss.item(), rtol=1e-10)
        query.step(t, loss)
    query.assert_equal(end.params, end.batch_stats, rows=16, passes=2)
    key.assert_equal(end.key_params, end.key_batch_stats, rows=16, passes=2)
