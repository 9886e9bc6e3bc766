"""What each field of a config and of `--eval` means, in a line.

`python main.py -h` and docs/reference/config.md are made of these tables, and a test asks that they
have every field and no other. A method has a table of its own section, `Method.MEANINGS`. Flags say
what they are for where they are defined (`common/cli/command_line.py`).
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from common import config as configs
from common.evaluate import settings

CONFIG = {
    "method": "simclr | moco: set by the config file, with the section of that name",
    "seed": "of everything that is drawn: weights, order, crops, shuffles",
    "batch_size": "images of the global batch; each gives two views",
    "microbatch": "images that the encoder sees at a time, 0 = all: less memory, the same step; "
    "model.bn_groups must be a multiple of batch_size / microbatch x devices",
    "duration": 'of the run: "100 epochs", "5000 steps"',
    "log_every": "steps between lines of metrics.jsonl",
    "init_from": "start from the weights of a file or of a run's workdir (docs/export.md)",
    "resume_from": "start from all that fits of another run: DIR or DIR@STEP",
    "resume_optimizer": "with resume_from: momenta too, not only the weights",
    "on_nonfinite": "at a loss or weight that is not finite: stop | skip that update and count it",
    "max_skipped": "skipped updates in a row after which the run stops after all",
    "steps_per_dispatch": "steps that one call of the compiled program takes, at most; more than 1 "
    "needs data.augment_on=device",
    "profile": "FIRST:LAST: trace these steps for TensorBoard",
    "tpu_compiler_options": "on TPUs, those of common/train/xla_options.py; False: XLA's defaults",
    "data.source": "embedded | tfds:NAME | folder:PATH | shards:PATH | fake; paths may be gs://...",
    "data.train_split": "split that is trained on",
    "data.test_split": "split that is classified by kNN and probe; empty = no scores",
    "data.bank_split": "split whose images vote in kNN; empty = data.train_split",
    "data.labels": "auto | folders (each folder is a class) | none, where a folder can be read in "
    "two ways; legacy = as before there was the field",
    "data.dir": "of TensorFlow Datasets; empty = TFDS_DATA_DIR, or else its own default",
    "data.image_size": "side of the training views and of the evaluation images, in pixels",
    "data.cache_gib": "images held in memory at most; a larger TFRecord dataset is streamed",
    "data.shuffle_buffer": "encoded images among which a streamed dataset is shuffled",
    "data.on_corrupt": "at an image that cannot be read: error | replace it by the next good one",
    "data.value_range": "LOW:HIGH, the values that become black and white in images of more than 8 "
    "bits; auto = by a sample of the training images, once; upper8 = as before",
    "data.jpeg": "how JPEGs are decoded: exact (as Pillow) | fast (off by some levels)",
    "data.exif_rotation": "turn photographs as their EXIF says (ImageFolder does not)",
    "data.augment_on": "host | both (the host decodes, crops and flips, the train step does the "
    "rest) | device (all in the train step, with the dataset in device memory)",
    "data.fake_examples": "images of the fake dataset",
    "data.fake_classes": "classes of the fake dataset",
    "model.depth": "of the ResNet: 18, 34, 50, 101, 152, 200",
    "model.stages": "blocks of each stage of a network of your own; then depth is ignored",
    "model.width": "channels of the first stage",
    "model.width_multiplier": "of all channels, e.g. 2 for a ResNet-50 (2x)",
    "model.stem": "imagenet (7x7, stride 2, max pool) | cifar (3x3) | patch2 | patch4",
    "model.bn_groups": "blocks of the global batch that share batch statistics; 1 = all of it",
    "model.dtype": "of convolutions and matrix products: float32 | bfloat16",
    "model.remat": "recompute activations, less memory for more work: none | convs | blocks",
    "model.fold_norm": "batch norm folded into widening 1x1 convolutions: less memory traffic",
    "model.conv_init": "how convolutions start: he | lecun | torch | normal, see "
    "common/models/initial.py",
    "model.stem_init": "the same of the first one; empty = as the others",
    "model.zero_init_residual": "the last scale of a residual block starts at 0, as in SimCLR's "
    "code; False: at 1, as in torchvision",
    "head.kind": "simclr (with batch norm) | moco_v1 (one linear map) | moco_v2 (two layers)",
    "head.layers": "linear maps of a simclr head",
    "head.hidden": "width of its middle layers; 0 = that of the features",
    "head.dim": "length of the embeddings that are contrasted",
    "head.init": "how linear maps start: lecun (Flax) | torch | normal | he",
    "optimizer.name": "sgd | lars | adamw",
    "optimizer.learning_rate": "base value; optimizer.scaling makes the peak of it",
    "optimizer.scaling": "peak = base x: linear (batch / 256) | sqrt (square root of batch) | none",
    "optimizer.weight_decay": "on kernels only, unless decay_bn_and_bias",
    "optimizer.decay_bn_and_bias": "decay biases and batch-norm scales too, as MoCo's PyTorch code",
    "optimizer.momentum": "of sgd and lars",
    "optimizer.nesterov": "look-ahead form of the momentum (any optimiser)",
    "optimizer.b1": "adamw: decay of the first moment",
    "optimizer.b2": "adamw: decay of the second moment",
    "optimizer.trust_coefficient": "lars: eta in You et al. 2017, eq. 6",
    "optimizer.warmup": 'linear warm-up: "10 epochs", "500 steps" or "5 %"',
    "optimizer.schedule": "after the warm-up: cosine (to 0) | step | constant",
    "optimizer.decay_at": "schedule=step: where to decay, in epochs, or durations",
    "optimizer.decay_rate": "schedule=step: factor at each of decay_at",
    "optimizer.clip_norm": "clip the gradient to this global norm; 0 = off",
    "probe.learning_rate": "of the linear probe that is trained alongside; not scaled by the batch",
    "probe.momentum": "of its SGD",
    "probe.schedule": "constant | cosine (to 0 at the end of the run)",
    "evaluate.every": 'kNN and probe during the run; "0 steps" = only before and after it',
    "evaluate.knn_k": "neighbours that vote; 0 = min(200, n / 10)",
    "evaluate.knn_temperature": "a vote weighs exp(similarity / temperature)",
    "evaluate.knn_center": "subtract the mean of the voting features first",
    "evaluate.knn_examples": "training images that vote; 0 = all",
    "evaluate.batch_size": "images encoded at a time; 0 = the training batch",
    "evaluate.pictures": "augmented pairs and nearest neighbours, as PNG in the workdir",
    "checkpoint.every": 'duration between checkpoints: "1 epoch", "500 steps", "5 %"',
    "checkpoint.keep": "the newest so many stay; with 1 there is none to fall back to",
    "checkpoint.keep_every": "the first of each so many steps stays too; 0 steps: none does",
    "checkpoint.keep_best": "so many with the highest kNN accuracy stay too",
}

# Of `augment`, and of `augment_view2`, where None is what view 1 has.
AUGMENT = {
    "preset": "simclr | cifar | moco_v1 | moco_v2: what None stands for below",
    "strength": "multiplies the preset's brightness, contrast, saturation and hue",
    "size": "side of the views in pixels; None = data.image_size",
    "crop": "how boxes are drawn: tf (as SimCLR's code) | torch (as torchvision)",
    "area_min": "smallest share of the image's area in a crop",
    "area_max": "largest share of the image's area in a crop",
    "ratio_min": "smallest width / height of a crop",
    "ratio_max": "largest width / height of a crop",
    "interpolation": "of the resize: bilinear | bicubic",
    "antialias": "widen the kernel where the crop is larger than the view, as Pillow does",
    "flip": "probability of a left-right flip",
    "jitter": "probability of the colour jitter",
    "brightness": "x: the factor is uniform in [max(0, 1 - x), 1 + x]",
    "contrast": "x: the factor is uniform in [max(0, 1 - x), 1 + x]",
    "saturation": "x: the factor is uniform in [max(0, 1 - x), 1 + x]",
    "hue": "x: the shift is uniform in [-x, x] of the colour circle, at most 0.5",
    "color_style": "tf (as SimCLR's code) | pil (as torchvision)",
    "brightness_style": "multiply | add (SimCLR's first version)",
    "grey": "probability of a greyscale view",
    "grey_first": "grey comes before the jitter (MoCo v1)",
    "blur": "probability of a Gaussian blur",
    "sigma_min": "smallest standard deviation of the blur, in pixels",
    "sigma_max": "largest standard deviation of the blur, in pixels",
    "kernel": "of the blur: tf (a tenth of the size, zeros outside) | pil (4 sigma, edge repeated)",
    "solarise": "probability of inverting the values above solarise_threshold",
    "solarise_threshold": "in [0, 1]",
    "rotate": "probability of a rotation",
    "rotate_degrees": "x: the rotation is uniform in [-x, x]",
    "mean": "subtracted from pixels in [0, 1], on the device: red, green, blue",
    "std": "divided by after that: red, green, blue",
}

EVAL = {
    "step": "of the checkpoint; 0 = the newest",
    "features": "trained | untrained (the same network before its first step) | pixels",
    "layer": "backbone | head1, head2 ... | projection: features behind that layer of the head",
    "seed": "of everything that the mode draws: splits, orders, initial weights",
    "batch_size": "of feature extraction; 0 = the run's",
    "source": "data other than the run's: folder:PATH, tfds:cifar100; empty = the run's",
    "labels": "auto | folders | none; empty = the run's, and auto with another source",
    "data_dir": "of TensorFlow Datasets; empty = the run's",
    "train_split": "empty = the run's, data.bank_split before data.train_split",
    "test_split": "empty = the run's",
    "on_corrupt": "error | replace; empty = the run's",
    "value_range": "LOW:HIGH of images of more than 8 bits; empty = the run's for its own data, "
    "else by a sample",
    "knn.k": "neighbours that vote; 0 = min(200, n / 10)",
    "knn.temperature": "a vote weighs exp(similarity / temperature)",
    "knn.metric": "cosine | euclidean",
    "knn.center": "subtract the mean of the training features first (cosine)",
    "linear.variant": "cached (features of un-augmented images) | augmented (crop and flip, every "
    "image encoded anew) | auto: cached on CPUs and for pixels",
    "linear.optimizer": "sgd | lbfgs (cached only; settings in logistic)",
    "linear.epochs": "passes over the training images",
    "linear.batch_size": "at most the training images",
    "linear.momentum": "of sgd",
    "linear.learning_rate": "base values, x batch / 256; the best is chosen on a held-out part",
    "linear.weight_decay": "of each of them; the best pair is taken",
    "linear.held_out": "share of each class of train to choose by",
    "linear.standardise": "scale features to variance 1 / d; False: as they are",
    "logistic.num_values": "strengths of the L2 penalty that are tried (transfer, and lbfgs)",
    "logistic.low": "smallest of them",
    "logistic.high": "largest of them",
    "logistic.max_iterations": "of L-BFGS, for each",
    "logistic.held_out": "share of each class of train to choose by",
    "transfer.sources": "datasets by commas, splits after an @: "
    "embedded,tfds:cifar10,folder:PATH@train:val; empty = the run's own",
    "finetune.fraction": "share of the labels, class balanced",
    "finetune.epochs": "0 = 60 up to 1 % of the labels, else 30 (Chen et al. 2020, B.5)",
    "finetune.batch_size": "at most the training images",
    "finetune.learning_rate": "base value, x batch / 256",
    "finetune.weight_decay": "on all kernels",
    "embed.split": "empty = the test split, or train where there is none",
    "embed.format": "npz | npz,parquet",
    "embed.examples": "at most so many images; 0 = all",
    "embed.report": "write report.html too",
    "embed.points": "of the map in the report",
    "export.format": "some of safetensors,npz,stablehlo",
    "export.dir": "empty = <workdir>/export",
}

# What to write for a field whose default does not show it.
EXAMPLES: dict[str, Any] = {
    "model.stages": (2, 2, 2, 2),
    "optimizer.decay_at": (120, 160.5, "90 %"),
    "augment.mean": (0.485, 0.456, 0.406),
    "augment.std": (0.229, 0.224, 0.225),
}


def of_config(method: str, method_meanings: Mapping[str, str]) -> dict[str, str]:
    """The meaning of every field of a method's config, in no order.

    Args:
        method: its name.
        method_meanings: `MEANINGS` of its class: field of its section -> meaning.
    """
    own = {f"{method}.{name}": text for name, text in method_meanings.items()}
    first = {f"augment.{name}": text for name, text in AUGMENT.items()}
    second = {f"augment_view2.{name}": text for name, text in AUGMENT.items()}
    second["augment_view2.preset"] = "of view 2, which has all fields of augment; None: as view 1"
    return CONFIG | own | first | second


def defaults(tree: ConfigDict) -> dict[str, Any]:
    """Every field of a config by its full name, with its value."""
    return configs.flatten(configs.as_dict(tree))


def of_method(name: str, make: Any) -> ConfigDict:
    """What `base_config` gives for a method."""
    return configs.base_config(name, make.default_config())


def of_eval() -> ConfigDict:
    """The defaults of `--eval`."""
    return settings.default_config()
