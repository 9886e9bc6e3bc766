"""Saving and restoring a run; the only file that imports orbax."""

import os
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath


class Checkpoints:
    """The checkpoints of one workdir: the whole state, and where the run stood.

    A checkpoint appears under its final name only when it is complete, so a run that is killed
    while it writes continues from the one before. Writing goes on in the background; `save` has
    copied the arrays when it returns, so the state may be donated.
    """

    def __init__(self, workdir: str | epath.PathLike, keep: int | None) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        workdir = os.fspath(workdir)
        if "://" not in workdir:  # orbax refuses relative paths, after the first epoch of work
            workdir = os.path.abspath(workdir)
        self._manager = ocp.CheckpointManager(
            epath.Path(workdir) / "checkpoints", options=options, item_names=("state", "progress")
        )

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, None if there is none."""
        return self._manager.latest_step()

    def all_steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
        """Starts to write `state` and the JSON dictionary `progress`, unless `step` is there."""
        if step == self._manager.latest_step():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress)
            ),
        )

    def restore(self, step: int, target: Any, shardings: Any) -> tuple[Any, dict[str, Any]]:
        """Reads a checkpoint onto the devices of `shardings`, however many wrote it.

        Args:
            step: of a complete checkpoint.
            target: the state's `jax.eval_shape`.
            shardings: a tree like it.

        Returns:
            `(state, progress)`.
        """
        placed = jax.tree.map(
            lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
            target,
            shardings,
        )
        out = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(placed), progress=ocp.args.JsonRestore()
            ),
        )
        return out.state, out.progress

    def restore_part(self, step: int, target: dict[str, Any], shardings: Any) -> dict[str, Any]:
        """Reads some fields of the state: those of `target`, a dictionary of their shapes."""
        placed = jax.tree.map(
            lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
            target,
            shardings,
        )
        how = ocp.checkpoint_utils.construct_restore_args(placed)
        args = ocp.args.PyTreeRestore(placed, restore_args=how, partial_restore=True)
        return self._manager.restore(step, args=ocp.args.Composite(state=args)).state

    def shapes(self, step: int) -> dict[str, Any]:
        """What `restore_part` can read of a checkpoint: `ShapeDtypeStruct`s by field and name."""
        saved = ocp.PyTreeCheckpointHandler().metadata(
            self._manager.directory / str(step) / "state"
        )
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved.tree)

    def wait(self) -> None:
        """Returns when everything is written."""
        self._manager.wait_until_finished()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self._manager.close()
