"""MoCo v2 on a folder of photographs, 200 or more, with labels or without; one GPU.

    python main.py --config=configs/moco_photos.py:laptop --workdir=runs/mine \
        --config.data.source=folder:/path/to/photos

`:laptop` is for two CPU cores, `:tpu` for a TPU slice. Batch, duration and queue follow from the
number of photographs (section `auto`); a run says how long it will take before it starts.
docs/your_images.md has what to expect.

One GPU: the ResNet-18, head and optimiser of `moco_cifar10.py`, whose figures on an H200 are in
docs/results.md, with the stem for large images, on views of 128 pixels. `:tpu`: the recipe of
`moco_tpu.py`. Neither was run on photographs by us.
"""

from ml_collections import ConfigDict

from configs import moco_cifar10, moco_tpu, photos, smoke


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" for one GPU, "laptop", "tpu"; "smoke" behind it shrinks the run to seconds."""
    on_tpu = arg.partition(":")[0] == "tpu"
    c = (moco_tpu if on_tpu else moco_cifar10).get_config()
    photos.folder(c)
    photos.one_gpu(c)
    c.moco.queue_length = 0
    return smoke.apply(c, arg, laptop=laptop, tpu=tpu)


def laptop(c: ConfigDict) -> None:
    """The recipe of `moco_cifar10.py:cpu` for larger images."""
    moco_cifar10.cpu(c)
    c.data.augment_on = "host"
    photos.folder(c)
    photos.laptop(c)


def tpu(c: ConfigDict) -> None:
    """The recipe of `moco_tpu.py`; a shorter queue goes with a faster key encoder."""
    photos.tpu(c)
    c.moco.momentum = 0.99
    c.model.bn_groups = 8  # of a small set's batch 32 gave one image to each
