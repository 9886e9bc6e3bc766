"""SimCLR on ImageNet: ResNet-50, batch 4096, LARS, 100 epochs, for a TPU slice (v3-32 and larger).

    python main.py --config=configs/simclr_tpu.py --workdir=gs://BUCKET/simclr --distributed

The recipe is Chen et al. 2020, appendix A, with the settings of the authors' README
(github.com/google-research/simclr: LARS, base learning rate 0.075 x sqrt(batch) = 4.8, weight
decay 1e-4, T 0.1, 10 epochs of warm-up). Published: 64.5 % top-1 of a linear classifier after
these 100 epochs (paper, table B.1; kNN is lower). Not run by us.

These rates belong to the loss of their code, which is twice eq. 1 (`simclr.loss_scale`). The
network is initialised as theirs: convolutions with variance 1 / fan-in, linear layers with standard
deviation 0.01, the last scale of a residual block 0. The head has the paper's 2 layers, as for the
figure above; the flag of their present code defaults to 3, as in SimCLR v2: use
--config.head.layers=3 for that. What else differs: docs/fidelity.md.

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
    c.duration = "100 epochs"
    c.data.source = "tfds:imagenet2012"
    c.data.test_split = "validation"
    c.data.image_size = 224
    c.augment.preset = "simclr"
    c.model.depth = 50
    c.model.bn_groups = 1  # statistics of the global batch
    c.model.dtype = "bfloat16"
    c.model.conv_init = "lecun"
    c.head.init = "normal"
    c.simclr.temperature = 0.1
    c.simclr.loss_scale = 2.0
    c.optimizer.name = "lars"
    c.optimizer.learning_rate = 0.075
    c.optimizer.scaling = "sqrt"
    c.optimizer.weight_decay = 1e-4
    c.optimizer.warmup = "10 epochs"
    c.evaluate.every = "10 epochs"
    c.evaluate.knn_examples = 50_000  # a sample of the 1.28 M training images votes
    c.checkpoint.every = "1 epoch"
    return smoke.apply(c, arg)
