"""`--mode=embed` of a folder without labels: search by an image, which files, which images."""

import re
import shutil

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

from common.cli import usage
from common.data.feed.pipeline import images_of
from common.errors import UserError
from common.evaluate import embed_mode, pretrained, query
from common.run import jsonl


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


def test_a_query_that_takes_a_package_to_read(folder, tmp_path, monkeypatch):
    (tmp_path / "photo.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    monkeypatch.setattr(query.decoding, "register_heif", lambda: False)
    with pytest.raises(UserError, match=r"such as a JPEG .for HEIC: pip install pillow-heif"):
        query.read(f"{tmp_path}/photo.HEIC", folder[1].open("train"))


def test_queries_with_one_name_are_told_apart(folder, tmp_path):
    root, opened = folder
    for sub, file in (("a", "03"), ("b/c", "05")):
        (tmp_path / sub).mkdir(parents=True)
        shutil.copy(root / "photos" / f"{file}.png", tmp_path / sub / "mine.png")
    shutil.copy(root / "photos" / "08.png", tmp_path / "other.png")
    paths = [f"{tmp_path}/{name}" for name in ("a/mine.png", "other.png", "b/c/mine.png")]
    s = eval_settings(batch_size=8, embed__query=",".join([*paths, paths[0]]))
    metrics, sentence = embed_mode.run(reopened(opened, root / "run", s))
    first = {name: next(iter(near)) for name, near in metrics["query"].items()}
    assert first == {"a/mine.png": "03.png", "other.png": "08.png", "b/c/mine.png": "05.png"}
    assert "; most like b/c/mine.png: 05.png (1.000), " in sentence
    text = (root / "run" / "report.html").read_text()
    assert "<h2>Most like a/mine.png</h2>" in text and str(tmp_path) not in text


def test_a_file_of_data_that_are_made_smaller_finds_itself(tmp_path):
    """As everything else of the query, its pixels are those that the data have after `shrink`."""
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(6):
        pixels = rng.integers(0, 256, (50, 60, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    changes = {"data__labels": "none", "data__test_split": "", "data__shrink": 9}
    make_run(tmp_path / "run", data__source=f"folder:{tmp_path}/photos", **changes)
    path = f"{tmp_path}/photos/4.png"
    s = eval_settings(batch_size=8, features="pixels", embed__query=path, embed__report=False)
    opened = pretrained.load(tmp_path / "run", s, tiny.METHODS)
    near = embed_mode.run(opened)[0]["query"]["4.png"]
    assert next(iter(near)) == "4.png" and near["4.png"] == 1
    source = opened.open("train")
    image, plain = (images_of(query.read(path, source, side), np.array([0]), 8) for side in (9, 0))
    np.testing.assert_array_equal(image, images_of(source, np.array([4]), 8))
    assert (image != plain).any()


def test_one_line_says_which_images_are_taken(folder, capsys):
    root, opened = folder
    run = reopened(opened, root / "run", eval_settings(batch_size=8, embed__report=False))
    with run.config.unlocked():
        run.config.data.train_split, run.config.data.test_split = "train[:75%]", "train[75%:]"
    embed_mode.run(run)
    assert capsys.readouterr().err.count("photos (train") == 1


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


def test_no_question_takes_the_files_of_another(folder, tmp_path):
    root, opened = folder
    for changes, end in (
        ({"embed__examples": 5}, "-5images"),
        ({"step": 0, "image_size": 12}, "-12px"),
    ):
        s = eval_settings(batch_size=8, embed__report=False, **changes)
        run = reopened(opened, root / "run", s)
        metrics, _ = embed_mode.run(run)
        assert metrics["files"][0] == f"features-photos-train-untrained{end}.npz"
    about = {"data": "photos", "split": "train", "features": "trained"}
    assert embed_mode._stem(about, eval_settings(step=7)) == "features-photos-train-step7"


def test_a_table_into_which_somebody_has_typed_is_kept(folder, tmp_path, capsys):
    root, opened = folder

    def embed():
        run = reopened(opened, tmp_path, eval_settings(batch_size=8))
        metrics, _ = embed_mode.run(run)
        jsonl.append(tmp_path / jsonl.RESULTS, metrics)
        return [name for name in metrics["files"] if name.endswith(".csv")]

    shutil.copy(root / "run" / "config.json", tmp_path)
    stem = "features-photos-train-untrained"
    assert embed() == embed() == [f"{stem}.csv", "duplicates.csv"]
    typed = (tmp_path / f"{stem}.csv").read_text().replace("01.png,,", "01.png,rose,")
    (tmp_path / f"{stem}.csv").write_text(typed)
    (tmp_path / "duplicates.csv").write_text("mine")
    capsys.readouterr()
    assert embed() == embed() == [f"{stem}_2.csv", "duplicates_2.csv"]
    assert "rose" in typed and (tmp_path / f"{stem}.csv").read_text() == typed
    assert (tmp_path / "duplicates.csv").read_text() == "mine"
    assert f"{stem}.csv was changed and stays as it is; {stem}_2.csv is new" in (
        capsys.readouterr().err.replace("\n", " ")
    )
    assert f"<code>{stem}_2.csv</code>" in (tmp_path / "report.html").read_text()


def test_of_other_data_with_labels_nothing_is_held_out(folder, tmp_path):
    root, _ = folder
    for kind in ("one", "two"):
        write_images(tmp_path / "other" / kind, [f"{i}.png" for i in range(60)])
    c = {"data__labels": "none", "data__train_split": "auto", "data__test_split": "auto"}
    make_run(tmp_path / "run", data__source=f"folder:{root}/photos", **c)
    s = eval_settings(
        batch_size=32, features="pixels", source=f"folder:{tmp_path}/other", embed__report=False
    )
    metrics, _ = embed_mode.run(pretrained.load(tmp_path / "run", s, tiny.METHODS))
    assert (metrics["examples"], metrics["labelled"], metrics["embedded_split"]) == (
        120,
        120,
        "train",
    )


def test_features_of_another_folder_of_the_same_name_are_kept(folder, tmp_path, monkeypatch):
    _root, opened = folder
    for place in ("one", "two"):
        write_images(tmp_path / place / "photos", [f"{place}{i}.png" for i in range(4)])

    def embed(source):
        s = eval_settings(batch_size=8, embed__report=False)
        run = reopened(opened, tmp_path / "run", s)
        with run.config.unlocked():
            run.config.data.source = f"folder:{source}"
        metrics, _ = embed_mode.run(run)
        jsonl.append(run.workdir / jsonl.RESULTS, metrics)
        with np.load(run.workdir / metrics["files"][0]) as found:
            return found["names"][0]

    (tmp_path / "run").mkdir()
    assert embed(tmp_path / "one" / "photos") == "one0.png"
    monkeypatch.chdir(tmp_path)
    assert embed("one/photos") == "one0.png"  # the same folder
    refused = r"folder:one/photos, and .*two/photos has the same name: move"
    with pytest.raises(UserError, match=refused):
        embed(tmp_path / "two" / "photos")
    shutil.copytree(tmp_path / "one" / "photos", tmp_path / "moved" / "photos")
    assert embed(tmp_path / "moved" / "photos") == "one0.png"  # images of the same names
    (tmp_path / "run" / "features-photos-train-untrained.npz").rename(tmp_path / "kept.npz")
    assert embed(tmp_path / "two" / "photos") == "two0.png"


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


def test_the_help_says_that_all_images_are_taken_where_nothing_is_labelled():
    meanings = {name: meaning for name, _, meaning in usage.of_eval()}
    assert (
        "where nothing is labelled and the test split is a slice, all images"
        in (meanings["embed.split"])
    )
