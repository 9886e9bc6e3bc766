"""Reads an encoder's weights into one form, whatever wrote them.

* a file of this project's `--mode=export`;
* torchvision's and timm's ResNets, and any other state_dict with their names behind one prefix
  (`module.`, `backbone.`, ...), as `.safetensors`, `.npz` or `.pth`;
* the MoCo authors' checkpoints: v1 and v2 (`module.encoder_q.`, with their projection head), v3
  (`module.base_encoder.`);
* the workdir of a run, or one of its checkpoints.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict

from common.data.augment import presets
from common.errors import UserError
from common.models import layout
from common.run import files, formats, saved_config
from common.run.checkpoint import Checkpoints
from common.sharding import make_mesh, replicated

# The last linear maps of the MoCo authors' query encoder, which projects where others classify.
_MOCO_HEADS = {"moco_v1": {"fc": "dense1"}, "moco_v2": {"fc.0": "dense1", "fc.2": "dense2"}}


@dataclasses.dataclass(frozen=True)
class Weights:
    """What was read.

    Attributes:
        path: of the file or the run.
        arrays: of the encoder, in torchvision's layout, without its `fc` and counters.
        head: `(params, batch_stats)` of the projection head; None if there was none.
        unused: names of arrays that were ignored: classifier, predictor, key encoder, queue ...
        prefix: of the encoder's names in the file.
        metadata: of an export or a run: `mean`, `std`, `method`, `step` and more; {} of others.
        digest: SHA-256 of the file; "" for a run.
    """

    path: str
    arrays: dict[str, np.ndarray]
    head: tuple[dict, dict] | None = None
    unused: tuple[str, ...] = ()
    prefix: str = ""
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    digest: str = ""


def load_weights(path: str | epath.PathLike) -> Weights:
    """Reads a weights file, or the newest checkpoint of a workdir.

    Args:
        path: a file that `formats.read` can read, a workdir, or `WORKDIR/checkpoints/STEP`.

    Raises:
        UserError: if the path does not exist, cannot be read safely, or holds no ResNet.
    """
    path = files.path(path)
    if path.is_dir() or _is_checkpoint(path):
        return _of_run(path)
    arrays, metadata, digest = formats.read(path)
    prefix = _prefix(arrays, path)
    encoder, unused, last = {}, [], {}
    for name, array in arrays.items():
        own = name.removeprefix(prefix) if name.startswith(prefix) else ""
        if own.startswith("fc."):
            last[own] = array
        elif own and not own.endswith("." + layout.COUNTER):
            encoder[own] = array
        elif not own:
            unused.append(name)
    head = _moco_head(last) if prefix.endswith("encoder_q.") else None
    if head is None:
        unused += [prefix + name for name in last]
    return Weights(str(path), encoder, head, tuple(sorted(unused)), prefix, metadata, digest)


def fit(weights: Weights, params: Mapping, batch_stats: Mapping) -> tuple[dict, dict, bool]:
    """The weights as trees for a network, whose encoder they must fit exactly.

    Args:
        weights: from `load_weights`.
        params: of the network (`backbone`, `head`), arrays or their shapes.
        batch_stats: likewise.

    Returns:
        `(params, batch_stats, whether they include the head)`, in the types of the network. A head
        of another kind or size is left out.

    Raises:
        UserError: naming arrays that are missing, unknown to the network, of another shape, or not
            finite.
    """
    expected = jax.eval_shape(layout.to_torchvision, params["backbone"], batch_stats["backbone"])
    found = weights.arrays
    problems = []
    if missing := [name for name in expected if name not in found]:
        problems.append(f"lacks {_first_three(missing)}")
    if beyond := [name for name in found if name not in expected]:
        problems.append(f"has {_first_three(beyond)}, which the network does not have")
    other = [n for n in expected if n in found and found[n].shape != expected[n].shape]
    if other:
        shapes = [f"{n} {found[n].shape} and not {expected[n].shape}" for n in other]
        problems.append(f"has {_first_three(shapes)}")
    if broken := [n for n in found if not np.isfinite(found[n].astype(np.float32)).all()]:
        problems.append(f"has numbers that are not finite in {_first_three(broken)}")
    if problems:
        raise UserError(
            f"{weights.path} does not fit the network of the config: it {'; '.join(problems)}; the "
            f"file holds {_words(layout.describe(found))}, the config asks for "
            f"{_words(layout.describe(expected))}: change config.model"
        )
    new_params, new_stats = ({"backbone": x} for x in layout.from_torchvision(found))
    heads = (params.get("head", {}), batch_stats.get("head", {}))
    head = weights.head
    if head is not None and not all(map(_alike, head, heads)):
        head = None
    if head is not None:
        new_params["head"] = head[0]
        if head[1]:
            new_stats["head"] = head[1]
    return _as_type(new_params, params), _as_type(new_stats, batch_stats), head is not None


def _prefix(names: Mapping[str, Any], path: epath.Path) -> str:
    """What precedes the names of the one encoder in the file."""
    first, second = "conv1.weight", "layer1.0.conv1.weight"
    found = [n.removesuffix(first) for n in names if n.endswith(first)]
    found = [p for p in found if p + second in names and (not p or p.endswith("."))]
    # of an encoder and its moving average, the one that was trained
    trained = [p for p in found if "momentum" not in p and not p.endswith("encoder_k.")]
    found = trained or found
    if not found:
        raise UserError(
            f"{path} holds no ResNet with torchvision's names: expected {first} and {second}, "
            f"found {_first_three(sorted(names))}"
        )
    if len(found) > 1:
        raise UserError(
            f"{path} holds {len(found)} encoders, {_first_three([repr(p) for p in found])}: "
            "expected one; write a file with the one you mean"
        )
    return found[0]


def _moco_head(arrays: Mapping[str, np.ndarray]) -> tuple[dict, dict] | None:
    for layers in _MOCO_HEADS.values():
        wanted = {f"{theirs}.{leaf}" for theirs in layers for leaf in ("weight", "bias")}
        if arrays.keys() == wanted:
            return {
                ours: {
                    "kernel": arrays[f"{theirs}.weight"].transpose(),
                    "bias": arrays[f"{theirs}.bias"],
                }
                for theirs, ours in layers.items()
            }, {}
    return None


def _of_run(path: epath.Path) -> Weights:
    """Encoder and head of a workdir, or of `WORKDIR/checkpoints/STEP`."""
    workdir, step = path, None
    if _is_checkpoint(path):
        workdir, step = path.parent.parent, int(path.name)
    config = workdir / saved_config.FILE
    if not config.exists():
        raise UserError(f"{path} is a directory and holds no run (no config.json): give a workdir")
    saved = saved_config.read(workdir)
    try:
        augmentation = presets.resolve(saved["augment"], saved["data"]["image_size"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{config} cannot be read ({error}): restore it") from error
    sharding = replicated(make_mesh())
    with Checkpoints(workdir, None, read_only=True) as checkpoints:
        steps = checkpoints.all_steps()
        step = steps[-1] if steps and step is None else step
        if step not in steps:
            wanted = "" if step is None else f" (step {step})"
            raise UserError(
                f"no such checkpoint in {workdir}{wanted}: it has "
                f"{', '.join(map(str, steps)) or 'none yet'}"
            )
        shapes = checkpoints.shapes(step)
        target = {name: shapes[name] for name in ("params", "batch_stats")}
        shardings = jax.tree.map(lambda _: sharding, target)
        state = jax.device_get(checkpoints.restore_part(step, target, shardings))
    params, stats = state["params"], state["batch_stats"]
    return Weights(
        path=str(path),
        arrays=layout.to_torchvision(params["backbone"], stats["backbone"]),
        head=(params["head"], stats.get("head", {})),
        metadata={
            "mean": list(augmentation.mean),
            "std": list(augmentation.std),
            "method": saved.get("method"),
            "step": step,
        },
    )


def _is_checkpoint(path: epath.Path) -> bool:
    return path.parent.name == "checkpoints" and path.name.isdigit()


def _alike(found: Mapping, expected: Mapping) -> bool:
    """Whether two trees have the same names and shapes."""
    found, expected = ({k: x.shape for k, x in flatten_dict(t).items()} for t in (found, expected))
    return found == expected


def _as_type(found: dict, expected: Mapping) -> dict:
    """`found` in the types of a tree that has its names."""
    types = {k: x.dtype for k, x in flatten_dict(expected).items()}
    return jax.tree_util.tree_map_with_path(
        lambda path, x: np.asarray(x, types[tuple(key.key for key in path)]), found
    )


def _words(network: Mapping[str, Any]) -> str:
    kind = "bottleneck" if network["bottleneck"] else "basic"
    depth = f"depth={network['depth']}" if network["depth"] else f"stages={network['stages']}"
    stem = network["stem"] or "unknown"
    return f"a ResNet with {depth} ({kind} blocks), width {network['width']}, stem {stem}"


def _first_three(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
