"""Pictures are PNGs that show the right pixels in the right frames."""

import io

import numpy as np
import pytest
from PIL import Image

from common.run import pictures


def load(path):
    return np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB")).astype(int)


def area(picture, color, tolerance=3):
    """Pixels of one colour."""
    return int((np.abs(picture - np.array(color)).max(-1) <= tolerance).sum())


def rgb(text):
    return [int(text[i : i + 2], 16) for i in (1, 3, 5)]


def solid(color, *shape):
    return np.broadcast_to(np.array(color, np.uint8), (*shape, 3))


@pytest.mark.parametrize("size", [28, 224])
@pytest.mark.parametrize("with_originals", [False, True])
def test_pairs_show_each_view_once(tmp_path, size, with_originals):
    blue, yellow, pink = (20, 40, 200), (240, 230, 20), (250, 120, 180)
    images = np.stack([solid(blue, 5, size, size), solid(yellow, 5, size, size)], 1)
    originals = solid(pink, 5, size, 2 * size) if with_originals else None
    pictures.augmented_pairs(images, originals, tmp_path / "sub" / "pairs.png")
    picture = load(tmp_path / "sub" / "pairs.png")
    counts = [area(picture, c) for c in (blue, yellow, pink)]
    one = (0.95 * pictures._CELL * 110) ** 2  # pixels of one image at 110 dots an inch
    np.testing.assert_allclose(counts[:2], 5 * one, rtol=0.12)
    # The originals are twice as wide as high: half the area.
    np.testing.assert_allclose(counts[2], 2.5 * one if with_originals else 0, rtol=0.12)


@pytest.mark.parametrize("with_originals", [False, True])
def test_one_view_is_shown_once(tmp_path, with_originals):
    blue, pink = (20, 40, 200), (250, 120, 180)
    originals = solid(pink, 5, 28, 28) if with_originals else None
    pictures.augmented_pairs(solid(blue, 5, 1, 28, 28), originals, tmp_path / "views.png")
    picture = load(tmp_path / "views.png")
    one = (0.95 * pictures._CELL * 110) ** 2
    np.testing.assert_allclose(area(picture, blue), 5 * one, rtol=0.12)
    np.testing.assert_allclose(area(picture, pink), 5 * one * with_originals, rtol=0.12)


@pytest.mark.parametrize("size", [28, 224])
def test_frames_tell_the_class(tmp_path, size):
    grey = (128, 128, 128)
    queries, near = solid(grey, 2, size, size), solid(grey, 2, 3, size, size)
    names = ["T-shirt/top", "a class with a very long name"]

    def frames(query_labels, labels, class_names=names):
        pictures.nearest_neighbours(
            queries, near, query_labels, labels, class_names, tmp_path / "n.png"
        )
        picture = load(tmp_path / "n.png")[:-60]  # without the legend
        return area(picture, rgb(pictures.SAME), 12), area(picture, rgb(pictures.OTHER), 12)

    same, other = frames(np.array([0, 1]), np.array([[0, 0, 1], [1, 0, -1]]))
    one_frame = 4 * pictures._CELL * 110 * 2.2 / 72 * 110
    np.testing.assert_allclose(same, 3 * one_frame, rtol=0.3)
    np.testing.assert_allclose(other, 2 * one_frame, rtol=0.3)
    same, other = frames(np.array([0, -1]), np.array([[0, 0, 0], [1, 0, 0]]), None)
    np.testing.assert_allclose(same, 3 * one_frame, rtol=0.3)
    assert other == 0
    assert frames(None, None) == (0, 0)
    assert frames(np.array([-1, -1]), np.full((2, 3), -1)) == (0, 0)


