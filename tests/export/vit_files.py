"""ViT files as others write them: names and shapes as in their code, random numbers.

timm: timm/models/vision_transformer.py; MoCo v3: moco-v3/vits.py and moco/builder.py; DINO:
dino/vision_transformer.py and main_dino.py; DINOv2: dinov2/models/vision_transformer.py.
"""

import itertools

import numpy as np

# of `tiny.VIT`: patch 4, views of 8 pixels
WIDTH, DEPTH, HIDDEN, PATCH, GRID = 12, 2, 24, 4, 2


def shapes(
    width=WIDTH, depth=DEPTH, hidden=HIDDEN, patch=PATCH, grid=GRID, token=True, layer_scale=False
):
    """Of timm's VisionTransformer without its head."""
    out = {
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "pos_embed": (1, grid * grid + token, width),
    }
    for i in range(depth):
        for name, shape in {
            "norm1.weight": (width,), "norm1.bias": (width,),
            "attn.qkv.weight": (3 * width, width), "attn.qkv.bias": (3 * width,),
            "attn.proj.weight": (width, width), "attn.proj.bias": (width,),
            "norm2.weight": (width,), "norm2.bias": (width,),
            "mlp.fc1.weight": (hidden, width), "mlp.fc1.bias": (hidden,),
            "mlp.fc2.weight": (width, hidden), "mlp.fc2.bias": (width,),
        }.items():  # fmt: skip
            out[f"blocks.{i}.{name}"] = shape
        if layer_scale:
            out |= {f"blocks.{i}.ls{j}.gamma": (width,) for j in (1, 2)}
    if token:
        out |= {"cls_token": (1, 1, width), "norm.weight": (width,), "norm.bias": (width,)}
    return out


def conv_stem(width, patch):
    """Of MoCo v3's ConvStem: `proj = nn.Sequential(conv, bn, relu, ..., conv 1x1)`."""
    out, layers, c = {}, patch.bit_length() - 1, 3
    for i in range(layers):
        d = width // 2 ** (layers - 1 - i)
        out[f"patch_embed.proj.{3 * i}.weight"] = (d, c, 3, 3)
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            out[f"patch_embed.proj.{3 * i + 1}.{leaf}"] = (d,)
        c = d
    last = f"patch_embed.proj.{3 * layers}"
    return out | {f"{last}.weight": (width, width, 1, 1), f"{last}.bias": (width,)}


def draw(wanted, seed=0):
    rng = np.random.default_rng(seed)
    return {n: rng.uniform(0.5, 1.5, shape).astype(np.float32) for n, shape in wanted.items()}


def fixed(grid=GRID, width=WIDTH):
    """The table of moco-v3/vits.py, a number at a time and in float32 as there."""
    table = np.zeros((1, grid * grid + 1, width), np.float32)
    quarter = width // 4
    for row in range(grid):
        for column in range(grid):
            for j in range(quarter):
                w = np.float32(1) / np.float32(10000) ** (np.float32(j) / np.float32(quarter))
                at = 1 + row * grid + column
                table[0, at, j] = np.sin(np.float32(row) * w)
                table[0, at, quarter + j] = np.cos(np.float32(row) * w)
                table[0, at, 2 * quarter + j] = np.sin(np.float32(column) * w)
                table[0, at, 3 * quarter + j] = np.cos(np.float32(column) * w)
    return table


def behind(prefix, arrays):
    return {prefix + name: x for name, x in arrays.items()}


def timm(seed=0, **network):
    """timm's own, with a classifier."""
    head = {"head.weight": (10, network.get("width", WIDTH)), "head.bias": (10,)}
    return draw(shapes(**network) | head, seed)


def _mlp(sizes, affine=False):
    """Of `MoCo._build_mlp`; the last batch norm has running statistics alone."""
    out = {}
    for i, (c, d) in enumerate(itertools.pairwise(sizes)):
        out[f"{3 * i}.weight"] = (d, c)
        leaves = ["running_mean", "running_var"]
        if affine or i < len(sizes) - 2:
            leaves += ["weight", "bias"]
        out |= {f"{3 * i + 1}.{leaf}": (d,) for leaf in leaves}
    return out


def _counted(arrays):
    """With the counters of its batch norms."""
    norms = [n.removesuffix(".running_mean") for n in arrays if n.endswith(".running_mean")]
    return arrays | {f"{n}.num_batches_tracked": np.array(9) for n in norms}


def moco_v3(hidden=8, dim=8, patches=None):
    """`checkpoint["state_dict"]`: both encoders with their heads, and the predictor."""
    out = {}
    for seed, name in enumerate(("base_encoder", "momentum_encoder"), 1):
        arrays = draw(shapes(), seed) | {"pos_embed": fixed()}
        if patches:
            arrays = {n: x for n, x in arrays.items() if not n.startswith("patch_embed")}
            arrays |= draw(patches, seed)
        head = behind("head.", draw(_mlp([WIDTH, hidden, hidden, dim]), seed))
        out |= behind(f"module.{name}.", arrays | head)
    return _counted(out | behind("module.predictor.", draw(_mlp([dim, hidden, dim]), 3)))


def dino(parts=("teacher", "student")):
    """`{"student": ..., "teacher": ...}`: the student is wrapped for distributed training."""
    inner = {"teacher": "backbone.", "student": "module.backbone."}
    head = {"mlp.0.weight": (16, WIDTH), "mlp.0.bias": (16,), "last_layer.weight_v": (32, 16)}
    return {
        part: behind(inner[part], draw(shapes(), seed))
        | behind(inner[part].replace("backbone", "head"), draw(head, seed))
        for seed, part in enumerate(("teacher", "student"), 1)
        if part in parts
    }


def dinov2(seed=0, grid=5, patch=PATCH):
    """The released weights: layer scale, a mask token, positions of a larger grid."""
    wanted = shapes(layer_scale=True, grid=grid, patch=patch)
    return draw(wanted | {"mask_token": (1, WIDTH)}, seed)
