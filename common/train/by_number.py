"""Batch, length and queue of a run that leave them open: they follow from the number of images.

A config for "a folder of photographs" does not know how many there are. `batch_size=0`,
`duration="auto"` and `moco.queue_length=0` are decided here when a run begins, and config.json
keeps what was decided, so that a resumed run does not depend on this file.
"""

import math

from ml_collections import ConfigDict

from common import config as configs
from common.errors import UserError

FEW = 150  # images to train on, which are left of 200
_LEAST_BATCH = 32  # NT-Xent learns little from fewer negatives, and batch norm from fewer images
_LEAST_QUEUE = 128


def decide(config: ConfigDict, images: int | None, devices: int = 1) -> ConfigDict:
    """The config with everything decided that follows from the number of training images.

    Args:
        config: of a run; it is not changed.
        images: in the training split; None where nobody knows: as if there were very many.
        devices: of the mesh; a batch that is decided here can be split among them.

    Raises:
        UserError: fewer images than the smallest batch.
    """
    queue, method = f"{config.method}.queue_length", config.get(config.method, {})
    values = {"batch_size": config.batch_size, "duration": config.duration}
    values[queue] = method.get("queue_length")
    if not any(configs.is_open(name, value) for name, value in values.items()):
        return config
    config = config.copy_and_resolve_references()
    rule, method = config.auto, config.get(config.method, {})
    if configs.is_open("batch_size", config.batch_size):
        multiple = math.lcm(devices, config.model.bn_groups)
        config.batch_size = batch_size(images, rule.batch_size, multiple)
        if images is not None and images < max(2, config.batch_size):
            raise UserError(
                f"{images} image{'s' * (images != 1)} to train on (the others are held out, with "
                f"data.test_split=auto): this recipe takes {max(2, multiple)} at least, and learns "
                f"something from {FEW} on"
            )
    if configs.is_open("duration", config.duration):
        config.duration = f"{epochs(images, rule)} epochs"
    if configs.is_open(queue, values[queue]):
        method.queue_length = queue_length(images, config.batch_size)
    return config


def batch_size(images: int | None, most: int, multiple: int = 1) -> int:
    """The largest power of two up to an eighth of the images: a few steps make an epoch.

    Args:
        images: in the training split; None: very many.
        most: the largest batch, at least 32 where the images allow it.
        multiple: of what it must be one: devices, batch-norm groups. That comes first.
    """
    wanted = most if images is None else max(_LEAST_BATCH, images // 8)
    if images is not None:
        wanted = min(wanted, images)  # a set of fewer than 32
    size = _power_of_two(min(wanted, most))
    return size if size % multiple == 0 else -(-size // multiple) * multiple


def epochs(images: int | None, rule: ConfigDict) -> int:
    """So many epochs that `rule.images` are shown, within its limits.

    Args:
        images: in the training split; None: very many.
        rule: the section `auto` of a config.
    """
    most = max(rule.least_epochs, rule.most_epochs)
    if images is None:
        return int(rule.least_epochs)
    return int(min(max(round(rule.images / images), rule.least_epochs), most))


def queue_length(images: int | None, batch: int) -> int:
    """The largest power of two up to half the images, from 128 to 65,536, and a batch at least.

    In a longer queue most keys of a small set would be of images that are there more than once.

    Args:
        images: in the training split; None: very many.
        batch: images of a batch.
    """
    longest = 65_536 if images is None else max(_LEAST_QUEUE, images // 2)
    return max(_power_of_two(min(longest, 65_536)), batch)


def _power_of_two(at_most: int) -> int:
    return 1 << (max(1, at_most).bit_length() - 1)
