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
            "backbone | head1, head2 ... | projection: features behind that layer of the head"),
        "seed": Field(0, "of everything that the mode draws: splits, orders, initial weights"),
        "batch_size": Field(0, "of feature extraction; 0 = the run's"),
        "source": Field("",
            "data other than the run's: folder:PATH, tfds:cifar100; empty = the run's"),
        "labels": Field("",
            "auto | folders | none; empty = the run's, and auto with another source"),
        "data_dir": Field("", "of TensorFlow Datasets; empty = the run's"),
        "train_split": Field("", "empty = the run's, data.bank_split before data.train_split"),
        "test_split": Field("", "empty = the run's"),
        "on_corrupt": Field("", "error | replace; empty = the run's"),
        "value_range": Field("",
            "LOW:HIGH of images of more than 8 bits; empty = the run's for its own data, else by "
            "a sample"),
    },
    "knn": {
        "k": Field(0, "neighbours that vote; 0 = min(200, n / 10)"),
        "temperature": Field(0.1, "a vote weighs exp(similarity / temperature)"),
        "metric": Field("cosine", "cosine | euclidean"),
        "center": Field(False, "subtract the mean of the training features first (cosine)"),
    },
    "linear": {
        "variant": Field("auto",
            "cached (features of un-augmented images) | augmented (crop and flip, every image "
            "encoded anew) | auto: cached on CPUs and for pixels"),
        "optimizer": Field("sgd", "sgd | lbfgs (cached only; settings in logistic)"),
        "epochs": Field(90, "passes over the training images"),
        "batch_size": Field(256, "at most the training images"),
        "momentum": Field(0.9, "of sgd"),
        "learning_rate": Field((0.1, 0.3, 1.0, 3.0, 10.0),
            "base values, x batch / 256; the best is chosen on a held-out part"),
        "weight_decay": Field((0.0, 1e-06, 1e-05), "of each of them; the best pair is taken"),
        "held_out": Field(0.1, "share of each class of train to choose by"),
        "standardise": Field(True, "scale features to variance 1 / d; False: as they are"),
    },
    "logistic": {
        "num_values": Field(45, "strengths of the L2 penalty that are tried (transfer, and lbfgs)"),
        "low": Field(1e-06, "smallest of them"),
        "high": Field(1e5, "largest of them"),
        "max_iterations": Field(1000, "of L-BFGS, for each"),
        "held_out": Field(0.1, "share of each class of train to choose by"),
    },
    "transfer": {
        "sources": Field("",
            "datasets by commas, splits after an @: embedded,tfds:cifar10,folder:PATH@train:val; "
            "empty = the run's own"),
    },
    "finetune": {
        "fraction": Field(0.01, "share of the labels, class balanced"),
        "epochs": Field(0, "0 = 60 up to 1 % of the labels, else 30 (Chen et al. 2020, B.5)"),
        "batch_size": Field(256, "at most the training images"),
        "learning_rate": Field(0.05, "base value, x batch / 256"),
        "weight_decay": Field(0.0, "on all kernels"),
    },
    "embed": {
        "split": Field("", "empty = the test split, or train where there is none"),
        "format": Field("npz", "npz | npz,parquet"),
        "examples": Field(0, "at most so many images; 0 = all"),
        "report": Field(True, "write report.html too"),
        "points": Field(3000, "of the map in the report"),
    },
    "export": {
        "format": Field("safetensors,npz,stablehlo", "some of safetensors,npz,stablehlo"),
        "dir": Field("", "empty = <workdir>/export"),
    },
}
# fmt: on
