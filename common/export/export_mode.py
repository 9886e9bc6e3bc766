"""`--mode=export`: the encoder for torchvision, timm and NumPy, and as a compiled JAX function."""

import importlib.metadata
import json
from typing import Any

import jax
import numpy as np

from common import version
from common.data.augment import presets
from common.errors import UserError
from common.evaluate.feature_files import shortened
from common.evaluate.pretrained import Pretrained
from common.export import stablehlo
from common.models import layout, layouts
from common.run import files, formats, saved_config

FORMATS = ("safetensors", "npz", "stablehlo")
LINEAR = "linear_eval.npz"  # written by --mode=linear_eval
_CLASSES = 1000  # the default of torchvision's constructors
_INPUT = "RGB [n, 3, h, w], divided by 255 to [0, 1], then (image - mean) / std per colour"
_PADDING = "; this is not part of {first}, whose zero padding would make that inexact"


def run(opened: Pretrained) -> tuple[dict[str, Any], str]:
    """Writes the formats of `settings.export.format`; `docs/export.md` says how to use them."""
    c = opened.settings.export
    wanted = [name.strip() for name in c.format.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in FORMATS]
    if unknown or not wanted:
        raise UserError(
            f"eval.export.format={c.format!r}: expected one or more of "
            f"{', '.join(FORMATS)}, separated by commas"
        )
    if opened.state is None:
        raise UserError(
            f"eval.features={opened.settings.features!r} has no weights to export: expected trained"
        )
    directory = files.path(c.dir) if c.dir else opened.workdir / "export"
    arrays, metadata = weights_of(opened)
    if jax.process_index() != 0:
        return {"dir": str(directory)}, ""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        sizes = {}
        for name in wanted:
            if name == "stablehlo":
                path, data = directory / "encoder.stablehlo", stablehlo.serialize(opened)
                files.write_bytes(path, data)
                sizes[path.name] = len(data)
            else:
                path = directory / f"model.{name}"
                sizes[path.name] = formats.write(path, arrays, metadata)
        text = json.dumps(metadata | {"files": sizes}, indent=2)
        files.write_text(directory / "export.json", text + "\n")
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write to {directory}: {reason}; see --eval.export.dir") from error
    written = ", ".join(f"{name} ({size / 1e6:.1f} MB)" for name, size in sizes.items())
    own = layouts.of(opened.method.setup.network.backbone)
    fits = own.loads_into(metadata)
    loads = f"loads into {fits}" if fits else "docs/export.md says how to load"
    return {"dir": str(directory), "files": sizes, "fc": metadata["fc"]}, (
        f"Exported {opened.subject} to {directory}: {written}; {loads}; "
        f"{own.classifier}: {metadata['fc']}."
    )


def weights_of(opened: Pretrained) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A complete state_dict of float32 arrays, and the metadata needed to use it.

    Args:
        opened: a run with weights.

    Returns:
        Arrays by the names of torchvision (ResNets) or timm (ViTs), including the classifier and
        the batch norms' counters, and metadata as JSON values.
    """
    config, state = opened.config, opened.state
    encoder = opened.method.setup.network.backbone
    own = layouts.of(encoder)
    trees = (tree.get("backbone", {}) for tree in (state.params, state.batch_stats))
    arrays = {
        name: np.asarray(array, np.float32)
        for name, array in own.to_other(*jax.device_get(tuple(trees))).items()
    }
    kernel, bias, fc, classes = _classifier(opened, encoder.feature_dim)
    norms = layout.batch_norms(arrays)
    for name in norms:
        arrays[f"{name}.{layout.COUNTER}"] = np.array(opened.step, np.int64)
    arrays |= {f"{own.classifier}.weight": kernel.T, f"{own.classifier}.bias": bias}
    augmentation = presets.resolve(config.augment, config.data.image_size)
    run = saved_config.read(opened.workdir)  # --eval may name other data
    libraries = ("jax", "flax", "numpy", "safetensors")
    first = "conv1" if own.kind == "resnet" else "patch_embed.proj"
    return arrays, {
        "layout": own.name,
        "weights": opened.settings.features,
        "method": config.method,
        "supervised": opened.method.supervised and opened.settings.features == "trained",
        "step": opened.step,
        "data": f"{shortened(run['data']['source'])} ({run['data']['train_split']})",
        "init_from": shortened(config.init_from),
        **own.about(arrays),
        "input": _INPUT + (_PADDING.format(first=first) if norms else ""),
        "input_range": [0.0, 1.0],
        "mean": list(augmentation.mean),
        "std": list(augmentation.std),
        "image_size": config.data.image_size,
        "trained_in": config.model.dtype,
        "fc": fc,
        "class_names": classes,
        **version.fields(),  # of this code
        "versions": {name: importlib.metadata.version(name) for name in libraries},
    }


def _classifier(opened: Pretrained, d: int) -> tuple[np.ndarray, np.ndarray, str, list[str]]:
    """`(kernel [d, c], bias [c], where they come from, class names)`, float32.

    Those of `--mode=linear_eval` if it used the backbone of this checkpoint, else zeros.
    """
    path, reason = opened.workdir / LINEAR, "no linear evaluation"
    if path.exists() and opened.settings.features == "trained":
        found, _, _ = formats.read(path)
        lacking = [name for name in ("kernel", "bias", "step") if name not in found]
        if lacking:
            raise UserError(f"{path} lacks {', '.join(lacking)}: run --mode=linear_eval again")
        step, layer = int(found["step"]), str(found.get("layer", "backbone"))
        own_size = opened.config.data.image_size
        if step != opened.step:
            reason = f"the linear evaluation is of step {step}"
        elif (size := int(found.get("image_size", own_size))) != own_size:
            reason = f"the linear evaluation is of images of {size} pixels, not of {own_size}"
        elif layer != "backbone" or found["kernel"].shape[0] != d:
            reason = f"the linear evaluation is of the layer {layer}, not of the backbone"
        else:
            kernel, bias = (np.asarray(found[name], np.float32) for name in ("kernel", "bias"))
            names = [str(name) for name in found.get("class_names", ())]
            return kernel, bias, f"linear evaluation of step {step}", names
    kernel, bias = np.zeros((d, _CLASSES), np.float32), np.zeros(_CLASSES, np.float32)
    return kernel, bias, f"zeros ({reason})", []
