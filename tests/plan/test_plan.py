"""Planning: collectives of a program, bounds, the table, and messages about mistakes."""

import json

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.sharding import PartitionSpec

import main
from common.errors import UserError
from common.plan import chips, collectives, measure, table, traffic
from common.plan import plan as plan_module
from common.plan.plan import data_of, plan
from common.sharding import AXIS, make_mesh
from common.train.prepare import Extent

HLO = """
%async_collective_fusion.7 (p: u8[100]) -> u8[100] {
  %copy.1 = u8[100]{0} collective-permute(%p), channel_id=1
  %g = f32[32]{0} all-gather(%p), channel_id=4, replica_groups={}
}

%async_collective_fusion.8 (p: u8[100]) -> u8[100] {
  %copy.2 = f32[32]{0} all-gather(%p), channel_id=4, replica_groups={}
  %c = f32[3]{0} all-gather(%p), channel_id=5, frontend_attributes={chain_id="0"}
}

%async_collective_fusion.9 (p: u8[100]) -> u8[100] {
  %c = f32[3]{0} all-gather(%p), channel_id=5, frontend_attributes={chain_id="0"}
  %other = f32[3]{0} all-gather(%p), channel_id=5, frontend_attributes={chain_id="1"}
}

ENTRY %main.1 (p: u8[100]) -> u8[100] {
  %all-reduce.3 = (f32[64]{0}, bf16[10,3]{1,0}) all-reduce(%a, %b), replica_groups=[1,8]<=[8]
  %ag = f32[64,128]{1,0:T(8,128)} all-gather(f32[8,128]{1,0} %x), replica_groups={{0,1},{2,3}}
  ROOT %rs.1 = f32[8,128]{1,0} reduce-scatter(%y), replica_groups=[2,4]<=[8], dimensions={0}
  %s = ((f32[8]{0}), (f32[64]{0})) all-gather-start(%z), replica_groups=[1,8]<=[8]
  %d = f32[64]{0} all-gather-done(%s)
  %p = (u8[100]{0}, u8[100]{0}, u32[], u32[]) collective-permute-start(%q), channel_id=1
  %t = u8[16,4]{1,0} all-to-all(u8[16,4]{1,0} %r), replica_groups={}
  %other = u8[7]{0} collective-permute(%q), channel_id=1
  %same = u8[7]{0} collective-permute(%other), channel_id=1
  %plain = f32[3]{0} all-gather(%p), channel_id=5, replica_groups={}
  %f = f32[9]{0} fusion(%all-reduce.3), calls=%all-reduce-computation
}
"""


def test_devices_of_a_slice():
    found = {t: chips.devices_of(t) for t in ("v5e:4x8", "v4:2x2x4", "v3:4x4", "v5e", "v9:2x2")}
    assert found == {"v5e:4x8": 32, "v4:2x2x4": 16, "v3:4x4": 32, "v5e": 1, "v9:2x2": 1}


def test_an_open_batch_is_that_of_the_slice():
    c = tiny.config("moco", batch_size=0)
    decided = {n: plan_module._extent(c, 300, 0, n)[0].batch_size for n in (1, 64)}
    assert decided == {1: 32, 64: 64}


def test_collectives_of_a_text():
    got = collectives.read(HLO, 8)
    assert [(c.kind, c.bytes, c.group) for c in got] == [
        ("all-reduce", 64 * 4 + 30 * 2, 8),
        ("all-gather", 64 * 128 * 4, 2),
        ("reduce-scatter", 4 * 8 * 128 * 4, 4),  # the operand, which is the group's
        ("all-gather", 64 * 4, 8),
        ("collective-permute", 100, 8),
        ("all-to-all", 64, 8),
        ("collective-permute", 7, 8),
        ("collective-permute", 7, 8),
        ("all-gather", 12, 8),
        ("all-gather", 32 * 4, 8),  # in two fusions, and one
        ("all-gather", 12, 8),  # of the same channel: one in two fusions, and one in one
        ("all-gather", 12, 8),
    ]
    assert got[0].traffic == 2 * 7 / 8 * 316 and got[1].traffic == 64 * 128 * 4 / 2
    assert got[4].traffic == 100
    totals = collectives.totals(got)
    assert totals["all-gather"] == {"count": 6, "bytes": 64 * 128 * 4 + 256 + 128 + 36}
    assert next(iter(totals)) == "all-gather"


