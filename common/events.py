"""TensorBoard's event files, also in an object store."""

from typing import Any

from etils import epath

from common import files


def open_writer(path: epath.Path, start_step: int) -> Any:
    """A `tensorboardX.SummaryWriter` for the directory `path`.

    Args:
        path: local or e.g. `gs://...`.
        start_step: the step restored. TensorBoard hides what was written before of later steps.
    """
    import tensorboardX
    from tensorboardX import record_writer

    if files.is_remote(path):
        scheme = str(path).partition(":")[0]
        record_writer.register_writer_factory(scheme, _Remote())
    purge = (start_step + 1 if start_step else 0) if path.exists() else None
    return tensorboardX.SummaryWriter(str(path), purge_step=purge, flush_secs=20)


class _Remote:
    """What tensorboardX asks for a path with a scheme. (Its own needs a client for each store.)"""

    def directory_check(self, path: str) -> None:
        """Object stores have no directories."""

    def open(self, path: str) -> "_WholeFile":
        return _WholeFile(epath.Path(path))


class _WholeFile:
    """A file that is written anew at each flush; event files are small."""

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
