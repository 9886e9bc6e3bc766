"""An object store in a directory: `gs://...` paths that can be neither appended to nor renamed."""

import contextlib
import pathlib

from etils.epath import backend, gpath

WRITES = ("w", "wb", "r", "rb")


class Refused(AssertionError):
    """Something that Cloud Storage cannot do, or does only by copying."""


class Bucket(backend._OsPathBackend):
    """Maps `gs://...` to a directory; keeps a list of what was written."""

    def __init__(self, root: pathlib.Path) -> None:
        self.root, self.written = root, []

    def _local(self, path):
        return str(self.root / str(path).removeprefix("gs://"))

    def open(self, path, mode):
        if mode not in WRITES:
            raise Refused(f"open({path!r}, {mode!r})")
        local = pathlib.Path(self._local(path))
        if "w" in mode:
            self.written.append(str(path))
            local.parent.mkdir(parents=True, exist_ok=True)  # a store has no directories
        return super().open(local, mode)

    def rename(self, path, dst):
        raise Refused(f"rename({path!r}, {dst!r})")

    def replace(self, path, dst):
        raise Refused(f"replace({path!r}, {dst!r})")

    def exists(self, path):
        return super().exists(self._local(path))

    def isdir(self, path):
        return super().isdir(self._local(path))

    def listdir(self, path):
        return super().listdir(self._local(path))

    def glob(self, path):
        root = self._local("gs://")
        return ["gs://" + x.removeprefix(root).lstrip("/") for x in super().glob(self._local(path))]

    def makedirs(self, path, *, exist_ok=False, mode=None):
        super().makedirs(self._local(path), exist_ok=exist_ok)

    def mkdir(self, path, *, exist_ok=False, mode=None):
        super().mkdir(self._local(path), exist_ok=exist_ok)

    def remove(self, path):
        super().remove(self._local(path))

    def stat(self, path):
        return super().stat(self._local(path))


@contextlib.contextmanager
def mounted(root: pathlib.Path, monkeypatch):
    """`gs://` is `root` inside this context; gives the `Bucket`."""
    bucket = Bucket(root)
    with monkeypatch.context() as patch:
        patch.setitem(gpath._PREFIX_TO_BACKEND, "gs", bucket)
        patch.setattr(gpath, "_is_tf_installed", lambda: False)  # it would ask the real store
        yield bucket
