"""What a run without labels says of its figures: words that follow from them, and no more."""

import json

import pytest
import toy
from etils import epath

from common.evaluate.page import history
from common.train import summary, verdict

GOOD = {
    "trained": {"view_agreement": 0.8, "alignment_ratio": 0.2, "rankme": 60.0, "uniformity": -2.0,
                "alignment": 0.3},
    "at_init": {"view_agreement": 0.3, "alignment_ratio": 0.6, "rankme": 20.0, "uniformity": -0.1,
                "alignment": 0.03},
    "raw_pixels": {"view_agreement": 0.4, "alignment_ratio": 0.7, "rankme": 180.0,
                   "uniformity": -0.6, "alignment": 0.2},
    "evaluation_before": {"view_agreement": 0.795},
}  # fmt: skip
NONE = dict.fromkeys(["knn_top1", "knn_top1_at_init", "knn_top1_raw_pixels", "probe_top1"])


def said(figures, **fields):
    made = NONE | {"method": "moco", "steps": 800, "dataset": "photos (train)"} | fields
    return summary.in_words(made | {"label_free": figures}, epath.Path("/runs/mine"))


def changed(**sides):
    return {side: found | sides.get(side, {}) for side, found in GOOD.items()}


def test_a_run_without_labels_ends_with_its_figures_a_verdict_and_what_to_do():
    lines = said(GOOD)
    assert lines[2].startswith("No test images with labels, so no accuracy. Without labels, on")
    table = [line.split() for line in lines[3:8]]
    assert table[0] == ["trained", "untrained", "raw", "pixels"]
    more, less = (f"{word} is better".split() for word in ("more", "less"))
    assert table[1:] == [
        ["view", "agreement", "80.0", "%", "30.0", "%", "40.0", "%", *more],
        ["alignment", "ratio", "0.200", "0.600", "0.700", *less],
        ["RankMe", "60.0", "20.0", "180.0", "more,", "of", "networks"],
        ["uniformity", "-2.000", "-0.100", "-0.600", *less],
    ]
    assert lines[8] == (
        "So it learned to recognise views of images that it has not seen, better than its "
        "untrained state and raw pixels. Whether it also puts together what belongs together, no "
        "such figure can say: look at the neighbours."
    )
    assert lines[9] == "What can be looked at next:"
    assert "--mode=embed --workdir=/runs/mine" in lines[10] and "--mode=suggest" in lines[11]
    assert max(map(len, lines[3:8])) < 80


@pytest.mark.parametrize(
    ("trained", "word"),
    [
        ({"view_agreement": 0.35}, "ahead of its untrained state, but not of raw pixels in view a"),
        ({"alignment_ratio": 0.65}, "Only its view agreement is better than that of its untrained"),
        ({"view_agreement": 0.2}, "Only its alignment ratio is better than that of its untrained"),
        ({"view_agreement": 0.3, "alignment_ratio": 0.6}, "did NOT learn to recognise images that"),
        ({"rankme": 1.2}, "they have COLLAPSED"),
        ({"uniformity": -0.001}, "they have COLLAPSED"),
        ({"rankme": 15.0}, "RankMe fell from 20.0 to 15.0: the features vary in fewer directions"),
        ({"view_agreement": 0.85}, "View agreement still rose by 5.5 points to the last"),
    ],
)  # fmt: skip
def test_words_follow_from_the_figures(trained, word):
    text = "\n".join(said(changed(trained=trained)))
    assert word in text
    ok = not {"alignment_ratio"} & trained.keys() and trained.get("view_agreement", 0.8) > 0.4
    ok = ok and "COLLAPSED" not in text
    assert ("So it learned" in text) == ok
    assert ("RankMe fell" in text) == (trained.get("rankme") == 15.0)
    assert ("train longer" in text) == (trained.get("view_agreement") == 0.85)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"steps": 99}, "99 steps are too few to say whether it learns."),
        ({"dataset": "fake (train)"}, "The images are random"),
        ({"started_from": "runs/other"}, "not seen, better than its start and raw pixels"),
    ],
)
def test_no_verdict_where_there_is_none(fields, word):
    text = "\n".join(said(GOOD, **fields))
    assert word in text
    assert ("untrained" in text) == ("started_from" not in fields)  # in the head of the table
    assert ("So it learned" in text) == ("started_from" in fields)


def test_views_that_raw_pixels_recognise_say_nothing():
    figures = changed(raw_pixels={"view_agreement": 0.55})
    text = "\n".join(said(figures))
    assert "Raw pixels recognise 55.0 % of the views: this augmentation asks for little" in text
    assert "learn" not in text
    # resumed from a version that had no figures before training
    assert "learn" not in "\n".join(said({"trained": GOOD["trained"]}))


def test_a_run_with_labels_has_one_line_of_it():
    scores = {"knn_top1": 0.7, "knn_top1_at_init": 0.5, "knn_top1_raw_pixels": 0.4}
    line = (
        "Without labels: it recognises 80.0 % of held-out views (before: 30.0 %, raw pixels: 40.0"
    )
    assert [x.startswith(line) for x in said(GOOD, **scores)].count(True) == 1
    assert not any("Without labels" in x for x in said(None, **scores))


def scored(run, bank, test):
    """An evaluator without labels whose figures are the step."""

    class Scored:
        kept = ""

        def __call__(self, state, keep=False):
            self.kept = ", from features that were kept" * keep
            return {name: float(state.step) + 2 for name in verdict.LABEL_FREE}

        def raw_pixels(self):
            return {f"{name}_raw_pixels": 0.25 for name in verdict.LABEL_FREE}

        def draw_neighbours(self, state, path, when):
            path.write_text(f"{when} {int(state.step)}{self.kept}")
            return True

    return Scored()


def every(value):
    return dict.fromkeys(verdict.LABEL_FREE, value)


def test_figures_reach_log_summary_page_and_pictures_also_of_a_resumed_run(tmp_path):
    """Those of the start are of the start, and the evaluation before is the one before."""
    c = toy.config(
        evaluate__every="2 steps", checkpoint__every="3 steps", evaluate__pictures=True,
        data__augment_on="host",
    )  # fmt: skip
    toy.train_until(5, c, tmp_path, make_evaluator=scored)
    got = toy.train(c, tmp_path, make_evaluator=scored)
    assert got["label_free"] == {
        "trained": every(9.0), "at_init": every(2.0), "raw_pixels": every(0.25),
        "evaluation_before": every(8.0),
    }  # fmt: skip
    assert json.loads((tmp_path / "summary.json").read_text()) == got
    records = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = {r["step"]: r for r in records if "rankme" in r}
    assert [(s, r["rankme"]) for s, r in found.items()] == [(0, 2), (2, 4), (4, 6), (6, 8), (7, 9)]
    assert (found[0]["alignment_at_init"], found[0]["alignment_raw_pixels"]) == (2, 0.25)
    rows = history.label_free(epath.Path(tmp_path))
    assert rows[2] == {
        "name": "RankMe",
        "trained": "9.0",
        "at_init": "2.0",
        "raw_pixels": "0.2",
        "better": "more, of networks",
    }
    assert len(rows) == 5 and rows[0]["trained"] == "900.0 %"
    pictures = {p.name: p.read_text() for p in tmp_path.glob("nearest*.png")}
    assert pictures == {
        "nearest_neighbours.png": "after training 7",
        "nearest_neighbours_before.png": "before training 0, from features that were kept",
    }
