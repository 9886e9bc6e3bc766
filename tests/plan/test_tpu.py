"""Train steps compiled for TPU slices: their memory and traffic must not grow.

The smallest that shows everything: two residual blocks, 8 devices, bfloat16, global BN.
"""

import importlib

import jax
import jax.numpy as jnp
import pytest
import tiny

import main
from benchmarks import tpu_figures
from benchmarks.record import plan
from common.errors import UserError
from common.models import attention
from common.plan import measure
from common.plan.collectives import Collective
from common.sharding import make_mesh, replicated
from common.train.prepare import Extent, prepare

pytestmark = [pytest.mark.tpu, pytest.mark.optimised]
DEVICES, BATCH, DIM = 8, 256, 128


def config(method, **changes):
    settings = {
        "batch_size": BATCH, "data__source": "fake", "data__image_size": 32,
        "model__stages": (1, 1), "model__width": 64, "model__dtype": "bfloat16",
        "head__hidden": 0, "head__dim": DIM, "optimizer__weight_decay": 1e-4,
    }  # fmt: skip
    if method == "moco":
        settings |= {"model__bn_groups": 8, "moco__queue_length": 65536}
    return tiny.config(method, **(settings | changes))


VIT = {
    "model__encoder": "vit", "vit__width": 128, "vit__depth": 2, "vit__heads": 2,
    "vit__patch": 4, "vit__patches": "frozen",
}  # fmt: skip


def compiled(method, topology="v5e:2x4", **changes):
    task = measure.Task(main.METHODS[method], config(method, **changes), Extent(100, 10, 10))
    found = measure.for_topology(task, topology)
    found["collectives"] = [Collective(*c) for c in found["collectives"]]
    return found


def state_bytes(method, **changes):
    """Of all that is on every device, of that the queue, and of the parameters."""
    built = tiny.build(config(method, **changes), 8)
    state = jax.eval_shape(built.init, jax.random.key(0))

    def size(tree):
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    queue = size(getattr(state, "queue", None))
    return {"all": size(state) - queue, "queue": queue, "params": size(state.params)}


def assert_sends(found, method, **changes):
    """What `tpu_figures.theory` names, and nothing else but metrics: 0.2 or 0.3 % here."""
    c = config(method, **changes)
    theory = sum(tpu_figures.theory(main.METHODS[method], c, DEVICES, 10).values())
    total = sum(c.bytes for c in found["collectives"])
    assert 0.99 < total / theory < 1.01


def test_simclr_sends_gradients_statistics_and_embeddings():
    found, size = compiled("simclr"), state_bytes("simclr")
    assert_sends(found, "simclr")
    assert found["aliased"] > 0.95 * size["all"]  # the old state is overwritten
    assert found["temporaries"] < 250e6


def test_moco_sends_nothing_of_the_queue():
    """And each device holds an eighth of it."""
    found, size = compiled("moco"), state_bytes("moco")
    assert_sends(found, "moco")
    images = BATCH // DEVICES * 32 * 32 * 3
    assert max(c.bytes for c in found["collectives"]) < size["params"]
    for c in found["collectives"]:
        if c.kind == "all-to-all":
            assert c.bytes <= images
    share = size["all"] + size["queue"] / DEVICES
    # layouts pad small arrays, by less than a second copy would take
    assert found["arguments"] < share + size["queue"] / DEVICES


def test_a_memory_sends_nothing_of_its_keys_either():
    """Rows once more to score them, and statistics of the second encoder."""
    memory = {"simclr__memory_length": 65536}
    found, size = compiled("simclr", **memory), state_bytes("simclr", **memory)
    assert_sends(found, "simclr", **memory)
    share = size["all"] + size["queue"] / DEVICES
    assert found["arguments"] < share + size["queue"] / DEVICES
    assert found["aliased"] > 0.95 * share  # the old keys are overwritten


@pytest.mark.parametrize("method", ["simclr", "moco_v3"])
def test_a_vit_sends_gradients_and_embeddings(method):
    """No image and no token leaves its chip, though a kernel is opaque to the compiler."""
    assert_sends(compiled(method, **VIT), method, **VIT)


def test_moco_v3_sends_what_two_passes_of_two_encoders_need():
    assert_sends(compiled("moco_v3"), "moco_v3")


# tokens of 96 pixels at patch 16, of 224 at 32, of 32 at 4, of 224 at 16, and of 224 at 14
KERNELS = [(37, 3, 64), (50, 12, 32), (65, 3, 64), (197, 12, 64), (257, 16, 64)]


def kernels_for(mesh):
    """Whether the compiler takes the attention kernels, forward and backward, in any size."""

    def loss(*arrays):
        return (attention.attend(*arrays).astype(jnp.float32) ** 2).sum()

    found = {}
    for size in KERNELS:
        x = jax.ShapeDtypeStruct((2, *size), jnp.bfloat16, sharding=replicated(mesh))
        text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile().as_text()
        found[size] = text.count('custom_call_target="tpu_custom_call"')
    return found


def test_the_attention_kernels_compile_for_every_number_of_tokens():
    assert measure.on_topology(kernels_for, "v5e:1x1") == dict.fromkeys(KERNELS, 2)


def test_an_unknown_topology_is_one_line():
    with pytest.raises(UserError, match=r"libtpu knows no topology 'v5e:3x5x7'"):
        compiled("simclr", "v5e:3x5x7")


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("method", ["simclr", "moco", "moco_v3"])  # with a config of CIFAR-10
def test_one_chip_compiles_sends_nothing_and_overwrites_its_state(method, quick):
    """With the settings of the Colab notebook, but a network of one block.

    At full effort the notebook's own step takes the compiler minutes: that one has a small batch.
    """
    c = importlib.import_module(f"configs.{method}_cifar10").get_config()
    c.model.dtype, c.model.stages = "bfloat16", (1,)
    if not quick:
        c.batch_size = 32
    found = plan.planned(c, "v5e:1x1", quick=quick)
    assert not found["collectives"]
    abstract = prepare(
        main.METHODS[c.method], c, make_mesh(jax.devices()[:1]), extent=Extent(100, 10, 10)
    ).abstract
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract))
    assert found["aliased"] > 0.95 * size
    assert found["peak"] < 4 * 2**30
