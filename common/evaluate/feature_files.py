"""Features on disk: `.npz` for NumPy, Parquet for pandas and other table readers."""

import dataclasses
import json
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
from etils import epath

from common.errors import UserError
from common.run import files


@dataclasses.dataclass(frozen=True)
class Embedded:
    """Features of the images of a split, row by row.

    Attributes:
        features: `[n, d]`, float32 (of raw pixels uint8).
        labels: int32 `[n]`, -1 where unlabelled.
        ids: int64 `[n]`, indices into the split.
        names: str `[n]`, `Source.names`: paths of files below the folder that the user named.
        class_names: of the labels 0, 1, ...; empty where nothing is labelled.
        about: which encoder and which data, as JSON values.
        left_out: str `[m]`, names of the damaged images that have no row.
    """

    features: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    names: np.ndarray
    class_names: tuple[str, ...]
    about: dict[str, Any]
    left_out: np.ndarray = dataclasses.field(default_factory=lambda: np.array([], str))

    @property
    def shown_names(self) -> list[str]:
        """`shown_names` of the rows, the same whichever images are damaged."""
        return shown_names([*self.names, *self.left_out])[: len(self.names)]


def formats_of(text: str) -> list[str]:
    """Parses `eval.embed.format`; npz is always among them, and csv means features in the table.

    Raises:
        UserError: an unknown format, or Parquet without pyarrow.
    """
    formats = [name.strip() for name in text.split(",") if name.strip()]
    for name in formats:
        if name not in (*WRITERS, "csv"):
            raise UserError(
                f"eval.embed.format={text!r}: {name!r} is unknown, choose one or more of "
                "npz,parquet,csv"
            )
    if "parquet" in formats:
        _pyarrow()
    return ["npz", *(name for name in dict.fromkeys(formats) if name != "npz")]


def printable(name: str) -> str:
    r"""A name as valid UTF-8: invalid bytes of a file name become `\udcXX`."""
    return name.encode("utf-8", "backslashreplace").decode()


def below(names: Iterable[object]) -> tuple[str, list[str]]:
    """The folder that all names share, and the names below it, as `printable` gives them.

    The folder ends in a slash, or is "" where they share none.
    """
    found = [printable(str(name)) for name in names]
    common = os.path.commonprefix(found)  # noqa: RUF071, the next line cuts it at a slash
    folder = common[: common.rfind("/") + 1]
    return folder, [name.removeprefix(folder) for name in found]


def rooted(folder: str) -> bool:
    """Whether a path tells where on a disk or in a bucket it is (shards keep such names)."""
    return folder.startswith("/") or "://" in folder


def shown_names(names: Iterable[object]) -> list[str]:
    """Names for people: valid UTF-8; absolute paths (shards keep them) without what they share."""
    folder, found = below(names)
    return found if rooted(folder) else [folder + name for name in found]


def write_npz(path: epath.Path, embedded: Embedded) -> None:
    """Writes the fields of `Embedded`; `np.load(path)` reads them, without pickle."""
    fields = {f.name: getattr(embedded, f.name) for f in dataclasses.fields(embedded)}
    fields["class_names"] = np.array(embedded.class_names, str)
    fields["about"] = np.array(json.dumps(embedded.about))
    files.write_binary(path, lambda file: np.savez(file, **fields))


def write_parquet(path: epath.Path, embedded: Embedded) -> None:
    """Writes the columns id, name, label, class_name (null: none) and features, a list of d.

    The schema's metadata holds `about` and the list `left_out` as JSON.
    """
    pa, parquet = _pyarrow()
    n, d = embedded.features.shape
    unlabelled = embedded.labels < 0
    classes = [printable(str(c)) for c in embedded.class_names]
    table = pa.table(
        {
            "id": pa.array(embedded.ids),
            "name": pa.array([printable(str(name)) for name in embedded.names], pa.string()),
            "label": pa.array(embedded.labels, mask=unlabelled),
            "class_name": pa.array(
                [classes[i] if i >= 0 else None for i in embedded.labels], pa.string()
            ),
            "features": pa.FixedSizeListArray.from_arrays(
                pa.array(np.ascontiguousarray(embedded.features).reshape(n * d)), d
            ),
        }
    )
    left_out = [printable(str(name)) for name in embedded.left_out]
    table = table.replace_schema_metadata(
        {"about": json.dumps(embedded.about), "left_out": json.dumps(left_out)}
    )
    files.write_binary(path, lambda file: parquet.write_table(table, file))


WRITERS = {"npz": write_npz, "parquet": write_parquet}


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            "eval.embed.format=parquet needs pyarrow, which is not installed: pip install "
            "pyarrow, or leave the format at npz"
        ) from error
    return pyarrow, pyarrow.parquet


def shortened(text: str) -> str:
    """A path without its directories, also after `folder:`, for a page that may be shared."""
    kind, colon, rest = text.partition(":")
    if not colon or not kind.isalnum() or rest.startswith("//"):
        kind, colon, rest = "", "", text
    rooted = rest.startswith(("/", "~", "./", "../")) or "://" in rest
    return kind + colon + (os.path.basename(rest.rstrip("/")) if rooted else rest)