def test_no_two_texts_overlap(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(pictures, "_save", lambda figure, path: figures.append(figure))
    names = ["WWWWWWWWWWWWWWWWWWWW"] * 2
    for k, size in ((1, 28), (6, 28), (3, 224)):
        image = np.zeros((3, size, size, 3), np.uint8)
        near = np.zeros((3, k, size, size, 3), np.uint8)
        labels = np.zeros((3, k), int)
        pictures.nearest_neighbours(image, near, labels[:, 0], labels, names, "")
        pictures.augmented_pairs(np.stack([image, image], 1), image, "")
        pictures.augmented_pairs(np.stack([image, image], 1), None, "", columns=1)
    for figure in figures:
        renderer = figure.canvas.get_renderer()
        figure.draw(renderer)
        texts = list(figure.texts)
        for axes in figure.axes:
            texts += [axes.title, axes.xaxis.label]
        for legend in figure.legends:
            texts += legend.get_texts()
        boxes = [t.get_window_extent(renderer) for t in texts if t.get_text()]
        images = [axes.get_window_extent(renderer) for axes in figure.axes]
        page = figure.bbox
        for i, box in enumerate(boxes):
            assert page.x0 <= box.x0 and box.x1 <= page.x1, texts[i]
            assert page.y0 <= box.y0 and box.y1 <= page.y1, texts[i]
            assert not any(box.overlaps(other) for other in boxes[i + 1 :] + images), texts[i]


def test_curves_plot_the_recorded_points(tmp_path, monkeypatch):
    records = [
        {"step": 0, "epoch": 0.0, "knn_top1": 0.3, "knn_top1_raw_pixels": 0.35},
        {"step": 5, "epoch": 0.5, "loss": 4.0},
        {"step": 10, "epoch": 1.0, "loss": None},  # a non-finite one
        {"step": 10, "epoch": 1.0, "loss": 3.0, "knn_top1": 0.5},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(pictures.jsonl.dump(r) + "\n" for r in records) + '{"step": 11, "lo')
    figures = []
    save = pictures._save
    monkeypatch.setattr(pictures, "_save", lambda f, p: (figures.append(f), save(f, p)))
    pictures.curves(path, tmp_path / "one.png")
    pictures.curves({"SimCLR": path, "MoCo": records}, tmp_path / "two.png")
    for figure, runs in zip(figures, (1, 2), strict=True):
        loss, accuracy = figure.axes
        assert [line.get_xydata().tolist() for line in loss.lines] == [[[0.5, 4], [1, 3]]] * runs
        assert [line.get_xydata().tolist() for line in accuracy.lines[:runs]] == (
            [[[0, 30], [1, 50]]] * runs
        )
        assert [set(line.get_ydata()) for line in accuracy.lines[runs:]] == [{35.0}]
        assert loss.get_xlabel() == "epoch"
    labels = [text.get_text() for text in figures[1].axes[1].get_legend().get_texts()]
    assert labels == ["SimCLR", "MoCo", "raw pixels"]
    assert load(tmp_path / "one.png").std() > 0


def test_values_of_raw_pixels_that_differ_are_told_apart(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(pictures, "_save", lambda figure, path: figures.append(figure))
    runs = {
        name: [{"step": 0, "knn_top1": 0.4, "knn_top1_raw_pixels": raw}, {"step": 1, "loss": 1.0}]
        for name, raw in {"k 200": 0.31, "k 10": 0.373}.items()
    }
    pictures.curves(runs, tmp_path / "c.png")
    labels = [text.get_text() for text in figures[0].axes[1].get_legend().get_texts()]
    assert labels == ["k 200", "k 10", "raw pixels (31.0 %)", "raw pixels (37.3 %)"]


def test_curves_of_a_run_without_epochs_or_evaluations(tmp_path):
    pictures.curves([{"step": 3, "loss": 1.0}], tmp_path / "c.png")
    found, both = load(tmp_path / "c.png"), io.BytesIO()
    pictures.curves([{"step": 3, "loss": 1.0, "knn_top1": 0.5}], both)
    assert found.std() > 0
    assert found.shape[1] < 0.6 * Image.open(both).width  # no empty axes
