"""Every field of `--eval`, by section; see `common/fields.py`."""

from common.fields import Field

# fmt: off
EVAL: dict[str, dict[str, Field]] = {
    "": {
        "step": Field(0, "of the checkpoint; 0 = the newest"),
        "features": Field("trained",
            "trained | untrained (the same network before its first step) | pixels",
            one_of=("trained", "untrained", "pixels")),
        "layer": Field("backbone",
            "backbone | head1, head2 ... | projection: features after that layer"),
        "seed": Field(0, "of all random draws of the mode: splits, orders, initial weights"),
        "batch_size": Field(0, "of feature extraction; 0 = the run's"),
        "image_size": Field(0,
            "side of the images in pixels; 0 = the run's; a ViT's positions are resized"),
        "area_min": Field(0.0,
            "smallest share of the image's area in a crop of linear_eval and finetune; 0 = that of "
            "the run's augment"),
        "source": Field("",
            "other data, e.g. folder:PATH or tfds:cifar100; empty = the run's"),
        "labels": Field("",
            "auto | folders | none; empty = the run's, or auto with another source"),
        "data_dir": Field("", "data directory of TensorFlow Datasets; empty = the run's"),
        "train_split": Field("", "empty = the run's, data.bank_split before data.train_split"),
        "test_split": Field("", "empty = the run's"),
        "on_corrupt": Field("", "error | replace; empty = the run's"),
        "value_range": Field("",
            "LOW:HIGH of images of more than 8 bits; empty = the run's for its own data, else from "
            "a sample"),
    },
    "knn": {
        "k": Field(0, "number of neighbours that vote; 0 = min(200, n / 10)"),
        "temperature": Field(0.1, "a vote weighs exp(similarity / temperature)"),
        "metric": Field("cosine", "cosine | euclidean"),
        "center": Field(False, "subtract the mean of the training features first (cosine)"),
    },
    "linear": {
        "variant": Field("auto",
            "cached (features of un-augmented images) | augmented (crop and flip, images "
            "encoded in each epoch) | auto: cached on CPUs and for pixels"),
        "optimizer": Field("sgd", "sgd | lbfgs (cached only; settings in logistic)"),
        "epochs": Field(90, "passes over the training images"),
        "batch_size": Field(256, "at most the training images"),
        "momentum": Field(0.9, "of sgd"),
        "nesterov": Field(True,
            "Nesterov momentum, as SimCLR; False as MoCo: PyTorch's plain momentum"),
        "learning_rate": Field((0.1, 0.3, 1.0, 3.0, 10.0),
            "base values, x batch / 256; the best is chosen on held-out images"),
        "weight_decay": Field((0.0, 1e-06, 1e-05),
            "tried with each learning rate; the best pair is used"),
        "held_out": Field(0.1, "fraction of each training class held out for the choice"),
        "standardise": Field(True, "scale features to variance 1 / d; False: as they are"),
    },
    "logistic": {
        "num_values": Field(45, "number of L2 penalties tried (transfer, and lbfgs)"),
        "low": Field(1e-06, "smallest L2 penalty"),
        "high": Field(1e5, "largest L2 penalty"),
        "max_iterations": Field(1000, "of L-BFGS, for each penalty"),
        "held_out": Field(0.1, "fraction of each training class held out for the choice"),
    },
    "transfer": {
        "sources": Field("",
            "datasets separated by commas, splits after an @: "
            "embedded,tfds:cifar10,folder:PATH@train:val; "
            "empty = the run's own"),
    },
    "finetune": {
        "fraction": Field(0.01, "fraction of the labels, class balanced"),
        "epochs": Field(0, "0 = 60 up to 1 % of the labels, else 30 (Chen et al. 2020, B.5)"),
        "batch_size": Field(256, "at most the training images"),
        "optimizer": Field("auto",
            "sgd (Nesterov momentum 0.9) | lars (momentum 0.9; SimCLR v2) | adamw | auto: adamw "
            "for a ViT, else sgd",
            one_of=("auto", "sgd", "lars", "adamw")),
        "learning_rate": Field(None,
            "base value, see scaling; None = 0.05 with sgd, 0.005 with lars, 0.00025 with adamw",
            kind=float),
        "scaling": Field(None,
            "of the learning rate: linear (x batch / 256) | sqrt (x sqrt(batch)) | none; None = "
            "sqrt with lars, else linear",
            kind=str, one_of=("linear", "sqrt", "none")),
        "weight_decay": Field(None,
            "on all kernels; None = 0 with sgd and lars, 0.05 with adamw", kind=float),
        "warmup": Field(None,
            'linear: "5 epochs", "500 steps" or "5 %"; None = 0 with sgd and lars, 5 % with adamw',
            kind=str),
        "layer_decay": Field(1.0,
            "factor of the learning rate from each layer (block) to the one before it; 1 = off"),
        "drop_path": Field(None,
            "as vit.drop_path; None = 0 with sgd and lars, 0.1 with adamw", kind=float),
        "label_smoothing": Field(None,
            "share of the target spread over all classes; None = 0 with sgd and lars, 0.1 with "
            "adamw",
            kind=float),
        "mixup": Field(0.0, "alpha of its Beta distribution; 0 = off; DeiT has 0.8"),
        "cutmix": Field(0.0,
            "the same; with both, either is drawn for each batch; 0 = off; DeiT has 1"),
        "save": Field(True, "write the network and its classifier to <workdir>/finetuned/"),
        "name": Field("",
            "of that file; empty = fraction, seed and layer, e.g. 1pct_seed0_head1, with a number "
            "behind it if another fine-tuning has that name"),
    },
    "classify": {
        "network": Field("",
            "file of a fine-tuned or distilled network; empty = the only one in "
            "<workdir>/finetuned"),
    },
    "embed": {
        "split": Field("",
            "empty = the test split, or train where there is none; where nothing is labelled and "
            "the test split is a slice, all images"),
        "format": Field("npz",
            "one or more of npz,parquet,csv; csv = the features also in the table of the images"),
        "examples": Field(0, "limit on the number of images; 0 = all"),
        "report": Field(True, "also write report.html"),
        "points": Field(3000, "number of points in the map of the report"),
        "clusters": Field(0, "number of clusters in the report; 0 = chosen by the silhouette"),
        "query": Field("",
            "image files with commas between them; the report shows what is most like each"),
    },
    "suggest": {
        "number": Field(50, "images to label; the list begins with the most useful ones"),
        "by": Field("clusters",
            "clusters (spread over all images) | margin (over those of which a classifier trained "
            "on label.csv is least sure)"),
        "split": Field("", "empty = all images: train, or the split of which train is a slice"),
    },
    "label": {
        "csv": Field("",
            "table with the columns file,label, e.g. a filled-in label_these.csv; several with "
            "commas between"),
        "l2": Field(0.1, "L2 penalty of the classifier, on features of variance 1 / d"),
        "split": Field("", "as suggest.split"),
    },
    "export": {
        "format": Field("safetensors,npz,stablehlo", "one or more of safetensors,npz,stablehlo"),
        "dir": Field("", "empty = <workdir>/export"),
    },
}
# fmt: on
