"""SimCLR on a folder of photographs, 200 or more, with labels or without; one GPU.

    python main.py --config=configs/simclr_photos.py:laptop --workdir=runs/mine \
        --config.data.source=folder:/path/to/photos

`:laptop` is for two CPU cores, `:tpu` for a TPU slice. Batch and duration follow from the number of
photographs (section `auto`); a run says how long it will take before it starts. docs/your_images.md
has what to expect.

One GPU: the ResNet-18, head and optimiser of `simclr_cifar10.py`, whose figures on an H200 are in
docs/results.md, with the stem for large images, on views of 128 pixels. `:tpu`: the recipe of
`simclr_tpu.py` with smaller batches. Neither was run on photographs by us.
"""

from ml_collections import ConfigDict

from configs import photos, simclr_cifar10, simclr_tpu, smoke


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" for one GPU, "laptop", "tpu"; "smoke" behind it shrinks the run to seconds."""
    on_tpu = arg.partition(":")[0] == "tpu"
    c = (simclr_tpu if on_tpu else simclr_cifar10).get_config()
    photos.folder(c)
    photos.one_gpu(c)
    return smoke.apply(c, arg, laptop=laptop, tpu=photos.tpu)


def laptop(c: ConfigDict) -> None:
    """The recipe of `simclr_cifar10.py:cpu` for larger images."""
    simclr_cifar10.cpu(c)
    c.data.augment_on = "host"
    photos.folder(c)
    photos.laptop(c)
