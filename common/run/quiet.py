"""The log of TensorFlow's C++ code: errors only, unless the user asks for more.

TensorFlow reads `TF_CPP_MIN_LOG_LEVEL` when it is loaded, and JAX sets it to 1 (warnings) if it is
unset: `install` must run before the first import of either. (Both the input pipeline and a path in
a bucket may load TensorFlow.)
"""

import os


def install() -> None:
    """Sets the environment variables that the user has not set."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # oneDNN logs at a higher level, and warns about uint8. The operations used here give the same
    # bytes without it, in the same time (measured).
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
