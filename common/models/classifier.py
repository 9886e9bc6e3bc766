"""A fine-tuned network in one file: encoder, the layers of its head in use, linear classifier.

The file has all that is needed to apply it: no run, no config and no dataset beside it.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from common import config as configs
from common.errors import UserError
from common.models import encoder, heads
from common.models.heads import Network
from common.run import files, formats

SUFFIX = ".safetensors"
_KIND = "fine-tuned classifier"  # in the metadata, what tells these files from others
_VERSION = 1
SECTIONS = ("model", "vit", "head")  # of the config, what a network is built from


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A network and a linear classifier of one of its layers, without their arrays.

    Attributes:
        config: sections "model", "vit" and "head" of the run.
        view_size: side of the run's training views, for which a ViT's positions are.
        layer: what the classifier reads: "backbone", "head1" ..., "projection".
        mean: of the images, one value a colour, in [0, 1].
        std: likewise.
        image_size: side of the images that it was fine-tuned on, in pixels.
        classes: the names, as the data source has them, else "0", "1" ...
        info: for messages and records, what JSON can hold: run, checkpoint, recipe, accuracy.
    """

    config: ConfigDict
    view_size: int
    layer: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    classes: tuple[str, ...]
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def network(self) -> Network:
        """As of the run, with one BN group.

        Raises:
            UserError: from its builder.
        """
        return heads.make_network(self.config, self.view_size).with_groups(1)

    def logits(self, arrays: Any, images: jax.Array) -> jax.Array:
        """Eval-mode logits; pure, so that it can be compiled.

        Args:
            arrays: `{"params": {"network", "classifier"}, "batch_stats"}`, see `load`.
            images: uint8 `[b, h, w, 3]`.

        Returns:
            `[b, c]`, at least float32.
        """
        scaled = encoder.scale(images, self.mean, self.std, self.network.backbone.dtype)
        variables = {
            "params": arrays["params"]["network"], "batch_stats": arrays["batch_stats"],
        }  # fmt: skip
        features: Any = self.network.apply(variables, scaled, self.layer, method="encode")
        return linear(arrays["params"]["classifier"], features)

    def shapes(self) -> Any:
        """The tree of `arrays`, as shapes and types."""
        size = self.image_size
        images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        init = functools.partial(self.network.init, train=False)
        variables = jax.eval_shape(init, jax.random.key(0), images)
        depth = self.network.depth_of(self.layer)
        params = start(self.network, self.layer, len(self.classes), variables["params"])
        return {
            "params": params,
            "batch_stats": used(variables.get("batch_stats", {}), depth),
        }


def linear(params: Mapping[str, jax.Array], features: jax.Array) -> jax.Array:
    """Logits `[b, c]` of features `[b, d]`: `kernel [d, c]`, `bias [c]`."""
    logits = jnp.matmul(features, params["kernel"], precision="highest")
    return logits + params["bias"][None]


