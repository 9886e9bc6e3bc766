"""MoCo v3 on ImageNet: ViT-B/16, batch 4096, 300 epochs, for a TPU slice (v3-128 and larger).

    python main.py --config=configs/moco_v3_tpu.py --workdir=gs://BUCKET/moco_v3 --distributed

The recipe is Chen et al. 2021 (arXiv:2104.02057) with the settings of the authors' README and
CONFIG.md (github.com/facebookresearch/moco-v3): AdamW, base learning rate 1.5e-4 x batch / 256,
weight decay 0.1 on everything that is trained, 40 epochs of warm-up, T 0.2, m 0.99 on a cosine to
1, patches that stay as drawn, crops from 8 %. Published top-1 of a linear classifier: 76.7 %. Not
run by us.

`:vit_s` is their ViT-S/16, which has 12 heads: 73.2 %. `:r50` is their ResNet-50 for 300 epochs
(LARS, 0.3 x batch / 256, weight decay 1e-6, 10 epochs of warm-up, T 1.0, crops from 20 %, heads of
2 layers): 72.8 %; for 100 epochs their learning rate is 0.6 (68.9 %), for 1,000 epochs weight decay
is 1.5e-6 and m starts at 0.996 (74.6 %). What else differs: docs/fidelity.md.

ImageNet must be prepared first: set TFDS_DATA_DIR to a directory that holds imagenet2012.
"""

from ml_collections import ConfigDict

from common.config import base_config
from configs import smoke
from moco_jax.v3 import MoCoV3


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is "vit_s" or "r50" for these encoders; "smoke" shrinks the run to seconds."""
    c = base_config("moco_v3", MoCoV3.default_config())
    c.batch_size = 4096
    c.duration = "300 epochs"
    c.data.source = "tfds:imagenet2012"
    c.data.test_split = "validation"
    c.data.image_size = 224
    views(c)
    c.model.encoder = "vit"
    c.model.dtype = "bfloat16"
    c.model.bn_groups = 1  # statistics of the global batch, in the heads
    c.vit.variant = "B"
    c.vit.patches = "frozen"
    heads(c, layers=3)
    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 1.5e-4
    c.optimizer.weight_decay = 0.1
    c.optimizer.decay_bn_and_bias = True
    c.optimizer.warmup = "40 epochs"
    c.evaluate.every = "10 epochs"
    c.evaluate.knn_examples = 50_000  # a sample of the 1.28 M training images votes
    c.checkpoint.every = "1 epoch"
    return smoke.apply(c, arg, vit_s=vit_s, r50=resnet50)


def vit_s(c: ConfigDict) -> None:
    """The authors' ViT-S has 12 heads, DeiT's 6."""
    c.vit.variant, c.vit.heads = "S", 12


def views(c: ConfigDict) -> None:
    """The two augmentations of the authors' code: the second view is seldom blurred."""
    c.augment.preset = "moco_v3"
    c.augment_view2.blur = 0.1
    c.augment_view2.solarise = 0.2


def heads(c: ConfigDict, layers: int) -> None:
    """Projector and predictor of the authors' code."""
    c.head.kind = "moco_v3"
    c.head.layers = layers
    c.head.hidden = 4096
    c.head.dim = 256
    c.head.init = "torch"


def resnet50(c: ConfigDict) -> None:
    """Their recipe for a ResNet-50."""
    c.model.encoder = "resnet"
    c.model.depth = 50
    c.model.zero_init_residual = True
    c.augment.area_min = 0.2
    c.head.layers = 2
    c.moco_v3.temperature = 1.0
    c.moco_v3.predictor_norm = False
    c.optimizer.name = "lars"
    c.optimizer.learning_rate = 0.3
    c.optimizer.weight_decay = 1e-6
    c.optimizer.decay_bn_and_bias = False
    c.optimizer.warmup = "10 epochs"
