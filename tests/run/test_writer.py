"""What lands in the files, also after a crash, and what the terminal says."""

import io
import itertools
import json
import logging
import math
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from tensorboardX.proto import event_pb2

from common.errors import UserError
from common.run import console, events, jsonl
from common.run import writer as writer_module
from common.run.writer import MetricsWriter, NonFiniteLossError


def make_writer(workdir, start=0, total=10, **kw):
    kw = {"images_per_step": 4, "steps_per_epoch": 5, "stream": io.StringIO(), **kw}
    return MetricsWriter(workdir, start, total, **kw)


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def steps(path):
    return [json.loads(line)["step"] for line in lines(path)]


def run(workdir, start, stop):
    with make_writer(workdir, start) as writer:
        for step in range(start + 1, stop + 1):
            writer.write(step, {"loss": jnp.float32(10 / step), "top1": jnp.float32(step / 100)})


def test_lines_hold_the_scalars_one_call_late(tmp_path):
    path = tmp_path / jsonl.FILE
    with make_writer(tmp_path) as writer:
        writer.write(1, {"loss": jnp.float32(2.5), "top1": 0.5})
        assert lines(path) == []
        writer.write(2, {"loss": np.float32(1.25), "top1": 0.75})
        assert steps(path) == [1]
        writer.write_now(2, {"knn_top1": 0.625})
        assert steps(path) == [1, 2, 2]
    records = [json.loads(line) for line in lines(path)]
    assert jsonl.read(path) == records
    assert [{k: r[k] for k in r if k not in writer_module.TIMING_KEYS} for r in records] == [
        {"step": 1, "epoch": 0.2, "loss": 2.5, "top1": 0.5},
        {"step": 2, "epoch": 0.4, "loss": 1.25, "top1": 0.75},
        {"step": 2, "epoch": 0.4, "knn_top1": 0.625},
    ]


def test_writing_waits_for_the_step_before_only(tmp_path):
    class Scalar:
        """Stands for an array on the device; notes when it is fetched."""

        def __init__(self, value):
            self.value, self.fetched = value, False

        def __array__(self, dtype=None, copy=None):
            self.fetched = True
            return np.asarray(self.value, dtype)

    with make_writer(tmp_path) as writer:
        scalars = [Scalar(float(step)) for step in range(1, 4)]
        for step, scalar in enumerate(scalars, 1):
            writer.write(step, {"loss": scalar})
            assert [s.fetched for s in scalars] == [i < step - 1 for i in range(3)]


def test_device_scalars_are_fetched_explicitly(tmp_path):
    with make_writer(tmp_path) as writer:
        loss = jax.jit(lambda: jnp.ones(()) / 3)()
        with jax.transfer_guard("disallow"):
            writer.write(1, {"loss": loss})
            writer.flush()
    assert json.loads(lines(tmp_path / jsonl.FILE)[0])["loss"] == float(np.float32(1) / 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["loss", "probe_loss"])
def test_a_bad_loss_stops_the_run_and_names_the_step(tmp_path, bad, name):
    writer = make_writer(tmp_path)
    writer.write(6, {"loss": 1.0})
    writer.write(7, {"loss": 1.0, name: jnp.float32(bad)})
    with pytest.raises(NonFiniteLossError, match=rf"^{name} is .* at step 7"):
        writer.write(8, {"loss": 1.0})
    writer.close()

    def strict(token):
        raise AssertionError(f"{token} is no JSON")

    records = [json.loads(x, parse_constant=strict) for x in lines(tmp_path / jsonl.FILE)]
    assert [r["step"] for r in records] == [6, 7]
    assert records[1][name] is None


def test_the_last_step_is_checked_on_close(tmp_path):
    with pytest.raises(NonFiniteLossError, match="step 3"), make_writer(tmp_path) as writer:
        writer.write(3, {"loss": math.nan})


def test_a_bad_loss_does_not_hide_the_error_that_ended_the_run(tmp_path):
    with pytest.raises(KeyError), make_writer(tmp_path) as writer:
        writer.write(3, {"loss": math.nan})
        raise KeyError("the cause")
    assert steps(tmp_path / jsonl.FILE) == [3]


def test_other_scalars_may_be_non_finite(tmp_path):
    with make_writer(tmp_path) as writer:
        writer.write(1, {"loss": 1.0, "grad_norm": math.inf})
    assert json.loads(lines(tmp_path / jsonl.FILE)[0])["grad_norm"] is None


