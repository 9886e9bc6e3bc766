"""Which rows go where, and which arrays are split."""

import re
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from common import sharding
from common.errors import UserError
from common.train.step import trace_step

P = jax.sharding.PartitionSpec


@flax.struct.dataclass
class Inner:
    table: jax.Array = sharding.sharded(None, "data")
    count: Any = None


@flax.struct.dataclass
class Outer:
    step: jax.Array
    inner: Inner
    rows: Any = sharding.sharded("data")
    nothing: Any = None


def mesh(n):
    return sharding.make_mesh(jax.devices()[:n])


def test_mesh_has_one_automatic_axis_over_all_devices():
    found = sharding.make_mesh()
    assert found.axis_names == ("data",) and found.size == jax.device_count() == 8
    # under the default, Explicit, this product of two sharded arrays is refused
    x = jax.device_put(np.ones((8, 2), np.float32), sharding.batch_sharding(found))
    np.testing.assert_array_equal(jax.jit(lambda x: x @ x.T)(x), np.full((8, 8), 2))


def test_fields_are_replicated_unless_marked_at_any_depth():
    state = Outer(
        step=jnp.zeros(()),
        inner=Inner(table=jnp.zeros((2, 8)), count={"a": jnp.zeros(3), "b": (jnp.zeros(1),)}),
        rows=[jnp.zeros(8), {"c": jnp.zeros((16, 2))}],
    )
    for given in (state, jax.eval_shape(lambda: state)):
        found = sharding.state_shardings(mesh(4), given)
        assert jax.tree.structure(found) == jax.tree.structure(state)
        assert found.step.spec == P() and found.inner.table.spec == P(None, "data")
        assert found.inner.count["a"].spec == found.inner.count["b"][0].spec == P()
        assert found.rows[0].spec == found.rows[1]["c"].spec == P("data")
        assert found.nothing is None
    placed = jax.jit(lambda: state, out_shardings=sharding.state_shardings(mesh(4), state))()
    assert {s.data.shape for s in placed.inner.table.addressable_shards} == {(2, 2)}
    assert {s.data.shape for s in placed.rows[1]["c"].addressable_shards} == {(4, 2)}
    assert {s.data.shape for s in placed.inner.count["a"].addressable_shards} == {(3,)}


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_one_process_holds_all_rows_in_order(devices):
    rows = sharding.local_rows(mesh(devices), 24)
    np.testing.assert_array_equal(rows, np.arange(24))
    batch = {"x": np.arange(48).reshape(24, 2), "y": np.arange(24, dtype=np.int32)}
    placed = sharding.to_global(mesh(devices), {k: v[rows] for k, v in batch.items()})
    for name, value in batch.items():
        np.testing.assert_array_equal(placed[name], value)
        for shard in placed[name].addressable_shards:
            assert len(shard.data) == 24 // devices
            np.testing.assert_array_equal(shard.data, value[shard.index])


def test_rows_follow_the_devices_of_a_process_even_when_the_mesh_reorders_them():
    """A process with devices 1, 4, 5 of 8 holds the rows at these positions, ascending."""

    class Fake:
        size = 8

    def of(held):
        fake = lambda shape: {d: (slice(3 * d, 3 * d + 3),) for d in held}  # noqa: E731
        with pytest.MonkeyPatch.context() as patch:
            spec = type("Spec", (), {"addressable_devices_indices_map": staticmethod(fake)})
            patch.setattr(sharding, "batch_sharding", lambda _: spec)
            return sharding.local_rows(Fake, 24)

    np.testing.assert_array_equal(of([5, 1, 4]), [3, 4, 5, 12, 13, 14, 15, 16, 17])
    np.testing.assert_array_equal(
        np.sort(np.concatenate([of([0, 1, 2, 3]), of([4, 5, 6, 7])])), np.arange(24)
    )


@pytest.mark.parametrize(("batch", "advice"), [(20, "e.g. 16"), (3, "e.g. 8")])
def test_a_batch_that_cannot_be_split_is_refused(batch, advice):
    message = rf"batch_size={batch} .* 8 devices: each takes as many images, .*{advice}"
    with pytest.raises(UserError, match=message):
        sharding.local_rows(mesh(8), batch)


@pytest.mark.parametrize("parts", [pytest.param(1, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("method", tiny.METHODS)
def test_a_step_on_one_device_sends_nothing_not_even_to_itself(method, parts):
    """A collective of one device computes nothing, and libtpu may crash on it."""
    c = tiny.config(method, model__bn_groups=8, microbatch=16 // parts)

    def collectives(devices):
        built = tiny.build(c, devices)
        text = trace_step(built.train_step, built.run).lower().as_text()
        return set(re.findall(r"stablehlo\.(all_\w+|reduce_scatter|collective_\w+)", text))

    assert collectives(1) == set()
    # a student sees no other image: nothing to gather, and without parts the rest is XLA's
    want = {"all_reduce"} if parts > 1 else set()
    found = collectives(2)
    assert found == want if method == "distil" else "all_gather" in found
