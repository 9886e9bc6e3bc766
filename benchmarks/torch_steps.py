"""The train steps of SimCLR and MoCo v2 in PyTorch, as their papers have them.

For `benchmarks.train_step`. The network is the one that the tests compare ours with; images are
uint8 as in our batches, memory is channels_last, which is PyTorch's fast layout on CPUs.
"""

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from tests.torch_resnet import ResNet

CIFAR_STEM = {"kernel_size": 3, "stride": 1, "padding": 1, "max_pool": False}


class Encoder(nn.Module):
    """ResNet-18 of `width` for 32 pixels, behind it a head of two layers."""

    def __init__(self, width: int, dim: int, norm: bool) -> None:
        super().__init__()
        self.backbone = ResNet((2, 2, 2, 2), False, width, CIFAR_STEM, classes=1)
        size = 8 * width

        def normed(features: int) -> nn.Module:
            return nn.BatchNorm1d(features) if norm else nn.Identity()

        self.head = nn.Sequential(
            nn.Linear(size, size, bias=not norm), normed(size), nn.ReLU(),
            nn.Linear(size, dim, bias=not norm), normed(dim),
        )  # fmt: skip

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """`[b, h, w, 3]` uint8 to unit vectors `[b, dim]`."""
        x = images.permute(0, 3, 1, 2).float().div(127.5).sub(1)
        x = self.backbone.features(x.contiguous(memory_format=torch.channels_last))
        return functional.normalize(self.head(x))


def nt_xent(z: torch.Tensor, temperature: float) -> torch.Tensor:
    """Chen et al. 2020, eq. 1; rows i and i + n of `z [2n, dim]` are a pair."""
    logits = z @ z.T / temperature
    logits.fill_diagonal_(float("-inf"))
    n = len(z) // 2
    return functional.cross_entropy(logits, torch.arange(2 * n, device=z.device).roll(n))


def sgd(model: nn.Module) -> torch.optim.SGD:
    """Momentum SGD with weight decay."""
    return torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4)


def simclr(images: torch.Tensor, width: int, dim: int = 128) -> Callable[[], torch.Tensor]:
    """A step on `images [b, 2, h, w, 3]`: both views in one forward pass."""
    model = Encoder(width, dim, norm=True).to(images.device, memory_format=torch.channels_last)
    optimizer = sgd(model)

    def step() -> torch.Tensor:
        loss = nt_xent(model(torch.cat([images[:, 0], images[:, 1]])), 0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def moco(
    images: torch.Tensor, width: int, length: int, dim: int = 128
) -> Callable[[], torch.Tensor]:
    """A step of He et al. 2020, algorithm 1, on one device, where there is nothing to shuffle."""
    model = Encoder(width, dim, norm=False).to(images.device, memory_format=torch.channels_last)
    momentum = copy.deepcopy(model).requires_grad_(False)
    queue = functional.normalize(torch.randn(length, dim, device=images.device))
    optimizer, place, batch = sgd(model), [0], len(images)

    def step() -> torch.Tensor:
        with torch.no_grad():
            for ours, theirs in zip(momentum.parameters(), model.parameters(), strict=True):
                ours.lerp_(theirs, 1 - 0.999)
            keys = momentum(images[:, 1])
        queries = model(images[:, 0])
        positives = (queries * keys).sum(1, keepdim=True)
        logits = torch.cat([positives, queries @ queue.T], 1) / 0.2
        loss = functional.cross_entropy(logits, logits.new_zeros(batch, dtype=torch.long))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        queue[place[0] : place[0] + batch] = keys
        place[0] = (place[0] + batch) % length
        return loss.detach()

    return step
