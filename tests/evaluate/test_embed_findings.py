"""`--mode=embed`: which image, name and number is where in the page and in the tables."""

import base64
import io
import json
import re
import sys

import numpy as np
import pytest
from embed_page import (
    Page,
    make_run,
    pictures_on,
    rows_of,
    shown,
    write_page,
)
from PIL import Image

from common.data.sources.base import ArraySource
from common.evaluate import clusters, feature_files, spreadsheet, structure
from common.evaluate.page import build, feature_map, gallery

N, CLUSTERS = 30, 3
FORMULA = '=HYPERLINK("http://x","a,b")\n.png'


def a_set(seed=0):
    """30 images in three clusters, with a copy and one that is far from all: images, features."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (N, 8, 8, 3), np.uint8)
    sizes = [15, 9, 6]
    features = np.eye(6)[np.repeat(np.arange(3), sizes)] + rng.normal(0, 0.1, (N, 6))
    features[29] = -np.eye(6)[4] - 0.2
    images[17], features[17] = images[4], features[4] * 1.0001
    order = rng.permutation(N)
    return images[order], features[order].astype(np.float32), order


class Listed(ArraySource):
    """With names of files."""

    def names(self, ids):
        long = "IMG_{:04d}_of_the_long_series.png"
        return np.array([f"shoot/day one/{FORMULA if i == 3 else long.format(i)}" for i in ids])


def made(workdir, labelled, kind="pixels", queries=(), n=N):
    """`(page, images, features, findings, embedded, text)` of `a_set`."""
    make_run(workdir)
    images, features, _ = a_set()
    images, features = images[:n], features[:n]
    labels = np.arange(n, dtype=np.int32) % 2 if labelled else np.full(n, -1, np.int32)
    classes = ("=cat", "dog") if labelled else ()
    source = Listed(
        name="set", split="test", kind=kind, num_examples=n, num_classes=len(classes),
        class_names=classes, labels=labels, image_shape=(8, 8), images=images,
    )  # fmt: skip
    about = {"method": "simclr", "features": "trained", "layer": "backbone", "image_size": 8}
    ids = np.arange(n)
    embedded = feature_files.Embedded(features, labels, ids, source.names(ids), classes, about)
    none = np.zeros(0, np.int64), np.zeros((0, 2, 1, 1, 3), np.uint8)
    run = build.Run("an encoder", workdir, 8, none, ("x.csv", "duplicates.csv"))
    found = write_page(workdir / "report.html", run, source, embedded, 100, CLUSTERS, queries)
    text = (workdir / "report.html").read_text()
    return Page(text), images, features, found, embedded, text


def arrays(page, section):
    return np.array([np.asarray(picture) for picture in pictures_on(page, (section,))])


@pytest.mark.parametrize("labelled", [False, True])
def test_each_section_shows_the_images_it_names(labelled, tmp_path):
    page, images, features, found, embedded, text = made(tmp_path / "run", labelled)
    below = [str(name).removeprefix("shoot/day one/") for name in embedded.names]
    row_of = {name: i for i, name in enumerate(below)}
    for section in ("clusters", "duplicates", "odd"):
        rows = [row_of[name] for name, _ in shown(text, section)]
        np.testing.assert_array_equal(arrays(page, section), images[rows])
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosines = unit @ unit.T - 3 * np.eye(N)
    far = 1 - np.sort(cosines, axis=1)[:, -10]
    want = np.argsort(-far)[: gallery.ODD]
    assert [row_of[name] for name, _ in shown(text, "odd")] == want.tolist()
    assert [note for _, note in shown(text, "odd")] == [f"{far[i]:.3f}" for i in want]
    _, _, order = a_set()
    copies = sorted(np.flatnonzero(np.isin(order, [4, 17])).tolist())
    assert [row_of[name] for name, _ in shown(text, "duplicates")] == copies
    assert [note for _, note in shown(text, "duplicates")] == ["first", "0.0 %"]
    assert "1 group with 2 images" in " ".join(page.text.split())
    labels = found.structure.clusters.labels
    sizes = np.bincount(labels)
    headings = re.findall(r"<h3>Cluster (\d+) <small>(\d+) image", text)
    assert headings == [(str(i + 1), str(n)) for i, n in enumerate(sizes)]
    rows = np.array([row_of[name] for name, _ in shown(text, "clusters")])
    assert np.sort(rows).tolist() == list(range(N))  # all: there are few, of few clusters
    start = 0
    for cluster, size in enumerate(sizes):
        part, start = rows[start : start + size], start + size
        assert (labels[part] == cluster).all()
        distance = ((unit[part] - unit[labels == cluster].mean(0)) ** 2).sum(1)
        assert (np.diff(distance) > -1e-6).all() and part[0] == found.structure.clusters.centres[
            cluster
        ]


@pytest.mark.parametrize(("many", "lowest"), [(N + 1, 2), (N, 6)])
def test_the_page_says_from_which_numbers_of_clusters_one_was_chosen(
    many, lowest, tmp_path, monkeypatch
):
    monkeypatch.setattr(structure, "MANY", many)
    monkeypatch.setattr(sys.modules[__name__], "CLUSTERS", 0)
    monkeypatch.setattr(clusters, "_LEAST", 3)
    *_, text = made(tmp_path / "run", False)
    assert f"Of {lowest} to 30 clusters this number" in " ".join(text.split())


def test_the_map_of_unlabelled_images_has_the_colours_of_clusters(tmp_path):
    page, _, _, found, embedded, text = made(tmp_path / "run", False)
    data = json.loads(page.scripts[0])
    assert data["classes"] == [f"cluster {i + 1}" for i in range(CLUSTERS)]
    row_of = {str(n).removeprefix("shoot/day one/"): i for i, n in enumerate(embedded.names)}
    points = [a for t, a in page.elements if t == "circle"]
    rows = [row_of[name] for name in data["names"]]
    assert [int(p["data-label"]) for p in points] == found.structure.clusters.labels[rows].tolist()
    assert "--mode=suggest" in text and "--mode=label" in text
    assert "the same class" not in text
    assert "begin with <code>shoot/day one/</code>" in text
    pictures = [a for t, a in page.elements if t == "i" and "data-point" in a]
    assert [int(a["data-point"]) for a in pictures] == list(range(N))  # few: all have theirs
    for point, picture in zip(points, pictures, strict=True):
        assert f"left:{float(point['cx']) / 10:.2f}%" in picture["style"]
        assert f"border-color:{point['fill']}" in picture["style"]


def test_pictures_on_the_map_are_cut_out_of_the_atlas(tmp_path):
    """A browser puts position p % where p % of the sheet is at p % of the frame."""
    page, images, _, _, embedded, text = made(tmp_path / "run", True)
    (sheet,) = re.findall(r"url\(data:([^)]*)", text)
    sheet = Image.open(io.BytesIO(base64.b64decode(sheet.partition(",")[2])))
    names = json.loads(page.scripts[0])["names"]
    row_of = {str(n).removeprefix("shoot/day one/"): i for i, n in enumerate(embedded.names)}
    styles = [a["style"] for t, a in page.elements if t == "i" and "data-point" in a]
    for name, style in zip(names, styles, strict=True):
        size, position = (
            np.array(re.search(rf"{key}:([\d.]+)% ([\d.]+)%", style).groups(), float)
            for key in ("background-size", "background-position")
        )
        frame = np.array(sheet.size) / size * 100
        left, top = (np.array(sheet.size) - frame) * position / 100
        assert frame == pytest.approx([8, 8], abs=0.01)
        cut = sheet.crop([round(left), round(top), round(left) + 8, round(top) + 8])
        want = images[row_of[name]].astype(int)
        others = np.abs(images.astype(int) - np.asarray(cut).astype(int)).mean((1, 2, 3))
        assert np.abs(want - np.asarray(cut)).mean() == others.min()


def test_many_points_have_pictures_where_there_is_room():
    rng = np.random.default_rng(0)
    xy = np.concatenate([rng.uniform(0, 100, (400, 2)), [[900, 900], [500, 20]]])
    chosen = feature_map.pictured(xy, 40)
    assert {400, 401} <= set(chosen) and chosen[0] == 0 and 4 <= len(chosen) < 20
    gaps = np.abs(xy[chosen][:, None] - xy[chosen][None]).max(-1) + 99 * np.eye(len(chosen))
    assert gaps.min() >= 40
    # and a point without one is beneath another's
    assert np.abs(xy[:, None] - xy[chosen][None]).max(-1).min(1).max() < 40
    assert feature_map.pictured(xy[:300], 40) == list(range(300))


def test_tables_agree_with_the_features_and_start_no_formula(tmp_path):
    *_, features, found, embedded, _ = made(tmp_path / "run", True)
    places = {5: (1.5, 2.5)}
    path = tmp_path / "x.csv"
    groups = found.duplicates
    spreadsheet.write(
        path, *spreadsheet.images(embedded, found.structure, groups, places, features=True)
    )
    rows = rows_of(path)
    assert [int(row["id"]) for row in rows] == list(range(N))
    read = np.array([[float(row[f"f{i}"]) for i in range(6)] for row in rows])
    np.testing.assert_allclose(read, features, rtol=1e-5)
    assert rows[3]["file"] == f"shoot/day one/{FORMULA}"
    assert [row["class"] for row in rows[:2]] == ["'=cat", "dog"]
    structure = found.structure
    for i, row in enumerate(rows):
        assert row["label"] == str(i % 2)
        assert int(row["cluster"]) == structure.clusters.labels[i] + 1
        assert row["nearest"] == embedded.names[structure.neighbours[i, 0]]
        assert float(row["nearest_cosine"]) == pytest.approx(structure.cosines[i, 0], abs=1e-5)
        assert float(row["oddness"]) == pytest.approx(structure.oddness[i], rel=1e-4)
        assert (row["x"], row["y"]) == (("1.5", "2.5") if i == 5 else ("", ""))
        assert row["duplicate_group"] == ("1" if i in groups[0].rows else "")
    spreadsheet.write(path, *spreadsheet.duplicates(embedded, groups))
    first, second = rows_of(path)
    assert [int(first["id"]), int(second["id"])] == groups[0].rows.tolist()
    assert (first["compared_with"], second["compared_with"]) == ("", first["file"])
    assert float(second["cosine"]) == 1 and second["mirrored"] == "no"


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_a_cell_that_would_be_a_formula(start, tmp_path):
    assert spreadsheet.cell(f"{start}1") == f"'{start}1"
    assert spreadsheet.cell(f"a{start}1") == f"a{start}1"
    assert spreadsheet.content(f"'{start}1") == f"{start}1"
    assert spreadsheet.content(f"'a{start}1") == f"'a{start}1"
    spreadsheet.write(tmp_path / "x.csv", ["file"], [[f'{start}1, "a"\nb']])
    (row,) = rows_of(tmp_path / "x.csv")
    assert row["file"] == f'\'{start}1, "a"\nb'


def test_a_streamed_split_has_what_needs_no_images(tmp_path):
    page, *_, found, embedded, text = made(tmp_path / "run", False, kind="stream")
    assert found.duplicates is None and not pictures_on(page, ("clusters", "duplicates", "odd"))
    assert 'id="odd"' not in text and 'id="duplicates"' not in text
    assert len(list(spreadsheet.images(embedded, found.structure)[1])) == N


@pytest.mark.parametrize("n", [1, 2])
def test_one_image_and_two(n, tmp_path):
    page, *_, text = made(tmp_path / "run", False, n=n)
    assert len(pictures_on(page, ("neighbours",))) == (0 if n == 1 else 4)
    assert 'id="odd"' not in text
    assert ('id="duplicates"' in text) == (n == 2)
