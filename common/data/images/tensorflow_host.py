"""TensorFlow as a feeder: imported on use, quiet, and kept away from the accelerators."""

import atexit
import contextlib
import functools
import os
import types
import weakref
from collections.abc import Callable, Generator

from common.run import quiet

quiet.install()


@contextlib.contextmanager
def _keras_on_use() -> Generator[None, None, None]:
    """Keeps TensorFlow's import from loading Keras, and with it SciPy and scikit-learn.

    That is a third of the import (of its CPU seconds, `import tensorflow` against this module).
    TensorFlow leaves it out when told to use the legacy Keras and that is not installed. The
    choice is taken back afterwards: `tf.keras`, if somebody uses it, is the one that it would have
    been.
    """
    name = "TF_USE_LEGACY_KERAS"
    if name in os.environ:
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]


with _keras_on_use():
    import tensorflow as tf

# JAX owns the accelerators; TensorFlow would reserve all their memory.
tf.config.set_visible_devices([], "GPU")
tf.config.set_visible_devices([], "TPU")

# AutoGraph reads source files again whenever it traces, so a file that is edited under a running
# job would change it. Nothing here needs it: no Python `if` or loop depends on a tensor.
traced = functools.partial(tf.function, autograph=False)
# Pixels a side; chosen, not measured: compiling and each call cost something, whatever the size.
FUSE_FROM = 64
plain = tf.autograph.experimental.do_not_convert  # what is given to `Dataset.map`

# TensorFlow's functions by NumPy's names, for arithmetic that is written once for both.
xp = types.SimpleNamespace(
    arange=tf.range, maximum=tf.maximum, where=tf.where, sum=tf.reduce_sum, exp=tf.exp,
    sqrt=tf.sqrt, rint=tf.round, clip=tf.clip_by_value,
)  # fmt: skip

_open_iterators: weakref.WeakSet[Generator] = weakref.WeakSet()


def arrays(data: tf.data.Dataset) -> Generator:
    """`data.as_numpy_iterator()`, closed before Python ends.

    One that is open then, as after an error, waits for its calls of Python functions, which never
    return from a Python that is ending: the process would hang instead of dying.
    """
    generator = (x for x in data.as_numpy_iterator())
    _open_iterators.add(generator)
    return generator


@atexit.register
def _close_iterators() -> None:
    for generator in list(_open_iterators):
        with contextlib.suppress(ValueError):  # another thread is in it
            generator.close()


def fused(function: Callable) -> Callable:
    """`function`, compiled by XLA where it gets one large image.

    TensorFlow's wheels are built without AVX and pass over the pixels once for each operation;
    docs/benchmarks.md has what compiling gains. Numbers differ in the last bit.

    Args:
        function: of one image or more, [n, a, b, c] whose b and c or a and b are its sides, and of
          tensors or of Python values that can be compared.
    """
    compiled = traced(function, jit_compile=True)

    @functools.wraps(function)
    def run(images: tf.Tensor, *more: object) -> tf.Tensor:
        return (compiled if is_fused(images) else function)(images, *more)

    return run


def is_fused(images: tf.Tensor) -> bool:
    """Whether `fused` functions are compiled for images of this shape."""
    return images.shape[0] == 1 and images.shape[2] >= FUSE_FROM and _xla_works()


@functools.cache
def _xla_works() -> bool:
    """Whether this TensorFlow can compile; tried without XLA_FLAGS, which it reads then only.

    They are meant for JAX, whose XLA is the newer one: an unknown flag would make TensorFlow
    end the process. Not every build of TensorFlow includes the compiler.
    """
    flags = os.environ.pop("XLA_FLAGS", None)
    try:
        traced(tf.identity, jit_compile=True)(tf.constant(0))
    except tf.errors.OpError:
        return False
    finally:
        if flags is not None:
            os.environ["XLA_FLAGS"] = flags
    return True