def test_traffic_of_a_text():
    """Operands in HBM count wherever they are used, a fetch counts the bytes that it moves."""
    text = """
%fused (p: f32[9]) -> f32[9] {
  %inside = f32[9]{0:S(1)} add(%p, %p)
}

ENTRY %main.1 (p: f32[8,100]) -> f32[8,100] {
  %p = bf16[8,100]{1,0:T(8,128)(2,1)} parameter(0)
  %s = ((bf16[8,100]{1,0}), bf16[2,100]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%p), slice={[0:2]}
  %sd = bf16[2,100]{1,0:S(1)} slice-done(%s)
  %f = (f32[100]{0:T(128)S(1)}, f32[8,100]{1,0:T(8,128)}) fusion(%p, %sd), calls=%fused
  %g = f32[8,100]{1,0:T(8,128)} get-tuple-element(%f), index=1
  %c = (f32[8,100]{1,0:T(8,128)S(1)}, f32[8,100]{1,0}, u32[]{:S(2)}) copy-start(%g)
  %cd = f32[8,100]{1,0:T(8,128)S(1)} copy-done(%c)
  %k = bf16[4,100]{1,0} custom-call(%cd, %p), custom_call_target="tpu_custom_call"
  %j = bf16[4,100]{1,0} custom-call(%k, %k), custom_call_target="ConcatBitcast"
  ROOT %w = pred[8,100]{1,0} compare(%cd, %cd), metadata={op_name="jit(step)/loss/lt"}
}
"""
    fetched, fusion, copied, compared = 400, 1600 + 3200, 3200, 800
    kernel = 800 + 1600  # one operand is in fast memory
    assert traffic.hbm_bytes(text) == fetched + fusion + copied + kernel + compared
    found = {x.kind: x for x in traffic.read(text)}
    assert found["tpu_custom_call"][1:] == ("", 800 + 1600 + 3200, kernel)
    # a fetch touches its two ends: here a whole array and two rows, and an array and its copy
    assert (found["slice-start"].touched, found["slice-start"].hbm) == (1600 + 400, fetched)
    assert (found["copy-start"].touched, found["copy-start"].hbm) == (2 * 3200, copied)
    assert found["ConcatBitcast"].hbm == 0  # it only says that two arrays are one
    assert found["compare"][1:] == ("jit(step)/loss/lt", 800 + 2 * 3200, 800)
    assert traffic.hbm_bytes(text.replace("S(1)", "")) is None


def test_collectives_of_a_real_program():
    mesh = make_mesh(jax.devices()[:4])

    def local(x):
        return jax.lax.psum(jax.lax.all_gather(x, AXIS, tiled=True).sum(0), AXIS)

    f = jax.shard_map(local, mesh=mesh, in_specs=PartitionSpec(AXIS), out_specs=PartitionSpec())
    compiled = jax.jit(f).lower(jnp.zeros((16, 6))).compile()
    got = {(c.kind, c.bytes, c.group) for c in collectives.read(compiled.as_text(), 4)}
    assert got == {("all-gather", 16 * 6 * 4, 4), ("all-reduce", 6 * 4, 4)}


@pytest.mark.parametrize("remat", ["none", pytest.param("blocks", marks=pytest.mark.slow)])
def test_plan_of_this_machine(remat, capsys):
    """The step that a run compiles: the state is the input, and its memory is donated."""
    c = tiny.config("moco", data__source="fake", data__fake_examples=64, model__remat=remat,
                    model__bn_groups=8)  # fmt: skip
    (row,) = plan(main.METHODS["moco"], c)
    printed = capsys.readouterr()
    assert json.loads(printed.out) == row
    assert (row["devices"], row["batch"], row["batch_per_device"]) == (8, 16, 2)
    assert row["fits"] is None and row["hbm_gib"] is None and row["tflop"] > 0
    assert "all-reduce" in row["collectives"] and row["remat"] == remat
    assert "topology" in printed.err and "local" in printed.err
    found = measure.for_mesh(measure.Task(main.METHODS["moco"], c, Extent(8, 4, 10)), make_mesh())
    state = tiny.place_state(tiny.prepared(c, classes=10).method)
    share = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    assert found["aliased"] == share
    assert found["peak"] == (
        found["arguments"] + found["temporaries"] + found["outputs"] - found["aliased"]
    )


