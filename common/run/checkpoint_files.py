"""What lies in the directory of one checkpoint, read without the manager that wrote it.

`state/` has the arrays, in orbax's format. `progress/metadata` has the record beside them, JSON:
"progress" (the position of the run, a dictionary), its SHA-256, and the digest of each array.
(Checkpoints of the first versions have the position alone there.)
"""

import json
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from common.errors import first_line
from common.run import digests, files

ASIDE = "damaged_checkpoints"


def make_record(position: dict[str, Any], state: Any) -> dict[str, Any]:
    """The record to save beside `state`; all processes call this."""
    return {
        "progress": position,
        "sha256": digests.of_json(position),
        "digests": digests.of_state(state),
    }


def position_of(record: dict[str, Any]) -> dict[str, Any]:
    """The position of the run, of a record."""
    return record.get("progress", record)


def read_record(directory: epath.Path) -> dict[str, Any]:
    """The record beside the state.

    Args:
        directory: of a checkpoint.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    return json.loads((directory / "progress" / "metadata").read_text())


def read_shapes(directory: epath.Path) -> dict[str, Any]:
    """`ShapeDtypeStruct`s of the arrays in the checkpoint, by field and name."""
    saved = ocp.PyTreeCheckpointHandler().metadata(directory / "state")
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved.tree)


def read(step: int, directory: epath.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads a whole checkpoint into this process's memory, without the other processes.

    Args:
        step: of the checkpoint, for messages.
        directory: of the checkpoint.

    Returns:
        ({name: array}, position); `digests.names` says how arrays are called.

    Raises:
        Exception: whatever is wrong with its files.
        digests.Damage: an array is not what was saved.
    """
    handler = ocp.PyTreeCheckpointHandler()
    tree = handler.metadata(directory / "state").tree
    how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    state = handler.restore(directory / "state", args=ocp.args.PyTreeRestore(restore_args=how))
    arrays = dict(zip(digests.names(state), jax.tree.leaves(state), strict=True))
    record = read_record(directory)
    found = {name: digests.of_array(array) for name, array in arrays.items()}
    digests.compare(step, found, record)
    return arrays, position_of(record)


def placed(target: Any, shardings: Any) -> Any:
    """The shapes of `target`, each with its sharding."""
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        target,
        shardings,
    )


def set_aside(directory: epath.Path, workdir: epath.Path) -> str:
    """Takes a damaged checkpoint out of the way; returns what was done: "in PATH" or "deleted".

    It is moved to `damaged_checkpoints/`; an object store cannot move, so there it is deleted.
    """
    if files.is_remote(directory):
        directory.rmtree()
        return "deleted"
    target = workdir / ASIDE / directory.name
    number = 1
    while target.exists():
        number += 1
        target = target.with_name(f"{directory.name}.{number}")
    target.parent.mkdir(exist_ok=True)
    directory.rename(target)
    return f"in {target}"


def reason(error: BaseException) -> str:
    """What is wrong with a checkpoint, for a message; of a foreign error its type too."""
    if isinstance(error, digests.Damage):
        return str(error)
    return f"{type(error).__name__}: {first_line(error)}" if str(error) else type(error).__name__
