"""`:smoke` after the name of a config: the same run, shrunk to seconds on a CPU."""

from collections.abc import Callable

from ml_collections import ConfigDict

from common.errors import UserError


def apply(config: ConfigDict, arg: str, **variants: Callable[[ConfigDict], None]) -> ConfigDict:
    """Returns the config, changed as `arg` says: "", NAME of a variant, "smoke" or "NAME:smoke".

    Random images replace the data, so no dataset is needed.

    Args:
        config: changed in place.
        arg: what followed the name of the config.
        **variants: what each variant that the config has changes.

    Raises:
        UserError: for any other argument.
    """
    name, _, rest = arg.partition(":")
    if name in variants:
        variants[name](config)
    else:
        rest = arg
    if rest not in ("", "smoke"):
        known = ", ".join(f":{name}" for name in (*variants, "smoke"))
        raise UserError(f"config argument {arg!r} is unknown: use {known} or nothing")
    if rest == "smoke":
        c = config
        c.data.source = "fake"
        c.data.fake_examples = 64
        c.data.fake_classes = 4
        c.data.image_size, c.data.shrink = 32, 0
        if (c.augment.size or 0) > 32:
            c.augment.size = None
        c.data.train_split, c.data.test_split, c.data.bank_split = "train", "test", ""
        c.batch_size = 16
        c.duration = "4 steps"
        c.log_every = 1
        c.model.stages = (1, 1)
        c.model.bottleneck = c.model.sk_ratio > 0
        c.model.width, c.model.width_multiplier = 8, 1
        c.vit.width, c.vit.depth, c.vit.heads, c.vit.patch = 16, 2, 2, 8
        c.head.hidden = 16
        c.head.dim = 16
        c.model.bn_groups = min(c.model.bn_groups, 4)
        c.optimizer.warmup = "1 step"
        c.evaluate.every = "2 steps"
        c.evaluate.knn_examples = 0
        c.checkpoint.every = "2 steps"
        if "moco" in c:
            c.moco.queue_length = min(c.moco.queue_length or 40, 40)
        if "moco_v3" in c:
            c.moco_v3.predictor_hidden = 16
    return config
