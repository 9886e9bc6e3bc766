"""A profile as a table: programs of three compilers, invented profiles, and real steps."""

import re
import types

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.profiler import ProfileData

from benchmarks import hlo_parts, trace
from benchmarks.trace import Event
from common import queue as queues
from common.errors import UserError
from moco_jax.loss import info_nce
from simclr_jax.loss import nt_xent_with_metrics

STEP = "jit(several)/jvp(Network)/backbone/layer1_0"
BACK = "jit(several)/transpose(jvp(Network))/backbone/layer1_0"


def meta(path):
    return f'metadata={{op_name="{path}" stack_frame_id=7}}'


GPU = f"""HloModule jit_several, is_scheduled=true

%fused_mul (param_0.1: f32[8,4]) -> f32[8,4] {{
  %param_0.1 = f32[8,4]{{1,0}} parameter(0)
  %multiply.3 = f32[8,4]{{1,0}} multiply(%param_0.1, %param_0.1), {meta(STEP + "/bn1/mul")}
  %add.3 = f32[8,4]{{1,0}} add(%multiply.3, %param_0.1), {meta(STEP + "/bn1/add")}
  ROOT %maximum.3 = f32[8,4]{{1,0}} maximum(%add.3, %param_0.1), {meta(STEP + "/jit(relu)/max")}
}}

%gemm_fusion_dot_computation (p.2: f32[8,4]) -> f32[8,8] {{
  %p.2 = f32[8,4]{{1,0}} parameter(0)
  ROOT %dot.9 = f32[8,8]{{1,0}} dot(%p.2, %p.2), \
{meta("jit(several)/jvp(Network)/head/dense1/dot_general")}
}}

%transposed (p.4: f32[8,4]) -> bf16[4,8] {{
  %p.4 = f32[8,4]{{1,0}} parameter(0)
  %convert.4 = bf16[8,4]{{1,0}} convert(%p.4), {meta(STEP + "/conv1/convert_element_type")}
  ROOT %transpose.4 = bf16[4,8]{{1,0}} transpose(%convert.4), {meta(STEP + "/conv_general_dilated")}
}}

%conv_fused {{
  %p.5 = f32[8,4]{{1,0}} parameter(0)
  %conv.5 = f32[8,4]{{1,0}} convolution(%p.5, %p.5), {meta(STEP + "/conv2/conv_general_dilated")}
  ROOT %add.5 = f32[8,4]{{1,0}} add(%conv.5, %p.5), {meta(STEP + "/bn2/add")}
}}

%command_buffer {{
  %loop_maximum_fusion.12 = f32[8,4]{{1,0}} fusion(%p), kind=kLoop, calls=%fused_mul, \
{meta(STEP + "/jit(relu)/max")}
  %gemm_fusion_dot.1 = f32[8,8]{{1,0}} fusion(%p), kind=kCustom, calls=%gemm_fusion_dot_computation
  %input_transpose_fusion = bf16[4,8]{{1,0}} fusion(%p), kind=kInput, calls=%transposed
  %cudnn-fusion = f32[8,4]{{1,0}} fusion(%p), kind=kCustom, calls=%conv_fused, \
{meta("jit(several)/update/add")}, backend_config={{"fusion_config":{{"kind":"__cudnn$fusion"}}}}
}}

ENTRY %main.9 (p: f32[8,4]) -> f32[8,4] {{
  %p = f32[8,4]{{1,0}} parameter(0), {meta("state.params['bn1']['scale']")}
  %call.4 = (f32[8,4]{{1,0}}, f32[8,8]{{1,0}}, /*index=2*/bf16[4,8]{{1,0}}) call(%p), \
to_apply=%command_buffer
  %cudnn-conv-bw-filter.3 = (f32[3,3,4,4]{{3,2,1,0}}, u8[0]{{0}}) custom-call(%p, %p), \
window={{size=3x3}}, custom_call_target="__cudnn$convBackwardFilter", \
{meta(BACK + "/conv1/conv_general_dilated")}
  %custom-call.7 = (f32[8,8]{{1,0}}, s8[4096]{{0}}) custom-call(%p, %p), \
custom_call_target="__cublas$gemm", {meta("jit(several)/jvp(loss)/while/body/dot_general")}
  %custom-call.8 = (f32[8,8]{{1,0}}, s8[4096]{{0}}) custom-call(%p, %p), \
custom_call_target="__cublas$lt$matmul", \
{meta("jit(several)/jvp(Network)/head/dense1/dot_general")}
  ROOT %copy.2 = f32[8,4]{{0,1}} copy(%p), {meta("jit(several)/jvp(loss)/div")}
}}
"""

