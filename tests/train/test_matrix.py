"""How a run was trained never makes a mode fail, nor changes what it says of the same weights.

Every possible pair of options meets in some row of each of the two tests.
"""

import itertools
import json

import jax
import numpy as np
import opened_run
import pytest
import tiny
from test_end_to_end import lines

from common.cli.modes import MODES
from common.data.sources.opening import open_source
from common.evaluate.online import make_evaluator
from common.plan import measure
from common.sharding import make_mesh
from common.train import loop, replay
from common.train.divergence import FOLDER, Watch
from common.train.import_weights import import_weights
from common.train.prepare import Extent

pytestmark = pytest.mark.slow

# What changes the state of a method, or what it reads of a batch; DCL and MoCo v2+ change neither.
VARIANTS = {
    "": ("", {}),
    "supcon": ("simclr", {"simclr__loss": "supcon"}),
    "memory": ("simclr", {"simclr__memory_length": 40}),
}
OPTIONS = {
    "method": ("simclr", "moco", "moco_v3", "distil"),
    "variant": tuple(VARIANTS),
    "model__encoder": ("resnet", "vit"),
    "data__augment_on": ("host", "both", "device"),
    "steps_per_dispatch": (1, 2),
    "microbatch": (0, 4),
    "model__bn_groups": (1, 8),
    "optimizer__warmup": ("0 steps", "3 steps"),  # of a run of 4 steps, in epochs of 3
    "start": ("", "init_from", "resume_from"),
}
# a ResNet with all that SimCLR v2's have, and a ViT
NETWORK = {
    "model__stages": (1,), "model__bottleneck": True, "model__resnet_d": True,
    "model__sk_ratio": 0.5, **tiny.VIT, "vit__depth": 1,
}  # fmt: skip
del NETWORK["model__encoder"]


def possible(row):
    """Several steps a dispatch take data that is there; parts of a batch are whole BN groups.

    Of an encoder that has them.
    """
    vit = row["model__encoder"] == "vit"
    return not (
        (row["variant"] and row["method"] != VARIANTS[row["variant"]][0])
        or (row["steps_per_dispatch"] > 1 and row["data__augment_on"] != "device")
        or (row["microbatch"] and row["model__bn_groups"] == 1 and not vit)
    )


def changes_of(row):
    """The fields of a row by the names of `tiny.config`, without what the run starts from."""
    changes = {k: v for k, v in row.items() if "__" in k}
    changes |= {k: row[k] for k in ("microbatch", "steps_per_dispatch")}
    return changes | VARIANTS[row["variant"]][1]


def pairs(row):
    return set(itertools.combinations(row.items(), 2))


def covering(options):
    """Rows in which every possible pair of options occurs: each row has most of what is left."""
    every = [dict(zip(options, v, strict=True)) for v in itertools.product(*options.values())]
    every = [row for row in every if possible(row)]
    left, rows = set().union(*map(pairs, every)), []
    while left:
        rows.append(max(every, key=lambda row: len(pairs(row) & left)))
        left -= pairs(rows[-1])
    return rows


def name_of(row):
    return "-".join(str(v) for v in row.values()).replace(" ", "")


def config(row, **more):
    """Of a run, without what it starts from."""
    fake = {"data__source": "fake", "data__fake_examples": 60, "data__fake_classes": 3}
    return tiny.config(row["method"], **(NETWORK | changes_of(row) | fake | more))


class Plain:
    """Runs without options: their workdirs, and what the modes say of them, on demand.

    By method, encoder, and whether the device crops the images on which classifiers are trained,
    which rounds some of their bytes otherwise.
    """

    def __init__(self, tmp_path_factory):
        self.folders, self.found = tmp_path_factory, {}

    def workdir(self, row):
        method, encoder, on = row["method"], row["model__encoder"], row["data__augment_on"]
        key = method, encoder, "device" if on == "device" else "host"
        if key not in self.found:
            folder = self.folders.mktemp(method)
            changes = {"model__encoder": encoder, "data__augment_on": key[2]}
            opened_run.write(folder / "run", method, **(NETWORK | changes))
            self.found[key] = folder / "run", {}
        return self.found[key][0]

    def modes(self, row):
        workdir = self.workdir(row)
        found = next(found for path, found in self.found.values() if path == workdir)
        if not found:
            found |= every_mode(workdir, 1)
        return found


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return Plain(tmp_path_factory)


