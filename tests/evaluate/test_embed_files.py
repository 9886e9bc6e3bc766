"""`--mode=embed` of a folder without labels: search by an image, which files, which images."""

import re

import numpy as np
import pytest
import tiny
from embed_page import (
    Page,
    eval_settings,
    make_run,
    pictures_on,
    reopened,
    rows_of,
    shown,
    write_images,
)
from PIL import Image

from common.evaluate import embed_mode, pretrained, query


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run on an unlabelled folder of 12 images: `(workdir, Pretrained)`."""
    root = tmp_path_factory.mktemp("findings")
    write_images(root / "photos", [f"{i:02d}.png" for i in range(12)])
    changes = {"data__labels": "none", "data__test_split": ""}
    make_run(root / "run", data__source=f"folder:{root}/photos", **changes)
    return root, pretrained.load(root / "run", eval_settings(batch_size=8), tiny.METHODS)


def test_search_finds_the_image_itself_first(folder, tmp_path):
    root, opened = folder
    Image.open(root / "photos" / "07.png").save(tmp_path / "=mine, <b>.bmp")
    Image.open(root / "photos" / "02.png").convert("RGBA").save(tmp_path / "other.png")
    paths = f"{tmp_path}/=mine, <b>.bmp"
    s = eval_settings(batch_size=8, embed__query=paths)
    metrics, sentence = embed_mode.run(reopened(opened, root / "run", s))
    near = metrics["query"]["=mine, <b>.bmp"]
    assert next(iter(near)) == "07.png" and near["07.png"] == pytest.approx(1, abs=1e-4)
    assert len(near) == 12 and list(near.values()) == sorted(near.values(), reverse=True)
    assert "; most like =mine, <b>.bmp: 07.png (1.000), " in sentence
    text = (root / "run" / "report.html").read_text()
    assert "<h2>Most like =mine, &lt;b&gt;.bmp</h2>" in text and text.index(
        "Most like"
    ) < text.index("Map of the features")
    cards = shown(text, "search-1")
    assert cards[0][1] == "your image" and [name for name, _ in cards[1:]] == list(near)
    pictures = pictures_on(Page(text), ("search-1",))
    np.testing.assert_array_equal(pictures[0], np.asarray(Image.open(root / "photos" / "07.png")))
    found = query.read(f"{tmp_path}/other.png, {root}/photos/11.png", opened.open("train"))
    assert found.file_names == ["other.png", "11.png"]
    features, _, _ = opened.extract(opened.open("train"))
    searched = query.search(opened, found, features)
    assert [int(q.rows[0]) for q in searched] == [2, 11]
    assert query.read("", found) is None and query.search(opened, None, features) == []


def test_files_beside_the_npz(folder):
    root, opened = folder
    s = eval_settings(batch_size=8, embed__format="csv")
    metrics, _ = embed_mode.run(reopened(opened, root / "run", s))
    stem = "features-photos-train-untrained"
    assert metrics["files"] == [f"{stem}.npz", f"{stem}.csv", "duplicates.csv", "report.html"]
    assert all((root / "run" / name).exists() for name in metrics["files"])
    rows = rows_of(root / "run" / f"{stem}.csv")
    with np.load(root / "run" / f"{stem}.npz") as found:
        assert [row["file"] for row in rows] == found["names"].tolist()
        read = np.array(
            [[float(row[f"f{i}"]) for i in range(found["features"].shape[1])] for row in rows]
        )
        np.testing.assert_allclose(read, found["features"], rtol=1e-4, atol=1e-6)
    drawn = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', (root / "run" / "report.html").read_text())
    assert sorted((float(r["x"]), float(r["y"])) for r in rows) == sorted(
        (float(x), float(y)) for x, y in drawn
    )
    s = eval_settings(batch_size=8, embed__report=False)
    embed_mode.run(reopened(opened, root / "run", s))
    assert list(rows_of(root / "run" / f"{stem}.csv")[0]) == ["id", "file", "label", "class"]


@pytest.mark.parametrize(
    ("changes", "split", "n"),
    [
        ({}, "train", 12),
        ({"embed__split": "train[75%:]"}, "train[75%:]", 3),
        ({"test_split": "train[:25%]"}, "train[:25%]", 3),
    ],
)
def test_of_images_without_labels_a_held_out_part_is_shown_with_the_rest(folder, changes, split, n):
    root, opened = folder
    s = eval_settings(batch_size=8, embed__report=False, **changes)
    run = reopened(opened, root / "run", s)
    with run.config.unlocked():
        run.config.data.train_split = "train[:75%]"
        run.config.data.test_split = s.test_split or "train[75%:]"
    metrics, _ = embed_mode.run(run)
    assert (metrics["embedded_split"], metrics["examples"]) == (split, n)
