"""SimCLR and MoCo v2 in PyTorch, as in their papers and as PyTorch users write it.

For `benchmarks.train_step` and `benchmarks.resident`. The network is the one that the tests compare
ours with; memory is channels_last, which is PyTorch's fast layout, and with `amp` the network runs
under autocast. `augmented` works on whole batches, on a GPU if the data is there.
"""

import contextlib
import copy
import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional
from torch.optim import swa_utils

from tests.torch_resnet import ResNet

CIFAR_STEM = {"kernel_size": 3, "stride": 1, "padding": 1, "max_pool": False}
LUMA = (0.299, 0.587, 0.114)
Views = Callable[[], tuple[torch.Tensor, torch.Tensor]]


def planes(images: torch.Tensor) -> torch.Tensor:
    """uint8 `[b, h, w, 3]` to float `[b, 3, h, w]` of 0 to 1, channels last in memory."""
    return images.permute(0, 3, 1, 2).float().div(255)


def augmented(images: torch.Tensor) -> torch.Tensor:
    """SimCLR's augmentation for CIFAR: crop, flip, colours at strength 0.5, grey; no blur.

    As batched augmentation libraries do it, the order of the colour operations is drawn once for a
    batch, and the hue is turned in YIQ; ours draws an order for each image and goes by way of HSV.

    Args:
        images: float `[b, 3, h, w]` of 0 to 1.
    """
    b, device = len(images), images.device

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(b, 1, 1, 1, device=device) * (high - low) + low

    def chance(p: float) -> torch.Tensor:
        return torch.rand(b, 1, 1, 1, device=device) < p

    images = functional.grid_sample(
        images, _crops(b, images.shape, device), mode="bilinear", padding_mode="reflection",
        align_corners=False,
    )  # fmt: skip
    luma = torch.tensor(LUMA, device=device).view(1, 3, 1, 1)

    def mixed(x: torch.Tensor, other: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return (x * factor + other * (1 - factor)).clamp(0, 1)

    def grey(x: torch.Tensor) -> torch.Tensor:
        return (x * luma).sum(1, keepdim=True)

    operations = [
        lambda x: mixed(x, torch.zeros_like(x), uniform(0.6, 1.4)),
        lambda x: mixed(x, grey(x).mean((2, 3), keepdim=True), uniform(0.6, 1.4)),
        lambda x: mixed(x, grey(x), uniform(0.6, 1.4)),
        lambda x: _hue(x, uniform(-0.1, 0.1).flatten()).clamp(0, 1),
    ]
    coloured = images
    for i in torch.randperm(4).tolist():
        coloured = operations[i](coloured)
    images = torch.where(chance(0.8), coloured, images)
    return torch.where(chance(0.2), grey(images), images)


def _crops(b: int, shape: torch.Size, device: torch.device) -> torch.Tensor:
    """Position in the image of each pixel of a random resized crop, flipped or not."""
    area = torch.rand(b, device=device) * 0.8 + 0.2
    ratio = torch.exp((torch.rand(b, device=device) * 2 - 1) * math.log(4 / 3))
    wide, tall = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    x, y = ((torch.rand(2, b, device=device) * 2 - 1) * (1 - torch.stack([wide, tall]))).unbind()
    flip = torch.where(torch.rand(b, device=device) < 0.5, 1.0, -1.0)
    zero = torch.zeros_like(x)
    rows = [torch.stack([wide * flip, zero, x], 1), torch.stack([zero, tall, y], 1)]
    return functional.affine_grid(torch.stack(rows, 1), list(shape), align_corners=False)


def _hue(images: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Rotates the hue of each image by fractions of a circle."""
    yiq = images.new_tensor([LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])
    cos, sin = torch.cos(turns * 2 * math.pi), torch.sin(turns * 2 * math.pi)
    one, zero = torch.ones_like(cos), torch.zeros_like(cos)
    turn = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], 1).view(-1, 3, 3)
    matrix = torch.linalg.inv(yiq) @ turn @ yiq
    return torch.einsum("bij,bjhw->bihw", matrix, images)


class Encoder(nn.Module):
    """ResNet-18 of `width` for 32 pixels, followed by a head of two layers."""

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
        """Float `[b, 3, h, w]` of 0 to 1 to float32 unit vectors `[b, dim]`."""
        x = images.mul(2).sub(1).contiguous(memory_format=torch.channels_last)
        return functional.normalize(self.head(self.backbone.features(x)).float())


def nt_xent(z: torch.Tensor, temperature: float) -> torch.Tensor:
    """Chen et al. 2020, eq. 1; rows i and i + n of `z [2n, dim]` are a pair."""
    logits = z @ z.T / temperature
    logits.fill_diagonal_(float("-inf"))
    n = len(z) // 2
    return functional.cross_entropy(logits, torch.arange(2 * n, device=z.device).roll(n))


def sgd(model: nn.Module) -> torch.optim.SGD:
    """Momentum SGD with weight decay."""
    return torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4)


def casts(device: torch.device, amp: bool) -> contextlib.AbstractContextManager:
    """The context of the network: autocast to bfloat16, or none."""
    return torch.autocast(device.type, torch.bfloat16) if amp else contextlib.nullcontext()


def ready(model: nn.Module, device: torch.device) -> nn.Module:
    """Moves it to the device in its layout; compiled on a GPU, as users do there."""
    model = model.to(device, memory_format=torch.channels_last)
    return torch.compile(model) if device.type == "cuda" else model


def simclr(
    views: Views, width: int, device: torch.device, amp: bool = False, dim: int = 128
) -> Callable[[], torch.Tensor]:
    """A step: both views, float `[b, 3, h, w]` each, in one forward pass."""
    model = ready(Encoder(width, dim, norm=True), device)
    optimizer = sgd(model)

    def step() -> torch.Tensor:
        images = torch.cat(views())
        with casts(device, amp):
            z = model(images)
        loss = nt_xent(z, 0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def moco(
    views: Views, width: int, device: torch.device, length: int, amp: bool = False, dim: int = 128
) -> Callable[[], torch.Tensor]:
    """A step of He et al. 2020, algorithm 1, on one device, where there is nothing to shuffle."""
    encoder = Encoder(width, dim, norm=False)
    momentum = ready(copy.deepcopy(encoder).requires_grad_(False), device)
    model = ready(encoder, device)
    queue = functional.normalize(torch.randn(length, dim, device=device))
    optimizer, place = sgd(model), [0]
    follow = swa_utils.get_ema_multi_avg_fn(0.999)

    def step() -> torch.Tensor:
        first, second = views()
        batch = len(first)
        with torch.no_grad(), casts(device, amp):
            follow(list(momentum.parameters()), list(model.parameters()), None)
            keys = momentum(second)
        with casts(device, amp):
            queries = model(first)
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
