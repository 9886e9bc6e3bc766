"""Reads an encoder's weights into one form, whatever wrote them.

* a file of this project's `--mode=export`;
* torchvision's and timm's ResNets, timm's ViTs, and any other state_dict with their names behind
  one prefix (`module.`, `backbone.`, ...), as `.safetensors`, `.npz` or `.pth`;
* the MoCo authors' checkpoints: v1 and v2 (`module.encoder_q.`, with their projection head), v3
  (`module.base_encoder.`, with head and predictor);
* DINO's and DINOv2's, released weights and checkpoints of training (`teacher`);
* the workdir of a run, or one of its checkpoints.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict

from common import config as configs
from common.data.augment import presets
from common.errors import UserError
from common.models import layout, layouts, vit
from common.models.encoder import Encoder
from common.run import console, files, formats, saved_config
from common.run.checkpoint import Checkpoints
from common.sharding import make_mesh, replicated
from common.train import moco_heads
from common.train.which_encoder import choose, first_three

Part = tuple[dict, dict]  # parameters and batch statistics of a part of a network


@dataclasses.dataclass(frozen=True)
class Weights:
    """What was read.

    Attributes:
        path: of the file or the run.
        arrays: of the encoder, in its layout, without classifier and counters.
        layout: what kind of encoder it is.
        head: `(params, batch_stats)` of the projection head; None if there was none.
        predictor: likewise.
        unused: names of arrays that were ignored: classifier, key encoder, queue ...
        notes: what was chosen or changed, in words.
        prefix: of the encoder's names in the file.
        metadata: of an export or a run: `mean`, `std`, `method`, `step` and more; {} of others.
        digest: SHA-256 of the file; "" for a run.
    """

    path: str
    arrays: dict[str, np.ndarray]
    layout: type[layouts.Layout] = layouts.TorchvisionResNet
    head: Part | None = None
    predictor: Part | None = None
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    prefix: str = ""
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    digest: str = ""


def load_weights(path: str | epath.PathLike) -> Weights:
    """Reads a weights file, or the newest checkpoint of a workdir.

    Args:
        path: a file that `formats.read` can read, a workdir, or `WORKDIR/checkpoints/STEP`.

    Raises:
        UserError: if the path does not exist, cannot be read safely, or holds no encoder of a kind
            that this project has.
    """
    path = files.path(path)
    if path.is_dir() or _is_checkpoint(path):
        return _of_run(path)
    arrays, metadata, digest = formats.read(path)
    if "classifier" in metadata:
        raise UserError(
            f"{path} is a network with a classifier, for distil.teacher and --mode=classify: give "
            "the workdir of its run, or what --mode=export made of that"
        )
    kind, prefix, note = choose(arrays, path)
    encoder, unused, last = {}, [], {}
    for name, array in arrays.items():
        own = name.removeprefix(prefix) if name.startswith(prefix) else ""
        if own.startswith(f"{kind.classifier}."):
            last[own.removeprefix(f"{kind.classifier}.")] = array
        elif own and not own.endswith("." + layout.COUNTER):
            encoder[own] = array
        elif not own:
            unused.append(name)
    head, predictor, behind = None, None, ""
    if prefix.endswith("encoder_q."):
        head = moco_heads.first_versions(last)
    elif prefix.endswith("base_encoder."):
        head = moco_heads.third_version(last)
        behind = prefix.removesuffix("base_encoder.") + "predictor."
        found = {n.removeprefix(behind): x for n, x in arrays.items() if n.startswith(behind)}
        predictor = moco_heads.third_version(found)
    if head is None:
        unused += [f"{prefix}{kind.classifier}.{name}" for name in last]
    if predictor is not None:
        unused = [name for name in unused if not name.startswith(behind)]
    encoder, notes = kind.read(encoder, str(path))
    return Weights(
        str(path),
        encoder,
        kind,
        head,
        predictor,
        tuple(sorted(unused)),
        (*note, *notes),
        prefix,
        metadata,
        digest,
    )


def fit(
    weights: Weights, params: Mapping, batch_stats: Mapping, encoder: Encoder | None = None
) -> tuple[dict, dict, bool]:
    """The weights as trees for a network, whose encoder they must fit exactly.

    Positions of a ViT that are learned may be for another number of patches: they are resized.

    Args:
        weights: from `load_weights`.
        params: of the network (`backbone`, `head`, perhaps `predictor`), arrays or their shapes.
        batch_stats: likewise.
        encoder: of the network; None: a ResNet.

    Returns:
        `(params, batch_stats, whether they include the head)`, in the types of the network. A head
        of another kind or size is left out, and with it the predictor.

    Raises:
        UserError: naming arrays that are missing, unknown to the network, of another shape, or not
            finite; or for an encoder of another kind.
    """
    own = layouts.of(encoder)
    if weights.layout is not type(own):
        raise UserError(
            f"{weights.path} holds {weights.layout.in_words(weights.arrays)}, and the config asks "
            f"for another kind of encoder: set --config.model.encoder={weights.layout.kind}"
        )
    expected = jax.eval_shape(own.to_other, params["backbone"], batch_stats.get("backbone", {}))
    found, notes = own.fitted(weights.arrays, weights.metadata, weights.path)
    problems = []
    if missing := [name for name in expected if name not in found]:
        problems.append(f"lacks {first_three(missing)}")
    if beyond := [name for name in found if name not in expected]:
        problems.append(f"has {first_three(beyond)}, which the network does not have")
    other = [n for n in expected if n in found and found[n].shape != expected[n].shape]
    if other:
        shapes = [f"{n} {found[n].shape} and not {expected[n].shape}" for n in other]
        problems.append(f"has {first_three(shapes)}")
    if broken := [n for n in found if not np.isfinite(found[n].astype(np.float32)).all()]:
        raise UserError(
            f"{weights.path} has numbers that are not finite in {first_three(broken)}: the run "
            "that wrote it diverged, or the file is damaged; take another one"
        )
    if problems:
        theirs, ours = own.in_words(weights.arrays), own.in_words(expected)
        what = f"the file holds {theirs}, the config asks for {ours}: change {own.section}"
        if theirs == ours:
            what = "no field of the config helps: the file is incomplete, or of another network"
        raise UserError(
            f"{weights.path} does not fit the network of the config: it {'; '.join(problems)}; "
            f"{what}"
        )
    for note in notes:
        console.say(f"  {note}")
    new_params, new_stats = {}, {}
    new_params["backbone"], stats = own.from_other(found)
    if stats:
        new_stats["backbone"] = stats
    with_head = True
    for name, part in (("head", weights.head), ("predictor", weights.predictor)):
        own_part = (params.get(name, {}), batch_stats.get(name, {}))
        if part is None or not all(map(_alike, part, own_part)):
            with_head = with_head and name != "head"
        elif with_head:
            new_params[name] = part[0]
            if part[1]:
                new_stats[name] = part[1]
    return _as_type(new_params, params), _as_type(new_stats, batch_stats), with_head


def _of_run(path: epath.Path) -> Weights:
    """Encoder and head of a workdir, or of `WORKDIR/checkpoints/STEP`."""
    workdir, step = path, None
    if _is_checkpoint(path):
        workdir, step = path.parent.parent, int(path.name)
    if not (workdir / saved_config.FILE).exists():
        raise UserError(f"{path} is a directory and holds no run (no config.json): give a workdir")
    saved, augmentation, encoder = views_and_encoder(workdir)
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
    head, predictor = (
        (params[name], stats.get(name, {})) if name in params else None
        for name in ("head", "predictor")
    )
    own = layouts.of(encoder)
    return Weights(
        path=str(path),
        arrays=own.to_other(params["backbone"], stats.get("backbone", {})),
        layout=type(own),
        head=head,
        predictor=predictor,
        metadata={
            "mean": list(augmentation.mean),
            "std": list(augmentation.std),
            "method": saved.get("method"),
            "step": step,
            **({"heads": encoder.heads} if encoder else {}),
        },
    )


def views_and_encoder(
    workdir: epath.Path,
) -> tuple[dict[str, Any], presets.Augmentation, vit.ViT | None]:
    """What a run's arrays do not show.

    Returns:
        `(its config, the augmentation of view 1, its encoder if that is a ViT)`.

    Raises:
        UserError: `config.json` is missing or cannot be understood.
    """
    saved = saved_config.read(workdir)
    try:
        views = presets.resolve(saved["augment"], saved["data"]["image_size"])
        if saved["model"].get("encoder") != "vit":
            return saved, views, None
        model, section = (configs.section(name, **saved[name]) for name in ("model", "vit"))
        return saved, views, vit.make_encoder(model, section, views.size)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        path = workdir / saved_config.FILE
        raise UserError(f"{path} cannot be read ({error}): restore it") from error


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
