"""The hash behind every random choice on the host, and the order of an epoch that follows from it.

Every random number is a hash of what it belongs to (seed, epoch, example id, ...); none is drawn in
sequence. Hence it is the same whatever the batch size, the number of processes or the step at which
a run was resumed, and it stays the same when NumPy or TensorFlow change their generators.
"""

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ORDER = 1  # the first word of a hash names its stream; 2 is `draws.py`'s


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014): every input bit moves every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash64(*words: int | np.ndarray) -> np.ndarray:
    """Hashes integers (broadcast against each other) to uint64."""
    state = np.zeros((1,), np.uint64)  # an array: NumPy warns of overflow in scalars only
    for word in words:
        word = np.atleast_1d(np.asarray(word, np.int64)).astype(np.uint64)
        state = mix((state + GOLDEN) ^ mix(word + GOLDEN))
    return state


def order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order in which an epoch visits the examples.

    Args:
        seed: of the run.
        epoch: >= 0.
        n: number of examples.

    Returns:
        int64 [n], a permutation of 0..n-1 that depends on (seed, epoch) only.
    """
    return np.argsort(hash64(_ORDER, seed, epoch, np.arange(n)), kind="stable")
