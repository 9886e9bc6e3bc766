"""SimCLR on ImageNet with ViT-B/16: batch 4096, AdamW, 300 epochs, for a TPU slice (v3-128 and up).

    python main.py --config=configs/simclr_vit_tpu.py --workdir=gs://BUCKET/simclr_vit --distributed

The recipe is that of github.com/ronghanghu/moco_v3_tpu (`run_simclr_vit.py` and `config.py`):
AdamW, base learning rate 2e-4 x batch / 256, weight decay 0.1 on everything that is trained, 40
epochs of warm-up, T 0.1, patches that stay as drawn, a head of 3 layers, and the views of MoCo v2
with crops from 8 %, alike for both views. Published there: 73.9 % top-1 of a linear classifier. Not
run by us. What else differs: docs/fidelity.md.

ImageNet must be prepared first: set TFDS_DATA_DIR to a directory that holds imagenet2012.
"""

from ml_collections import ConfigDict

from common.config import base_config
from configs import smoke
from simclr_jax.method import SimCLR


def get_config(arg: str = "") -> ConfigDict:
    """`arg="smoke"` shrinks the run to seconds."""
    c = base_config("simclr", SimCLR.default_config())
    c.batch_size = 4096
    c.duration = "300 epochs"
    c.data.source = "tfds:imagenet2012"
    c.data.test_split = "validation"
    c.data.image_size = 224
    c.augment.preset = "moco_v2"
    c.augment.area_min = 0.08
    c.model.encoder = "vit"
    c.model.dtype = "bfloat16"
    c.model.bn_groups = 1  # statistics of the global batch, in the head
    c.vit.variant = "B"
    c.vit.patches = "frozen"
    c.head.kind = "simclr"  # the last batch norm keeps its scale, as theirs
    c.head.layers = 3
    c.head.hidden = 4096
    c.head.dim = 256
    c.head.init = "torch"
    c.simclr.temperature = 0.1
    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 2e-4
    c.optimizer.weight_decay = 0.1
    c.optimizer.decay_bn_and_bias = True
    c.optimizer.warmup = "40 epochs"
    c.evaluate.every = "10 epochs"
    c.evaluate.knn_examples = 50_000  # a sample of the 1.28 M training images votes
    c.checkpoint.every = "1 epoch"
    return smoke.apply(c, arg)