@pytest.mark.slow
def test_plan_of_a_memory():
    """Beside what SimCLR sends: rows to be scored by every device, and what comes back of them."""
    found = {}
    for length in (0, 1024):
        c = tiny.config("simclr", batch_size=64, head__dim=32, simclr__memory_length=length)
        task = measure.Task(main.METHODS["simclr"], c, Extent(8, 4, 10))
        found[length] = measure.for_mesh(task, make_mesh())
    sent = {
        length: collectives.totals(collectives.Collective(*c) for c in x["collectives"])
        for length, x in found.items()
    }
    rows = 4 * 128 * 32  # bytes of the embeddings
    more = {
        kind: sent[1024][kind]["bytes"] - sent[0].get(kind, {"bytes": 0})["bytes"]
        for kind in ("all-gather", "reduce-scatter")
    }
    gone = 4 * 128 * 3  # NT-Xent gathers ids, log-sum-exps and cotangents of these; keys need none
    assert rows - gone <= more["all-gather"] < 1.1 * rows
    assert rows <= more["reduce-scatter"] < 1.1 * rows
    assert max(c[1] for c in found[1024]["collectives"]) < 4 * 1024 * 32  # the memory stays
    assert found[1024]["flops"] > found[0]["flops"]


def row_for(topology, monkeypatch, **found):
    """The row of a plan with invented measurements for 32 devices."""
    base = {
        "devices": 32, "compile_seconds": 1.0, "arguments": 2**30, "temporaries": 2**32,
        "outputs": 2**30, "aliased": 2**30, "peak": 5 * 2**30, "flops": 6.17e12,
        "bytes_accessed": 83.5e9, "hbm_bytes": 61e9,
        "collectives": [("all-reduce", 100_000_000, 32)],
    }  # fmt: skip
    monkeypatch.setattr(measure, "for_topology", lambda task, name: base | found)
    c = tiny.config("simclr", data__source="tfds:imagenet2012", batch_size=4096)
    return plan(main.METHODS["simclr"], c, [topology])


def test_bounds_by_hand(monkeypatch, capsys):
    """v5e: 197 TFLOP/s, 819 GB/s, 200 GB/s of links; the slowest bounds the step."""
    (row,) = row_for("v5e:4x8", monkeypatch)
    assert row["arithmetic_ms"] == pytest.approx(6.17 / 197 * 1e3, abs=0.01)
    assert row["memory_ms"] == pytest.approx(83.5 / 819 * 1e3, abs=0.01)
    assert row["ici_ms"] == pytest.approx(2 * 31 / 32 * 0.1 / 200 * 1e3, abs=0.01)
    assert row["images_per_second"] == pytest.approx(4096 / (83.5 / 819), rel=1e-3)
    assert row["hours"] == pytest.approx(8 * 83.5 / 819 / 3600, abs=0.01)
    assert row["fits"] is True and row["chips"] == 32 and row["peak_gib"] == 5
    text = capsys.readouterr().err
    assert (
        "v5e:4x8" in text and "197 bfloat16 TFLOP/s" in text and "1 all-reduce of 100.00 MB" in text
    )


def test_a_v3_device_is_half_a_chip(monkeypatch):
    (row,) = row_for("v3:4x4", monkeypatch)
    assert (row["devices"], row["chips"], row["hbm_gib"]) == (32, 16, 16)


def test_what_does_not_fit_is_tried_with_remat(monkeypatch, capsys):
    rows = row_for("v5e:4x8", monkeypatch, peak=40 * 2**30)
    assert [r["remat"] for r in rows] == ["none", "convs", "blocks"]
    assert all(r["fits"] is False for r in rows)
    assert "batch_size=1472" in rows[0]["advice"] and "128 chips" in rows[0]["advice"]
    assert " NO " in capsys.readouterr().err
    rows = row_for("v5e:4x8", monkeypatch, out_of_memory={"peak": 2 * 2**34, "capacity": 2**34})
    assert rows[0]["peak_gib"] == 32 and "does not fit" in rows[0]["advice"]


@pytest.mark.parametrize(
    ("message", "peak"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 19.25G of 15.75G hbm. "
         "Exceeded hbm capacity by 3.50G.", 19.25),
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
         "temporaries (45.08G) exceeds available HBM (15.75G).", 45.08),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem", None),
    ],
)  # fmt: skip
def test_what_the_compiler_says_of_a_program_that_is_too_large(message, peak):
    want = {"peak": peak * 2**30, "capacity": 15.75 * 2**30} if peak else {}
    assert measure.out_of_memory(message) == want


