"""Two processes with four devices each against one with eight.

Started by pytest, this file starts itself twice: `test_multiprocess.py PORT INDEX DIRECTORY`.
"""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import pytest

HERE = pathlib.Path(__file__).resolve()
LIMIT = 900  # seconds for both processes, on a busy machine
VARIANTS = ("simclr", "moco", "moco_symmetric", "moco-v3_vit")


def loop_config():
    import tiny

    return tiny.config(
        "moco", model__bn_groups=4, duration="5 steps", log_every=1, data__source="fake",
        data__fake_examples=36, data__fake_classes=3, checkpoint__every="2 steps",
        evaluate__every="4 steps", evaluate__batch_size=24, optimizer__learning_rate=0.05,
    )  # fmt: skip


def interrupted(c, workdir, mesh=None):
    """Trains until step 3 is done and dies: the last checkpoint is of step 2."""
    import tiny

    from common.evaluate.online import make_evaluator
    from common.train import loop
    from common.train.divergence import Watch

    real = Watch.check

    def fail_at_three(self, step, *rest):
        real(self, step, *rest)
        if step == 3:
            raise KeyboardInterrupt

    Watch.check = fail_at_three
    try:
        loop.train(tiny.METHODS[c.method], c, workdir, make_evaluator, mesh)
    except KeyboardInterrupt:
        return
    finally:
        Watch.check = real
    raise AssertionError("not interrupted")


def long_config():
    """Long enough to be told to stop in the middle: the word takes a second to get around."""
    c = loop_config()
    c.duration, c.checkpoint.every, c.evaluate.every = "24 steps", "0 steps", "0 steps"
    c.log_every = 4
    return c


def told(workdir, index):
    """Trains with slow steps; process 1 alone gets SIGTERM, twice, before step 10."""
    import signal

    import tiny

    from common.evaluate.online import make_evaluator
    from common.train import loop
    from common.train.preemption import PreemptedError

    real, taken = loop.to_global, iter(range(1, 10_000))

    def slow(*arguments):
        time.sleep(0.25)
        if next(taken) == 10 and index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    loop.to_global = slow
    try:
        loop.train(tiny.METHODS["moco"], long_config(), workdir, make_evaluator)
    except PreemptedError as error:
        return str(error)
    finally:
        loop.to_global = real
    raise AssertionError("not told")


def resident_losses():
    """Two dispatches, of 1 and of 3 steps that only look at their views."""
    import jax
    import numpy as np
    from test_resident import checksum, setting

    from common.data.feed import pipeline, resident
    from common.data.feed.recipe import FeedRecipe
    from common.sharding import local_rows, make_mesh, replicated, to_global
    from common.train import dispatch

    c, source = setting()
    mesh, recipe = make_mesh(), FeedRecipe.of(c)
    data, whole = resident.load(source, mesh), replicated(mesh)
    batches = pipeline.train_batches(source, recipe, rows=local_rows(mesh, c.batch_size))
    step = jax.jit(dispatch.program(checksum, recipe, mesh), out_shardings=whole)
    state, key = jax.jit(lambda: (0 * jax.numpy.ones(()), jax.random.key(0)), out_shardings=whole)()
    losses = []
    for count in (1, 3):
        state, metrics = step(state, to_global(mesh, batches.take(count)[1]) | data, key)
        losses.append(np.asarray(metrics["each"]["loss"]))
    return np.stack(losses)


