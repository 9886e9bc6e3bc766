"""What a kind of encoder has to say for its weights to be exported and imported: the one seam.

A kind of encoder is a subclass of `Layout` here, over a module that moves the numbers
(`layout.py`: ResNets as torchvision names them; `vit_layout.py`: ViTs as timm does).
"""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np

from common.models import layout, positions, vit_layout, vit_variants
from common.models.encoder import Encoder
from common.models.resnet import ResNet
from common.models.vit import EPSILON, ViT

# of timm, with which tests/export/test_timm.py loads what is exported
TIMM = "1.0.31"


class Layout:
    """Of a kind of encoder.

    Attributes:
        name: what exports call it.
        kind: of `config.model.encoder`.
        words: for a message, e.g. "ResNet with torchvision's names".
        section: of the config that has to fit.
        marks: names of arrays, of which each such encoder has one of the first and one of the
            second group.
        classifier: where the libraries have a linear classifier, and MoCo its projection head.
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    words: ClassVar[str]
    section: ClassVar[str]
    marks: ClassVar[tuple[tuple[str, ...], tuple[str, ...]]]
    classifier: ClassVar[str]

    def to_other(self, params: Mapping, batch_stats: Mapping) -> dict[str, Any]:
        """Arrays of the encoder by the other library's names, in PyTorch's shapes."""
        raise NotImplementedError

    def from_other(self, arrays: Mapping[str, Any]) -> tuple[dict, dict]:
        """The inverse: `(params, batch_stats)`. Raises a `UserError` for unknown names."""
        raise NotImplementedError

    @classmethod
    def in_words(cls, arrays: Mapping[str, Any]) -> str:
        """What names and shapes say about a network, for a message."""
        raise NotImplementedError

    def about(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """All that somebody has to know to build the network: metadata of an export."""
        raise NotImplementedError

    def loads_into(self, about: Mapping[str, Any]) -> str:
        """How the arrays are loaded; "" where docs/export.md has to say it."""
        raise NotImplementedError

    @classmethod
    def read(cls, arrays: Mapping[str, Any], path: str) -> tuple[dict[str, Any], list[str]]:
        """Arrays of a file, as this code has them, and what was done to them, in words."""
        del path
        return dict(arrays), []

    def fitted(
        self, arrays: Mapping[str, Any], metadata: Mapping[str, Any], path: str
    ) -> tuple[dict[str, Any], list[str]]:
        """Arrays of `read` for this layout's own encoder, and what was done to them, in words."""
        del metadata, path
        return dict(arrays), []

    @classmethod
    def prefixes(cls, names: Iterable[str]) -> list[str]:
        """What precedes the names of each encoder of this kind among those of a file."""
        names = set(names)
        first, second = cls.marks
        found = {n.removesuffix(mark) for mark in first for n in names if n.endswith(mark)}
        return sorted(
            p for p in found if (not p or p.endswith(".")) and names & {p + x for x in second}
        )