def test_what_fits_is_said(monkeypatch, capsys):
    """The plain step is too large; with the second policy it fits: that row is there too."""
    fits = dict(
        devices=32, compile_seconds=1.0, arguments=0, temporaries=2**33, outputs=0, aliased=0,
        peak=2**33, flops=1e12, bytes_accessed=1e9, hbm_bytes=None,
        collectives=[],
    )  # fmt: skip

    def found(task, topology):
        if task.config.model.remat == "convs":
            return fits
        peak = {"peak": 2**35, "capacity": 2**34}
        return {"devices": 32, "compile_seconds": 1.0, "out_of_memory": peak}

    monkeypatch.setattr(measure, "for_topology", found)
    c = tiny.config("moco", data__source="tfds:imagenet2012", batch_size=3072, model__bn_groups=96)
    rows = plan(main.METHODS["moco"], c, ["v5e:4x8"])
    assert [(r["remat"], r["fits"]) for r in rows] == [("none", False), ("convs", True)]
    advice = rows[0]["advice"]
    assert advice.startswith("does not fit, but does with model.remat=convs: try batch_size=1344")
    assert 1344 % 96 == 1344 % 32 == 0 and "model.remat=convs or blocks" in advice
    err = capsys.readouterr().err
    assert advice in err and "8.00 GiB = 0.00 arguments + 8.00 temporaries" in err


def test_a_slice_that_cannot_be_planned_does_not_lose_the_others(monkeypatch, capsys):
    real = row_for("v5e:4x8", monkeypatch)
    capsys.readouterr()
    good = measure.for_topology

    def found(task, topology):
        if topology == "v6e:4x8":
            raise UserError("the TPU compiler crashed on v6e:4x8")
        return good(task, topology)

    monkeypatch.setattr(measure, "for_topology", found)
    c = tiny.config("simclr", data__source="tfds:imagenet2012", batch_size=4096)
    with pytest.raises(UserError, match=r"crashed on v6e:4x8$"):
        plan(main.METHODS["simclr"], c, ["v6e:4x8", "v5e:4x8"])
    printed = capsys.readouterr()
    assert json.loads(printed.out) == real[0] and "v5e:4x8" in printed.err


def test_quick_reaches_the_compiler_and_the_reader(monkeypatch, capsys):
    seen = []

    def refuse(compile_for, topology, quick):
        seen.append((topology, quick))
        raise UserError("seen enough")

    c = tiny.config("simclr", data__source="tfds:imagenet2012", batch_size=4096)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="seen enough"):
        patch.setattr(measure, "on_topology", refuse)
        plan(main.METHODS["simclr"], c, ["v5e:4x8"], quick=True)
    assert seen == [("v5e:4x8", True)]
    (plain,) = row_for("v5e:4x8", monkeypatch)
    assert plain["quick"] is False and "little effort" not in capsys.readouterr().err
    assert "little effort" in table.render([plain | {"quick": True}])


def test_the_table_lines_up():
    row = {
        "topology": "v4:2x2x1", "chips": 4, "batch": 64, "batch_per_device": 16, "remat": "none",
        "peak_gib": 1.5, "hbm_gib": 32, "fits": True, "collectives": {}, "device": "x",
    }  # fmt: skip
    lines = table.render([row, row | {"topology": "local", "hbm_gib": None, "fits": None}])
    head, first, second = lines.splitlines()[:3]
    assert len(head) == len(first) == len(second)
    assert first.split()[-2:] == ["-", "-"] and "?" in second


def test_devices_by_name():
    assert chips.of_topology("v5p:4x4x4").hbm_gib == 95
    assert chips.of_topology("v9:1") is None
    assert chips.of_kind("TPU v5 lite") is chips.TPUS["v5e"]
    assert chips.of_kind("TPU v4") is chips.TPUS["v4"]
    assert chips.of_kind("NVIDIA H100 80GB HBM3").tflops == 989
    assert chips.of_kind("cpu") is None


