"""What `--eval.NAME=VALUE` sets: everything that the modes of evaluation can be told."""

from ml_collections import ConfigDict

FEATURES = ("trained", "untrained", "pixels")


def default_config() -> ConfigDict:
    """Returns the locked defaults; durations and learning rates are explained by each mode."""
    c = ConfigDict()
    c.step = 0  # of the checkpoint; 0 = the newest
    c.features = "trained"  # trained | untrained (the same network before step 1) | pixels
    c.layer = "backbone"  # or head1 ..., projection: see `common/models/heads.py`
    c.seed = 0  # of whatever the mode draws: splits, orders, initial weights
    c.batch_size = 0  # of feature extraction; 0 = the run's
    # The data, where it is not the run's own:
    c.source = ""  # e.g. "folder:/path", "tfds:cifar100"; "" = the run's
    c.labels = ""  # auto | folders | none; "" = the run's, and auto with a source of its own
    c.data_dir = ""  # of TensorFlow data sets; "" = the run's
    c.train_split = ""  # "" = the run's, data.bank_split before data.train_split
    c.test_split = ""
    c.on_corrupt = ""  # error | replace; "" = the run's
    # Of images of more than 8 bits, "LOW:HIGH"; "" = the run's for its own data, and for another
    # source what a sample of it says
    c.value_range = ""
    # k = 0 is min(200, n / 10); knn.metric: cosine | euclidean
    c.knn = ConfigDict({"k": 0, "temperature": 0.1, "metric": "cosine", "center": False})
    c.linear = ConfigDict(
        {
            "variant": "auto",  # cached (features of un-augmented images) | augmented (crop and
            # flip, every image encoded anew) | auto: cached on CPUs and for pixels
            "optimizer": "sgd",  # sgd | lbfgs (cached only; settings in eval.logistic)
            "epochs": 90,
            "batch_size": 256,  # at most the training images
            "momentum": 0.9,
            # Base values, x batch / 256. The best pair on a held-out part of train is taken.
            "learning_rate": (0.1, 0.3, 1.0, 3.0, 10.0),
            "weight_decay": (0.0, 1e-6, 1e-5),
            "held_out": 0.1,  # share of each class of train to choose by
            "standardise": True,  # features of variance 1 / d; False: as they are
        }
    )
    # l2-regularised logistic regression: --mode=transfer, and --mode=linear_eval with lbfgs
    c.logistic = ConfigDict(
        {"num_values": 45, "low": 1e-6, "high": 1e5, "max_iterations": 1000, "held_out": 0.1}
    )
    # Data sets by commas, splits after an @: "embedded,tfds:cifar10,folder:PATH@train:val";
    # "" = one, the run's own
    c.transfer = ConfigDict({"sources": ""})
    c.finetune = ConfigDict(
        {
            "fraction": 0.01,  # of the labels, class balanced
            "epochs": 0,  # 0 = 60 up to 1 % of the labels, else 30 (Chen et al. 2020, B.5)
            "batch_size": 256,  # at most the training images
            "learning_rate": 0.05,  # x batch / 256
            "weight_decay": 0.0,
        }
    )
    # embed.split: "" = the test split, or train where there is none; format: npz | npz,parquet;
    # examples: at most so many, 0 = all; report: write report.html too, with so many map points
    c.embed = ConfigDict(
        {"split": "", "format": "npz", "examples": 0, "report": True, "points": 3000}
    )
    # dir "" is <workdir>/export
    c.export = ConfigDict({"format": "safetensors,npz,stablehlo", "dir": ""})
    return c.lock()
