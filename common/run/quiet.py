"""C++ lines of TensorFlow: errors only, unless the user asks for more.

It reads `TF_CPP_MIN_LOG_LEVEL` when it is loaded, and JAX sets that to 1 (no notices, but warnings)
where nobody has: this has to come before the first import of either. Whatever loads TensorFlow
first, the input pipeline or a path in a bucket, then finds it set.
"""

import os


def install() -> None:
    """Sets what the user has not set."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # oneDNN announces itself past that level, and complains about uint8. The operations used here
    # give the same bytes without it, in the same time (measured).
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
