"""Eight simulated CPU devices for every test, and JAX at its strictest that Flax and Optax bear."""

import os
import pathlib
import sys

import jax

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before anything imports TensorFlow

# Before the first device access, which fixes the number of devices.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# A [b] array that meets a [b, d] one by accident is an error.
jax.config.update("jax_numpy_rank_promotion", "raise")
