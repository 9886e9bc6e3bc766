"""MoCo v3 on CIFAR-10: ResNet-18, batch 256, 1,000 epochs, one GPU or a few TPU cores.

    TFDS_DATA_DIR=DIR python main.py --config=configs/moco_v3_cifar10.py --workdir=runs/moco_v3_c10

The recipe of solo-learn (github.com/vturrisi/solo-learn, scripts/pretrain/cifar/mocov3.yaml: LARS
with eta 0.02, 0.3 x batch / 256, weight decay 1e-6, 10 epochs of warm-up, T 0.2, m 0.99 to 1, crops
from 8 % and bicubic, no blur, the second view solarised with probability 0.2). Published: 93.10 %
of a classifier trained alongside, after 1,000 epochs. Not run by us. Their LARS never raises the
rate of a kernel above the learning rate, ours may: this and the rest in docs/fidelity.md.

`:cpu` is the same task sized for two CPU cores, with the network of `simclr_cifar10.py:cpu`: kNN
59.3 % after 18 epochs. `:vit` has a small vision transformer instead: 52.0 % after 6 (commands and
curves of both: docs/results.md).
"""

from ml_collections import ConfigDict

from common.config import base_config
from configs import moco_v3_tpu, simclr_cifar10, smoke
from moco_jax.v3 import MoCoV3


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is "cpu" or "vit" for 2 cores; "smoke" shrinks the run to seconds."""
    c = base_config("moco_v3", MoCoV3.default_config())
    c.batch_size = 256
    c.duration = "1000 epochs"
    c.data.source = "tfds:cifar10"
    c.data.image_size = 32
    c.augment.preset = "moco_v3"
    c.augment.interpolation = "bicubic"
    c.augment.blur = 0.0
    c.augment_view2.solarise = 0.2
    c.augment.mean = (0.4914, 0.4822, 0.4465)
    c.augment.std = (0.2470, 0.2435, 0.2616)
    c.model.depth = 18
    c.model.stem = "cifar"
    simclr_cifar10.torch_init(c)
    moco_v3_tpu.heads(c, layers=2)
    c.moco_v3.predictor_norm = False
    c.optimizer.name = "lars"
    c.optimizer.trust_coefficient = 0.02
    c.optimizer.learning_rate = 0.3
    c.optimizer.weight_decay = 1e-6
    c.optimizer.warmup = "10 epochs"
    return smoke.apply(c, arg, cpu=cpu, vit=small_vit)


def cpu(c: ConfigDict) -> None:
    """Network and views of `simclr_cifar10.py:cpu` but for the saturation; smaller heads."""
    simclr_cifar10.cpu(c)
    c.duration = "18 epochs"
    c.augment.interpolation = "bilinear"
    c.augment.area_min = 0.2
    c.augment.grey = 0.1
    c.augment_view2.solarise = 0.0
    c.head.kind = "moco_v3"
    c.head.hidden = 1024
    c.head.dim = 128
    c.moco_v3.predictor_hidden = 1024
    c.moco_v3.temperature = 0.1
    c.optimizer.name = "sgd"
    c.optimizer.learning_rate = 1.0


def small_vit(c: ConfigDict) -> None:
    """A ViT of 4 blocks on patches of 4 pixels made by convolutions, trained with AdamW."""
    cpu(c)
    c.duration = "6 epochs"
    c.model.encoder = "vit"
    c.vit.width, c.vit.depth, c.vit.heads, c.vit.patch = 96, 4, 3, 4
    c.vit.patches = "conv"
    c.head.layers = 3
    c.moco_v3.predictor_norm = True
    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 2e-3
    c.optimizer.weight_decay = 0.05
    c.optimizer.warmup = "1 epoch"
