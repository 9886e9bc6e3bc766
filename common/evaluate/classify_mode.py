"""`--mode=classify`: the top-1 of a network that a fine-tuning or a distillation has left."""

import functools
from typing import Any

import jax

from common.errors import UserError
from common.evaluate import accuracy, features
from common.evaluate.pretrained import Pretrained
from common.models import classifier, finetuned
from common.sharding import replicated


def run(opened: Pretrained) -> tuple[dict[str, Any], str]:
    """Scores the test split in eval mode; nothing is trained.

    Raises:
        UserError: no such network, or a test split of other classes than it tells apart.
    """
    named = opened.settings.classify.network
    path = finetuned.find(named or str(opened.workdir), "eval.classify.network")
    network, arrays = classifier.load(path)
    test = opened.open_labelled("test")
    if difference := accuracy.unlike(network.classes, test):
        raise UserError(
            f"{test.name} ({test.split}) has {difference}, those of {path.name}: give images of "
            "the network's classes, with --eval.source"
        )
    arrays = jax.device_put(arrays, replicated(opened.mesh))
    encode = features.jit_encoder(network.logits, opened.mesh)
    logits, labels, _ = opened.extract(test, encode=functools.partial(encode, arrays))
    logits, labels = accuracy.labelled("test", logits, labels)
    metrics = accuracy.top_k(logits, labels) | {
        "network": str(path),
        "digest": network.info["digest"],
        "num_test": len(labels),
        "features": "trained",
        "layer": network.layer,
    }
    return metrics, f"{path.name}: {accuracy.in_words(metrics, test)}."
