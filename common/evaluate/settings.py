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
    c.data_dir = ""  # of TensorFlow data sets; "" = the run's
    c.train_split = ""  # "" = the run's, data.bank_split before data.train_split
    c.test_split = ""
    # k = 0 is min(200, n / 10); knn.metric: cosine | euclidean
    c.knn = ConfigDict({"k": 0, "temperature": 0.1, "metric": "cosine", "center": False})
    # dir "" is <workdir>/export
    c.export = ConfigDict({"format": "safetensors,npz,stablehlo", "dir": ""})
    return c.lock()
