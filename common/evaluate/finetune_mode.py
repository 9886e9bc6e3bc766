"""`--mode=finetune`: the whole network trained on 1 %, 10 % or 100 % of the labels.

Chen et al. 2020, B.5: class-balanced labels, crops and flips only, SGD with Nesterov momentum,
60 epochs on 1 % and 30 on more; or as in SimCLR v2 with LARS; for vision transformers AdamW with
DeiT's values: see `finetune_recipe.py`. `--eval.features=untrained` is supervised training from
scratch on the same labels. No setting is tuned; the test split is only scored. The network is
saved, see `finetuned_file.py`.
"""

import dataclasses
import functools
import json
from typing import Any

import jax
import numpy as np

from common.data.sources import subset
from common.data.sources.base import Source
from common.errors import UserError
from common.evaluate import accuracy, batches, finetune, finetune_recipe, finetuned_file
from common.evaluate.finetune_recipe import Recipe
from common.evaluate.pretrained import Pretrained
from common.run import console, files
from common.setup import make_encoder_setup


def run(opened: Pretrained) -> tuple[dict[str, Any], str]:
    """Trains on a fraction of the training labels, and scores the test split in eval mode."""
    c, s = opened.settings.finetune, opened.settings
    if s.features == "pixels":
        raise UserError("--mode=finetune needs a network: --eval.features=trained or untrained")
    recipe = Recipe.of(c, opened.config.model.encoder)
    train, test = opened.open_labelled("train"), opened.open_labelled("test")
    labels = subset.labels_of(train)
    accuracy.labelled("training", labels, labels)
    ids = subset.balanced(labels, c.fraction, train.num_classes, s.seed)
    listed = save_ids(opened, train, ids)

    size = batches.batch_size_for(c.batch_size, len(ids), opened.mesh)
    images, keep = train, None
    if train.kind != "stream" or len(ids) < train.num_examples / 2:
        images = subset.select(train, ids)
    else:  # too large for memory: all of it is read, with the other labels hidden
        keep = np.isin(np.arange(train.num_examples), ids)
        if recipe.mixes and len(ids) < np.sum(labels >= 0):
            raise UserError(
                f"eval.finetune.mixup={recipe.mixup} and cutmix={recipe.cutmix} need two labelled "
                "images, and most of a streamed dataset are hidden here: set both to 0, or "
                "eval.finetune.fraction=1"
            )
    per_epoch = images.num_examples // size
    epochs = c.epochs or (60 if c.fraction <= 0.01 else 30)
    steps = round(epochs * per_epoch)
    if steps < 1:
        raise UserError(f"eval.finetune.epochs={epochs} is less than one step: expected more")

    setup = make_encoder_setup(opened.config, opened.mesh)
    layers = setup.network.backbone.layers
    tx = finetune_recipe.optimizer(recipe, size, steps, per_epoch, layers)
    tuner = finetune.Finetuner(setup, s.layer, train.num_classes, tx, recipe, s.seed)
    how = {"epochs": epochs, "batch_size": size, **dataclasses.asdict(recipe)}
    classes = train.class_names or tuple(map(str, range(train.num_classes)))
    place = finetuned_file.reserve(opened, tuple(classes), how)
    state = tuner.init(opened.state.params, opened.state.batch_stats)
    console.say(f"Training on {len(ids):,} labelled images for {epochs:g} epochs, {steps:,} steps.")
    state = tuner.train(state, opened.batches(images, size, keep), steps, size)

    logits, wanted, _ = opened.extract(test, encode=functools.partial(tuner.logits, state))
    logits, wanted = accuracy.labelled("test", logits, wanted)
    scores = accuracy.top_k(logits, wanted)
    metrics = scores | {
        "protocol": f"fine-tuning of all layers, {recipe.in_words()}",
        "fraction": c.fraction,
        "ids": listed,
        "num_train": len(ids),
        "num_test": len(wanted),
        **how,
        "finetuned": None,
    }
    where = ""
    if place:
        arrays = {"params": state.params, "batch_stats": state.batch_stats}
        path = place.write(arrays, scores | {"num_train": len(ids), "num_test": len(wanted)})
        metrics["finetuned"] = path and f"{finetuned_file.FOLDER}/{path.name}"
        where = f"; the network is in {path}" if path else "; the network could NOT be saved"
    start = "from scratch" if s.features == "untrained" else f"from {opened.subject}"
    return metrics, (
        f"Fine-tuned on {100 * c.fraction:g} % of the labels ({len(ids):,} images) {start}, layer "
        f"{s.layer}, {epochs:g} epochs of {recipe.optimizer} at {recipe.learning_rate:g}: "
        f"{accuracy.in_words(metrics, test)}{where}."
    )


def save_ids(opened: Pretrained, train: Source, ids: np.ndarray) -> str:
    """Writes the list of the examples used; returns the file's name.

    Raises:
        UserError: if the file exists and lists others.
    """
    fraction, seed = opened.settings.finetune.fraction, opened.settings.seed
    name = f"finetune_ids_{fraction:g}_seed{seed}.json"
    path = opened.workdir / name
    record = {
        "source": opened.config.data.source,
        "split": train.split,
        "num_examples": train.num_examples,
        "fraction": fraction,
        "seed": seed,
        "ids": ids.tolist(),
    }
    if path.exists() and json.loads(path.read_text()) != record:
        raise UserError(
            f"{path} lists the examples of an earlier fine-tuning on other data: rename it, or "
            "give another --eval.seed"
        )
    if jax.process_index() == 0 and not path.exists():
        files.write_text(path, json.dumps(record) + "\n")
    return name
