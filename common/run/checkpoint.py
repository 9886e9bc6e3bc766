"""Saving and restoring a run; the only file that imports orbax."""

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from common.errors import UserError, first_line
from common.run import digests, files
from common.run.retention import Keep
from common.sharding import any_process

ASIDE = "damaged_checkpoints"


class Checkpoints:
    """The checkpoints of one workdir: the whole state, and where the run stood.

    A checkpoint appears under its final name only when it is complete, so a run that is killed
    while it writes continues from the one before; older ones are deleted after that, never before.
    Writing goes on in the background; `save` has copied the arrays when it returns, so the state
    may be donated. With each goes a digest of every array, and restoring checks it.

    Args:
        workdir: of the run.
        keep: the newest so many stay; None: all. With 1 there is none to go back to.
        every: of each so many steps the first one stays too; 0: none does.
        best: so many with the highest kNN stay too.
        read_only: nothing is written, tidied up or deleted: another process may be training here.
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

    def save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
        """Starts to write `state` and the JSON dictionary `progress`, unless `step` is there.

        Raises:
            UserError: if this one or the one before cannot be written.
        """
        if step == self._manager.latest_step():
            return
        record = {
            "progress": progress,
            "sha256": digests.of_json(progress),
            "digests": digests.of_state(state),
        }
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(record)
        )
        self.wait()
        with self._written(step):
            self._manager.save(step, args=args)
        self._writing = step

    def check(self) -> None:
        """Says of the last save, if it has ended by now, whether it failed.

        Raises:
            UserError: as `save`.
        """
        if self._writing is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Returns when everything is written.

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
            carry_on = f"carries on from step {good:,}" if good else "starts anew"
            raise UserError(
                f"cannot write the checkpoint of step {step} in {self._workdir} "
                f"({_reason(error)}): make room or mend the disk; the same command then "
                f"{carry_on}"
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
            `(state, progress)`.

        Raises:
            UserError: if an array is not what was saved.
        """
        out = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(_place(target, shardings)),
                progress=ocp.args.JsonRestore(),
            ),
        )
        try:
            digests.compare(step, digests.of_state(out.state), out.progress)
        except digests.Damage as damage:
            raise self._damaged(step, str(damage)) from None
        return out.state, out.progress.get("progress", out.progress)

    def restore_part(self, step: int, target: dict[str, Any], shardings: Any) -> dict[str, Any]:
        """Reads some fields of the state: those of `target`, a dictionary of their shapes.

        Raises:
            UserError: if an array is not what was saved, or cannot be read.
        """
        placed = _place(target, shardings)
        how = ocp.checkpoint_utils.construct_restore_args(placed)
        args = ocp.args.PyTreeRestore(placed, restore_args=how, partial_restore=True)
        try:
            state = self._manager.restore(step, args=ocp.args.Composite(state=args)).state
            digests.compare(step, digests.of_state(state), self._record(step))
        except (OSError, ValueError, KeyError) as error:
            raise self._damaged(step, _reason(error)) from error
        return state

    def shapes(self, step: int) -> dict[str, Any]:
        """What `restore_part` can read of a checkpoint: `ShapeDtypeStruct`s by field and name."""
        saved = ocp.PyTreeCheckpointHandler().metadata(
            self._manager.directory / str(step) / "state"
        )
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved.tree)

    def read(self, step: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Reads a whole checkpoint into this process's memory, without the other processes.

        Returns:
            ({name: array}, progress); `digests.names` says how arrays are called.

        Raises:
            Exception: whatever is wrong with its files.
            digests.Damage: an array is not what was saved.
        """
        path = self._manager.directory / str(step) / "state"
        handler = ocp.PyTreeCheckpointHandler()
        tree = handler.metadata(path).tree
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        state = handler.restore(path, args=ocp.args.PyTreeRestore(restore_args=how))
        arrays = dict(zip(digests.names(state), jax.tree.leaves(state), strict=True))
        record = self._record(step)
        found = {name: digests.of_array(array) for name, array in arrays.items()}
        digests.compare(step, found, record)
        return arrays, record.get("progress", record)

    def restore_newest(self, target: Any, shardings: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Restores the newest checkpoint that reads back as it was written.

        Process 0 reads each whole before all of them do: one that fails alone would leave the
        others waiting. Newer ones, which are damaged, are moved to `damaged_checkpoints/` (in an
        object store, which cannot move, deleted), so that their steps can be saved again; that is
        done and said when an older one has been restored, never before.

        Args:
            target, shardings: as for `restore`.

        Returns:
            `(step, state, progress)`; None if there is no checkpoint at all.

        Raises:
            UserError: if there are checkpoints and none of them is good.
        """
        damage: dict[int, str] = {}
        alone = jax.process_count() == 1
        for step in reversed(self.all_steps()):
            reason = None
            try:
                if jax.process_index() == 0:
                    self.read(step)
            except MemoryError:
                raise
            except Exception as error:  # whatever a reader makes of damaged files
                reason = _reason(error)
            try:
                if not any_process(reason is not None):
                    state, progress = self.restore(step, target, shardings)
                    break
            except Exception as error:
                if not alone:  # where the others are by now is not known
                    raise
                reason = _reason(error)
            damage[step] = reason or "process 0 says how"
        else:
            if damage:
                newest = max(damage)
                raise self._damaged(newest, damage[newest])
            return None
        for bad, reason in damage.items():
            if jax.process_index() == 0:
                logging.warning(
                    "the checkpoint of step %d is damaged (%s) and is now %s: going on from that "
                    "of step %d", bad, reason, self._set_aside(bad), step,
                )  # fmt: skip
        if damage:
            any_process(False)  # all wait for the move
            self._manager.reload()
        return step, state, progress

    def _set_aside(self, step: int) -> str:
        source = self._manager.directory / str(step)
        if files.is_remote(source):
            source.rmtree()
            return "deleted"
        target = self._workdir / ASIDE / str(step)
        number = 1
        while target.exists():
            number += 1
            target = target.with_name(f"{step}.{number}")
        target.parent.mkdir(exist_ok=True)
        source.rename(target)
        return f"in {target}"

    def _record(self, step: int) -> dict[str, Any]:
        """What was saved beside the state."""
        return json.loads((self._manager.directory / str(step) / "progress/metadata").read_text())

    def progress(self, step: int) -> dict[str, Any]:
        """What was noted beside the state, without a look at that; {} if it cannot be read."""
        try:
            record = self._record(step)
            return dict(record.get("progress", record))
        except (OSError, ValueError, AttributeError, TypeError):
            return {}

    def score(self, step: int) -> float | None:
        """The last kNN accuracy before a checkpoint, None if there was none."""
        try:
            return self.progress(step)["results"].get("knn_top1")
        except (KeyError, AttributeError):
            return None

    def _damaged(self, step: int, reason: str) -> UserError:
        others = ", ".join(str(s) for s in self.all_steps() if s != step)
        found = f"there are also those of step {others}" if others else "there is no other"
        return UserError(
            f"the checkpoint of step {step} in {self._workdir} is damaged ({reason}), and "
            f"{found}: restore the files from a copy, or train anew in another --workdir"
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        # when something went wrong already, that is the error to show
        known = kind or self._failed
        # Orbax tidies up in a thread, which complains at length if the interpreter ends before it.
        tidied_up = getattr(self._manager, "_maybe_await_cleanup_tmp_directory", None)
        if tidied_up and jax.process_count() == 1:
            with contextlib.suppress(Exception):
                tidied_up()
        with contextlib.suppress(Exception) if known else self._written(self._writing):
            self._manager.close()


def _place(target: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        target,
        shardings,
    )


def _reason(error: BaseException) -> str:
    """What is wrong, for a message; of an error from elsewhere its type too."""
    if isinstance(error, digests.Damage):
        return str(error)
    return f"{type(error).__name__}: {first_line(error)}" if str(error) else type(error).__name__
