"""A vision transformer in PyTorch, after Dosovitskiy et al. 2021, eqs. 1-4; names are timm's."""

import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x):
        """Eqs. 5-7 and 8 of its appendix A, a head at a time."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        size = q.shape[-1] // self.heads
        out = []
        for h in range(self.heads):
            at = slice(h * size, (h + 1) * size)
            a = torch.softmax(q[..., at] @ k[..., at].transpose(1, 2) / size**0.5, dim=-1)
            out.append(a @ v[..., at])
        return self.proj(torch.cat(out, dim=-1))


class Mlp(nn.Module):
    def __init__(self, d, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(d, hidden), nn.Linear(hidden, d)

    def forward(self, x):
        x = self.fc1(x)
        return self.fc2(x * 0.5 * (1 + torch.erf(x / 2**0.5)))  # Hendrycks & Gimpel 2016


class Scale(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(d))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, d, heads, hidden, layer_scale):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(d, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = Attention(d, heads), Mlp(d, hidden)
        self.ls1, self.ls2 = (Scale(d) if layer_scale else nn.Identity() for _ in range(2))

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, d, patch, convolutions):
        super().__init__()
        self.proj = nn.Conv2d(3, d, patch, patch)
        if convolutions:  # Xiao et al. 2021, as MoCo v3's code has it
            layers, c, out = [], 3, d // (patch // 2)
            while out <= d:
                layers += [nn.Conv2d(c, out, 3, 2, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
                c, out = out, 2 * out
            self.proj = nn.Sequential(*layers, nn.Conv2d(c, d, 1))

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    def __init__(
        self, d, depth, heads, hidden, patch, grid, token=True, convolutions=False,
        layer_scale=False, classes=0,
    ):  # fmt: skip
        super().__init__()
        self.patch_embed = PatchEmbed(d, patch, convolutions)
        if token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, d))
            self.norm = nn.LayerNorm(d, eps=1e-6)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid**2 + token, d))
        self.blocks = nn.ModuleList(Block(d, heads, hidden, layer_scale) for _ in range(depth))
        if classes:
            self.head = nn.Linear(d, classes)
        self.token = token

    def forward(self, x):
        x = self.patch_embed(x)
        if self.token:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0] if self.token else x.mean(1)


@torch.no_grad()
def randomise(model, seed):
    """Biases, scales and positions that matter; tokens so small that the norms' epsilon does."""
    torch.manual_seed(seed)
    for name, x in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            x.fill_(7)
        elif x.ndim > 1 and "pos_embed" not in name and "cls_token" not in name:
            x.normal_(0, 1 / x[0].numel() ** 0.5)
        elif name.endswith(("running_var", "weight", "gamma")):
            x.uniform_(0.5, 1.5)
        else:
            x.uniform_(-0.5, 0.5)
        if name in ("cls_token", "pos_embed") or name.startswith("patch_embed.proj.weight"):
            x.mul_(0.03)
    return model.eval()