def test_resume_moves_later_lines_once(tmp_path):
    path, discarded = tmp_path / jsonl.FILE, tmp_path / jsonl.DISCARDED
    run(tmp_path, 0, 7)
    before = lines(path)
    run(tmp_path, 4, 6)  # restored at 4, interrupted again at 6
    assert lines(discarded) == before[4:]
    assert steps(path) == [1, 2, 3, 4, 5, 6]
    second = lines(path)
    run(tmp_path, 4, 10)
    assert lines(discarded) == before[4:] + second[4:]
    assert steps(path) == list(range(1, 11))
    assert lines(path)[:4] == before[:4]  # untouched, byte for byte
    run(tmp_path, 10, 10)  # a finished run started again changes nothing
    assert steps(path) == list(range(1, 11))
    assert lines(discarded) == before[4:] + second[4:]


def test_a_run_from_scratch_also_moves_step_zero(tmp_path):
    for _ in range(2):
        with make_writer(tmp_path) as writer:
            writer.write_now(0, {"knn_top1": 0.1})
            writer.write(1, {"loss": 1.0})
    assert steps(tmp_path / jsonl.FILE) == [0, 1]
    assert steps(tmp_path / jsonl.DISCARDED) == [0, 1]


@pytest.mark.parametrize(
    "torn", ['{"step": 8, "lo', '{"step": 8}\n{"ste', "{", '{"step": 3', "\x00"]
)
def test_a_torn_last_line(tmp_path, torn):
    run(tmp_path, 0, 5)
    path = tmp_path / jsonl.FILE
    with path.open("a") as file:
        file.write(torn)
    whole = 8 in [r["step"] for r in jsonl.read(path)]
    run(tmp_path, 4, 6)
    assert steps(path) == [1, 2, 3, 4, 5, 6]
    assert steps(tmp_path / jsonl.DISCARDED) == ([5, 8] if whole else [5])


def test_a_result_behind_a_torn_one_is_a_line_of_its_own(tmp_path):
    path = epath.Path(tmp_path / jsonl.RESULTS)
    jsonl.append(path, {"mode": "knn", "top1": 0.5})
    path.write_text(path.read_text() + '{"mode": "embed", "fil')
    jsonl.append(path, {"mode": "label"})
    jsonl.append(path, {"mode": "suggest"})
    assert [r["mode"] for r in jsonl.results(epath.Path(tmp_path))] == ["knn", "label", "suggest"]
    assert jsonl.results(epath.Path(tmp_path / "none")) == []


def test_a_line_that_only_lacks_its_newline_is_kept(tmp_path):
    run(tmp_path, 0, 3)
    path = tmp_path / jsonl.FILE
    path.write_text(path.read_text().removesuffix("\n"))
    run(tmp_path, 3, 4)
    assert steps(path) == [1, 2, 3, 4]


