"""SimCLR on the 10,000 Fashion-MNIST images that ship with the repository; minutes on a CPU.

python main.py --config=configs/simclr_demo.py --workdir=runs/simclr_demo
"""

from ml_collections import ConfigDict

from common.config import base_config
from configs import smoke
from simclr_jax.method import SimCLR


def get_config(arg: str = "") -> ConfigDict:
    """`arg="smoke"` shrinks the run to seconds."""
    c = base_config("simclr", SimCLR.default_config())
    c.batch_size = 128
    c.duration = "6 epochs"
    c.log_every = 10
    c.data.source = "embedded"
    c.data.image_size = 28
    c.augment.preset = "cifar"
    c.augment.area_min = 0.3  # the garment fills the picture, and smaller crops are often blank
    c.model.stages = (1, 1)
    c.model.width = 64
    c.model.stem = "patch4"
    c.simclr.temperature = 0.2
    c.optimizer.learning_rate = 0.4
    c.optimizer.warmup = "1 epoch"
    return smoke.apply(c, arg)
