"""ResNet v1.5 in PyTorch, written after He et al. 2016: the names are torchvision's."""

import torch
from torch import nn


def conv(c, d, size, stride=1):
    return nn.Conv2d(c, d, size, stride, size // 2, bias=False)


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
    """Attributes: `first` is `conv1` of an export's metadata."""

    def __init__(self, stages, bottleneck, width, first, classes=1000):
        super().__init__()
        self.conv1 = nn.Conv2d(
            3, width, first["kernel_size"], first["stride"], first["padding"], bias=False
        )
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if first["max_pool"] else nn.Identity()
        channels = width
        for i, blocks in enumerate(stages):
            layers = []
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 else 1
                layers.append(Block(channels, width * 2**i, stride, bottleneck))
                channels = width * 2**i * (4 if bottleneck else 1)
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