TPU = f"""HloModule jit_several, is_scheduled=true

%fused_computation.1 (p.1: bf16[8,4]) -> f32[4] {{
  %p.1 = bf16[8,4]{{1,0:T(8,128)(2,1)}} parameter(0)
  ROOT %convolution.2 = f32[4]{{0:T(128)}} convolution(%p.1, %p.1), dim_labels=bf_io->bf, \
{meta("jit(several)/jvp(Network)/head/dense2/transpose")}
}}

%fused_computation.2 (p.2: bf16[8,4]) -> f32[4] {{
  %p.2 = bf16[8,4]{{1,0:T(8,128)(2,1)}} parameter(0)
  %convolution.3 = f32[4]{{0:T(128)}} convolution(%p.2, %p.2), dim_labels=b01f_01io->b01f, \
{meta(BACK + "/conv1/conv_general_dilated")}
  ROOT %add.2 = f32[4]{{0:T(128)}} add(%convolution.3, %p.2), {meta("jit(several)/update/add")}
}}

%body (arg: (s32[], f32[4])) -> (s32[], f32[4]) {{
  %arg = (s32[]{{:T(128)}}, f32[4]{{0:T(128)}}) parameter(0)
  %exponential.1 = f32[4]{{0:T(128)S(1)}} exponential(%arg), \
{meta("jit(several)/transpose(jvp(loss))/while/body/closed_call/exp")}
}}

ENTRY %main.1 (p: bf16[8,4]) -> f32[4] {{
  %fusion.1 = (f32[4]{{0:T(128)}}, u32[]{{:S(2)}}) fusion(%p), kind=kOutput, \
calls=%fused_computation.1
  %fusion.2 = f32[4]{{0:T(128)}} fusion(%p), kind=kOutput, calls=%fused_computation.2, \
{meta("jit(several)/update/add")}
  %convolution.7 = f32[8,4]{{1,0:T(8,128)}} convolution(%p, %p), dim_labels=0bf_0io->0bf, \
{meta(STEP + "/bn3/gbhwc,gcd->gbhwd/dot_general")}
  %while.3 = (s32[]{{:T(128)}}, f32[4]{{0:T(128)}}) while(%tuple), condition=%cond, body=%body, \
{meta("jit(several)/jvp(loss)/while")}
  %copy-start.1 = (f32[4]{{0:T(128)S(1)}}, f32[4]{{0:T(128)}}, u32[]{{:S(2)}}) copy-start(%p)
  ROOT %convert.3 = f32[8,4]{{1,0:T(8,128)}} convert(%p), {meta("jit(several)/augmentation/mul")}
}}
"""

CPU = f"""HloModule jit_several, is_scheduled=true

ENTRY %main.1 (p: f32[8,4]) -> f32[4] {{
  %convolution.4 = f32[8,4]{{1,0}} convolution(%p, %p), dim_labels=b01f_01io->b01f, \
{meta("jit(several)/augmentation/blur/conv_general_dilated")}
  %conv_general_dilated.81 = f32[8,4]{{1,0}} convolution(%p, %p), dim_labels=b01f_01io->b01f
  %dot.1 = f32[8,4]{{1,0}} dot(%p, %p), {meta("jit(several)/probe/jvp()/dot_general")}
  %reduce.5 = f32[4]{{0}} reduce(%p, %c), to_apply=%r, {meta(BACK + "/stem_bn/reduce_sum")}
  %transpose.1 = f32[4,8]{{1,0}} transpose(%p), {meta(BACK + "/conv1/transpose")}
  ROOT %divide.1 = f32[4]{{0}} divide(%p, %p), {meta("jit(several)/jvp()/div")}
}}
"""


def test_categories_of_a_gpu():
    want = {
        "loop_maximum_fusion.12": "norms",  # with the ReLU after it
        "gemm_fusion_dot.1": "other products",
        "input_transpose_fusion": "copies",  # whatever it is a copy for
        "cudnn-fusion": "convolutions",  # whatever is added to it
        "call.4": "around",
        "cudnn-conv-bw-filter.3": "convolutions",
        "custom-call.7": "loss",
        "custom-call.8": "other products",
        "copy.2": "copies",
        "p": "other",
    }
    found = hlo_parts.categories(GPU)
    assert {name: found[name] for name in want} == want


def test_categories_of_a_tpu():
    found = hlo_parts.categories(TPU)
    assert {name: found[name] for name in found if not name.startswith(("p", "arg"))} == {
        "convolution.2": "other products",  # a product in a TPU's form
        "convolution.3": "convolutions",
        "add.2": "update",
        "exponential.1": "loss",
        "fusion.1": "other products",
        "fusion.2": "convolutions",
        "convolution.7": "convolutions",  # 1 x 1, folded into its norm
        "while.3": "around",
        "copy-start.1": "copies",
        "convert.3": "augmentation",
    }


