"""`--mode=knn`: weighted kNN with the k, temperature and metric of one's choice."""

from typing import Any

from common.evaluate import knn, modes
from common.evaluate.pretrained import Pretrained


def run(opened: Pretrained) -> tuple[dict[str, Any], str]:
    """Scores the test split by the votes of the train split; see `knn.knn_top1`."""
    train, test = opened.open_labelled("train"), opened.open_labelled("test")
    c = opened.settings.knn
    bank, labels, _ = opened.extract(train)
    queries, wanted, _ = opened.extract(test)
    k = c.k or knn.default_k(int((labels >= 0).sum()))
    top1 = knn.knn_top1(
        bank, labels, queries, wanted, train.num_classes,
        k=k, temperature=c.temperature, center=c.center,
    )  # fmt: skip
    metrics = {"top1": top1, "k": k, "temperature": c.temperature, "metric": c.metric}
    return metrics, (
        f"kNN (k = {k}, T = {c.temperature:g}) on {modes.subject(opened)}: {100 * top1:.2f} % of "
        f"{len(wanted):,} images of {test.name} ({test.split}) right."
    )
