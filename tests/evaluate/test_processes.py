"""Evaluation in two processes: what only the host of process 0 has, and what only it does.

Started by pytest, this file starts itself twice: `test_processes.py PORT INDEX DIRECTORY`.
"""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

HERE = pathlib.Path(__file__).resolve()
LIMIT = 300  # seconds for both processes, on a busy machine
SLOW = 1.5  # seconds that process 0 needs for something


def outcome(act, *args):
    """What a call returns or raises, on any process."""
    from common.sharding import of_first_process

    try:
        return of_first_process(act, *args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def worker(port, index, directory):
    """Modes that read files of the user's, which process 1 lacks."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=index)
    import opened_run
    import tiny

    from common.cli import modes
    from common.errors import UserError
    from common.evaluate import embed_mode, few_labels
    from common.run import jsonl

    def fails(error):
        raise error

    def after(seconds, act):
        def slow(*args):
            time.sleep(seconds)
            done.append(time.time())
            return act(*args)

        return slow

    done = []
    found = {
        "value": outcome(lambda: f"é of {index}"),
        "mistake": outcome(fails, UserError("no such file")),
        "fault": outcome(fails, PermissionError("not yours")),
    }
    few_labels._REPEATS = 2
    jsonl.append = after(SLOW, jsonl.append)
    embed_mode._write = after(SLOW, embed_mode._write)

    def go(mode, **changes):
        c = opened_run.config(features="pixels", embed__report=False, **changes)
        try:
            record = modes.run(mode, str(directory / "run"), c, tiny.METHODS)
        except UserError as error:
            return str(error).replace(str(directory), "")
        return record["mode"], record.get("given"), record.get("query")

    here = "here" if index == 0 else "elsewhere"
    for name, mode, changes in (
        ("label", "label", {"label__csv": f"{directory / here}/typed.csv"}),
        ("suggest", "suggest", {"label__csv": f"{directory / here}/typed.csv"}),
        ("embed", "embed", {"embed__query": f"{directory / here}/query.png"}),
        ("no table", "label", {"label__csv": f"{directory}/none.csv"}),
        ("no query", "embed", {"embed__query": f"{directory}/none.png"}),
    ):
        found[name] = go(mode, **changes)
        found[f"{name} left"] = time.time()
    found["done"] = done
    (directory / f"{index}.json").write_text(json.dumps(found))
    jax.distributed.shutdown()


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each of two processes has found."""
    import numpy as np
    import opened_run
    from test_label_modes import COLOURS, paint
    from test_multiprocess import free_port

    directory, rng = tmp_path_factory.mktemp("two"), np.random.default_rng(0)
    colours = [list(COLOURS)[i % 3] for i in range(12)]
    for i, colour in enumerate(colours):
        paint(directory / "photos" / f"{i}.png", colour, rng)
    paint(directory / "here" / "query.png", "red", rng)
    rows = [f"{i}.png,{colour}\n" for i, colour in enumerate(colours[:6])]
    (directory / "here" / "typed.csv").write_text("".join(rows))
    opened_run.write(
        directory / "run", data__source=f"folder:{directory}/photos", data__labels="none",
        data__train_split="train", data__test_split="",
    )  # fmt: skip
    port, children = free_port(), []
    try:
        for i in range(2):
            argv = [sys.executable, str(HERE), str(port), str(i), str(directory)]
            with open(directory / f"{i}.log", "w") as log:
                children.append(subprocess.Popen(argv, stdout=log, stderr=log, env=os.environ))
        deadline = time.monotonic() + LIMIT
        while any(c.poll() is None for c in children) and time.monotonic() < deadline:
            if any(c.returncode for c in children):
                break
            time.sleep(0.1)
    finally:
        for child in children:
            child.kill()
            child.wait()
    text = "\n".join((directory / f"{i}.log").read_text()[-4000:] for i in range(2))
    assert [c.returncode for c in children] == [0, 0], text
    return [json.loads((directory / f"{i}.json").read_text()) for i in range(2)]


@pytest.mark.multiprocess
def test_all_processes_have_what_the_first_one_has_read_or_its_error(told):
    assert [found["value"] for found in told] == ["é of 0"] * 2
    assert [found["mistake"] for found in told] == ["UserError: no such file"] * 2
    assert [found["fault"] for found in told] == [
        "PermissionError: not yours", "UserError: not yours"
    ]  # fmt: skip


@pytest.mark.multiprocess
def test_files_of_the_users_need_be_on_one_host_only(told):
    for found in told:
        assert found["label"][:2] == ["label", 6] and found["suggest"][:2] == ["suggest", 6]
        assert list(found["embed"][2]) == ["query.png"]
        assert found["no table"].startswith("no file ")
        assert found["no query"].startswith("eval.embed.query: there is no file ")
    assert told[0]["embed"] == told[1]["embed"]


@pytest.mark.multiprocess
def test_no_process_leaves_before_the_first_one_has_written_everything(told):
    """JAX ends all of them when one waits for the others for 5 minutes at its exit."""
    first, other = told
    assert len(first["done"]) == 4 and not other["done"]  # three records and a table of features
    assert other["label left"] >= first["done"][0] and other["suggest left"] >= first["done"][1]
    assert other["embed left"] >= first["done"][3]


if __name__ == "__main__":
    root = HERE.parents[2]
    rooms = {path.parent for path in (root / "tests").glob("**/test_*.py")}
    sys.path[:0] = [str(root), *map(str, rooms)]
    worker(int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3]))