def test_categories_of_a_cpu():
    assert hlo_parts.categories(CPU) == {
        "convolution.4": "augmentation",
        "conv_general_dilated.81": "convolutions",
        "dot.1": "probe",
        "reduce.5": "norms",
        "transpose.1": "copies",
        "divide.1": "other",
    }


def times(events, of, steps=1):
    """Milliseconds that are not 0; the fractions add up to 1."""
    rows = trace.summary(events, of, steps)
    assert [row[0] for row in rows] == [*hlo_parts.ROWS, "idle"]
    total = sum(time for _, time, _ in rows)
    assert [row[2] for row in rows] == pytest.approx([row[1] / total for row in rows])
    return {name: pytest.approx(time) for name, time, _ in rows if time}


def test_every_instant_counts_once():
    of = {"conv": "convolutions", "bn": "norms", "exp": "loss", "while": "around"}
    ms = 1e6
    events = [
        Event("conv", 5 * ms, 4 * ms),  # 5 to 9
        Event("bn", 8 * ms, 2 * ms),  # half of 8 to 9, then to 10
        Event("while", 12 * ms, 8 * ms),  # around the two below: 3 of its 8 are its own
        Event("exp", 13 * ms, 3 * ms),
        Event("conv", 17 * ms, 2 * ms),
        Event("bn", 20 * ms, 0),
    ]
    want = {"convolutions": 5.5, "norms": 1.5, "loss": 3, "other": 3, "idle": 2}
    assert times(events, of) == want
    assert times(events[::-1], of) == want
    assert times(events, of, steps=2) == {name: time / 2 for name, time in want.items()}


def test_three_at_once_share_an_instant_by_their_number():
    of = {"a": "loss", "b": "loss", "c": "update"}
    assert times([Event(name, 0, 3e6) for name in of], of) == {"loss": 2, "update": 1}


@pytest.mark.parametrize(
    ("event", "want"),
    [
        (("loop_maximum_fusion.12", "any_kernel"), "norms"),
        (("", "loop_maximum_fusion_12"), "norms"),
        (("call.4", "loop_maximum_fusion_12"), "norms"),  # in a CUDA graph
        (("call.4", "input_transpose_fusion__1"), "copies"),
        (("custom-call.7", "nvjet_hsh_128x128_64x4"), "loss"),
        (("", "nvjet_hsh_128x128_64x4"), "other products"),
        (("", "sm90_xmma_wgrad_implicit_gemm_bf16bf16_nhwc"), "convolutions"),
        (("", "void cudnn::engines_precompiled::nhwcToNchwKernel"), "convolutions"),
        (("", "MemcpyH2D"), "copies"),
        (("call.4", "nobody_knows"), "other"),
        (("", "nobody_knows"), "other"),
    ],
)
def test_a_kernel_is_found_by_its_instruction_then_by_its_name(event, want):
    events = [Event(event[0], 0, 1e6, event[1])]
    assert times(events, hlo_parts.categories(GPU)) == {want: 1}


NUMBERS = ("_pt", "_p", "_ct", "_c")  # of what an event starts, of what it ends


def write(path, plane, lines, numbers=types.MappingProxyType({})):
    """A profile.

    Args:
        path: folder.
        plane: name of a device.
        lines: by name, events (name, start and duration in ns, value of hlo_op).
        numbers: by an event's name, some of `NUMBERS` with their values.
    """
    names = sorted({event[0] for events in lines.values() for event in events})
    stats = ["hlo_op", *NUMBERS]
    text = f'planes {{ name: "{plane}"'
    for kind, all_of_it in (("event", names), ("stat", stats)):
        for i, name in enumerate(all_of_it, 1):
            text += f' {kind}_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }}'
    for line, events in lines.items():
        text += f' lines {{ name: "{line}" '
        for name, start, duration, op in events:
            values = numbers.get(name, {})
            values = {stats.index(x) + 1: f"int64_value: {n}" for x, n in values.items()}
            values |= {1: f'str_value: "{op}"'} if op else {}
            text += (
                f"events {{ metadata_id: {names.index(name) + 1} offset_ps: {start * 1000} "
                f"duration_ps: {duration * 1000} "
            )
            text += "".join(f"stats {{ metadata_id: {i} {x} }} " for i, x in values.items()) + "} "
        text += "}"
    path.mkdir(parents=True, exist_ok=True)
    profile = ProfileData.text_proto_to_serialized_xspace(text + "}")
    (path / "host.xplane.pb").write_bytes(profile)


