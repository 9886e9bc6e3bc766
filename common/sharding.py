"""Mesh, shardings, and global arrays from the rows of each host.

One mesh axis, "data". Arrays are replicated unless a state dataclass says otherwise through
`sharded(...)`; batches are split along their first axis.
"""

import dataclasses
import functools
import pickle
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import flax
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from common.errors import UserError

AXIS = "data"
_P = ParamSpec("_P")
_T = TypeVar("_T")


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh with the single axis "data" over `devices` (default: all devices).

    The axis type is named because the default became Explicit, under which a similarity matrix
    of two sharded arrays is refused.
    """
    devices = jax.devices() if devices is None else list(devices)
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows (axis 0) are split over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def sharded(*axes: str | None) -> Any:
    """Field of a state dataclass whose arrays are split, e.g. `sharded(None, "data")`.

    Leave out trailing axes that are not split: a compiled step returns its shardings in that form,
    and `jit` would compile again for the longer one.
    """
    return flax.struct.field(metadata={"spec": PartitionSpec(*axes)})


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """Shardings of a (nested) state dataclass: replicated, except fields marked `sharded(...)`.

    Args:
        mesh: the device mesh.
        state: the state, or its `jax.eval_shape`.

    Returns:
        A tree like `state` with a `NamedSharding` at every leaf.
    """

    def shardings(tree: Any, spec: PartitionSpec) -> Any:
        if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
            fields = {
                f.name: shardings(getattr(tree, f.name), f.metadata.get("spec", spec))
                for f in dataclasses.fields(tree)
            }
            return dataclasses.replace(tree, **fields)
        return jax.tree.map(lambda _: NamedSharding(mesh, spec), tree)

    return shardings(state, PartitionSpec())


def each_device(
    function: Callable, mesh: Mesh | None, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """`jax.shard_map`; on one device, where nothing is communicated, the plain function.

    A collective over a single device computes nothing, and compilers are not tested for it: libtpu
    0.0.42 crashes on a reduce-scatter when it optimises little (`--mode=plan --quick`).

    Args:
        function: of the arguments that `in_specs` split, and of the keyword `axis`, the name of
            the mesh axis for its collectives; None on one device.
        mesh: None: one device.
        in_specs: as of `jax.shard_map`.
        out_specs: as of `jax.shard_map`.
    """
    if mesh is None or mesh.size == 1:
        return functools.partial(function, axis=None)
    return jax.shard_map(
        functools.partial(function, axis=AXIS), mesh=mesh, in_specs=in_specs, out_specs=out_specs
    )


def any_process(here: bool) -> bool:
    """Whether `here` is true on any process; all processes must call this."""
    if jax.process_count() == 1:
        return here
    return bool(multihost_utils.process_allgather(np.int32(here)).any())


def first_process(here: bool) -> bool:
    """The value of `here` on process 0; all processes must call this, and leave it together."""
    if jax.process_count() == 1:
        return here
    return bool(multihost_utils.broadcast_one_to_all(np.int32(here)))


def of_first_process(act: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """What `act(*args, **kwargs)` returns on process 0, the only one to call it, on every process.

    For files that only one host may have, such as a table in somebody's home, and for long work of
    one process. All processes must call this, and leave it together, also where `act` raises.

    Raises:
        UserError: on every process, if `act` raises on process 0; there it is the error itself.
    """
    if jax.process_count() == 1:
        return act(*args, **kwargs)
    found, failure = None, None
    if jax.process_index() == 0:
        try:
            found = act(*args, **kwargs)
        except Exception as error:
            failure = error
    message = "" if failure is None else str(failure) or repr(failure)
    value, message = pickle.loads(_broadcast(pickle.dumps((found, message))))
    if failure is not None:
        raise failure
    if message:
        raise UserError(message)
    return value


def _broadcast(data: bytes) -> bytes:
    """The bytes of process 0."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    words = np.zeros(-(-size // 4), np.int32)
    if jax.process_index() == 0:
        words = np.frombuffer(data.ljust(4 * len(words), b"\0"), np.int32)
    return np.asarray(multihost_utils.broadcast_one_to_all(words), np.int32).tobytes()[:size]


def any_process_of(here: np.ndarray) -> np.ndarray:
    """`any_process` for each entry of a bool array `[n]`."""
    if jax.process_count() == 1:
        return here
    return multihost_utils.process_allgather(here).any(0)


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Rows of the global batch that this process holds, in the order of its local array.

    Args:
        mesh: the device mesh, which may have reordered the devices.
        batch_size: rows of the global batch.

    Returns:
        int64 `[batch_size / process_count]`, ascending.

    Raises:
        UserError: if the batch cannot be split evenly.
    """
    if batch_size % mesh.size:
        raise UserError(
            f"batch_size={batch_size} cannot be split over {mesh.size} devices: "
            f"each takes as many images, so use a multiple of {mesh.size}, e.g. "
            f"{max(1, batch_size // mesh.size) * mesh.size}"
        )
    slices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    starts = sorted({(s[0].start or 0) for s in slices.values() if s})
    size = batch_size // mesh.size
    return np.concatenate([np.arange(start, start + size) for start in starts])


def to_global(mesh: Mesh, batch: Any) -> Any:
    """Turns this process's rows, a tree of NumPy `[b_local, ...]`, into global arrays.

    A scalar, which must be the same in every process, is replicated.
    """

    def to_array(x: np.ndarray) -> jax.Array:
        sharding = batch_sharding(mesh) if np.ndim(x) else replicated(mesh)
        return jax.make_array_from_process_local_data(sharding, x)

    return jax.tree.map(to_array, batch)