def worker(port, index, directory):
    """One of two processes: a few steps of each method, then runs that are interrupted."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=index)
    import numpy as np
    import tiny
    from jax.experimental import multihost_utils

    from common.evaluate.online import make_evaluator
    from common.sharding import local_rows, make_mesh
    from common.train import loop

    assert (jax.device_count(), jax.local_device_count()) == (8, 4)
    rows = local_rows(make_mesh(), 16)
    assert len(rows) == 8
    arrays = {"rows": rows}
    with jax.enable_x64(True):
        for variant in VARIANTS:
            run = tiny.run(tiny.build(tiny.variant_config(variant)), rows=rows)
            for name, value in tiny.named_leaves([run.states[1:], run.metrics]).items():
                arrays[variant + name] = value
            if hasattr(run.state, "queue"):
                for i, shard in enumerate(run.state.queue.keys.addressable_shards):
                    arrays[f"share {variant} {i} {shard.index[1].start}"] = np.asarray(shard.data)
    arrays["resident"] = resident_losses()
    np.savez(directory / f"{index}.npz", **arrays)

    interrupted(loop_config(), directory / "run")
    multihost_utils.sync_global_devices("interrupted")
    if index == 0:
        shutil.copytree(directory / "run", directory / "of two")  # for one process to continue
    multihost_utils.sync_global_devices("copied")
    summary = loop.train(tiny.METHODS["moco"], loop_config(), directory / "run", make_evaluator)
    (directory / f"summary{index}.json").write_text(json.dumps(summary))
    loop.train(tiny.METHODS["moco"], loop_config(), directory / "of one", make_evaluator)

    loop.train(tiny.METHODS["moco"], long_config(), directory / "whole", make_evaluator)
    (directory / f"told{index}").write_text(told(directory / "told", index))
    loop.train(tiny.METHODS["moco"], long_config(), directory / "told", make_evaluator)
    jax.distributed.shutdown()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """The directory that two finished processes left; they never outlive this."""
    import jax

    from common.sharding import make_mesh

    directory = tmp_path_factory.mktemp("two")
    interrupted(loop_config(), directory / "of one", make_mesh(jax.devices()[:2]))
    port, children, logs = free_port(), [], []
    try:
        for i in range(2):
            logs.append(open(directory / f"{i}.log", "w"))  # noqa: SIM115
            argv = [sys.executable, "-W", "error::DeprecationWarning:common", str(HERE)]
            argv += [str(port), str(i), str(directory)]
            env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
            children.append(
                subprocess.Popen(argv, env=env, stdout=logs[i], stderr=subprocess.STDOUT)
            )
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
    if hasattr(run.state, "queue"):
        step = run.states[-1].queue.keys.shape[1] // 8
        assert sorted(seen) == [step * i for i in range(8)]  # every share is held once


@pytest.mark.multiprocess
def test_each_process_takes_its_rows_of_the_data_on_its_devices(outcome):
    import numpy as np

    want = resident_losses()
    assert np.count_nonzero(want) == 4
    for i in range(2):
        with np.load(outcome / f"{i}.npz") as found:
            np.testing.assert_allclose(found["resident"], want, rtol=1e-5)


@pytest.mark.multiprocess
def test_the_loop_in_two_processes_interrupted_and_resumed_ends_like_one(outcome, tmp_path):
    """Losses of every step, kNN before, during and after; written by process 0 alone."""
    import numpy as np
    import tiny

    from common.evaluate.online import make_evaluator
    from common.run.writer import TIMING_KEYS
    from common.train.loop import train

    train(tiny.METHODS["moco"], loop_config(), tmp_path / "run", make_evaluator)
    lines = []
    for workdir in (outcome / "run", tmp_path / "run"):
        text = (workdir / "metrics.jsonl").read_text().splitlines()
        lines.append([json.loads(line) for line in text])
    got, want = lines
    assert [x["step"] for x in got] == [x["step"] for x in want]
    assert [x["step"] for x in got if "loss" in x] == [1, 2, 3, 4, 5]
    assert any("knn_top1" in x and "rankme" in x for x in got)
    for a, b in zip(got, want, strict=True):
        a, b = ({k: v for k, v in x.items() if k not in TIMING_KEYS} for x in (a, b))
        assert a.keys() == b.keys()
        for name in a:
            # a rounding may turn one neighbour or one prediction
            counted = "top" in name or "view_agreement" in name
            bound = {"atol": 0.06} if counted else {"rtol": 1e-3, "atol": 1e-5}
            np.testing.assert_allclose(a[name], b[name], err_msg=name, **bound)
    summaries = [json.loads((outcome / f"summary{i}.json").read_text()) for i in range(2)]
    on_disk = json.loads((outcome / "run" / "summary.json").read_text())
    assert on_disk == summaries[0]
    for summary in summaries:
        assert summary["steps"] == 5 and summary["method"] == "moco"
        assert summary["knn_top1"] == on_disk["knn_top1"]
    assert "Trained moco" in (outcome / "0.log").read_text()
    assert "Trained moco" not in (outcome / "1.log").read_text()


def losses(workdir):
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["loss"] for r in records if "loss" in r}


@pytest.mark.multiprocess
def test_a_checkpoint_moves_between_two_processes_and_one(outcome, tmp_path):
    """2 x 4 devices to 1 x 2, and back: queue and all, the next three losses within 1e-3."""
    import jax
    import numpy as np
    import tiny

    from common.evaluate.online import make_evaluator
    from common.sharding import make_mesh
    from common.train.loop import train

    two = make_mesh(jax.devices()[:2])
    train(tiny.METHODS["moco"], loop_config(), tmp_path / "whole", make_evaluator, two)
    train(tiny.METHODS["moco"], loop_config(), outcome / "of two", make_evaluator, two)
    want = losses(tmp_path / "whole")
    assert sorted(want) == [1, 2, 3, 4, 5]
    for moved in ("of two", "of one"):
        got = losses(outcome / moved)
        assert sorted(got) == sorted(want)
        for step in (3, 4, 5):
            np.testing.assert_allclose(got[step], want[step], rtol=1e-3, err_msg=moved)


@pytest.mark.multiprocess
def test_sigterm_for_one_of_two_processes_stops_both_at_one_step(outcome):
    """And the run ends as if nothing had happened: the same numbers to the last bit."""
    from common.run import jsonl
    from common.run.writer import TIMING_KEYS

    said = [(outcome / f"told{i}").read_text() for i in range(2)]
    assert said[0] == said[1] and "step " in said[0]
    step = int(said[0].split("step ")[1].split(" ")[0])
    assert 10 <= step < 24
    got, want = (
        [{k: v for k, v in r.items() if k not in TIMING_KEYS}
         for r in jsonl.read(outcome / name / jsonl.FILE)]
        for name in ("told", "whole")
    )  # fmt: skip
    assert got == want and got[-1]["step"] == 24
    assert str(step) in {p.name for p in (outcome / "told" / "checkpoints").iterdir()}


if __name__ == "__main__":
    root = HERE.parents[2]
    rooms = {path.parent for path in (root / "tests").glob("**/test_*.py")}
    sys.path[:0] = [str(root), *map(str, rooms)]
    worker(int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3]))
