"""The queue of keys against a Python list that appends and forgets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from common import queue as queue_lib
from common.errors import UserError
from common.sharding import batch_sharding, make_mesh, replicated, state_shardings

# length, rows: a multiple, a remainder, exactly one slot, shorter than a slot, a single key.
SIZES = [(32, 8), (27, 8), (8, 8), (5, 8), (1, 8), (17, 4), (3, 1)]


@pytest.mark.parametrize(("length", "rows"), SIZES)
def test_holds_exactly_the_last_keys_after_any_number_of_pushes(length, rows):
    rng = np.random.default_rng(0)
    start = rng.normal(size=(queue_lib.slots(length, rows), rows, 2)).astype(np.float32)
    queue = queue_lib.Queue(keys=jnp.asarray(start))
    # A list that forgets: it starts with the first keys, oldest first.
    remembered = list(np.asarray(queue.keys).reshape(-1, 2))
    push = jax.jit(queue_lib.push)
    mask = jax.jit(queue_lib.mask, static_argnums=(0, 1))
    for step in range(23):
        want = np.stack(remembered[-length:])
        np.testing.assert_array_equal(queue_lib.contents(queue, length, step), want)
        live = np.asarray(mask(length, rows, step))
        assert live.shape == queue.keys.shape[:2] and live.sum() == length
        masked = np.asarray(queue.keys)[live]
        order = [np.lexsort(x.T) for x in (masked, want)]
        np.testing.assert_array_equal(masked[order[0]], want[order[1]])
        keys = rng.normal(size=(rows, 2)).astype(np.float32)
        remembered += list(keys)
        queue = push(queue, keys, step)


def test_masks_of_a_small_queue_by_hand():
    """Length 3, 2 keys a step: two slots, and the first key of the oldest slot is forgotten."""
    np.testing.assert_array_equal(queue_lib.mask(3, 2, 0), [[False, True], [True, True]])
    np.testing.assert_array_equal(queue_lib.mask(3, 2, 5), [[True, True], [False, True]])
    np.testing.assert_array_equal(queue_lib.mask(1, 3, 7), [[False, False, True]])
    np.testing.assert_array_equal(queue_lib.mask(4, 2, 1), np.ones((2, 2)))


@pytest.mark.parametrize(("length", "rows", "slots"), [(65536, 256, 256), (10, 4, 3)])
def test_starts_as_random_unit_vectors(length, rows, slots):
    dim = 16
    init = jax.jit(lambda key: queue_lib.init(key, length, rows, dim).keys)
    keys = np.asarray(init(jax.random.key(3)), np.float64)
    assert keys.shape == (slots, rows, dim)
    np.testing.assert_allclose(np.linalg.norm(keys, axis=2), 1, rtol=1e-5)
    keys = keys.reshape(-1, dim)
    assert len(np.unique(keys[:, 0])) > 0.99 * len(keys)  # no repeated rows
    # Uniform on the sphere: mean 0, covariance I / d; five standard errors.
    assert np.linalg.norm(keys.mean(axis=0)) < 5 / np.sqrt(len(keys)) + 1e-9
    other = np.asarray(init(jax.random.key(4)))
    assert not np.isclose(other.reshape(-1, dim), keys).all(axis=1).any()


@pytest.mark.parametrize("devices", [2, 8])
def test_same_values_on_any_number_of_devices_and_each_holds_its_share(devices):
    mesh = make_mesh(jax.devices()[:devices])
    length, rows, dim = 37, 16, 4

    def init(key):
        return queue_lib.init(key, length, rows, dim)

    key = jax.random.key(0)
    shardings = state_shardings(mesh, jax.eval_shape(init, key))
    assert shardings.keys == NamedSharding(mesh, PartitionSpec(None, "data"))
    place = replicated(mesh)
    queue = jax.jit(init, out_shardings=shardings)(jax.device_put(key, place))
    want = np.array(jax.jit(init)(key).keys)
    np.testing.assert_allclose(queue.keys, want, rtol=1e-6)
    push = jax.jit(queue_lib.push, donate_argnums=0, out_shardings=shardings)
    rng = np.random.default_rng(0)
    for step in range(5):
        keys = rng.normal(size=(rows, dim)).astype(np.float32)
        want[step % 3] = keys
        args = jax.device_put(keys, batch_sharding(mesh)), jax.device_put(jnp.int32(step), place)
        queue = push(queue, *args)
    assert push._cache_size() == 1
    np.testing.assert_allclose(queue.keys, want, rtol=1e-6)
    shares = [shard.data.shape for shard in queue.keys.addressable_shards]
    assert shares == [(3, rows // devices, dim)] * devices


@pytest.mark.optimised
def test_push_communicates_nothing():
    mesh = make_mesh(jax.devices()[:8])
    queue = jax.eval_shape(lambda: queue_lib.init(jax.random.key(0), 64, 16, 4))
    shardings = state_shardings(mesh, queue)
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    queue = jax.tree.map(place, queue, shardings)
    keys = jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=batch_sharding(mesh))
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    push = jax.jit(queue_lib.push, donate_argnums=0, out_shardings=shardings)
    compiled = push.lower(queue, keys, step).compile()
    text = compiled.as_text()
    for kind in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert kind not in text
    # Written in place: the output is the donated input.
    assert compiled.memory_analysis().alias_size_in_bytes == 4 * 4 * 16 * 4 // 8


def test_pushed_keys_carry_no_gradient():
    queue = queue_lib.Queue(keys=jnp.zeros((2, 4, 2)))
    gradient = jax.grad(lambda keys: queue_lib.push(queue, keys, 1).keys.sum())(jnp.ones((4, 2)))
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("length", [0, -5])
def test_length_below_one_is_refused(length):
    with pytest.raises(UserError, match="length"):
        queue_lib.init(jax.random.key(0), length, 8, 4)
    with pytest.raises(UserError, match="length"):
        queue_lib.mask(length, 8, 0)


def test_keys_of_another_batch_size_are_refused():
    queue = queue_lib.Queue(keys=jnp.zeros((2, 8, 4)))
    for shape in ((4, 4), (8, 3)):
        with pytest.raises(UserError, match=r"a slot of the queue is .*: build the queue for"):
            queue_lib.push(queue, jnp.ones(shape), 0)
