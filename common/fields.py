"""Every field of a config: default, meaning, bounds, and what may change on resume.

`common/config.py` builds the config from these tables and checks it against them; `python main.py
-h` and docs/reference/config.md print them. `common/eval_fields.py` has the fields of `--eval`. A
method brings its own section: `default_config` and `MEANINGS` of its class.
"""

import dataclasses
from typing import Any

AUTO = "auto"
# What the backward pass recomputes instead of storing, from least to most memory saved: docs/tpu.md
# has the figures.
REMAT = ("none", "convs", "blocks")


@dataclasses.dataclass(frozen=True)
class Field:
    """One field.

    Attributes:
        default: the value unless the config file or a flag sets another; its type is the field's.
        meaning: one line for the help.
        kind: the type, where the default is None.
        least: the smallest value allowed.
        one_of: the values allowed.
        free: it may change when a run is resumed, because it changes neither a training step
            already taken nor the meaning of a score.
        before: what the code did before it had this field: a run whose config.json lacks the field
            is resumed and evaluated with that value. Not given: the code did the same as with a
            falsy value (0, "", False).
        auto: a value that stands for another, which is decided when a run begins (by the data it
            has) and which config.json then keeps; None: there is none.
        example: a value for messages, if the default is not a good one.
    """

    default: Any
    meaning: str
    kind: type | None = None
    least: float | None = None
    one_of: tuple[str, ...] = ()
    free: bool = False
    before: Any = ...
    auto: Any = None
    example: Any = None


# fmt: off
# One view; None means the preset's value.
AUGMENT: dict[str, Field] = {
    "preset": Field("simclr",
        "simclr | cifar | moco_v1 | moco_v2 | moco_v3: the values of fields that are "
        "None", kind=str),
    "strength": Field(None,
        "multiplies the preset's brightness, contrast, saturation and hue", kind=float),
    "size": Field(None, "side of the views in pixels; None = data.image_size", kind=int),
    "crop": Field(None,
        "sampling of crop boxes: tf (as SimCLR's code) | torch (as torchvision)", kind=str),
    "area_min": Field(None, "smallest share of the image's area in a crop", kind=float),
    "area_max": Field(None, "largest share of the image's area in a crop", kind=float),
    "ratio_min": Field(None, "smallest width / height of a crop", kind=float),
    "ratio_max": Field(None, "largest width / height of a crop", kind=float),
    "interpolation": Field(None, "of the resize: bilinear | bicubic", kind=str),
    "antialias": Field(None,
        "widen the kernel where the crop is larger than the view, as Pillow does", kind=bool),
    "flip": Field(None, "probability of a left-right flip", kind=float),
    "jitter": Field(None, "probability of the colour jitter", kind=float),
    "brightness": Field(None, "x: the factor is uniform in [max(0, 1 - x), 1 + x]", kind=float),
    "contrast": Field(None, "x: the factor is uniform in [max(0, 1 - x), 1 + x]", kind=float),
    "saturation": Field(None, "x: the factor is uniform in [max(0, 1 - x), 1 + x]", kind=float),
    "hue": Field(None,
        "x: the shift is uniform in [-x, x] of the colour circle, at most 0.5", kind=float),
    "color_style": Field(None, "tf (as SimCLR's code) | pil (as torchvision)", kind=str),
    "brightness_style": Field(None, "multiply | add (SimCLR's first version)", kind=str),
    "grey": Field(None, "probability of a greyscale view", kind=float),
    "grey_first": Field(None, "apply grey before the jitter (MoCo v1)", kind=bool),
    "blur": Field(None, "probability of a Gaussian blur", kind=float),
    "sigma_min": Field(None, "smallest standard deviation of the blur, in pixels", kind=float),
    "sigma_max": Field(None, "largest standard deviation of the blur, in pixels", kind=float),
    "kernel": Field(None,
        "of the blur: tf (a tenth of the size, zeros outside) | pil (4 sigma, edge repeated)",
        kind=str),
    "solarise": Field(None,
        "probability of inverting the values above solarise_threshold", kind=float),
    "solarise_threshold": Field(None, "in [0, 1]", kind=float),
    "rotate": Field(None, "probability of a rotation", kind=float),
    "rotate_degrees": Field(None, "x: the rotation is uniform in [-x, x]", kind=float),
    "mean": Field(None,
        "subtracted from pixels in [0, 1], on the device: red, green, blue",
        kind=tuple, example=(0.485, 0.456, 0.406)),
    "std": Field(None,
        "divided by after the subtraction: red, green, blue",
        kind=tuple, example=(0.229, 0.224, 0.225)),
}