@pytest.mark.parametrize("crash_at", [1, 2, 3, 4])
def test_a_crash_in_the_middle_of_discarding_loses_and_repeats_nothing(
    tmp_path, monkeypatch, crash_at
):
    run(tmp_path, 0, 6)
    path, discarded = tmp_path / jsonl.FILE, tmp_path / jsonl.DISCARDED
    discarded.write_text('{"step": 9}\n')
    before = lines(path)
    kind = type(jsonl.epath.Path(tmp_path))
    calls = []

    def crash_on(name):
        original = getattr(kind, name)

        def method(self, *args, **kw):
            calls.append(name)
            if len(calls) == crash_at:
                if name == "write_text":  # half of it reached the disk
                    original(self, args[0][: len(args[0]) // 2])
                raise KeyboardInterrupt
            return original(self, *args, **kw)

        monkeypatch.setattr(kind, name, method, raising=False)

    crash_on("write_text")
    crash_on("replace")
    with pytest.raises(KeyboardInterrupt):
        jsonl.discard_after(jsonl.epath.Path(tmp_path), 2)
    assert set(before) <= set(lines(path)) | set(lines(discarded))
    monkeypatch.undo()
    jsonl.discard_after(jsonl.epath.Path(tmp_path), 2)
    assert lines(path) == before[:2]
    assert lines(discarded) == ['{"step": 9}', *before[2:]]


def test_an_object_store_gets_whole_files(tmp_path):
    path = jsonl.epath.Path(tmp_path / "x.jsonl")
    path.write_text("1\n")
    file = jsonl.Lines(path)
    file.close()
    file = jsonl.Lines.__new__(jsonl.Lines)
    file._path, file._remote, file._saved, file._text = path, True, -math.inf, path.read_text()
    file._waiting = []
    file.add("2")
    assert path.read_text() == "1\n2\n"
    file.add("3")
    assert path.read_text() == "1\n2\n"  # not rewritten for every line
    file.flush()
    assert path.read_text() == "1\n2\n3\n"
    file.add("4")
    file.close()
    assert path.read_text() == "1\n2\n3\n4\n"


class Full:
    """A file on a disk that takes `room` bytes and then no more, until there is room again."""

    def __init__(self, path, room):
        self._file, self.room = open(path, "ab", buffering=0), room  # noqa: SIM115

    def write(self, data):
        if not self.room:
            raise OSError(28, "No space left on device")
        written = self._file.write(data[: self.room])
        self.room -= written
        return written

    def fileno(self):
        return self._file.fileno()

    def flush(self):
        pass

    def close(self):
        self._file.close()


def test_lines_wait_for_a_full_disk(tmp_path, caplog, monkeypatch):
    """None is lost, none is torn; what must outlive the process says that it cannot."""
    path = jsonl.epath.Path(tmp_path / "x.jsonl")
    file = jsonl.Lines(path)
    file._file.close()
    disk = file._file = Full(path, 7)
    file.add("one")
    file.add("two")
    file.add("three")
    assert path.read_text() == "one\n" and len(caplog.records) == 1
    said = r"cannot write .*x.jsonl \(No space left on device; 2 lines wait\): make room"
    with pytest.raises(UserError, match=said):
        file.flush()
    disk.room = 100
    file.add("four")
    assert path.read_text() == "one\ntwo\nthree\nfour\n"
    disk.room = 0
    monkeypatch.setattr(jsonl, "_MOST_WAITING", 3)
    for _ in range(3):
        file.add("waits")
    with pytest.raises(UserError, match="4 lines wait"):
        file.add("too many")
    disk.room = 100
    file.close()
    assert path.read_text().splitlines()[-1] == "too many"


def test_a_full_disk_stops_neither_tensorboard_nor_the_training(tmp_path, caplog, monkeypatch):
    """Its thread would die, its queue of ten would fill, and the eleventh scalar wait for ever."""
    real = events._Careful

    def full(file, path):
        file.close()
        return real(Full(path, 50), path)

    monkeypatch.setattr(events, "_Careful", full)
    with make_writer(tmp_path, total=60, log_every=1) as writer:
        for step in range(1, 61):
            writer.write(step, {"loss": 1.0, "other": 2.0})
            writer.flush()
    said = [r.getMessage() for r in caplog.records if "without TensorBoard" in r.getMessage()]
    assert len(said) == 1 and "No space left on device" in said[0]
    assert len(jsonl.read(tmp_path / jsonl.FILE)) == 60


def test_no_tensorboard_where_it_cannot_be(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("a file")
    with make_writer(tmp_path, total=2, log_every=1) as writer:
        writer.write(1, {"loss": 1.0})
    assert "training without TensorBoard" in caplog.text
    assert [r["loss"] for r in jsonl.read(tmp_path / jsonl.FILE)] == [1.0]


def test_events_in_an_object_store_are_whole_files(tmp_path, monkeypatch):
    """tensorboardX would ask for a client library of the store; a path that can write does."""
    monkeypatch.setattr(events.files, "is_remote", lambda path: True)
    monkeypatch.setattr(events.epath, "Path", lambda path: pathlib.Path(str(path).split(":")[-1]))
    writer = events.open_writer(Remote(tmp_path), 3)
    writer.add_scalar("loss", 2.5, 4)
    assert list(tmp_path.iterdir()) == []  # nothing yet: nothing can be appended
    writer.flush()
    (path,) = tmp_path.iterdir()
    first = path.read_bytes()
    writer.add_scalar("loss", 1.5, 5)
    writer.close()
    assert path.read_bytes()[: len(first)] == first
    (got,) = read_events(tmp_path)
    values = [(e.step, v.simple_value) for e in got for v in e.summary.value]
    assert values == [(4, 2.5), (5, 1.5)]


class Remote:
    """The path of a directory as one in a store: `bucket:/...`."""

    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return f"bucket:{self.path}"

    __str__ = __fspath__

    def exists(self):
        return False


def read_events(directory):
    """TFRecord framing by hand: length, its CRC, payload, its CRC. One list an event file."""
    files = []
    for path in sorted(directory.iterdir(), key=lambda p: p.stat().st_mtime_ns):
        raw, events = path.read_bytes(), []
        while raw:
            size = int.from_bytes(raw[:8], "little")
            events.append(event_pb2.Event.FromString(raw[12 : 12 + size]))
            raw = raw[16 + size :]
        files.append(events)
    return files


def test_tensorboard_has_the_scalars_and_purges_on_resume(tmp_path):
    run(tmp_path, 0, 5)
    time.sleep(1.1)  # the file name has the second in it
    run(tmp_path, 3, 4)
    first, second = read_events(tmp_path / "tensorboard")

    def scalars(events):
        return [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]

    losses = [(s, v) for s, tag, v in scalars(first) if tag == "loss"]
    assert losses == [(s, pytest.approx(10 / s)) for s in range(1, 6)]
    start = event_pb2.SessionLog.START
    assert [e.step for e in second if e.session_log.status == start] == [4]
    assert not [e for e in first if e.session_log.status == start]
    assert [s for s, tag, _ in scalars(second) if tag == "loss"] == [4]


def test_images_per_second_leaves_out_compilation_and_pauses(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(writer_module.time, "perf_counter", lambda: now[0])
    writer = make_writer(tmp_path, total=20)
    assert writer.images_per_second is None

    def train(step, seconds):
        writer.write(step, {"loss": 1.0})
        now[0] += seconds
        writer.flush()

    train(1, 60.0)  # compiles
    assert writer.images_per_second is None
    with writer.waiting():
        now[0] += 0.5
    now[0] -= 0.5  # inside the step's second
    train(3, 1.0)
    with writer.pause():
        now[0] += 500.0
        writer.write_now(3, {"knn_top1": 0.5})
    with writer.pause():
        now[0] += 70.0
    train(5, 3.0)
    writer.close()
    rates = [r.get("images_per_second") for r in jsonl.read(tmp_path / jsonl.FILE)]
    assert rates == [None, 2 * 4 / 1.0, None, 2.67]
    names = ("seconds_step", "seconds_input", "seconds_pause")
    timings = [[r.get(n) for n in names] for r in jsonl.read(tmp_path / jsonl.FILE)]
    assert timings == [[None] * 3, [0.5, 0.25, 0.0], [None] * 3, [1.5, 0.0, 570.0]]
    assert writer.images_per_second == pytest.approx(4 * 4 / 4.0)


def test_due_is_each_interval_and_the_two_ends(tmp_path):
    writer = make_writer(tmp_path, start=7, total=24, log_every=5)
    assert [s for s in range(8, 25) if writer.due(s)] == [8, 10, 15, 20, 24]
    writer.close()


def test_a_log_file_gets_plain_lines(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(writer_module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with make_writer(tmp_path, total=1560, stream=out, images_per_step=812) as writer:
        for step in range(1, 122):
            writer.write(step, {"loss": 4.8123, "contrastive_top1": 0.4119, "grad_norm": 3.0})
            now[0] += 1.0
        writer.write_now(121, {"knn_top1": 0.5})
    got = out.getvalue().splitlines()
    # One step a second, a line each 10 s: and none of it with control characters.
    assert got[0] == "step 1/1560  loss 4.812  contrastive_top1 41.2 %  epoch 0.2"
    assert got[1] == (
        "step 11/1560  812 images/s  ETA 25:49  loss 4.812  contrastive_top1 41.2 %  epoch 2.2"
    )
    assert len(got) == 14
    assert got[-1] == "step 121  knn_top1 50.0 %"
    assert "\r" not in out.getvalue()


class Terminal(io.StringIO):
    """What is written to a terminal, and what then stands on it."""

    def isatty(self):
        return True

    def fileno(self):
        return 99

    def lines(self):
        """Line feed and carriage return as a terminal takes them (`stty onlcr`)."""
        screen, column = [""], 0
        for c in self.getvalue():
            if c == "\n":
                screen.append("")
            elif c != "\r":
                screen[-1] = screen[-1][:column].ljust(column) + c + screen[-1][column + 1 :]
            column = column + 1 if c not in "\r\n" else 0
        return [line.rstrip() for line in screen]


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of `columns`, of which `progress` shows everything."""

    def make(columns):
        size = os.terminal_size((columns, 24))
        monkeypatch.setattr(console.os, "get_terminal_size", lambda fd: {99: size}[fd])
        return Terminal()

    ticks = itertools.count()
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(ticks)))
    return make


TIMING = {"images_per_second": 20_000.0, "seconds_step": 0.2, "seconds_input": 0.01}
LATE = {"images_per_second": 5.0, "seconds_step": 0.2, "seconds_input": 0.15}


def test_a_terminal_line_rewrites_itself(terminal):
    out = terminal(60)
    bar = console.Progress(100, out)
    bar.show(1, 0.1, {"loss": 12.5, "probe_top1": 0.1}, {}, None)
    assert out.lines() == ["step 1/100  loss 12.500  probe 10.0 %  epoch 0.1"]
    bar.show(2, 0.2, {"loss": 2.5, "probe_top1": 0.1}, TIMING, 3723.0)
    assert out.lines() == ["step 2/100  20,000 images/s  ETA 1:02:03  loss 2.500"]
    bar.message(2, {"knn_top1": 0.5})
    bar.show(100, 10.0, {"loss": 1.0}, LATE, 0.0)
    bar.close()
    assert out.lines() == [
        "step 2  knn_top1 50.0 %",
        "step 100/100  5 images/s  input 75%  loss 1.000  epoch 10.0",
        "",
    ]


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (81, "step 1200/4680  1,234 images/s  ETA 3:12  loss 4.812  top1 41.2 %  probe 18.8 %"),
        (80, "step 1200/4680  1,234 images/s  ETA 3:12  loss 4.812  top1 41.2 %  probe 18.8 %"),
        (79, "step 1200/4680  1,234 images/s  ETA 3:12  loss 4.812  top1 41.2 %"),
        (66, "step 1200/4680  1,234 images/s  ETA 3:12  loss 4.812  top1 41.2 %"),
        (65, "step 1200/4680  1,234 images/s  ETA 3:12  loss 4.812"),
        (20, "step 1200/4680"),
    ],
)
def test_what_does_not_fit_is_left_out_whole_and_the_time_comes_first(columns, shown, terminal):
    out = terminal(columns)
    values = {"loss": 4.8123, "contrastive_top1": 0.412, "probe_top1": 0.188}
    timing = TIMING | {"images_per_second": 1234.4}
    console.Progress(4680, out).show(1200, 15.4, values, timing, 192.0)
    assert out.lines() == [shown]


def test_a_result_breaks_between_its_numbers(terminal):
    out = terminal(60)
    scores = {"knn_top1": 0.219, "knn_top1_at_init": 0.219, "knn_top1_raw_pixels": 0.25}
    bar = console.Progress(9, out)
    bar.show(1, None, {"loss": 1.0}, {}, None)
    bar.message(0, scores)
    assert out.lines() == [
        "step 0  knn_top1 21.9 %  knn_top1_at_init 21.9 %", "knn_top1_raw_pixels 25.0 %", "",
    ]  # fmt: skip


def test_of_figures_without_labels_the_console_shows_the_two_to_watch(terminal):
    out = terminal(80)
    names = ("alignment", "alignment_ratio", "rankme", "uniformity", "view_agreement")
    scores = {f"{n}{end}": 0.125 for n in names for end in ("", "_at_init", "_raw_pixels")}
    console.Progress(9, out).message(0, dict(sorted(scores.items())))
    console.Progress(9, out).message(1, {n: 0.125 for n in names})
    assert out.lines() == [
        "step 0  alignment_ratio 0.125  alignment_ratio_raw_pixels 0.125",
        "view_agreement 12.5 %  view_agreement_raw_pixels 12.5 %",
        "step 1  alignment_ratio 0.125  view_agreement 12.5 %",
        "",
    ]


def test_what_others_write_to_the_terminal_does_not_run_into_the_line(terminal):
    """C++ code by the file descriptor, and Python's `logging`, which makes way for itself."""
    out = terminal(80)
    handler = logging.StreamHandler(out)
    logging.getLogger().addHandler(handler)
    try:
        bar = console.Progress(9, out)
        bar.show(1, None, {"loss": 1.0}, {}, None)
        out.write("E0000 00:00:1 jpeg_mem.cc:314] Premature end of JPEG data\n")
        bar.show(2, None, {"loss": 1.0}, {}, None)
        logging.getLogger().warning("short")
        bar.show(3, None, {"loss": 2.0}, {}, None)
        bar.close()
        assert not handler.filters
    finally:
        logging.getLogger().removeHandler(handler)
    assert out.lines() == [
        "E0000 00:00:1 jpeg_mem.cc:314] Premature end of JPEG data", "short",
        "step 3/9  loss 2.000", "",
    ]  # fmt: skip


def test_duration():
    assert [console.duration(s) for s in (0, 59.6, 192, 3725)] == [
        "0:00",
        "1:00",
        "3:12",
        "1:02:05",
    ]
