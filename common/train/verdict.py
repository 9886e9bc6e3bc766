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
BETTER = {
    "view_agreement": "more is better",
    "alignment_ratio": "less is better",
    "rankme": "more, of networks",  # pixels have thousands of directions to vary in
    "uniformity": "less is better",
    "alignment": "less; see the docs",  # an untrained network may have the least
}
LABEL_FREE = tuple(TITLES)
_SIDES = {"trained": "", "at_init": AT_INIT, "raw_pixels": RAW_PIXELS, "evaluation_before": BEFORE}
# All features in nearly one direction. Uniformity -0.01 is a mean distance of 0.07 on the unit
# sphere; an untrained network with batch norm has -0.1 on CIFAR-10.
_ONE_POINT = {"rankme": 1.5, "uniformity": -0.01}
_TRUSTED = {"view_agreement": 1, "alignment_ratio": -1}  # 1: more is better
_EASY = 0.5  # share of views that raw pixels recognise, above which the task is not one
# Rise of the view agreement between the last two evaluations: beyond the noise of 1,000 views.
_RISING = 0.03


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
        row = "".join(f"{value:>12}" for value in values)
        lines.append(f"  {title:16}{row}  {BETTER[name]}")
    return lines


def text(name: str, value: float | None) -> str:
    """A figure as it is printed; "-" where there is none."""
    if value is None:
        return "-"
    if name == "view_agreement":
        return f"{100 * value:.1f} %"
    return f"{value:.1f}" if name == "rankme" else f"{value:.3f}"


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
            "use. Train again with a lower learning rate; see docs/troubleshooting.md."
        ]
    if not all(name in side for name in _TRUSTED for side in (trained, init, raw)):
        return []
    return [
        _gain(trained, init, raw, summary.get("started_from")),
        *_rank(trained, init),
        *_trend(trained, figures.get("evaluation_before", {})),
    ]


def _gain(
    trained: Mapping[str, float], init: Mapping[str, float], raw: Mapping[str, float], given: Any
) -> str:
    """Whether it beats its start and raw pixels, by both of the figures to trust."""
    start = "its start" if given else "its untrained state"
    if raw["view_agreement"] > _EASY:
        return (
            f"Raw pixels recognise {text('view_agreement', raw['view_agreement'])} of the views: "
            "this augmentation asks for little, and figures by it say little of the encoder."
        )
    over_start, over_pixels = _ahead(trained, init), _ahead(trained, raw)
    if not over_start:
        return f"So it did NOT learn to recognise images that it has not seen: {start} is as good."
    if len(over_start) < len(_TRUSTED):
        return f"Only its {over_start[0]} is better than that of {start}: no verdict."
    if len(over_pixels) < len(_TRUSTED):
        behind = " and ".join(TITLES[n] for n in _TRUSTED if TITLES[n] not in over_pixels)
        return (
            f"It is ahead of {start}, but not of raw pixels in {behind}: too little to say that it "
            "learned."
        )
    return (
        f"So it learned to recognise views of images that it has not seen, better than {start} and "
        "raw pixels. Whether it also puts together what belongs together, no such figure can say: "
        "look at the neighbours."
    )


def _ahead(one: Mapping[str, float], other: Mapping[str, float]) -> list[str]:
    """The titles of the figures to trust in which one is better than the other."""
    return [TITLES[n] for n, sign in _TRUSTED.items() if sign * one[n] > sign * other[n]]


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
