"""The modes of `main.py` that evaluate a trained run: one table, one way to report.

A mode is a function of a `Pretrained`. It returns what it measured, and a sentence about it; here
that becomes a line on the terminal and one in `<workdir>/results.jsonl`.
"""

import datetime
import importlib
import shlex
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from common.evaluate import pretrained
from common.method import Method, Setup
from common.run import console, files, jsonl

# The mode's name -> module with `run(pretrained) -> (metrics, sentence)`, imported when it is used.
MODES = {
    "embed": "common.evaluate.embed_mode",
    "knn": "common.evaluate.knn_mode",
    "linear_eval": "common.evaluate.linear_mode",
    "finetune": "common.evaluate.finetune_mode",
    "transfer": "common.evaluate.transfer_mode",
    "export": "common.export.export_mode",
}


def run(
    mode: str,
    workdir: str,
    settings: ConfigDict,
    methods: Mapping[str, Callable[[Setup], Method]],
) -> dict[str, Any]:
    """Evaluates the run of a workdir, says the result in words, and notes it.

    Args:
        mode: one of `MODES`.
        workdir: of the run.
        settings: `--eval`.
        methods: by name.

    Returns:
        The record written: what was measured, and under which protocol.
    """
    run_mode = importlib.import_module(MODES[mode]).run
    opened = pretrained.load(workdir, settings, methods)
    metrics, sentence = run_mode(opened)
    record = {
        "mode": mode,
        **metrics,
        "features": settings.features,
        "layer": settings.layer,
        "checkpoint_step": opened.step,
        "method": opened.config.method,
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
    record |= metrics  # a mode that has data of its own says so
    if jax.process_index() == 0:
        jsonl.append(files.path(workdir) / jsonl.RESULTS, record)
    console.result(sentence)
    return record


def subject(opened: pretrained.Pretrained) -> str:
    """What was evaluated, for a sentence."""
    return {
        "trained": f"the encoder after step {opened.step:,}",
        "untrained": "the untrained encoder",
        "pixels": "raw pixels",
    }[opened.settings.features]
