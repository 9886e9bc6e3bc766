"""What the configs for a folder of photographs share: `simclr_photos.py` and `moco_photos.py`."""

from ml_collections import ConfigDict


def folder(c: ConfigDict) -> None:
    """Reads photographs of any size and number, with or without labels.

    Batch, duration and queue follow from their number; a tenth of them is held out to score the
    run, unless there is a split for that. A damaged file is replaced by another one and named.
    """
    c.data.source = "folder:/path/to/photos"  # to be given: --config.data.source=folder:...
    c.data.train_split, c.data.test_split, c.data.bank_split = "auto", "auto", ""
    c.data.on_corrupt = "replace"
    c.data.exif_rotation = True
    c.data.jpeg = "fast"
    c.batch_size, c.duration = 0, "auto"
    c.log_every = 20
    c.optimizer.warmup = "5 %"
    c.evaluate.every = "10 %"
    c.checkpoint.every = "5 %"
    c.augment.mean = c.augment.std = None  # those of the preset


def laptop(c: ConfigDict) -> None:
    """Two cores: a small network on patches, which is fast on a CPU, and small views."""
    c.data.image_size, c.augment.size, c.data.shrink = 64, 48, 96
    c.model.stages, c.model.width = (1, 1, 1), 64
    c.auto.batch_size, c.auto.images = 64, 160_000
    c.auto.least_epochs, c.auto.most_epochs = 20, 200


def one_gpu(c: ConfigDict) -> None:
    """A ResNet-18 on views of 128 pixels; colour and blur are left to the GPU."""
    c.data.image_size, c.augment.size, c.data.shrink = 160, 128, 256
    c.data.augment_on = "both"
    c.model.stem = "imagenet"
    c.auto.batch_size, c.auto.images = 256, 2_000_000
    c.auto.least_epochs, c.auto.most_epochs = 50, 400


def tpu(c: ConfigDict) -> None:
    """The network of the ImageNet recipe at its full size, on as many chips as there are."""
    c.data.image_size, c.augment.size, c.data.shrink = 224, None, 384
    c.data.augment_on = "both"
    c.evaluate.knn_examples = 50_000
    c.auto.batch_size, c.auto.images = 1024, 20_000_000
    c.auto.least_epochs, c.auto.most_epochs = 100, 800
