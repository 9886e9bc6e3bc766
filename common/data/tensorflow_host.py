"""TensorFlow as a feeder: imported on use, quiet, and kept away from the accelerators."""

import functools
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # start-up notices; errors still show
# oneDNN announces itself past that level, and complains about uint8. The operations used here give
# the same bytes without it, in the same time (measured).
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import tensorflow as tf

# JAX owns the accelerators; TensorFlow would reserve all their memory.
tf.config.set_visible_devices([], "GPU")
tf.config.set_visible_devices([], "TPU")

# AutoGraph reads source files again whenever it traces, so a file that is edited under a running
# job would change it. Nothing here needs it: no Python `if` or loop depends on a tensor.
traced = functools.partial(tf.function, autograph=False)
plain = tf.autograph.experimental.do_not_convert  # what is given to `Dataset.map`