def test_reading_a_gpu(tmp_path):
    write(
        tmp_path / "a",
        "/device:GPU:0",
        {
            "Stream #13(Kernel)": [("nvjet", 10, 5, "custom-call.7"), ("loop_fusion_1", 20, 1, "")],
            "Stream #14(MemcpyH2D)": [("MemcpyH2D", 12, 2, "")],
            "XLA Ops": [("custom-call.7", 10, 5, "custom-call.7")],  # the same again
        },
    )
    assert trace.read(tmp_path) == [
        Event("custom-call.7", 10, 5, "nvjet"),
        Event("", 20, 1, "loop_fusion_1"),
        Event("", 12, 2, "MemcpyH2D"),
    ]


def test_reading_a_tpu(tmp_path):
    name = "%fusion.2 = f32[4]{0:T(128)} fusion(f32[4] %p), kind=kOutput"
    write(
        tmp_path,
        "/device:TPU:0",
        {"XLA Modules": [("jit_several", 0, 99, "")], "XLA Ops": [(name, 10, 5, "")]},
    )
    assert trace.read(tmp_path) == [Event("fusion.2", 10, 5)]


def test_nothing_to_read_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no \*.xplane.pb below it: expected"):
        trace.read(tmp_path)
    write(tmp_path / "a", "/device:GPU:0", {"Stream #1": []})
    with pytest.raises(UserError, match="no operation of a device in it: trace a step"):
        trace.read(tmp_path)


FUSED = [pytest.mark.optimised, pytest.mark.slow]


@pytest.mark.parametrize(
    ("method", "where"),
    [
        pytest.param("simclr", "device", marks=pytest.mark.slow),
        pytest.param("moco", "host", marks=pytest.mark.slow),
        pytest.param("moco", "device", marks=FUSED),
    ],
)
def test_a_real_step(method, where, tmp_path):
    c = tiny.config(
        method, data__source="fake", data__fake_examples=32, data__augment_on=where,
        augment__preset="simclr",
    )  # fmt: skip
    rows = trace.profile(c, tmp_path, steps=2)
    shares = {name: share for name, _, share in rows}
    assert sum(shares.values()) == pytest.approx(1)
    for name in ("convolutions", "norms", "loss", "probe", "update", "other products"):
        assert shares[name] > 0, name
    assert (shares["augmentation"] > 0) == (where == "device")
    assert shares["other"] < 0.3  # most instructions have a name


@pytest.mark.parametrize("method", ["simclr", "moco"])
def test_the_products_of_a_loss_are_its_own(method):
    x = jnp.ones((8, 2, 4))
    queue = queues.Queue(keys=jnp.ones((3, 8, 4)))
    losses = {
        "simclr": lambda x: nt_xent_with_metrics(x)[0],
        "moco": lambda x: info_nce(x[:, 0], x[:, 1], queue, length=24, step=0)[0],
    }
    with trace._own_names():
        text = jax.jit(jax.grad(losses[method])).lower(x).compile().as_text()
    found = hlo_parts.categories(text)
    products = [found[name] for name in re.findall(r"%(\S+) = \S+ dot\(", text)]
    assert len(products) >= 2 and set(products) == {"loss"}


def test_a_program_has_the_names_of_its_own_code():
    """Without this the tests' disk cache confuses programs that differ only in names."""
    for scope in ("probe", "update"):

        def step(x, scope=scope):
            with jax.named_scope(scope):
                return jnp.sin(x) * 17

        with trace._own_names():
            text = jax.jit(step).lower(jnp.ones(19)).compile().as_text()
        assert scope in hlo_parts.categories(text).values()


def test_half_of_the_augmentation_is_refused():
    with pytest.raises(UserError, match='augment_on="both" cannot be traced here: use "device"'):
        trace.profile(tiny.config("simclr", data__augment_on="both"))


def test_reading_a_cpu(tmp_path):
    """A convolution continues in other threads: it lasts until its end marker."""
    write(
        tmp_path,
        "/host:CPU",
        {
            "python": [("$resident.py:60 turn", 0, 99, "")],
            "thread 1": [("conv.1", 10, 5, "conv.1"), ("add.2", 15, 1, "add.2")],
            "thread 2": [("end: conv.1", 40, 2, "")],
        },
        numbers={
            "conv.1": {"_pt": 0, "_p": 7},
            "add.2": {"_pt": 0, "_p": 8},
            "end: conv.1": {"_ct": 0, "_c": 7},
        },
    )
    assert trace.read(tmp_path) == [Event("conv.1", 10, 30), Event("add.2", 15, 1)]
