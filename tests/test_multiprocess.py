"""Two processes with four devices each against one with eight.

Started by pytest, this file starts itself twice: `test_multiprocess.py PORT INDEX DIRECTORY`.
"""

import json
import pathlib
import socket
import subprocess
import sys
import time

import pytest

HERE = pathlib.Path(__file__).resolve()
LIMIT = 900  # seconds for both processes; they need about 60 of each of two cores
VARIANTS = ("simclr", "moco", "moco_symmetric")


def loop_config():
    import tiny

    return tiny.config(
        "moco", model__bn_groups=4, duration="5 steps", log_every=1, data__source="fake",
        data__fake_examples=36, data__fake_classes=3, checkpoint__every="2 steps",
        evaluate__every="4 steps", evaluate__batch_size=24, optimizer__learning_rate=0.05,
    )  # fmt: skip


def worker(port, index, directory):
    """One of two processes: a few steps of each method, then a run that is interrupted."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=index)
    import numpy as np
    import tiny

    from common import train as loop
    from common.sharding import local_rows, make_mesh

    assert (jax.device_count(), jax.local_device_count()) == (8, 4)
    rows = local_rows(make_mesh(), 16)
    assert len(rows) == 8
    arrays = {"rows": rows}
    with jax.enable_x64(True):
        for variant in VARIANTS:
            c = tiny.config(variant.split("_")[0], model__dtype="float64", **tiny.VARIANTS[variant])
            run = tiny.run(tiny.build(c), rows=rows)
            for name, value in tiny.named_leaves([run.states[1:], run.metrics]).items():
                arrays[variant + name] = value
            if hasattr(run.state, "queue"):
                for i, shard in enumerate(run.state.queue.keys.addressable_shards):
                    arrays[f"share {variant} {i} {shard.index[1].start}"] = np.asarray(shard.data)
    np.savez(directory / f"{index}.npz", **arrays)

    real = loop.check_finite

    def fail_at_three(step, loss):
        real(step, loss)
        if step == 3:
            raise KeyboardInterrupt

    loop.check_finite = fail_at_three
    try:
        loop.train(tiny.METHODS["moco"], loop_config(), directory / "run")
        raise AssertionError("not interrupted")
    except KeyboardInterrupt:
        loop.check_finite = real
    summary = loop.train(tiny.METHODS["moco"], loop_config(), directory / "run")
    (directory / f"summary{index}.json").write_text(json.dumps(summary))
    jax.distributed.shutdown()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """The directory that two finished processes left; they never outlive this."""
    directory = tmp_path_factory.mktemp("two")
    port, children, logs = free_port(), [], []
    try:
        for i in range(2):
            logs.append(open(directory / f"{i}.log", "w"))  # noqa: SIM115
            argv = [sys.executable, "-W", "error::DeprecationWarning:common", str(HERE)]
            argv += [str(port), str(i), str(directory)]
            children.append(subprocess.Popen(argv, stdout=logs[i], stderr=subprocess.STDOUT))
        deadline = time.monotonic() + LIMIT
        while any(c.poll() is None for c in children):
            # one that has failed leaves the other waiting for it
            failed = any(c.returncode for c in children)
            if failed or time.monotonic() > deadline:
                break
            time.sleep(0.2)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
            child.wait()
        for log in logs:
            log.close()
    text = "\n".join((directory / f"{i}.log").read_text()[-4000:] for i in range(2))
    assert [c.returncode for c in children] == [0, 0], text
    return directory


@pytest.mark.multiprocess
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_take_the_same_steps_as_one(outcome, variant):
    """Float64: loss, metrics, gradient (momentum), statistics, queue, parameters, probe."""
    import numpy as np
    import tiny

    run = tiny.cached_run(variant, 8)
    want = tiny.named_leaves([run.states[1:], run.metrics])
    seen = []
    for index in range(2):
        with np.load(outcome / f"{index}.npz") as file:
            got = {n.removeprefix(variant): file[n] for n in file if n.startswith(variant + "[")}
            tiny.assert_close(got, want, 1e-9, 1e-12)
            np.testing.assert_array_equal(file["rows"], np.arange(8) + 8 * index)
            for name in file:
                if name.startswith(f"share {variant} "):
                    first = int(name.split()[-1])
                    seen.append(first)
                    queue = run.states[-1].queue.keys
                    share = queue[:, first : first + queue.shape[1] // 8]
                    np.testing.assert_allclose(file[name], share, rtol=1e-9, atol=1e-12)
    if variant != "simclr":
        step = run.states[-1].queue.keys.shape[1] // 8
        assert sorted(seen) == [step * i for i in range(8)]  # every share is held once


@pytest.mark.multiprocess
def test_the_loop_in_two_processes_interrupted_and_resumed_ends_like_one(outcome, tmp_path):
    """Losses of every step, kNN before, during and after; written by process 0 alone."""
    import numpy as np
    import tiny

    from common.train import train

    train(tiny.METHODS["moco"], loop_config(), tmp_path / "run")
    timings = ("time", "images_per_second")
    lines = []
    for workdir in (outcome / "run", tmp_path / "run"):
        text = (workdir / "metrics.jsonl").read_text().splitlines()
        lines.append([json.loads(line) for line in text])
    got, want = lines
    assert [x["step"] for x in got] == [x["step"] for x in want]
    assert [x["step"] for x in got if "loss" in x] == [1, 2, 3, 4, 5]
    assert any("knn_top1" in x for x in got)
    for a, b in zip(got, want, strict=True):
        a, b = ({k: v for k, v in x.items() if k not in timings} for x in (a, b))
        assert a.keys() == b.keys()
        for name in a:
            # a rounding may turn one neighbour or one prediction
            bound = {"atol": 0.06} if "top" in name else {"rtol": 1e-3, "atol": 1e-5}
            np.testing.assert_allclose(a[name], b[name], err_msg=name, **bound)
    summaries = [json.loads((outcome / f"summary{i}.json").read_text()) for i in range(2)]
    on_disk = json.loads((outcome / "run" / "summary.json").read_text())
    assert on_disk == summaries[0]
    for summary in summaries:
        assert summary["steps"] == 5 and summary["method"] == "moco"
        assert summary["knn_top1"] == on_disk["knn_top1"]
    assert "Trained moco" in (outcome / "0.log").read_text()
    assert "Trained moco" not in (outcome / "1.log").read_text()


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parents[1]))
    worker(int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3]))
