"""SimCLR v2 on ImageNet: ResNet-50, batch 4096, LARS, 800 epochs, for a TPU slice (v3-32 or more).

    python main.py --config=configs/simclr_v2_tpu.py --workdir=gs://BUCKET/simclr_v2 --distributed

Pretraining of Chen et al. 2020b (arXiv:2006.10029), section 3.1: base learning rate
0.1 x sqrt(batch) = 6.4, 5 % of warm-up (by their author in issue 77 of
github.com/google-research/simclr), weight decay 1e-4, T 0.1, a head of 3 layers, batch norm over
the global batch. `:sk` adds selective kernels and ResNet-D; `:r152` is their largest network,
ResNet-152, three times as wide, with both.

Published top-1, by the README of that repository (none of it run by us):

    network                  parameters  linear  fine-tuned with 1 %  10 %  100 % of the labels
    ResNet-50                      24 M  71.7 %               57.9 %  68.4 %  76.3 %
    ResNet-50, SK (:sk)            35 M  74.6 %               64.5 %  72.1 %  78.7 %
    ResNet-152, 3x, SK (:r152)    795 M  79.8 %               74.9 %  80.1 %  83.1 %

Their runs had a memory of past embeddings (`--config.simclr.memory_length=65536`), which their code
has not: by issue 77 it gives a ResNet-50 71.1 % (linear). As in simclr_tpu.py, the learning rate
belongs to their loss, which is twice eq. 1, and the network is initialised as theirs. What else
differs: docs/fidelity.md. `:r152` fits 64 chips of v4 or v5p without remat, and not 32 of v5e
(docs/tpu.md).

ImageNet must be prepared first: set TFDS_DATA_DIR to a directory that holds imagenet2012.
"""

from ml_collections import ConfigDict

from configs import simclr_tpu, smoke


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is "sk" or "r152" for these encoders; "smoke" shrinks the run to seconds."""
    c = simclr_tpu.get_config()
    c.duration = "800 epochs"
    c.head.layers = 3
    c.optimizer.learning_rate = 0.1
    c.optimizer.warmup = "5 %"
    return smoke.apply(c, arg, sk=selective_kernels, r152=resnet152)


def selective_kernels(c: ConfigDict) -> None:
    """Of all their networks with SK."""
    c.model.resnet_d = True
    c.model.sk_ratio = 0.0625


def resnet152(c: ConfigDict) -> None:
    """Their largest network."""
    selective_kernels(c)
    c.model.depth = 152
    c.model.width_multiplier = 3
