"""Operations that XLA compiles for one large image give what TensorFlow's own kernels give."""

import os
import subprocess
import sys

import numpy as np
import pytest
from test_augment import encode, noise, planes, recipe

from common.data.augment import draws, on_host, pixel_ops
from common.data.images import tensorflow_host
from common.data.images.tensorflow_host import tf

SIZE = 72  # at least tensorflow_host.FUSE_FROM
FACTOR = np.array([1.3], np.float32)


@pytest.mark.parametrize(
    "op, more",
    [
        (pixel_ops.greyscale, ("tf",)),
        (pixel_ops.greyscale, ("pil",)),
        (pixel_ops.adjust_brightness, (FACTOR, "multiply")),
        (pixel_ops.adjust_brightness, (FACTOR - 1, "add")),
        (pixel_ops.adjust_contrast, (FACTOR, "tf")),
        (pixel_ops.adjust_contrast, (FACTOR, "pil")),
        (pixel_ops.adjust_saturation, (FACTOR, "tf")),
        (pixel_ops.adjust_saturation, (FACTOR, "pil")),
        (pixel_ops.adjust_hue, (FACTOR - 1.4,)),
        (pixel_ops._blurred, (FACTOR, recipe("simclr", SIZE))),
        (pixel_ops._blurred, (FACTOR, recipe("moco_v2", SIZE))),
    ],
)
def test_operations(op, more, monkeypatch):
    """To float32's rounding; the plain functions have their oracles in test_augment.py."""
    assert SIZE >= tensorflow_host.FUSE_FROM
    starts = []
    monkeypatch.setattr(tensorflow_host, "_xla_works", lambda: starts.append(1) or True)
    image = tf.constant(planes(noise(1, SIZE, SIZE)) * 1.02 - 0.01)  # bicubic overshoots too
    found = op(image, *more)
    assert starts
    starts.clear()
    twice = (np.repeat(x, 2) if isinstance(x, np.ndarray) else x for x in more)
    plain = op(tf.repeat(image, 2, axis=0), *twice)  # several, and small ones: TensorFlow's own
    np.testing.assert_allclose(found, plain[:1], atol=2e-6)
    op(image[:, :, :32, :32], *more)
    assert not starts


@pytest.mark.parametrize(
    "a",
    [
        recipe("simclr", SIZE),
        recipe("moco_v1", SIZE, solarise=0.4, solarise_threshold=0.4),
        recipe("moco_v2", SIZE, jitter=0.0, grey=0.0, blur=0.0),  # the host's part of "both"
    ],
)
def test_views(a, monkeypatch):
    """Bytes differ where a number lies on the edge between two: in few places, by one level."""
    parameters, crops = draws.draw_views((a, a), 5, 0, np.arange(12), None)
    files = [tf.constant(encode(image, "PNG")) for image in noise(12, 80, 104)]

    def views():
        function = tensorflow_host.traced(on_host.augment_encoded)
        made = [
            function(*x, (a, a)) for x in zip(files, parameters, crops, strict=True)
        ]  # fmt: skip
        return np.stack(made).astype(int)

    compiled = views()
    monkeypatch.setattr(tensorflow_host, "FUSE_FROM", SIZE + 1)
    difference = np.abs(compiled - views())
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


def test_without_a_compiler(monkeypatch):
    """Not every build of TensorFlow brings XLA."""
    a = recipe("simclr", SIZE)
    images = tf.constant(planes(noise(1, SIZE, SIZE)))
    want = pixel_ops.blur(images, tf.constant(FACTOR), a)

    def refused(*_, **__):
        raise tf.errors.InvalidArgumentError(None, None, "not compilable")

    with monkeypatch.context() as patch:
        patch.setattr(tensorflow_host, "traced", lambda *_, **__: refused)
        tensorflow_host._xla_works.cache_clear()
        assert not tensorflow_host._xla_works()
        np.testing.assert_allclose(pixel_ops.blur(images, tf.constant(FACTOR), a), want, atol=2e-6)
    tensorflow_host._xla_works.cache_clear()
    assert tensorflow_host._xla_works()


@pytest.mark.slow
def test_flags_that_only_jax_knows_are_not_shown_to_tensorflow():
    """TensorFlow's XLA ends the process at an unknown flag."""
    program = (
        "import os\n"
        "from common.data.images.tensorflow_host import fused, tf\n"
        "print(fused(lambda x: x + 1)(tf.zeros([1, 64, 64, 3])).numpy().sum())\n"
        "print(os.environ['XLA_FLAGS'])\n"
    )
    flags = "--xla_of_tomorrow=true"
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120,
        env=os.environ | {"XLA_FLAGS": flags},
    )  # fmt: skip
    assert ended.stdout.split() == ["12288.0", flags], ended.stderr[-2000:]
