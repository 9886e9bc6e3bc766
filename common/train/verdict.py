"""What figures without labels say of a run, in words, and what they cannot say."""

from collections.abc import Mapping
from typing import Any

AT_INIT, RAW_PIXELS, BEFORE = "_at_init", "_raw_pixels", "_before"
# In the log and in summary.json: docs/evaluation.md says which to trust.
TITLES = {
    "view_agreement": "view agreement",
    "alignment_ratio": "alignment ratio",
    "rankme": "RankMe",
    "uniformity": "uniformity",
    "alignment": "alignment",
}
LABEL_FREE = tuple(TITLES)
_SIDES = {"trained": "", "at_init": AT_INIT, "raw_pixels": RAW_PIXELS, "evaluation_before": BEFORE}
# All features in nearly one direction. Uniformity -0.01 is a mean distance of 0.07 on the unit
# sphere; an untrained network with batch norm has -0.1 on CIFAR-10.
_ONE_POINT = {"rankme": 1.5, "uniformity": -0.01}
_RISING = 0.01  # of the view agreement between the last two evaluations


def earlier(results: Mapping[str, float]) -> dict[str, float]:
    """The figures of the last evaluation, under the names they get when another follows it."""
    return {f"{name}{BEFORE}": results[name] for name in LABEL_FREE if name in results}


def of_results(results: Mapping[str, float]) -> dict[str, dict[str, float]] | None:
    """The figures as `summary.json` has them: by encoder, then by name; None without any."""
    sides = {
        side: {name: results[name + end] for name in LABEL_FREE if name + end in results}
        for side, end in _SIDES.items()
    }
    return {side: found for side, found in sides.items() if found} or None


def table(figures: Mapping[str, Mapping[str, float]], given: bool) -> list[str]:
    """Lines of at most 79 characters: a figure each, of the trained encoder and what it must beat.

    Args:
        figures: `label_free` of a summary.
        given: the encoder did not start untrained, but with weights of another run.
    """
    sides = [side for side in ("trained", "at_init", "raw_pixels") if side in figures]
    heads = {"trained": "trained", "at_init": "start" if given else "untrained"}
    lines = [f"  {'':16}" + "".join(f"{heads.get(side, 'raw pixels'):>12}" for side in sides)]
    for name, title in TITLES.items():
        if name == "alignment":  # which the ratio puts in proportion
            continue
        values = (text(name, figures[side].get(name)) for side in sides)
        lines.append(f"  {title:16}" + "".join(f"{value:>12}" for value in values))
    return lines


def text(name: str, value: float | None) -> str:
    """A figure as it is printed; "-" where there is none."""
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if name == "view_agreement" else f"{value:.3g}"


def in_brief(summary: Mapping[str, Any]) -> list[str]:
    """The figure to watch, in a line, for a run that has a score too; absent in older summaries."""
    found = summary.get("label_free") or {}
    name = "view_agreement"
    trained, init, raw = (found.get(s, {}).get(name) for s in ("trained", "at_init", "raw_pixels"))
    if trained is None:
        return []
    beside = f" (before: {text(name, init)}, raw pixels: {text(name, raw)})"
    return [f"Without labels: it recognises {text(name, trained)} of held-out views{beside}."]


def words(summary: Mapping[str, Any], too_few: int) -> list[str]:
    """Whether a run without labels learned what it was trained for, by its figures.

    Args:
        summary: of a run, with figures.
        too_few: steps of a run that says nothing about learning.
    """
    figures, steps = summary["label_free"], summary["steps"]
    trained, init = figures.get("trained", {}), figures.get("at_init", {})
    raw = figures.get("raw_pixels", {})
    if summary.get("dataset", "").startswith("fake "):
        return ["The images are random: these figures only show that all of it runs."]
    if steps < too_few:
        return [f"{steps} steps are too few to say whether it learns."]
    if any(abs(trained.get(n, bound)) < abs(bound) for n, bound in _ONE_POINT.items()):
        return [
            "The features are nearly the same for every image: they have COLLAPSED, and are of no "
            "use. Train again with a lower learning rate; docs/recipes.md says what else to try."
        ]
    if not all("view_agreement" in side for side in (trained, init, raw)):
        return []
    return [_gain(trained, init, raw, summary.get("started_from")), *_rank(trained, init), *_trend(
        trained, figures.get("evaluation_before", {})
    )]  # fmt: skip


def _gain(
    trained: Mapping[str, float], init: Mapping[str, float], raw: Mapping[str, float], given: Any
) -> str:
    """Whether it beats its start and raw pixels."""
    new, old, pixels = (100 * side["view_agreement"] for side in (trained, init, raw))
    start = "start" if given else "untrained state"
    gain = f"{new - old:+.1f} points over its {start}, {new - pixels:+.1f} over raw pixels"
    if min(old, pixels) > 99.95 or (new > 99.95 and max(old, pixels) > 99.95):
        return "Every view was recognised before training: nothing here says whether it learned."
    if new > max(old, pixels):
        return (
            f"So it learned to recognise views of images that it has not seen ({gain}). Whether it "
            "also puts together what belongs together, no such figure can say: look at the "
            "neighbours."
        )
    if new > old:
        return f"It gained ({gain}), but does not beat raw pixels: too little to say it learned."
    return f"So it did NOT learn to recognise views of images that it has not seen ({gain})."


def _rank(trained: Mapping[str, float], init: Mapping[str, float]) -> list[str]:
    """A warning of features that have come to vary in fewer directions."""
    new, old = trained.get("rankme", 0.0), init.get("rankme", 0.0)
    if new >= old:
        return []
    return [
        f"RankMe fell from {old:.1f} to {new:.1f}: the features vary in fewer directions than "
        "before, which may be a partial collapse."
    ]


def _trend(trained: Mapping[str, float], before: Mapping[str, float]) -> list[str]:
    """Whether more training is worth a try."""
    rise = trained["view_agreement"] - before.get("view_agreement", trained["view_agreement"])
    if rise < _RISING:
        return []
    return [
        f"View agreement still rose by {100 * rise:.1f} points to the last evaluation: train "
        "longer (a new run with a larger duration)."
    ]
