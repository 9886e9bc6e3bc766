"""ResNet v1.5 in PyTorch, written after He et al. 2016: the names are torchvision's."""

import torch
from torch import nn


def conv(c, d, size, stride=1):
    return nn.Conv2d(c, d, size, stride, size // 2, bias=False)


class ConvNorm(nn.Module):
    """As timm names them in blocks with selective kernels."""

    def __init__(self, c, d, size, stride=1):
        super().__init__()
        self.conv, self.bn = conv(c, d, size, stride), nn.BatchNorm2d(d)

    def forward(self, x):
        return self.bn(self.conv(x))


class Attention(nn.Module):
    def __init__(self, d, squeeze):
        super().__init__()
        self.fc_reduce, self.bn = conv(d, squeeze, 1), nn.BatchNorm2d(squeeze)
        self.fc_select = conv(squeeze, 2 * d, 1)

    def forward(self, x):  # [n, branch, d, h, w]
        logits = self.fc_select(self.bn(self.fc_reduce(x.sum(1).mean((2, 3), keepdim=True))).relu())
        weights = logits.reshape(len(x), 2, -1, 1, 1).softmax(1)
        return (x * weights).sum(1)


class SelectiveKernels(nn.Module):
    def __init__(self, c, d, stride, squeeze):
        super().__init__()
        self.paths = nn.ModuleList(ConvNorm(c, d, 3, stride) for _ in range(2))
        self.attn = Attention(d, squeeze)

    def forward(self, x):
        return self.attn(torch.stack([path(x).relu() for path in self.paths], 1))


class Selective(nn.Module):
    """A bottleneck with selective kernels."""

    def __init__(self, channels, mid, stride, ratio):
        super().__init__()
        self.conv1, self.conv3 = ConvNorm(channels, mid, 1), ConvNorm(mid, 4 * mid, 1)
        self.conv2 = SelectiveKernels(mid, mid, stride, max(int(mid * ratio), 32))
        self.downsample = nn.Identity()

    def forward(self, x):
        y = self.conv3(self.conv2(self.conv1(x).relu()))
        return (y + self.downsample(x)).relu()


def pooled(channels, out, stride):
    """The shortcut of SimCLR v2: replicated pixels are those that the mean does not count."""
    pad = nn.ZeroPad2d if stride == 2 else nn.ReplicationPad2d
    pool = nn.Sequential(pad((0, 1, 0, 1)), nn.AvgPool2d(2, stride))
    return nn.Sequential(pool, conv(channels, out, 1), nn.BatchNorm2d(out))


class Block(nn.Module):
    def __init__(self, channels, mid, stride, bottleneck):
        super().__init__()
        out = 4 * mid if bottleneck else mid
        if bottleneck:
            self.conv1, self.bn1 = conv(channels, mid, 1), nn.BatchNorm2d(mid)
            self.conv2, self.bn2 = conv(mid, mid, 3, stride), nn.BatchNorm2d(mid)
            self.conv3, self.bn3 = conv(mid, out, 1), nn.BatchNorm2d(out)
        else:
            self.conv1, self.bn1 = conv(channels, mid, 3, stride), nn.BatchNorm2d(mid)
            self.conv2, self.bn2 = conv(mid, mid, 3), nn.BatchNorm2d(mid)
        self.downsample = nn.Identity()
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(conv(channels, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x):
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y))
        if hasattr(self, "conv3"):
            y = self.bn3(self.conv3(y.relu()))
        return (y + self.downsample(x)).relu()


class ResNet(nn.Module):
    """Attributes: `first` is `conv1` of an export's metadata; `sk_ratio` needs `resnet_d`."""

    def __init__(
        self, stages, bottleneck, width, first, classes=1000, resnet_d=False, sk_ratio=0.0
    ):
        super().__init__()
        half = width // 2 if first.get("convolutions") == 3 else width
        self.conv1 = nn.Conv2d(
            3, half, first["kernel_size"], first["stride"], first["padding"], bias=False
        )
        if first.get("convolutions") == 3:
            self.conv1 = nn.Sequential(
                self.conv1, nn.BatchNorm2d(half), nn.ReLU(),
                conv(half, half, 3), nn.BatchNorm2d(half), nn.ReLU(), conv(half, width, 3),
            )  # fmt: skip
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if first["max_pool"] else nn.Identity()
        channels = width
        for i, blocks in enumerate(stages):
            layers = []
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 else 1
                mid, out = width * 2**i, width * 2**i * (4 if bottleneck else 1)
                block = Block(channels, mid, stride, bottleneck)
                if sk_ratio:
                    block = Selective(channels, mid, stride, sk_ratio)
                if resnet_d and j == 0:
                    block.downsample = pooled(channels, out, stride)
                layers.append(block)
                channels = out
            setattr(self, f"layer{i + 1}", nn.Sequential(*layers))
        self.stages = len(stages)
        self.fc = nn.Linear(channels, classes)

    def features(self, x):
        x = self.maxpool(self.bn1(self.conv1(x)).relu())
        for i in range(self.stages):
            x = getattr(self, f"layer{i + 1}")(x)
        return x.mean((2, 3))

    def forward(self, x):
        return self.fc(self.features(x))


@torch.no_grad()
def randomise(model, seed):
    """No scale, shift or statistic is 0 or 1, where one could stand for another; He et al. 2015."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5)
            module.bias.uniform_(-0.5, 0.5)
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 1.5)
            module.num_batches_tracked.fill_(7)
    return model.eval()