def every_mode(workdir, devices):
    """Numbers that each mode finds in a run, and the arrays that it writes."""
    export = workdir.parent / "export"
    asked = {
        "knn": ("knn", {}),
        "cached": ("linear_eval", {"linear__variant": "cached"}),
        "augmented": ("linear_eval", {"linear__variant": "augmented", "linear__epochs": 2}),
        "finetune": ("finetune", {}),
        "head": ("finetune", {"layer": "head1", "seed": 1}),
        "transfer": ("transfer", {}),
        "embed": ("embed", {"embed__report": False}),
        "export": ("export", {"export__dir": str(export), "export__format": "npz"}),
    }
    found = {}
    for name, (mode, changes) in asked.items():
        opened = opened_run.load(workdir, devices, **changes)
        found[name] = MODES[mode](opened)[0].get("top1", 0.0)
    with np.load(export / "model.npz") as file:
        linear = ("fc.", "head.")  # of the linear evaluation
        names = [name for name in file.files if not name.startswith(linear)]
        found["weights"] = {name: file[name] for name in names}
    (path,) = workdir.glob("features*.npz")
    with np.load(path) as file:
        found["features"] = file["features"]
    return found


@pytest.mark.parametrize("row", covering(OPTIONS | {"elsewhere": (1, 8)}), ids=name_of)
def test_what_modes_say_of_an_encoder_is_not_of_how_it_was_trained(row, plain, tmp_path):
    want = plain.modes(row)
    start = {row["start"]: str(plain.workdir(row))} if row["start"] else {}
    opened_run.write(tmp_path / "run", row["method"], **(NETWORK | changes_of(row) | start))
    found = every_mode(tmp_path / "run", row["elsewhere"])
    for name, value in want.items():
        if name == "weights":
            for array, expected in value.items():
                np.testing.assert_array_equal(found[name][array], expected, err_msg=array)
        elif name == "features":
            np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5)
        else:  # a rounding may turn one of 60 images
            assert found[name] == pytest.approx(value, abs=0.02), name
    c = config(row, init_from=str(tmp_path / "export" / "model.npz"))
    import_weights(tiny.METHODS[row["method"]], c, tmp_path / "imported")
    opened = opened_run.load(tmp_path / "imported", row["elsewhere"])
    top1 = MODES["knn"](opened)[0]["top1"]
    assert top1 == pytest.approx(want["knn"], abs=0.02)


def interrupt_once(monkeypatch):
    """Ends the run when step 3 is done, as Ctrl-C would."""
    real = Watch.check

    def check(self, step, *rest):
        real(self, step, *rest)
        if step >= 3:
            monkeypatch.setattr(Watch, "check", real)
            raise KeyboardInterrupt

    monkeypatch.setattr(Watch, "check", check)


@pytest.mark.parametrize("row", covering(OPTIONS | {"devices": (1, 2)}), ids=name_of)
def test_a_run_is_resumed_replayed_and_planned(row, plain, tmp_path, monkeypatch, capsys):
    start = {row["start"]: str(plain.workdir(row))} if row["start"] else {}
    c = config(
        row, duration="4 steps", log_every=1, checkpoint__every="2 steps", checkpoint__keep=3,
        evaluate__every="0 steps", evaluate__pictures=False, optimizer__learning_rate=0.05, **start,
    )  # fmt: skip
    mesh = make_mesh(jax.devices()[: row["devices"]])
    make_method = tiny.METHODS[row["method"]]
    interrupt_once(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        loop.train(make_method, c, tmp_path, make_evaluator, mesh)
    summary = loop.train(make_method, c, tmp_path, make_evaluator, mesh)
    losses = {r["step"]: r["loss"] for r in lines(tmp_path) if "loss" in r}
    assert summary["steps"] == 4 and list(losses)[-1] == 4
    assert np.isfinite(list(losses.values())).all()

    # as if step 4 had stopped the run
    (tmp_path / FOLDER).mkdir()
    record = {"step": 4, "checkpoint": 2, "what": "loss"}
    (tmp_path / FOLDER / "step_4.json").write_text(json.dumps(record))
    np.savez(tmp_path / FOLDER / "step_4.process_0.npz", ids=np.zeros(16))
    monkeypatch.setattr(replay, "make_mesh", lambda: mesh)
    monkeypatch.setattr(replay, "_first_nan", lambda *arguments: "")  # there is none to look for
    capsys.readouterr()
    replay.replay(str(tmp_path), tiny.METHODS)
    said = capsys.readouterr().err
    assert float(said.split("loss ")[-1].split(",")[0]) == pytest.approx(losses[4], rel=1e-5)

    source = open_source(c.data, "train")
    extent = Extent(4, source.num_examples // 16, source.num_classes)
    task = measure.Task(make_method, c, extent)
    assert measure.for_mesh(task, mesh)["flops"] > 0
