"""`--mode=embed`: the contents of the files, and what may appear in the page."""

import base64
import hashlib
import io
import json
import os
import re
import sys

import jax
import numpy as np
import pytest
import tiny
from embed_page import (
    Page,
    eval_settings,
    make_run,
    pictures_on,
    reopened,
    write_images,
    write_page,
)
from jax.experimental import multihost_utils
from PIL import Image

from common import version
from common.cli import modes
from common.data.sources.base import ArraySource, Source
from common.errors import UserError
from common.evaluate import embed_mode, everything, feature_files, pretrained
from common.evaluate.page import build, feature_map, history, inline, names

HOSTILE = "<script>alert(1)<_script> & \"'"
CLASSES = ("a <b onclick='alert(2)'> & <!--", "plain")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Folder of two classes, embedded: `(workdir, record, Pretrained)`."""
    root = tmp_path_factory.mktemp("embed")
    for i, name in enumerate(CLASSES):
        write_images(root / "data" / "test" / name, [f"{n}{HOSTILE}.png" for n in "cab"], seed=i)
    make_run(root / "run", data__source=f"folder:{root}/data", data__dir=str(root))
    s = eval_settings(embed__format="npz,parquet", batch_size=8)
    opened = pretrained.load(root / "run", s, tiny.METHODS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "load", lambda *_: opened)  # one compilation for all tests
        record = modes.run("embed", str(root / "run"), s, tiny.METHODS)
    return root / "run", record, opened


def test_npz_holds_the_features_in_order(labelled):
    workdir, record, opened = labelled
    features, labels, ids = opened.extract(opened.open("test"))
    with np.load(workdir / "features-data-test-untrained.npz", allow_pickle=False) as found:
        np.testing.assert_array_equal(found["features"], features)
        np.testing.assert_array_equal(found["labels"], [0, 0, 0, 1, 1, 1])
        np.testing.assert_array_equal(found["labels"], labels)
        np.testing.assert_array_equal(found["ids"], ids)
        want = [f"test/{c}/{n}{HOSTILE}.png" for c in CLASSES for n in "abc"]
        assert found["names"].tolist() == want
        assert found["class_names"].tolist() == list(CLASSES)
        about = json.loads(str(found["about"]))
    assert features.dtype == np.float32 and ids.dtype == np.int64
    assert about["features"] == "untrained" and about["split"] == "test"
    assert (record["examples"], record["labelled"]) == (6, 6)
    assert len(np.unique(features.round(4), axis=0)) == 6  # six images, none mistaken for another


def test_parquet_holds_the_same(labelled):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(labelled[0] / "features-data-test-untrained.parquet")
    with np.load(labelled[0] / "features-data-test-untrained.npz") as want:
        np.testing.assert_array_equal(np.stack(table["features"].to_numpy()), want["features"])
        assert table["name"].to_pylist() == want["names"].tolist()
        assert table["id"].to_pylist() == want["ids"].tolist()
        assert table["label"].to_pylist() == want["labels"].tolist()
        classes = want["class_names"][want["labels"]]
        assert table["class_name"].to_pylist() == classes.tolist()


def test_page_escapes_and_is_self_contained(labelled):
    workdir, _, _ = labelled
    text = (workdir / "report.html").read_text()
    page = Page(text)
    data, script = page.scripts  # no third one out of a name
    found = json.loads(data)
    assert sorted(found["names"]) == sorted(f"{c}/{n}{HOSTILE}.png" for c in CLASSES for n in "abc")
    assert found["classes"] == list(CLASSES)
    assert CLASSES[0] in page.text  # shown as text
    assert "begin with test/" in " ".join(page.text.split())
    policy = next(a["content"] for t, a in page.elements if "http-equiv" in a)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert all(url.startswith("data:") for url in re.findall(r"url\(['\"]?([^)]{5})", text))
    assert "http://" not in text and "https://" not in text
    assert str(workdir.parent) not in text  # a page that is shared reveals no disk layout
    assert sum(tag == "circle" and "data-label" in a for tag, a in page.elements) == 6


def test_page_reports_the_numbers(labelled):
    html = (labelled[0] / "report.html").read_text()
    page = Page(html)
    text = " ".join(page.text.split())
    assert "6 images of the split test , 2 classes" in text.replace("test,", "test ,")
    assert "loss went from 3.00 to 1.00" in text
    cells = "<td>RankMe</td><td><b>60.5</b></td><td>4.2</td><td>187.0</td><td>more, of networks"
    assert cells in html and "<td>view agreement</td><td><b>12.5 %</b></td><td>-</td>" in html
    assert "damaged" not in text.partition("Near-duplicates")[0]
    assert "from 25.0 % to 30.0 % right; on raw pixels it reaches 50.0 %" in text
    assert "top1 12.50 %" in text and "folder:x" in text
    (curves,) = (a["src"] for t, a in page.elements if a.get("alt", "").startswith("Training loss"))
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(curves.partition(",")[2]))))
    assert drawn.shape[1] > 2 * drawn.shape[0] and drawn.std() > 0  # two axes side by side
    assert f"of jax-contrastive {version.in_words()} with jax {jax.__version__}." in text
    nested = [
        {"source": "folder:/home/me/photos", "top1": 0.5},
        {"source": "embedded", "top1": 1.0},
    ]
    shown = history._score("data_sets", nested)
    assert shown == "source folder:photos, top1 50.00 %; source embedded, top1 100.00 %"


@pytest.fixture(scope="module")
def rebuild(labelled):
    """Writes the page of the same features again: `rebuild(path, class_names, left_out)`."""
    opened = labelled[2]
    source = opened.open("test")
    features, labels, ids = opened.extract(source)
    names = source.names(ids)
    about = embed_mode._about(opened, source)

    def write(path, class_names=source.class_names, left_out=()):
        gone = np.array(left_out, str)
        embedded = feature_files.Embedded(features, labels, ids, names, class_names, about, gone)
        tables = ("features-data-test-untrained.csv", "duplicates.csv")
        write_page(path, embed_mode._page_run(opened, source, tables), source, embedded, 3000)
        return path.read_text()

    return write


def test_page_is_deterministic(labelled, rebuild, tmp_path):
    # results.jsonl has the line of the first time by now, and embeddings are not shown
    assert '"embed"' in (labelled[0] / "results.jsonl").read_text()
    assert rebuild(tmp_path / "again.html") == (labelled[0] / "report.html").read_text()


def test_a_class_name_cannot_end_the_script(rebuild, tmp_path):
    evil = "</script><script>alert(2)</script>"
    page = Page(rebuild(tmp_path / "evil.html", (evil, "plain")))
    assert len(page.scripts) == 2 and json.loads(page.scripts[0])["classes"] == [evil, "plain"]
    assert evil in page.text


def test_page_names_damaged_images(rebuild, tmp_path):
    page = Page(rebuild(tmp_path / "one.html", left_out=["a<b.png"]))
    assert "1 damaged image is left out: a<b.png." in page.text
    page = Page(rebuild(tmp_path / "many.html", left_out=[f"{i}.png" for i in range(22)]))
    assert "22 damaged images are left out: 0.png, 1.png" in page.text
    assert "19.png and 2 more." in page.text


def page_of(workdir, n, classes, size=8, kind="pixels"):
    """`(page, images, features)`: random ones, every second image with two views."""
    make_run(workdir)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, size, size, 3), np.uint8)
    labels = (np.arange(n) % classes).astype(np.int32)
    class_names = tuple(f"class {i}" for i in range(classes))
    source = ArraySource(
        name="random", split="test", kind="pixels", num_examples=n, num_classes=classes,
        class_names=class_names, labels=labels, image_shape=(size, size), images=images,
    )  # fmt: skip
    source.kind = kind
    about = {"method": "simclr", "features": "trained", "layer": "backbone", "image_size": size}
    features, names = rng.normal(size=(n, 6)).astype(np.float32), source.names(np.arange(n))
    embedded = feature_files.Embedded(features, labels, np.arange(n), names, class_names, about)
    ids = np.arange(1, n if kind == "pixels" else 0, 2)
    views = np.stack([images[ids] // 2, images[ids] // 3], axis=1)
    run = build.Run("an encoder", workdir, size, (ids, views))
    write_page(workdir / "report.html", run, source, embedded, 100)
    return Page((workdir / "report.html").read_text()), images, features


def test_page_shows_the_nearest_and_the_views_of_each_image(tmp_path):
    """12 images: 8 queries over the split, each with its 7 nearest by hand; then the pairs."""
    page, images, features = page_of(tmp_path / "run", 12, 3)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    queries = np.linspace(0, 11, 8).astype(int)
    rows = np.argsort(-unit[queries] @ unit.T, axis=1)[:, :8]
    np.testing.assert_array_equal(rows[:, 0], queries)
    found = np.stack([np.asarray(picture) for picture in pictures_on(page)])
    np.testing.assert_array_equal(found[:64], images[rows.reshape(-1)])
    pairs = np.stack([images[1::2], images[1::2] // 2, images[1::2] // 3], axis=1)
    pairs = pairs.reshape(-1, 8, 8, 3)
    np.testing.assert_array_equal(found[64:], pairs)
    framed = [
        a["class"] for t, a in page.elements if t == "td" and a.get("class") in ("same", "other")
    ]
    others = rows[:, 1:].reshape(-1)
    same = others % 3 == np.repeat(queries, 7) % 3
    assert framed == ["same" if x else "other" for x in same]
    points = [a for t, a in page.elements if t == "circle" and "data-label" in a]
    names = json.loads(page.scripts[0])["names"]
    assert len(set(names)) == 12 and names != sorted(names)
    for name, point in zip(names, points, strict=True):
        assert int(name.split("/")[-1]) % 3 == int(point["data-label"])


def test_page_of_large_images_shows_small_ones(tmp_path):
    """9 images of 300 px: 8 rows of a query and 7 neighbours, and 4 originals with two views."""
    found = pictures_on(page_of(tmp_path / "run", 9, 2, size=300)[0])
    assert [(p.format, p.size) for p in found] == [("JPEG", (224, 224))] * (8 * 8 + 4 * 3)
    (sheet,) = re.findall(r"url\(data:([^)]*)", (tmp_path / "run" / "report.html").read_text())
    sheet = Image.open(io.BytesIO(base64.b64decode(sheet.partition(",")[2])))
    assert sheet.size == (3 * 96, 3 * 96)


def test_page_of_many_classes_has_a_scale_and_no_legend(tmp_path):
    page, *_ = page_of(tmp_path / "run", 50, 25)
    assert "25 classes are too many for distinct colours" in page.text
    classes = [a.get("class") for _, a in page.elements]
    assert "scale" in classes and "legend" not in classes


@pytest.mark.parametrize(("n", "kind"), [(1, "pixels"), (12, "stream")])
def test_page_without_neighbours_to_show(n, kind, tmp_path):
    """One image has none, and the images of a streamed split cannot be read again."""
    page, *_ = page_of(tmp_path / "run", n, 2, kind=kind)
    assert not pictures_on(page)
    assert sum(tag == "circle" for tag, _ in page.elements) == n


def test_unlabelled_folder_of_odd_names(labelled, tmp_path):
    write_images(tmp_path / "photos", ["b.png", b"\xff.png", "a.png"])
    make_run(tmp_path / "run")
    s = eval_settings(source=f"folder:{tmp_path}/photos", embed__format="parquet", batch_size=8)
    record, sentence = embed_mode.run(reopened(labelled[2], tmp_path / "run", s))
    assert "3 images of photos (train) by the untrained encoder" in sentence
    assert (record["embedded_split"], record["labelled"]) == ("train", 0)
    with np.load(tmp_path / "run" / "features-photos-train-untrained.npz") as found:
        assert found["labels"].tolist() == [-1, -1, -1]
        assert [os.fsencode(n) for n in found["names"]] == [b"a.png", b"b.png", b"\xff.png"]
        assert found["class_names"].size == 0
    text = (tmp_path / "run" / "report.html").read_text()
    assert "without labels" in text and "one colour" in text and "--mode=suggest" in text
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(tmp_path / "run" / "features-photos-train-untrained.parquet")
    assert table["label"].to_pylist() == [None] * 3
    assert table["name"].to_pylist() == ["a.png", "b.png", "\\udcff.png"]


def test_a_damaged_file_gets_no_features_of_another(labelled, tmp_path, caplog):
    """The others keep their rows, labels and names; the damaged ones are listed everywhere."""
    names = [f"{i}.png" for i in range(7)]
    for k in (0, 1):
        write_images(tmp_path / "photos" / "test" / f"kind{k}", names, seed=k)
    make_run(tmp_path / "run")

    def embed(**changes):
        s = eval_settings(source=f"folder:{tmp_path}/photos", batch_size=8,
                          embed__format="npz,parquet", embed__report=False, **changes)  # fmt: skip
        opened = reopened(labelled[2], tmp_path / "run", s)
        metrics, sentence = embed_mode.run(opened)
        with np.load(tmp_path / "run" / "features-photos-test-untrained.npz") as found:
            return metrics, sentence, dict(found)

    _, sentence, whole = embed()
    assert "left out" not in sentence and whole["left_out"].size == 0
    bad = [2, 6, 11]
    for i in bad:
        (tmp_path / "photos" / whole["names"][i]).write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cannot decode .*kind0/2.png.* .--eval.on_corrupt of an"):
        embed()
    metrics, sentence, found = embed(on_corrupt="replace")
    gone = ["test/kind0/2.png", "test/kind0/6.png", "test/kind1/4.png"]
    assert sentence.endswith(f"; 3 damaged images left out: {', '.join(gone)}")
    assert (metrics["left_out"], metrics["examples"]) == (3, 11)
    assert "left out (3 of 14 images so far)" in caplog.text and "replaced" not in caplog.text
    assert found["left_out"].tolist() == gone
    for name in ("features", "labels", "ids", "names"):
        np.testing.assert_array_equal(found[name], np.delete(whole[name], bad, 0))
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(tmp_path / "run" / "features-photos-test-untrained.parquet")
    assert json.loads(table.schema.metadata[b"left_out"]) == gone
    assert table["name"].to_pylist() == found["names"].tolist()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"embed__format": "npz,xls"}, "'xls' is unknown, choose one or more of npz,parquet,csv"),
        ({"embed__points": 0}, "embed.points=0 and eval.embed.clusters=0: expected"),
        ({"embed__clusters": -1}, "embed.clusters=-1: expected"),
        ({"embed__query": "/no/such.jpg"}, "embed.query: there is no file /no/such.jpg; expected"),
        ({"embed__query": "/"}, "embed.query=/ is a folder; expected an image file"),
        ({"embed__query": __file__}, "embed.query: cannot decode .*test_embed.py .*not an image"),
        ({"embed__split": "tset"}, "no split 'tset'.*--eval.embed.split=NAME"),
        ({"test_split": "other"}, "no split 'other'.*--eval.embed.split=NAME"),
    ],
)
def test_mistakes(labelled, changes, message):
    wrong = reopened(labelled[2], labelled[0], eval_settings(**changes))
    with pytest.raises(UserError, match=message):
        embed_mode.run(wrong)


def test_parquet_without_pyarrow(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert feature_files.formats_of("npz") == ["npz"]
    with pytest.raises(UserError, match=r"needs pyarrow.*pip install pyarrow"):
        feature_files.formats_of("npz,parquet")


def test_a_process_learns_what_the_others_found_damaged(monkeypatch):
    source = Source("x", "test", "encoded", 5, 0, (), None, replaced={1: 2})
    assert everything.damaged(source, np.arange(5)).tolist() == [0, 1, 0, 0, 0]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    others = np.array([False, False, False, True, False])
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda mine: np.stack([others, mine]))
    assert everything.damaged(source, np.arange(5)).tolist() == [0, 1, 0, 1, 0]


def test_features_that_are_no_numbers():
    with pytest.raises(UserError, match="1 of 2 images are NaN"):
        everything.check_finite(np.array([[1.0, 2.0], [np.nan, 0.0]]))


def test_no_name_leaves_the_workdir():
    about = {"data": "../../etc", "split": "train[:10%]/..", "features": "pixels"}
    assert embed_mode._stem(about, eval_settings()) == ("features-______etc-train__10_____-pixels")
    assert feature_files.shortened("folder:/home/me/photos/") == "folder:photos"
    assert feature_files.shortened("folder:gs://bucket/photos") == "folder:photos"
    assert feature_files.shortened("gs://bucket/a/b") == "b"
    assert feature_files.shortened("tfds:cifar10") == "tfds:cifar10"


def test_names_on_the_page():
    shown = names.below(np.array(["/home/me/a/b.png", "/home/me/a/bc/d.png"]))
    assert shown == ("", ["b.png", "bc/d.png"])  # an absolute path is nobody's business
    assert names.below(np.array(["a/b/c.png", "a/b/cd/e.png"])) == ("a/b/", ["c.png", "cd/e.png"])
    assert names.below(np.array(["12", "13"])) == ("", ["12", "13"])
    assert names.middle("short.jpg") == "short.jpg"
    long = names.middle("IMG_20240131_120000_HDR_0001.jpg")
    assert long == "IMG_202…0_HDR_0001.jpg" and len(long) == 22


def test_map_keeps_groups_together():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 20)
    rows = np.eye(3, 16)[labels] + 0.05 * rng.normal(size=(60, 16))
    places = feature_map.project(rows, seed=0)
    distance = np.linalg.norm(places[:, None] - places[None], axis=-1) + 9 * np.eye(60)
    np.testing.assert_array_equal(labels[distance.argmin(1)], labels)
    assert places.min() >= 0 and places.max() <= 1
    np.testing.assert_array_equal(feature_map.project(rows, seed=0), places)


@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_map_of_few_or_equal_rows(n):
    assert np.isfinite(feature_map.project(np.eye(n, 4) + 1, 0)).all()
    np.testing.assert_array_equal(feature_map.project(np.ones((n, 4)), 0), 0.5)


def test_colours_and_legend():
    names = tuple(f"n{i}" for i in range(30))
    colours, legend = feature_map.colour(np.array([2, 0, -1, 2]), names)
    assert [(e.name, e.count) for e in legend] == [("n0", 1), ("n2", 2), ("no label", 1)]
    assert colours[0] == colours[3] and len(set(colours)) == 3
    few = np.array([2, 0, 2])  # of all the images, whose labels are these
    _, legend = feature_map.colour(few, names, np.array([2, 0, 2, 2, 0, 1, -1]))
    assert [(e.name, e.count) for e in legend] == [("n0", 2), ("n2", 3)]
    colours, legend = feature_map.colour(np.arange(30), names)
    assert len(legend) == 30 and len(set(colours)) == 30


def test_same_class_by_hand():
    labels = np.array([0, 0, 1, 1, -1])
    share, chance = feature_map.same_class(np.array([1, 0, 0, 2, 3]), labels)
    assert share == 3 / 4  # the third has the first as its neighbour
    assert chance == pytest.approx(1 / 3)  # of the three others, one is of the class
    assert feature_map.same_class(np.array([1, 0]), np.array([-1, 0])) is None


def test_atlas_holds_each_image_in_its_cell():
    rng = np.random.default_rng(0)
    images = np.broadcast_to(rng.integers(0, 256, (5, 1, 1, 3), dtype=np.uint8), (5, 20, 20, 3))
    uri, cells = inline.atlas(images)
    data = base64.b64decode(uri.partition(",")[2])
    sheet = np.asarray(Image.open(io.BytesIO(data))).astype(int)
    cell, columns = cells["cell"], cells["columns"]
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        corner = sheet[row * cell : row * cell + 20, column * cell : column * cell + 20]
        assert np.abs(corner - image).max() <= 6  # JPEG


def test_small_images_keep_their_pixels():
    image = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    data = base64.b64decode(inline.image_uri(image).partition(",")[2])
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), image)
