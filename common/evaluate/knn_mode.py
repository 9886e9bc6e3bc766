"""`--mode=knn`: weighted kNN with a given k, temperature and metric."""

from typing import Any

from common.errors import one_of
from common.evaluate import accuracy, knn
from common.evaluate.pretrained import Pretrained


def run(opened: Pretrained) -> tuple[dict[str, Any], str]:
    """Scores the test split by votes of the train split; see `knn.knn_scores`."""
    c = opened.settings.knn
    one_of("eval.knn.metric", c.metric, knn.METRICS)
    train, test = opened.open_labelled("train"), opened.open_labelled("test")
    bank, labels, _ = opened.extract(train)
    queries, wanted, _ = opened.extract(test)
    metrics = knn.knn_scores(
        bank, labels, queries, wanted, train.num_classes,
        k=c.k or None, temperature=c.temperature, center=c.center, metric=c.metric,
        mesh=opened.mesh,
    )  # fmt: skip
    metrics |= {
        "protocol": "weighted kNN (Wu et al. 2018) on features of un-augmented images",
        "temperature": c.temperature,
        "metric": c.metric,
        "center": c.center,
    }
    s = opened.settings
    layer = f", layer {s.layer}" if s.layer != "backbone" and s.features != "pixels" else ""
    return metrics, (
        f"kNN (k = {metrics['k']}, T = {c.temperature:g}, {c.metric}, votes of "
        f"{metrics['num_train']:,} images) on {opened.subject}{layer}: "
        f"{accuracy.in_words(metrics, test)}."
    )
