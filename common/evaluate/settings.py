"""What `--eval.NAME=VALUE` sets: the settings of all modes of evaluation."""

from ml_collections import ConfigDict

FEATURES = ("trained", "untrained", "pixels")


def default_config() -> ConfigDict:
    """Returns the locked defaults; `common/fields.py` says what each field means."""
    c = ConfigDict()
    c.step = 0
    c.features = "trained"
    c.layer = "backbone"
    c.seed = 0
    c.batch_size = 0
    c.source = ""
    c.labels = ""
    c.data_dir = ""
    c.train_split = ""
    c.test_split = ""
    c.on_corrupt = ""
    c.value_range = ""
    c.knn = ConfigDict({"k": 0, "temperature": 0.1, "metric": "cosine", "center": False})
    c.linear = ConfigDict(
        {
            "variant": "auto",
            "optimizer": "sgd",
            "epochs": 90,
            "batch_size": 256,
            "momentum": 0.9,
            "learning_rate": (0.1, 0.3, 1.0, 3.0, 10.0),
            "weight_decay": (0.0, 1e-6, 1e-5),
            "held_out": 0.1,
            "standardise": True,
        }
    )
    c.logistic = ConfigDict(
        {"num_values": 45, "low": 1e-6, "high": 1e5, "max_iterations": 1000, "held_out": 0.1}
    )
    c.transfer = ConfigDict({"sources": ""})
    c.finetune = ConfigDict(
        {
            "fraction": 0.01,
            "epochs": 0,
            "batch_size": 256,
            "learning_rate": 0.05,
            "weight_decay": 0.0,
        }
    )
    c.embed = ConfigDict(
        {"split": "", "format": "npz", "examples": 0, "report": True, "points": 3000}
    )
    c.export = ConfigDict({"format": "safetensors,npz,stablehlo", "dir": ""})
    return c.lock()
