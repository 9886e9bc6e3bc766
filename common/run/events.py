"""TensorBoard's event files, also in an object store.

tensorboardX and not `clu.metric_writers` or `tf.summary`: both import TensorFlow, which takes
seconds and which runs without the host pipeline do not need. It writes in a thread. If a write
fails there the thread ends, its queue fills, and training blocks for ever; so no write may fail:
the files here warn once and drop what they cannot write. `metrics.jsonl` has the same numbers.
"""

import logging
import os
from typing import Any, BinaryIO

from etils import epath

from common.run import files


def open_writer(path: epath.Path, start_step: int) -> Any:
    """A `tensorboardX.SummaryWriter` for the directory `path`.

    Args:
        path: local or e.g. `gs://...`.
        start_step: the step restored; TensorBoard hides events of later steps written before.
    """
    import tensorboardX
    from tensorboardX import record_writer

    purge = (start_step + 1 if start_step else 0) if path.exists() else None
    name = str(path)
    if files.is_remote(path):
        record_writer.register_writer_factory(name.partition(":")[0], _Remote())
    else:
        record_writer.register_writer_factory(_LOCAL, _Local())
        name = f"{_LOCAL}:{os.path.abspath(name)}"
    return tensorboardX.SummaryWriter(name, purge_step=purge, flush_secs=20)


_LOCAL = "careful"  # a scheme by which tensorboardX finds `_Local`


class _Local:
    """What tensorboardX needs for paths with a scheme, for a disk."""

    def directory_check(self, path: str) -> None:
        os.makedirs(path.removeprefix(f"{_LOCAL}:"), exist_ok=True)

    def open(self, path: str) -> "_Careful":
        path = path.removeprefix(f"{_LOCAL}:")
        return _Careful(open(path, "wb", buffering=0), path)


class _Remote:
    """The same for an object store; tensorboardX's own needs a client library for each."""

    def directory_check(self, path: str) -> None:
        """Object stores have no directories."""

    def open(self, path: str) -> "_Careful":
        return _Careful(_WholeFile(epath.Path(path)), path)


class _Careful:
    """A file whose writes never raise: after the first failure nothing more is written."""

    def __init__(self, file: "BinaryIO | _WholeFile", path: str) -> None:
        self._file, self._path, self._broken = file, path, False

    def write(self, data: bytes) -> None:
        self._try(self._file.write, data)

    def flush(self) -> None:
        self._try(self._file.flush)

    def close(self) -> None:
        self._try(self._file.close)

    def _try(self, action: Any, *arguments: Any) -> None:
        if self._broken:
            return
        try:
            action(*arguments)
        except Exception as error:  # of a disk, or of the client of an object store
            self._broken = True
            logging.warning(
                "cannot write %s (%s): training continues without TensorBoard; metrics.jsonl has "
                "the same numbers", self._path, error,
            )  # fmt: skip


class _WholeFile:
    """A file that is rewritten at each flush; event files are small."""

    def __init__(self, path: epath.Path) -> None:
        self._path, self._content, self._written = path, bytearray(), 0

    def write(self, data: bytes) -> None:
        self._content += data

    def flush(self) -> None:
        if len(self._content) != self._written:
            self._path.write_bytes(bytes(self._content))
            self._written = len(self._content)

    def close(self) -> None:
        self.flush()