def test_the_data_need_not_be_there(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert data_of(tiny.config("simclr", data__source="tfds:imagenet2012:5.1.0")) == (
        1_281_167, 1000)  # fmt: skip
    stl = tiny.config("simclr", data__source="tfds:stl10", data__train_split="unlabelled")
    assert data_of(stl) == (100_000, 0)
    assert data_of(tiny.config("simclr", data__source="embedded")) == (10_000, 10)
    with pytest.raises(UserError, match="no dataset tfds:nothing"):
        data_of(tiny.config("simclr", data__source="tfds:nothing"))


def test_mistakes(monkeypatch):
    c = tiny.config("simclr", data__source="fake")
    monkeypatch.setattr(measure.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -U .jax\[tpu\]"):
        plan(main.METHODS["simclr"], c, ["v5e:4x8"])
    c = tiny.config("simclr", data__source="fake", batch_size=12)
    with pytest.raises(UserError, match="batch_size=12 cannot be split over 8 devices"):
        plan(main.METHODS["simclr"], c)
    c = tiny.config("simclr", data__source="fake", data__fake_examples=8)
    with pytest.raises(UserError, match="the data has only 8 images"):
        plan(main.METHODS["simclr"], c)


@pytest.mark.parametrize("topologies", [(), ("v5e:4x8",)])
def test_a_setting_is_refused_before_anybody_waits(topologies, capsys, monkeypatch):
    """And for a slice without using a device, which may be busy with a run."""
    c = tiny.config("simclr", data__source="fake", optimizer__name="adam")
    if topologies:
        monkeypatch.setattr(measure.jax, "devices", None)
    with pytest.raises(UserError, match=r'optimizer\.name="adam" is unknown'):
        plan(main.METHODS["simclr"], c, topologies)
    assert "compiling" not in capsys.readouterr().err


# Of libtpu 0.0.42.1, shortened.
DYING = """E0000 00:00:1795738717.677787   23731 common_lib.cc:554] INVALID_ARGUMENT: Error
F1127 00:18:51.707496   23774 rotated.cc:676] Check failed: bound == 1 || bound >= 2  bound = 0
*** Check failure stack trace: ***
    @     0x7f64be09bc54  absl::log_internal::LogMessage::SendToLog()
*** SIGABRT received by PID 23731 (TID 23774) on cpu 0, si_code=-6, from PID 23731; ***
E1127 00:18:52.777298   23774 process_state.cc:708] RAW: Raising signal 6 with default behavior
"""


def die(compile_for, topology, sender, log):
    """Simulates a compiler that fails one of its own checks."""
    import os
    import pathlib

    pathlib.Path(log).write_text(DYING)
    os.abort()


@pytest.mark.parametrize(
    ("topology", "quick", "advice"),
    [
        ("v6e:4x8", False, "libtpu, known for ResNets on v6e; try --quick, another topology"),
        ("v5e:1x1", True, "libtpu; try another topology"),
    ],
)
def test_a_compiler_that_crashes_is_an_error(topology, quick, advice, monkeypatch):
    """In one line: the check that failed, and what has not been tried yet."""
    monkeypatch.setattr(measure.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(measure, "_child", die)
    task = measure.Task(main.METHODS["simclr"], tiny.config("simclr"), Extent(8, 4, 3), quick=quick)
    with pytest.raises(UserError) as caught:
        measure.for_topology(task, topology)
    assert str(caught.value) == (
        f"the TPU compiler crashed on {topology} (exit status -6, Check failed: bound == 1 || "
        f"bound >= 2 bound = 0): a fault in {advice}, or another version of libtpu"
    )


def test_the_last_words_of_a_compiler():
    assert measure._last_words("I am\n\n*** SIGSEGV received by PID 1 ***\n@ 0x7\n") == ", SIGSEGV"
    assert measure._last_words("I am\nnot well\n\n") == ", not well"
    assert measure._last_words("") == ""


@pytest.mark.slow
def test_remat_changes_nothing_but_memory():
    """Loss and gradient, batch statistics too: float64, and only what is stored differs."""
    runs = {}
    with jax.enable_x64(True):
        for remat in ("none", "convs", "blocks"):
            c = tiny.config("simclr", model__dtype="float64", model__remat=remat)
            runs[remat] = tiny.run(tiny.build(c, 2), steps=2)
    for remat in ("convs", "blocks"):
        assert jax.tree.structure(runs[remat].states) == jax.tree.structure(runs["none"].states)
        for got, want in zip(runs[remat].states, runs["none"].states, strict=True):
            tiny.assert_close(got, want, 1e-10, 1e-13)
    with pytest.raises(UserError, match=r'model.remat="all" is unknown: use one of none, convs'):
        tiny.build(tiny.config("simclr", model__remat="all"), 1)