class TorchvisionResNet(Layout):
    """A ResNet as torchvision has it; names and shapes say all that is needed."""

    name = "torchvision ResNet, version 1"
    kind = "resnet"
    words = "ResNet with torchvision's names"
    section = "config.model"
    marks = (
        ("conv1.weight", "conv1.0.weight"),  # ResNet-D has a sequence of convolutions
        ("layer1.0.conv1.weight", "layer1.0.conv1.conv.weight"),  # with selective kernels
    )
    classifier = "fc"

    def to_other(self, params: Mapping, batch_stats: Mapping) -> dict[str, Any]:
        """See `Layout`."""
        return layout.to_torchvision(params, batch_stats)

    def from_other(self, arrays: Mapping[str, Any]) -> tuple[dict, dict]:
        """See `Layout`."""
        return layout.from_torchvision(arrays)

    @classmethod
    def in_words(cls, arrays: Mapping[str, Any]) -> str:
        """See `Layout`."""
        return layout.in_words(layout.describe(arrays))

    def about(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """See `Layout`."""
        network = layout.describe(arrays)
        first = layout.conv1(network["stem"], network["resnet_d"])
        return network | {"conv1": first, "batch_norm_epsilon": 1e-5}

    def loads_into(self, about: Mapping[str, Any]) -> str:
        """See `Layout`."""
        return f"torchvision.models.{about['torchvision']}()" if about["torchvision"] else ""

    def fitted(
        self, arrays: Mapping[str, Any], metadata: Mapping[str, Any], path: str
    ) -> tuple[dict[str, Any], list[str]]:
        """See `Layout`: says what names and shapes of a ResNet-D from elsewhere do not show."""
        del path
        other = not metadata and layout.describe(arrays)["resnet_d"]
        note = (
            "a ResNet-D from elsewhere: here the first shortcut of stage 1 averages 2x2 pixels, as "
            "in SimCLR v2; timm's (resnet50d) does not, and is then another function"
        )
        return dict(arrays), [note] if other else []


class TimmViT(Layout):
    """A vision transformer as timm has it.

    Args:
        encoder: whose grid, positions and heads count, which parameters do not show.
    """

    name = "timm ViT, version 1"
    kind = "vit"
    words = "ViT with timm's names"
    section = "config.vit"
    marks = (
        ("patch_embed.proj.weight", "patch_embed.proj.0.weight"),
        ("blocks.0.norm1.weight", "blocks.0.0.norm1.weight"),  # DINOv2 has its blocks in chunks
    )
    classifier = "head"

    def __init__(self, encoder: ViT) -> None:
        self.encoder = encoder

    @property
    def _side(self) -> int:
        return self.encoder.image_size // self.encoder.patch

    @property
    def _token(self) -> bool:
        return self.encoder.pool == "token"

    def _table(self, side: int) -> np.ndarray | None:
        """The fixed positions; None if they are learned."""
        if self.encoder.positions == "learned":
            return None
        return positions.sincos(side, side, self.encoder.width, self._token)

    def to_other(self, params: Mapping, batch_stats: Mapping) -> dict[str, Any]:
        """See `Layout`; fixed positions are written for the grid of the training views."""
        return vit_layout.to_timm(params, batch_stats, self._table(self._side))

    def from_other(self, arrays: Mapping[str, Any]) -> tuple[dict, dict]:
        """See `Layout`; fixed positions are left out, being a constant here."""
        if self.encoder.positions != "learned":
            arrays = {name: x for name, x in arrays.items() if name != "pos_embed"}
        return vit_layout.from_timm(arrays)

    @classmethod
    def in_words(cls, arrays: Mapping[str, Any]) -> str:
        """See `Layout`."""
        return vit_layout.in_words(vit_layout.describe(arrays))

    def about(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """See `Layout`: also every field of the encoder, and what timm's constructor takes."""
        e = self.encoder
        return vit_layout.describe(arrays) | {
            "heads": e.heads,
            "mlp_ratio": e.mlp_ratio,
            "patches": e.patches,
            "positions": e.positions,
            "training_size": e.image_size,
            "layer_norm_epsilon": EPSILON,
            **({"batch_norm_epsilon": 1e-5} if e.has_batch_norm else {}),
            "gelu": "exact",
            "qkv": "rows of attn.qkv: query, key, value, each with the heads one after the other",
            "timm": self._timm(),
        }

    def _timm(self) -> dict[str, Any]:
        if self.encoder.patches == "conv":
            return {}  # timm has no such patches
        e = self.encoder
        arguments: dict[str, Any] = {
            "img_size": e.image_size,
            "patch_size": e.patch,
            "embed_dim": e.width,
            "depth": e.depth,
            "num_heads": e.heads,
            "mlp_ratio": e.mlp_ratio,
        }
        if not self._token:
            arguments |= {
                "class_token": False, "global_pool": "avg", "final_norm": False, "fc_norm": False,
            }  # fmt: skip
        return {
            "constructor": "timm.models.VisionTransformer",
            "arguments": arguments,
            "tried_with": TIMM,
        }

    def loads_into(self, about: Mapping[str, Any]) -> str:
        """See `Layout`."""
        if not about["timm"]:
            return ""
        return f"{about['timm']['constructor']}(**arguments) with the arguments in export.json"

    @classmethod
    def read(cls, arrays: Mapping[str, Any], path: str) -> tuple[dict[str, Any], list[str]]:
        """See `Layout`. Raises a `UserError` that names what no encoder here has."""
        return vit_variants.adapted(arrays, path)

    def fitted(
        self, arrays: Mapping[str, Any], metadata: Mapping[str, Any], path: str
    ) -> tuple[dict[str, Any], list[str]]:
        """See `Layout`: checks heads and fixed positions, resizes learned ones."""
        arrays, heads = dict(arrays), self.encoder.heads
        notes = vit_variants.check_heads(metadata.get("heads"), heads, self.encoder.width, path)
        table = arrays.get("pos_embed")
        side = 0 if table is None else vit_layout.side_of(table, self._token)
        if table is None or not side or table.shape[2] != self.encoder.width:
            return arrays, notes  # which is said where all names and shapes are compared
        fixed = self._table(side)
        if fixed is not None:
            vit_variants.check_positions(table, fixed, side, self._side, path)
        elif side != self._side:
            arrays["pos_embed"] = vit_variants.resized(table, self._side, self._token)
            notes.append(
                f"positions resized from {side} x {side} to {self._side} x {self._side} patches"
            )
        return arrays, notes


LAYOUTS: tuple[type[Layout], ...] = (TorchvisionResNet, TimmViT)


def of(encoder: Encoder | None) -> Layout:
    """The layout of an encoder; None: of a ResNet, whose parameters say all."""
    if isinstance(encoder, ViT):
        return TimmViT(encoder)
    assert encoder is None or isinstance(encoder, ResNet), encoder
    return TorchvisionResNet()
