"""Saving and restoring a run; only this file and `checkpoint_files.py` import orbax."""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from common.errors import UserError
from common.run import checkpoint_files, digests
from common.run.checkpoint_files import position_of, reason
from common.run.retention import Keep
from common.sharding import any_process


class Checkpoints:
    """The checkpoints of one workdir: the whole state, and the position of the run beside it.

    A checkpoint appears under its final name only when it is complete, so a run that is killed
    while it writes continues from the one before; older ones are deleted after that, never before.
    Writing goes on in the background; `save` has copied the arrays when it returns, so the state
    may be donated. A digest of every array is saved too, and checked on restoring.

    Args:
        workdir: of the run.
        keep: how many of the newest to keep; None: all. With 1 there is none to fall back to.
        every: also keep the first checkpoint of each period of this many steps; 0: off.
        best: also keep this many with the highest kNN accuracy.
        read_only: write, clean up and delete nothing: another process may be training here.
    """

    def __init__(
        self,
        workdir: str | epath.PathLike,
        keep: int | None,
        *,
        every: int = 0,
        best: int = 0,
        read_only: bool = False,
    ) -> None:
        workdir = os.fspath(workdir)
        if "://" not in workdir:  # orbax refuses relative paths, after the first epoch of work
            workdir = os.path.abspath(workdir)
        self._workdir = epath.Path(workdir)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=Keep(self.score, keep, every, best),
            cleanup_tmp_directories=not read_only,
            create=not read_only,  # (orbax's own read_only warns of what it then ignores)
        )
        self._manager = ocp.CheckpointManager(
            self._workdir / "checkpoints", options=options, item_names=("state", "progress")
        )
        self._writing: int | None = None
        self._failed = False

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, None if there is none."""
        return self._manager.latest_step()

    def all_steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, position: dict[str, Any]) -> None:
        """Starts to write a checkpoint, unless there is one of this step.

        Args:
            step: of the run.
            state: of the method, on the devices.
            position: of the run, a JSON dictionary.

        Raises:
            UserError: if this one or the one before cannot be written.
        """
        if step == self._manager.latest_step():
            return
        record = checkpoint_files.make_record(position, state)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(record)
        )
        self.wait()
        with self._written(step):
            self._manager.save(step, args=args)
        self._writing = step

    def check(self) -> None:
        """Raises the error of the last save, if that has ended by now and failed.

        Raises:
            UserError: as `save`.
        """
        if self._writing is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until everything is written.

        Raises:
            UserError: as `save`.
        """
        step, self._writing = self._writing, None
        with self._written(step):
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _written(self, step: int | None) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of tensorstore, of the file system, of orbax
            self._failed = True
            good = max((s for s in self._steps_on_disk() if s != step), default=None)
            then = f"resumes from step {good:,}" if good else "starts from scratch"
            raise UserError(
                f"cannot write the checkpoint of step {step} in {self._workdir} "
                f"({reason(error)}): make room or repair the disk; the same command then "
                f"{then}"
            ) from error

    def _steps_on_disk(self) -> list[int]:
        try:
            return [int(p.name) for p in self._manager.directory.iterdir() if p.name.isdigit()]
        except OSError:
            return []

    def restore(self, step: int, target: Any, shardings: Any) -> tuple[Any, dict[str, Any]]:
        """Reads a checkpoint onto the devices of `shardings`, however many wrote it.

        Args:
            step: of a complete checkpoint.
            target: the state's `jax.eval_shape`.
            shardings: a tree like it.

        Returns:
            `(state, position)`.

        Raises:
            UserError: if an array is not what was saved.
        """
        try:
            return self._restore(step, target, shardings)
        except digests.Damage as damage:
            raise self._damaged(step, str(damage)) from None

    def _restore(self, step: int, target: Any, shardings: Any) -> tuple[Any, dict[str, Any]]:
        out = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(checkpoint_files.placed(target, shardings)),
                progress=ocp.args.JsonRestore(),
            ),
        )
        digests.compare(step, digests.of_state(out.state), out.progress)
        return out.state, position_of(out.progress)

    def restore_part(self, step: int, target: dict[str, Any], shardings: Any) -> dict[str, Any]:
        """Reads part of the state: the fields of `target`, a dictionary of their shapes.

        Raises:
            UserError: if an array is not what was saved, or cannot be read.
        """
        placed = checkpoint_files.placed(target, shardings)
        how = ocp.checkpoint_utils.construct_restore_args(placed)
        args = ocp.args.PyTreeRestore(placed, restore_args=how, partial_restore=True)
        try:
            state = self._manager.restore(step, args=ocp.args.Composite(state=args)).state
            record = checkpoint_files.read_record(self._directory(step))
            digests.compare(step, digests.of_state(state), record)
        except (MemoryError, UserError):
            raise
        except Exception as error:  # whatever a reader makes of damaged files
            raise self._damaged(step, reason(error)) from error
        return state

    def shapes(self, step: int) -> dict[str, Any]:
        """What `restore_part` can read of a checkpoint: `ShapeDtypeStruct`s by field and name."""
        return checkpoint_files.read_shapes(self._directory(step))

    def read(self, step: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """See `checkpoint_files.read`."""
        return checkpoint_files.read(step, self._directory(step))

    def restore_newest(self, target: Any, shardings: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Restores the newest checkpoint that reads back as it was written.

        Of several processes, one whose read fails would leave the others waiting: there process 0
        reads each checkpoint whole before all of them do. Newer ones, which are damaged, are moved
        to `damaged_checkpoints/` (in an object store deleted), so that their steps can be saved
        again; that happens, with a warning, once an older one has been restored, never before.

        Args:
            target: as for `restore`.
            shardings: the same.

        Returns:
            `(step, state, position)`; None if there is no checkpoint at all.

        Raises:
            UserError: if there are checkpoints and none of them is good.
        """
        damage: dict[int, str] = {}
        several = _several_processes()
        restore = self.restore if several else self._restore
        for step in reversed(self.all_steps()):
            found = None
            try:
                if several and jax.process_index() == 0:
                    self.read(step)
            except MemoryError:
                raise
            except Exception as error:  # whatever a reader makes of damaged files
                found = reason(error)
            try:
                if not any_process(found is not None):
                    state, position = restore(step, target, shardings)
                    break
            except MemoryError:
                raise
            except Exception as error:
                if several:  # how far the others have got is not known
                    raise
                found = self._reason(step, error)
            damage[step] = found or "see the message of process 0"
        else:
            if damage:
                newest = max(damage)
                raise self._damaged(newest, damage[newest])
            return None
        for bad, found in damage.items():
            if jax.process_index() == 0:
                logging.warning(
                    "the checkpoint of step %d is damaged (%s) and is now %s: going on from that "
                    "of step %d", bad, found,
                    checkpoint_files.set_aside(self._directory(bad), self._workdir), step,
                )  # fmt: skip
        if damage:
            any_process(False)  # all wait for the move
            self._manager.reload()
        return step, state, position

    def position(self, step: int) -> dict[str, Any]:
        """The position of the run that was saved beside the state; {} if it cannot be read."""
        try:
            return dict(position_of(checkpoint_files.read_record(self._directory(step))))
        except (OSError, ValueError, AttributeError, TypeError):
            return {}

    def score(self, step: int) -> float | None:
        """The last kNN accuracy before a checkpoint, None if there was none."""
        try:
            return self.position(step)["results"].get("knn_top1")
        except (KeyError, AttributeError):
            return None

    def _reason(self, step: int, error: Exception) -> str:
        """Why a checkpoint cannot be restored, by a read, which names array and file."""
        try:
            self.read(step)
        except MemoryError:
            raise
        except Exception as found:
            error = found
        return reason(error)

    def _directory(self, step: int) -> epath.Path:
        return self._manager.directory / str(step)

    def _damaged(self, step: int, reason: str) -> UserError:
        others = ", ".join(str(s) for s in self.all_steps() if s != step)
        found = f"there are also those of step {others}" if others else "there is no other"
        return UserError(
            f"the checkpoint of step {step} in {self._workdir} is damaged ({reason}), and "
            f"{found}: restore the files from a copy, or train again in another --workdir"
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        # if there is an error already, that is the one to show
        known = kind or self._failed
        # Orbax cleans up in a thread, which prints long errors if the interpreter exits first.
        await_cleanup = getattr(self._manager, "_maybe_await_cleanup_tmp_directory", None)
        if await_cleanup and not _several_processes():
            with contextlib.suppress(Exception):
                await_cleanup()
        with contextlib.suppress(Exception) if known else self._written(self._writing):
            self._manager.close()


def _several_processes() -> bool:
    """Whether others would wait for this process if it failed in a read."""
    return jax.process_count() > 1
