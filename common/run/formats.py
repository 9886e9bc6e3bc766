"""Files of named arrays: `.safetensors` and `.npz`, and PyTorch's, which can only be read.

Nothing read here can run code: safetensors holds none, `.npz` is read without pickle, and a PyTorch
file is left to `torch.load(weights_only=True)`.
"""

import argparse
import contextlib
import hashlib
import io
import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from common.errors import UserError
from common.run import files

TORCH = (".pth", ".pt", ".tar", ".ckpt", ".bin")
SUFFIXES = (".safetensors", ".npz", *TORCH)
Arrays = dict[str, np.ndarray]
_LONGEST_HEADER = 100_000_000  # bytes, of safetensors
# of safetensors
_TYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8,
    "BOOL": np.bool_,
}  # fmt: skip


def read(path: epath.Path) -> tuple[Arrays, dict[str, Any], str]:
    """Reads every array of a file.

    Args:
        path: ends in one of `SUFFIXES`; local or e.g. `gs://...`.

    Returns:
        The arrays by name, the metadata that `write` was given ({} if none was), and the SHA-256 of
        the file.

    Raises:
        UserError: no such file, an unknown file extension, a damaged file, one with other things
            than arrays, or
            a PyTorch file where PyTorch is not installed.
    """
    if path.suffix not in SUFFIXES:
        if not path.exists():
            raise UserError(f"there is no file or workdir {path}: give one of weights, or of a run")
        raise UserError(
            f"{path} has an unknown file extension: expected one of {', '.join(SUFFIXES)}"
        )
    try:
        data = path.read_bytes()
        if not data:
            raise UserError(f"{path} is empty: fetch or write it again")
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror or error}; give a file of weights or a workdir"
        ) from error
    reader = {".safetensors": _safetensors, ".npz": _npz}.get(path.suffix, _torch)
    arrays, metadata = reader(data, path)
    return arrays, _decode(metadata), hashlib.sha256(data).hexdigest()


def read_header(path: epath.Path) -> dict[str, Any]:
    """The metadata of a `.safetensors` file, of which only the beginning is read.

    Args:
        path: local or e.g. `gs://...`.

    Raises:
        UserError: no such file, another file extension, no header that can be read, or a file that
            ends before the last array that its header names.
    """
    if path.suffix != ".safetensors":
        raise UserError(f"{path} has the file extension {path.suffix!r}: expected .safetensors")
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if length <= _LONGEST_HEADER else b""
        if len(text) < length:  # the end of a header is spaces: without some it is valid JSON too
            raise ValueError(f"it ends in its header of {length} bytes")
        header = json.loads(text)
        ends = [x["data_offsets"][1] for name, x in header.items() if name != "__metadata__"]
        expected, found = 8 + length + max(ends, default=0), path.stat().length
        if found < expected:
            raise ValueError(f"it has {found:,} of its {expected:,} bytes")
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror or error}; give a .safetensors file"
        ) from error
    except ValueError as error:
        raise _damaged(path, error) from error
    return _decode(header.get("__metadata__"))


def write(path: epath.Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> int:
    """Writes a `.safetensors` or `.npz` file, whole or not at all.

    Args:
        path: its file extension chooses the format.
        arrays: by name.
        metadata: what JSON can hold. In safetensors it is the `__metadata__` of the header, where
            what is no string is written as JSON; in `.npz` the comment of the zip file, so that
            the arrays are all that NumPy sees.

    Returns:
        The size in bytes.
    """
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    text = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    if path.suffix == ".safetensors":
        data = safetensors.numpy.save(arrays, text)
    else:
        while len(comment := json.dumps(text).encode()) > zipfile.ZIP_MAX_COMMENT:
            del text[max(text, key=lambda name: len(text[name]))]  # the names of 20,000 classes
        buffer, by_name = io.BytesIO(), dict[str, Any](arrays)
        np.savez(buffer, **by_name)
        with zipfile.ZipFile(buffer, "a") as archive:
            archive.comment = comment
        data = buffer.getvalue()
    files.write_bytes(path, data)
    return len(data)


def _safetensors(data: bytes, path: epath.Path) -> tuple[Arrays, Any]:
    try:
        # not safetensors.numpy.load: it does not know bfloat16
        tensors = dict(safetensors.deserialize(data))
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (safetensors.SafetensorError, ValueError) as error:
        raise _damaged(path, error) from error
    if other := {x["dtype"] for x in tensors.values()} - _TYPES.keys():
        raise UserError(f"{path} has arrays of the type {', '.join(other)}: convert them to F32")
    return {
        name: np.frombuffer(x["data"], _TYPES[x["dtype"]]).reshape(x["shape"])
        for name, x in tensors.items()
    }, header.get("__metadata__")


def _npz(data: bytes, path: epath.Path) -> tuple[Arrays, Any]:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        comment = zipfile.ZipFile(io.BytesIO(data)).comment
    except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise _damaged(path, error) from error
    try:
        return arrays, json.loads(comment or b"{}")
    except ValueError:  # somebody else's comment
        return arrays, {}


def _torch(data: bytes, path: epath.Path) -> tuple[Arrays, Any]:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path} is a PyTorch file and PyTorch is not installed: pip install torch, or turn it "
            "into .safetensors where it is"
        ) from error
    try:
        # DINO's training saves its command line too: a Namespace holds values, and runs nothing
        allowing = getattr(torch.serialization, "safe_globals", contextlib.nullcontext)  # 2.5
        with allowing([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TorchScript, which is answered below
            found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors, which could run code, or is damaged: save its "
            "state_dict() alone, as .safetensors or by torch.save"
        ) from error
    except (RuntimeError, ValueError, EOFError, OSError, KeyError) as error:
        if "TorchScript" in str(error):
            raise UserError(f"{path} is a TorchScript program: save its state_dict()") from error
        raise _damaged(path, error) from error
    for name in ("state_dict", "model"):  # what training scripts wrap it in
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
    tensors = dict(found) if isinstance(found, dict) else {}
    for name in ("teacher", "student"):  # DINO's, two networks
        if isinstance(tensors.get(name), dict):
            tensors |= {f"{name}.{inner}": x for inner, x in tensors[name].items()}
    tensors = {str(name): x for name, x in tensors.items() if isinstance(x, torch.Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no state_dict: save model.state_dict()")
    # NumPy has no bfloat16
    return {
        name: (x.float() if x.is_floating_point() else x).detach().numpy()
        for name, x in tensors.items()
    }, {}


def _decode(metadata: Any) -> dict[str, Any]:
    """Values as they were before `write` converted them to text."""

    def value(text: Any) -> Any:
        try:
            return json.loads(text)
        except (TypeError, ValueError):
            return text

    if not isinstance(metadata, dict):
        return {}
    return {name: value(text) for name, text in metadata.items()}


def _damaged(path: epath.Path, error: Exception) -> UserError:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]
    return UserError(f"{path} cannot be read as {path.suffix} ({reason}): fetch or write it again")
