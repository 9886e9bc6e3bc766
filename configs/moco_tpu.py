"""MoCo v2 on ImageNet: ResNet-50, a queue of 65,536 keys, 200 epochs, for 8 TPU chips and more.

    python main.py --config=configs/moco_tpu.py --workdir=gs://BUCKET/moco --distributed

The recipe is Chen et al. 2020 (arXiv:2003.04297) with the authors' code
(github.com/facebookresearch/moco): SGD 0.03 x batch / 256, momentum 0.9, weight decay 1e-4, no
warm-up, cosine, T 0.2, m 0.999, shuffling BN over 8 groups at batch 256. Published: 67.5 % top-1
of a linear classifier after 200 epochs at batch 256. Not run by us; the batch here is 1024, with
the learning rate scaled and the groups kept at 32 images, as the authors advise.

The network is initialised as theirs, which is torchvision's: the last scale of a residual block is
1; the head has PyTorch's defaults. What else differs: docs/fidelity.md.

ImageNet must be prepared first: set TFDS_DATA_DIR to a directory that holds imagenet2012.
"""

from ml_collections import ConfigDict

from common.config import base_config
from configs import smoke
from moco_jax.method import MoCo


def get_config(arg: str = "") -> ConfigDict:
    """`arg="smoke"` shrinks the run to seconds."""
    c = base_config("moco", MoCo.default_config())
    c.batch_size = 1024
    c.duration = "200 epochs"
    c.data.source = "tfds:imagenet2012"
    c.data.test_split = "validation"
    c.data.image_size = 224
    c.augment.preset = "moco_v2"
    c.model.depth = 50
    c.model.bn_groups = 32
    c.model.dtype = "bfloat16"
    c.model.zero_init_residual = False
    c.head.kind = "moco_v2"
    c.head.init = "torch"
    c.moco.temperature = 0.2
    c.moco.queue_length = 65536
    c.moco.momentum = 0.999
    c.optimizer.learning_rate = 0.03
    c.optimizer.weight_decay = 1e-4
    c.optimizer.decay_bn_and_bias = True
    c.evaluate.every = "10 epochs"
    c.evaluate.knn_examples = 50_000  # a sample of the 1.28 M training images votes
    c.checkpoint.every = "1 epoch"
    return smoke.apply(c, arg)