def used(tree: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """Parameters or statistics of a network, without the layers of its head above `depth`."""
    names = [f"{kind}{i + 1}" for i in range(depth) for kind in ("dense", "bn")]
    head = {name: x for name, x in tree.get("head", {}).items() if name in names}
    backbone = {k: x for k, x in tree.items() if k == "backbone"}  # no statistics, no entry
    return backbone | ({"head": head} if head else {})


def start(
    network: Network, layer: str, num_classes: int, params: Mapping[str, Any]
) -> dict[str, Any]:
    """`{"network", "classifier"}`: the layers in use of a network, and zeros.

    Args:
        network: whose parameters these are.
        layer: that the classifier reads.
        num_classes: c.
        params: of the network, arrays or their shapes.

    Raises:
        UserError: for a layer that the network does not have.
    """
    depth, dim = network.depth_of(layer), network.backbone.feature_dim
    if depth:
        dim = params["head"][f"dense{depth}"]["kernel"].shape[-1]
    kind = encoder.at_least_float32(network.backbone.dtype)
    return {
        "network": used(params, depth),
        "classifier": {
            "kernel": np.zeros((dim, num_classes), kind), "bias": np.zeros(num_classes, kind),
        },
    }  # fmt: skip


def save(path: str | os.PathLike, classifier: Classifier, arrays: Any) -> int:
    """Writes a classifier, whole or not at all; returns the size in bytes.

    Args:
        path: ends in `SUFFIX`; local or e.g. `gs://...`. A file there is replaced.
        classifier: what the arrays are of.
        arrays: on the host, see `load`.
    """
    config = configs.as_dict(classifier.config)
    metadata = {
        "kind": _KIND,
        "version": _VERSION,
        "config": {name: config[name] for name in SECTIONS},
        "info": dict(classifier.info),
        "digest": digest(arrays),
    } | {name: getattr(classifier, name) for name in _PLAIN}
    # as JSON all of them: `formats` leaves text as it is, and takes "7" for a number
    text = {"classifier": json.dumps(metadata)}
    return formats.write(files.path(path), _named(arrays), text)


_PLAIN = ("view_size", "layer", "mean", "std", "image_size", "classes")


def describe(path: str | os.PathLike) -> Classifier:
    """What a file holds, without its arrays: only its header is read.

    `info["digest"]` is a SHA-256 of all arrays and their names, as it was when they were saved.

    Raises:
        UserError: no such file, or not one that `save` wrote.
    """
    path = files.path(path)
    return _described(formats.read_header(path), path)


def load(path: str | os.PathLike) -> tuple[Classifier, dict[str, Any]]:
    """Reads what `save` wrote.

    Returns:
        The classifier, and its arrays on the host: `{"params": {"network": {"backbone", "head"},
        "classifier": {"kernel", "bias"}}, "batch_stats"}`.

    Raises:
        UserError: no such file, not one that `save` wrote, or a damaged one.
    """
    path = files.path(path)
    header = _described(formats.read_header(path), path)
    named, _, _ = formats.read(path)
    arrays = {"batch_stats": {}} | unflatten_dict(
        {tuple(k.split("/")): x for k, x in named.items()}
    )
    if digest(arrays) != header.info["digest"]:
        raise UserError(
            f"{path} is damaged, its arrays are not those that were saved: fetch it once more, "
            "or give the command of --mode=finetune again"
        )
    want = {k: x.shape for k, x in flatten_dict(header.shapes()).items()}
    if {k: x.shape for k, x in flatten_dict(arrays).items()} != want:
        raise UserError(
            f"{path} holds arrays of another network than its own config describes: use the "
            "version of the code that wrote it"
        )
    return header, arrays


def digest(arrays: Any) -> str:
    """SHA-256 of names, shapes, types and bytes of arrays as `load` gives them."""
    found = hashlib.sha256()
    for name, x in sorted(_named(arrays).items()):
        found.update(f"{name} {x.dtype} {x.shape}\n".encode())
        found.update(np.ascontiguousarray(x).tobytes())
    return found.hexdigest()


def _named(arrays: Any) -> dict[str, np.ndarray]:
    return {"/".join(k): np.asarray(x) for k, x in flatten_dict(arrays).items()}


def _described(found: Mapping[str, Any], path: epath.Path) -> Classifier:
    found = found.get("classifier") or {}
    if not isinstance(found, dict) or found.get("kind") != _KIND:
        raise UserError(
            f"{path} is no fine-tuned network: give a file that --mode=finetune wrote, "
            f"WORKDIR/finetuned/NAME{SUFFIX}"
        )
    if found["version"] != _VERSION:
        raise UserError(
            f"{path} was written by a newer version of the code (its format is "
            f"{found['version']}, expected {_VERSION}): use that version"
        )
    config = ConfigDict({name: configs.section(name) for name in SECTIONS}).lock()
    configs.update(config, found["config"], str(path))
    plain: dict[str, Any] = {n: tuple(x) if isinstance(x := found[n], list) else x for n in _PLAIN}
    return Classifier(config, info=found["info"] | {"digest": found["digest"]}, **plain)
