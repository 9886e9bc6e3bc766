"""A run in a workdir that nobody had to train: a config, and a checkpoint of random weights."""

from typing import Any

import jax
import numpy as np
import tiny

from common.config import eval_config
from common.evaluate import pretrained
from common.run.checkpoint import Checkpoints
from common.run.workdir import claim
from common.sharding import make_mesh

STEP = 7


def write(workdir: Any, method: str = "simclr", **changes: Any) -> Any:
    """Makes `workdir` that of a run of `tiny.config`, at step `STEP`; returns the workdir."""
    defaults = {"data__source": "fake", "data__fake_examples": 60, "data__fake_classes": 3}
    c = tiny.config(method, **(defaults | changes))
    with jax.enable_x64(False):
        state = tiny.place_state(tiny.build(c, 1), seed=3)
    with claim(workdir, c), Checkpoints(workdir, keep=None) as checkpoints:
        checkpoints.save(STEP, state, {})
        checkpoints.wait()
    return workdir


def config(**changes: Any) -> Any:
    """`--eval`, quick; `changes` are dotted names with `__` for the dot."""
    c = eval_config()
    c.batch_size = 16
    c.linear.update(epochs=8, batch_size=16, learning_rate=(0.3, 3.0), weight_decay=(0.0,))
    c.logistic.num_values = 3
    c.finetune.update(fraction=1.0, epochs=2, batch_size=16)
    for name, value in changes.items():
        *path, last = name.split("__")
        section = c
        for part in path:
            section = section[part]
        section[last] = value
    return c


def load(workdir: Any, devices: int = 1, **changes: Any) -> pretrained.Pretrained:
    """Opens the run of a workdir."""
    mesh = make_mesh(jax.devices()[:devices])
    return pretrained.load(workdir, config(**changes), tiny.METHODS, mesh)


def leaves(tree: Any) -> dict[str, np.ndarray]:
    """Every array by its path, on the host."""
    return tiny.named_leaves(jax.device_get(tree))
