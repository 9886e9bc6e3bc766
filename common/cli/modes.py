"""The modes of `main.py` that evaluate or export a trained run: one table, one way to report.

A mode is a function of a `Pretrained`. It returns what it measured and a sentence about it, which
become a line in `<workdir>/results.jsonl` and one on the terminal.
"""

import datetime
import shlex
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from common.errors import UserError
from common.evaluate import (
    classify_mode,
    embed_mode,
    finetune_mode,
    knn_mode,
    label_mode,
    linear_mode,
    pretrained,
    suggest_mode,
    transfer_mode,
)
from common.evaluate.pretrained import Pretrained
from common.export import export_mode
from common.run import console, files, jsonl
from common.sharding import of_first_process

MODES: dict[str, Callable[[Pretrained], tuple[dict[str, Any], str]]] = {
    "embed": embed_mode.run,
    "knn": knn_mode.run,
    "linear_eval": linear_mode.run,
    "finetune": finetune_mode.run,
    "classify": classify_mode.run,
    "transfer": transfer_mode.run,
    "suggest": suggest_mode.run,
    "label": label_mode.run,
    "export": export_mode.run,
}


def run(
    mode: str, workdir: str, settings: ConfigDict, methods: Mapping[str, Any]
) -> dict[str, Any]:
    """Evaluates the run of a workdir, reports the result in words, and records it.

    Args:
        mode: one of `MODES`.
        workdir: of the run.
        settings: `--eval`.
        methods: class of each method by its name.

    Returns:
        The record written: what was measured, and under which protocol.
    """
    if mode == "export" and settings.image_size:
        raise UserError(
            f"eval.image_size={settings.image_size} is not for exports, whose images are as large "
            "as the run's: leave it out"
        )
    opened = pretrained.load(workdir, settings, methods)
    metrics, sentence = MODES[mode](opened)
    record = {
        "mode": mode,
        **metrics,
        "features": settings.features,
        "layer": settings.layer,
        "image_size": opened.image_size,
        "checkpoint_step": opened.step,
        "method": opened.config.method,
        "supervised": opened.method.supervised and settings.features == "trained",
        "source": opened.config.data.source,
        "train_split": opened.config.data.train_split,
        "test_split": opened.config.data.test_split,
        "seed": settings.seed,
        "run_seed": opened.config.seed,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "command": shlex.join(sys.argv),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    record |= metrics  # a mode with datasets of its own records those
    # The others wait: JAX ends all processes 5 minutes after the first of them has left.
    of_first_process(jsonl.append, files.path(workdir) / jsonl.RESULTS, record)
    console.result(sentence)
    return record