# By section, in the order of config.json; "" holds the fields outside any section.
CONFIG: dict[str, dict[str, Field]] = {
    "": {
        "method": Field("",
            "name of the method: set by the config file, with the section of that name"),
        "seed": Field(0, "of all random draws: weights, order, crops, shuffles", least=0),
        "batch_size": Field(256,
            "images of the global batch; 0 = by the number of images, see auto", least=2, auto=0),
        "views": Field(2,
            "augmented views of each image in a batch; methods that compare views take 2",
            least=1, before=2),
        "microbatch": Field(0,
            "images in one pass of the encoder, 0 = all: less memory, the same step; with batch "
            "norm in the encoder model.bn_groups must be a multiple of batch_size / microbatch x "
            "devices",
            least=0, free=True),
        "duration": Field("100 epochs",
            'length of the run: "100 epochs", "5000 steps"; auto = by the number of images, see '
            'auto', auto=AUTO),
        "log_every": Field(50, "steps between lines of metrics.jsonl", least=1, free=True),
        "init_from": Field("",
            "start from the weights of a file or of a run's workdir (docs/export.md)"),
        "resume_from": Field("", "start from the matching arrays of another run: DIR or DIR@STEP"),
        "resume_optimizer": Field(False,
            "with resume_from: also take the optimiser state, not only the weights"),
        "on_nonfinite": Field("stop",
            "if a loss or weight is not finite: stop | skip (leave that update out and count it)",
            one_of=("stop", "skip"), free=True),
        "max_skipped": Field(10,
            "number of skipped updates in a row after which the run stops", least=1, free=True),
        "steps_per_dispatch": Field(1,
            "at most this many steps in one call of the compiled program; more than 1 needs "
            "data.augment_on=device", least=1, free=True),
        "profile": Field("", "FIRST:LAST: trace these steps for TensorBoard", free=True),
        "tpu_compiler_options": Field(True,
            "use the options of common/train/xla_options.py on TPUs; False: XLA's defaults",
            free=True),
    },
    "auto": {
        "batch_size": Field(256,
            "batch_size=0 takes an eighth of the images, at least 32 and at most so many",
            least=2, free=True),
        "images": Field(1_000_000,
            "duration=auto shows so many images in all, within the limits below", least=1,
            free=True),
        "least_epochs": Field(20, "duration=auto: at least so many epochs", least=1, free=True),
        "most_epochs": Field(400, "duration=auto: at most so many epochs", least=1, free=True),
    },
    "data": {
        "source": Field("embedded",
            "embedded | tfds:NAME | folder:PATH | shards:PATH | fake; paths may be gs://..."),
        "train_split": Field("train",
            "split to train on; auto, together with test_split: train, less what that holds out",
            auto=AUTO),
        "test_split": Field("test",
            "split to score by; empty = no scores; auto = the test or validation split if there is "
            "one, else a tenth of train is held out (at least 100 images, at most 2,000 or a "
            "quarter)",
            auto=AUTO),
        "bank_split": Field("", "split whose images vote in kNN; empty = data.train_split"),
        "labels": Field("auto",
            "auto | folders (each folder is a class) | none; legacy = as before the field existed",
            before="legacy"),
        "dir": Field("",
            "data directory of TensorFlow Datasets; empty = TFDS_DATA_DIR, or its own default",
            free=True),
        "image_size": Field(28,
            "side of the training views and of the evaluation images, in pixels", least=1),
        "cache_gib": Field(16.0,
            "limit for images in memory; a larger TFRecord dataset is streamed", free=True),
        "shuffle_buffer": Field(16384,
            "size of the shuffle buffer of a streamed dataset, in encoded images", least=1),
        "on_corrupt": Field("error",
            "if an image cannot be read: error | replace (by the next good one)", free=True),
        "value_range": Field("auto",
            "LOW:HIGH, the values mapped to black and white in images of more than 8 bits; auto = "
            "from a sample of the training images, once; upper8 = as before the field existed",
            before="upper8", auto=AUTO),
        "jpeg": Field("exact",
            "how JPEGs are decoded: exact (as Pillow) | fast (off by some levels)", before="fast"),
        "exif_rotation": Field(False,
            "rotate photographs by their EXIF orientation (ImageFolder does not)"),
        "shrink": Field(0,
            "make photographs twice as large and more smaller once, to a shorter side of at least "
            "so many pixels, and keep them in memory; 0 = off: each crop decodes the whole file",
            least=0),
        "augment_on": Field("host",
            "host | both (the host decodes, crops and flips, the train step does the rest) | "
            "device (all in the train step, with the dataset in device memory)"),
        "fake_examples": Field(4096, "images of the fake dataset"),
        "fake_classes": Field(10, "classes of the fake dataset"),
    },
    "augment": AUGMENT,
    "augment_view2": AUGMENT | {
        "preset": Field(None,
            "of view 2, which has all fields of augment; None = as view 1", kind=str),
    },
    "model": {
        "encoder": Field("resnet",
            "resnet | vit (a vision transformer, of the section vit; of this one it reads "
            "bn_groups, dtype and remat)",
            one_of=("resnet", "vit"), before="resnet"),
        "depth": Field(50, "of the ResNet: 18, 34, 50, 101, 152, 200"),
        "stages": Field((),
            "blocks per stage of a custom network; depth is then ignored",
            example=(2, 2, 2, 2)),
        "bottleneck": Field(False,
            "blocks of model.stages are bottlenecks (1x1, 3x3, 1x1), as those of depth 50 and more",
            before=False),
        "width": Field(64, "channels of the first stage", least=1),
        "width_multiplier": Field(1,
            "multiplies all channels, e.g. 2 for a ResNet-50 (2x)", least=1),
        "stem": Field("imagenet",
            "imagenet (7x7, stride 2, max pool) | cifar (3x3) | patch2 | patch4"),
        "bn_groups": Field(1,
            "blocks of the global batch that share batch statistics; 1 = all of it", least=1),
        "dtype": Field("float32", "of convolutions and matrix products: float32 | bfloat16"),
        "remat": Field("none",
            "recompute activations (less memory, more compute): none | convs (of a ViT: all but "
            "matrix products) | blocks",
            one_of=REMAT, free=True),
        "fold_norm": Field(True,
            "fold batch norm into widening 1x1 convolutions: less memory traffic"),
        "conv_init": Field("he",
            "initialisation of convolutions: he | lecun | torch | normal, see"
            " common/models/initial.py",
            before="he"),
        "stem_init": Field("", "the same for the first one; empty = as the others", before=""),
        "zero_init_residual": Field(True,
            "start the last scale of a residual block at 0, as in SimCLR's code; False: at 1, as "
            "in torchvision", before=True),
        "resnet_d": Field(False,
            "ResNet-D as in SimCLR v2: an imagenet stem of three 3x3 convolutions, shortcuts that "
            "average 2x2 pixels", before=False),
        "sk_ratio": Field(0.0,
            "selective kernels in bottlenecks, with a squeeze to this share of the channels "
            "(SimCLR v2: 0.0625); 0 = none; needs model.resnet_d", least=0, before=0.0),
    },
    "vit": {
        "variant": Field("S",
            "Ti | S | B | L: width, depth and heads of the fields below that are 0",
            one_of=("Ti", "S", "B", "L"), before="S"),
        "patch": Field(16, "side of a patch in pixels", least=1, before=16),
        "width": Field(0, "of the tokens; 0 = the variant's (192, 384, 768, 1024)", least=0),
        "depth": Field(0,
            "number of blocks; 0 = the variant's (12, 12, 12, 24), one less with patches=conv",
            least=0),
        "heads": Field(0,
            "of attention; 0 = the variant's (3, 6, 12, 16); MoCo v3 has 12 in its ViT-S", least=0),
        "mlp_ratio": Field(4.0, "width of the perceptron of a block / width", before=4.0),
        "pool": Field("token",
            "token (a class token, after a norm) | mean (of the patches, no norm)",
            one_of=("token", "mean"), before="token"),
        "positions": Field("sincos",
            "sincos (MoCo v3's fixed table) | learned",
            one_of=("sincos", "learned"), before="sincos"),
        "patches": Field("linear",
            "linear | frozen (linear, and not trained: MoCo v3) | conv (convolutions with batch "
            "norm)",
            one_of=("linear", "frozen", "conv"), before="linear"),
        "drop_path": Field(0.0,
            "probability of leaving out a branch of the last block, in proportion for earlier "
            "ones", least=0),
        "tpu_kernel": Field(True,
            "bfloat16 attention on TPUs by a kernel that keeps its logits on the chip, and tokens "
            "in the order in memory that it takes; False: as XLA likes", before=True, free=True),
    },
    "head": {
        "kind": Field("simclr",
            "simclr (with batch norm) | moco_v1 (one linear layer) | moco_v2 (two layers) | "
            "moco_v3 (batch norm, the last without scale and shift)"),
        "layers": Field(2, "number of linear layers of a simclr or moco_v3 head"),
        "hidden": Field(0, "width of its hidden layers; 0 = that of the features", least=0),
        "dim": Field(128, "dimension of the embeddings in the loss", least=0),
        "init": Field("lecun",
            "initialisation of linear layers: lecun (Flax) | torch | normal | he", before="lecun"),
    },
    "optimizer": {
        "name": Field("sgd", "sgd | lars | adamw", one_of=("sgd", "lars", "adamw")),
        "learning_rate": Field(0.06, "base value; optimizer.scaling turns it into the peak"),
        "scaling": Field("linear",
            "peak = base x: linear (batch / 256) | sqrt (square root of batch) | none",
            one_of=("linear", "sqrt", "none")),
        "weight_decay": Field(0.0001, "on kernels only, unless decay_bn_and_bias"),
        "decay_bn_and_bias": Field(False,
            "also decay biases and batch-norm scales, as MoCo's PyTorch code does"),
        "momentum": Field(0.9, "of sgd and lars"),
        "nesterov": Field(False, "Nesterov momentum (any optimizer)"),
        "b1": Field(0.9, "adamw: decay of the first moment"),
        "b2": Field(0.999, "adamw: decay of the second moment"),
        "trust_coefficient": Field(0.001, "lars: eta in You et al. 2017, eq. 6"),
        "warmup": Field("0 steps", 'linear warm-up: "10 epochs", "500 steps" or "5 %"'),
        "schedule": Field("cosine",
            "after the warm-up: cosine (to 0) | step | constant",
            one_of=("cosine", "step", "constant")),
        "decay_at": Field((120, 160),
            "schedule=step: where to decay, in epochs, or durations", example=(120, 160.5, "90 %")),
        "decay_rate": Field(0.1, "schedule=step: factor at each of decay_at"),
        "clip_norm": Field(0.0, "clip the gradient to this global norm; 0 = off"),
    },
    "probe": {
        "learning_rate": Field(1.0,
            "of the linear probe trained during the run; not scaled by the batch"),
        "momentum": Field(0.9, "of its SGD"),
        "schedule": Field("constant",
            "constant | cosine (to 0 at the end of the run)", one_of=("constant", "cosine")),
    },
    "evaluate": {
        "every": Field("10 %",
            'kNN and probe during the run; "0 steps" = only before and after it', free=True),
        "knn_k": Field(0, "number of neighbours that vote; 0 = min(200, n / 10)", least=0),
        "knn_temperature": Field(0.1, "a vote weighs exp(similarity / temperature)"),
        "knn_center": Field(False, "subtract the mean of the training features first"),
        "knn_examples": Field(0, "number of training images that vote; 0 = all", least=0),
        "label_free_examples": Field(1000,
            "number of test images of which two views are compared, without labels: "
            "view_agreement, rankme, alignment, uniformity; 0 = off", least=0, before=0),
        "batch_size": Field(0,
            "batch size for encoding; 0 = the training batch", least=0, free=True),
        "pictures": Field(True,
            "draw augmented pairs and nearest neighbours as PNG in the workdir", free=True),
    },
    "log": {
        "csv": Field(True,
            "also write the lines of metrics.jsonl as a table, metrics.csv", free=True),
        "wandb": Field("",
            "project of Weights & Biases to log to (pip install wandb; WANDB_MODE and its other "
            "variables apply); empty = none", free=True),
    },
    "checkpoint": {
        "every": Field("5 %",
            'duration between checkpoints: "1 epoch", "500 steps", "5 %"', free=True),
        "keep": Field(2,
            "how many of the newest to keep; with 1 there is none to fall back to",
            least=1, free=True),
        "keep_every": Field("0 steps",
            "also keep the first of each period of this length; 0 steps: off", free=True),
        "keep_best": Field(0,
            "also keep this many with the highest kNN accuracy", least=0, free=True),
    },
}
# fmt: on

# `auto` and `before` of fields in the sections of methods.
METHODS_AUTO = {"moco.queue_length": 0}
METHODS_BEFORE = {
    "simclr.loss": "nt_xent",
    "simclr.loss_scale": 1.0,
    "simclr.memory_momentum": 0.999,
    "moco.loss_scale": 1.0,
}
