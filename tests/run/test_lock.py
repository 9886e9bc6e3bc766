"""One run at a time: on a disk, in an object store, and after a death without farewell."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
from bucket import mounted
from etils import epath

from common.errors import UserError
from common.run import lock

KEEPER = """
import sys, time
from etils import epath
from common.run import lock
with lock.hold(epath.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_on_a_disk_the_lock_dies_with_its_process(tmp_path):
    root = pathlib.Path(__file__).parents[2]
    keeper = subprocess.Popen(
        [sys.executable, "-c", KEEPER, str(tmp_path)], cwd=root, stdout=subprocess.PIPE, text=True
    )
    with keeper:
        try:
            assert keeper.stdout.readline() == "held\n"
            said = rf"in use by another run \(process {keeper.pid} on .*, since 20.*--workdir"
            with pytest.raises(UserError, match=said), lock.hold(epath.Path(tmp_path)):
                pass
        finally:
            keeper.send_signal(signal.SIGKILL)
    with lock.hold(epath.Path(tmp_path)) as held:
        held.check()
        assert json.loads((tmp_path / lock.FILE).read_text())["pid"] == os.getpid()
        with pytest.raises(UserError, match="in use"), lock.hold(epath.Path(tmp_path)):
            pass  # a second run in this very process
    with lock.hold(epath.Path(tmp_path)):
        pass


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A workdir in an object store, and time that passes faster."""
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lock, "WATCHED_BEATS", 8)
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.02)
    with mounted(tmp_path, monkeypatch):
        workdir = epath.Path("gs://b/run")
        workdir.mkdir(parents=True)
        yield workdir


def test_in_a_store_a_living_owner_keeps_others_out(store):
    with lock.hold(store) as held:
        with pytest.raises(UserError, match="in use by another run"), lock.hold(store):
            pass
        held.check()
    assert not (store / lock.FILE).exists()
    begin = time.monotonic()
    with lock.hold(store):  # after a farewell nobody waits
        assert time.monotonic() - begin < 0.2
    assert not [t for t in threading.enumerate() if t.name == "workdir lock"]


def test_in_a_store_a_dead_owner_is_replaced(store, caplog):
    dead = {"host": "gone", "pid": 7, "since": "2020", "owner": "x", "beat": 3}
    (store / lock.FILE).write_text(json.dumps(dead))
    with lock.hold(store) as held:
        assert "locked by process 7 on gone: watching" in caplog.text
        # this one was only asleep, wakes up and goes on writing: then there is one run too many
        (store / lock.FILE).write_text(json.dumps(dead | {"beat": 4}))
        for _ in range(100):
            time.sleep(0.02)
            try:
                held.check()
            except UserError as error:
                assert "process 7 on gone" in str(error)
                break
        else:
            raise AssertionError("not noticed")
    assert json.loads((store / lock.FILE).read_text())["owner"] == "x"  # it is not ours to remove


def test_of_two_that_start_together_one_goes_on(store):
    begin, held, refused = threading.Barrier(2), [], []

    def start():
        begin.wait()
        try:
            with lock.hold(store):
                held.append(1)
                time.sleep(0.3)
        except UserError:
            refused.append(1)

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 1)


def test_of_two_that_saw_no_lock_the_one_that_was_overwritten_leaves(store, monkeypatch):
    """Both looked before either wrote: in the time to settle the other one's record comes."""
    other = {"host": "there", "pid": 9, "since": "2020", "owner": "y", "beat": 0}

    class Time:
        monotonic = time.monotonic

        def sleep(self, seconds):
            (store / lock.FILE).write_text(json.dumps(other))

    monkeypatch.setattr(lock, "time", Time())
    with pytest.raises(UserError, match="process 9 on there"), lock.hold(store):
        pass
    assert json.loads((store / lock.FILE).read_text()) == other


def test_a_disk_without_locks_gets_signs_of_life(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.0)
    with lock.hold(epath.Path(tmp_path)):
        assert json.loads((tmp_path / lock.FILE).read_text())["beat"] == 0
    assert not (tmp_path / lock.FILE).exists()
