"""`--mode=suggest` and `--mode=label`, from a folder of photographs to a table of labels."""

import csv
import json
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import opened_run
import pytest
import tiny
from PIL import Image
from test_embed import Page, write_images

from common.cli import modes
from common.data.sources import shard_writer
from common.errors import UserError
from common.evaluate import (
    embed_mode,
    everything,
    few_labels,
    label_file,
    label_mode,
    spreadsheet,
)
from common.evaluate.page import label_page

COLOURS = {"red": (220, 30, 40), "green": (30, 200, 60), "blue": (20, 60, 230)}


def paint(path, colour, rng):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = rng.integers(-20, 21, (8, 8, 3))
    Image.fromarray(np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`(workdir, {name: colour})` of an unlabelled run that trained on nine tenths of a folder."""
    root, rng, truth = tmp_path_factory.mktemp("label"), np.random.default_rng(0), {}
    order = rng.permutation(np.repeat(list(COLOURS), (20, 12, 8)))
    for i, colour in enumerate(order):
        name = f"{'aü'[i % 2]}/photo {i:02d}.png"
        truth[name] = str(colour)
        paint(root / "photos" / name, colour, rng)
    workdir = opened_run.write(
        root / "run", data__source=f"folder:{root}/photos", data__labels="none",
        data__train_split="train[:90%]", data__test_split="train[90%:]",
    )  # fmt: skip
    return workdir, dict(sorted(truth.items()))


@pytest.fixture
def go(run, monkeypatch):
    """Runs a mode and returns its record; raw pixels tell the colours apart and compile nothing."""
    for old in run[0].glob("label*"):
        old.unlink()
    monkeypatch.setattr(few_labels, "_REPEATS", 2)  # for speed

    def go(mode, workdir=run[0], **changes):
        c = opened_run.config(**({"features": "pixels", "suggest__number": 6} | changes))
        return modes.run(mode, str(workdir), c, tiny.METHODS)

    return go


def table(path, separator=","):
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file, delimiter=separator))


def fill(path, labels, target=None):
    """Types labels into a table, as a spreadsheet saves it."""
    rows = table(path)
    with open(target or path, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=";")
        writer.writeheader()
        writer.writerows(row | {"label": labels[row["file"]]} for row in rows)


def test_from_a_suggestion_to_labels_of_all_images(run, go, capsys):
    workdir, truth = run
    record = go("suggest")
    assert record["files"] == ["label_these.csv", "label_these.html"]
    assert (record["suggested"], record["images"], record["train_split"]) == (6, 40, "train")
    suggested = table(workdir / "label_these.csv")
    assert list(suggested[0]) == ["file", "label", "cluster_size"]
    assert {row["label"] for row in suggested} == {""}
    sizes = [int(row["cluster_size"]) for row in suggested]
    assert sizes == sorted(sizes, reverse=True) and sum(sizes) == 40
    assert {truth[row["file"]] for row in suggested} == set(COLOURS)
    out = capsys.readouterr().out
    assert "6 of 40 images of photos (train) to label first, by raw pixels: type the labels" in out

    fill(workdir / "label_these.csv", truth)
    before = (workdir / "label_these.csv").read_bytes()
    record = go("label", label__csv=str(workdir / "label_these.csv"))
    assert (workdir / "label_these.csv").read_bytes() == before
    out = capsys.readouterr().out
    assert "40 images of photos (train) labelled by raw pixels from 6 labels of 3 classes" in out
    assert "standard error, for" in out and "Least sure of: " in out
    labels = table(workdir / "labels_pixels.csv")
    assert list(labels[0]) == [
        "file", "label", "given", "probability", "second", "second_probability", "knn"
    ]  # fmt: skip
    assert [row["file"] for row in labels] == list(truth)  # in order, held-out ones among them
    assert {row["file"]: row["label"] for row in labels} == truth
    given = {row["file"] for row in labels if row["given"] == "yes"}
    assert given == {row["file"] for row in suggested}
    for row in labels:
        if row["probability"]:
            assert 0 <= float(row["second_probability"]) <= float(row["probability"]) <= 1
            assert row["second"] != row["label"]
    assert record["predicted"] == {
        colour: list(truth.values()).count(colour) - sum(truth[name] == colour for name in given)
        for colour in sorted(COLOURS)
    }
    line = json.loads((workdir / "results.jsonl").read_text().splitlines()[-1])
    assert line["mode"] == "label" and line["given"] == 6 and line["folders_top1"] is None


def test_every_row_has_what_its_own_features_say(run, go):
    """Against the classifiers called by hand on features in the order of the files."""
    workdir, truth = run
    names = list(truth)[::4]
    target = workdir / "labels_of_mine.csv"
    target.write_text("".join(f"{n},{truth[n]}\n" for n in reversed(names)))
    record = go("label", label__csv=str(target), seed=3)
    opened = opened_run.load(workdir, features="pixels", seed=3)
    images = everything.features_of(opened, everything.open_all(opened))
    assert images.names.tolist() == list(truth)
    rows, classes = np.arange(0, 40, 4), sorted(COLOURS)
    y = np.array([classes.index(truth[n]) for n in names])
    trainer = few_labels.Trainer.of(images.features, 3, opened.settings)
    estimate = few_labels.cross_validate(trainer, rows, y, 3)
    assert record["cv_accuracy"] == estimate.accuracy and record["cv_images"] == estimate.scored
    rest = np.setdiff1d(np.arange(40), rows)
    p = trainer.predict(rows, y, rest).probabilities
    labels = table(workdir / "labels_pixels.csv")
    for i, row in zip(rest, p, strict=True):
        ranked = np.argsort(-row)
        assert labels[i]["label"] == classes[ranked[0]] and labels[i]["given"] == "no"
        assert labels[i]["second"] == classes[ranked[1]]
        assert float(labels[i]["probability"]) == pytest.approx(row.max(), abs=6e-4)
    for i, label, row in zip(rows, y, estimate.predictions.probabilities, strict=True):
        assert labels[i]["given"] == "yes" and labels[i]["label"] == classes[label]
        assert float(labels[i]["probability"]) == pytest.approx(row[label], abs=6e-4)


def test_a_table_with_labels_is_never_replaced(run, go, capsys):
    workdir, truth = run
    first = workdir / "label_these.csv"
    go("suggest")
    go("suggest", suggest__number=4)  # nobody has typed into it
    assert len(table(first)) == 4
    elsewhere = first.read_bytes().replace(b",,", b",,ant ")  # in the wrong column
    first.write_bytes(elsewhere)
    go("suggest", suggest__number=4)
    assert first.read_bytes() == elsewhere
    (workdir / "label_these_2.csv").replace(first)
    fill(first, truth)
    typed = first.read_bytes()
    assert go("suggest")["files"] == ["label_these_2.csv", "label_these_2.html"]
    assert "label_these.csv was changed and stays as it is" in capsys.readouterr().err
    record = go("suggest", label__csv=str(first))
    assert record["given"] == 4 and first.read_bytes() == typed
    again = {row["file"] for row in table(workdir / "label_these_2.csv")}
    assert len(again) == 6 and not again & {row["file"] for row in table(first, ";")}
    (workdir / "label_these_2.csv").write_bytes(b"PK\x03\x04 a workbook under this name")
    assert go("suggest")["files"][0] == "label_these_3.csv"
    both = f"{first},{workdir / 'label_these_3.csv'}"
    fill(workdir / "label_these_3.csv", truth)
    assert go("label", label__csv=both)["given"] >= 6


def test_labels_that_were_corrected_by_hand_are_kept(run, go, capsys):
    workdir, truth = run
    names, target = list(truth), workdir / "labels_typed.csv"
    target.write_text("".join(f"{n},{truth[n]}\n" for n in names[:12]))
    go("label", label__csv=str(target))
    target.write_text("".join(f"{n},{truth[n]}\n" for n in names[:15]))
    assert go("label", label__csv=str(target))["files"] == [
        "labels_pixels.csv"
    ]  # knows all of its labels
    text = (workdir / "labels_pixels.csv").read_text("utf-8-sig")
    line = next(x for x in text.splitlines() if x.startswith(names[20]))
    corrected = text.replace(line, f"{names[20]},violet,yes")
    (workdir / "labels_pixels.csv").write_text(corrected)
    assert go("label", label__csv=str(target))["files"] == ["labels_pixels_2.csv"]
    assert (workdir / "labels_pixels.csv").read_text() == corrected
    told = capsys.readouterr().err
    assert (
        "labels_pixels.csv was changed, or has labels that" in told
        and "labels_pixels_2.csv is new" in told
    )
    # its own table counts what was given in it, and nothing that was predicted
    record = go("label", label__csv=str(workdir / "labels_pixels.csv"))
    assert (record["given"], record["classes"], record["files"]) == (16, 4, ["labels_pixels_2.csv"])


@pytest.mark.parametrize(
    ("typed", "covered"),
    [
        ("a/1.jpg,cat\n", False),  # another image has the same name
        ("a/1.jpg,cat\n2.jpg,dog\n", False),
        ("a/1.jpg,cat\nb/1.jpg,dog\n", True),  # a mistake put right
        ("B/1.JPG,cat\n./a/1.jpg,cat\n2.jpg,dog\n", True),
    ],
    ids=["one", "others", "another label", "both"],
)
def test_labels_of_files_with_one_name_are_told_apart(tmp_path, typed, covered):
    names = ["a/1.jpg", "a/2.jpg", "b/1.jpg"]
    old, table = tmp_path / "labels_pixels.csv", tmp_path / "typed.csv"
    old.write_text("file,label,given\na/1.jpg,cat,yes\nb/1.jpg,cat,yes\na/2.jpg,dog,no\n")
    table.write_text(typed)
    rows = label_file.read(table, "")
    assert label_mode._covered(old, rows, names) is covered
    assert not label_mode._covered(old, rows, names[:2])  # has a label of an image that is gone


def test_names_and_labels_that_are_formulas(go, tmp_path):
    rng = np.random.default_rng(3)
    truth = {f"{'=+ '[i % 3]}{i:02d}.png": list(COLOURS)[i % 3] for i in range(12)}
    labels = {"red": "+", "green": "-", "blue": "=B1"}
    for name, colour in truth.items():
        paint(tmp_path / "photos" / name, colour, rng)
    workdir = opened_run.write(
        tmp_path / "run", data__source=f"folder:{tmp_path}/photos", data__test_split=""
    )
    go("suggest", workdir)
    written = [row["file"] for row in table(workdir / "label_these.csv")]
    assert {name[0] for name in written} == {"'", " "}
    typed = {spreadsheet.cell(name): labels[colour] for name, colour in truth.items()}
    fill(workdir / "label_these.csv", typed)
    assert go("label", workdir, label__csv=str(workdir / "label_these.csv"))["given"] == 6
    found = table(workdir / "labels_pixels.csv")
    assert {row["file"]: row["label"] for row in found} == {
        name: f"'{label}" for name, label in typed.items()
    }
    record = go("label", workdir, label__csv=str(workdir / "labels_pixels.csv"))
    assert (record["given"], record["files"]) == (6, ["labels_pixels.csv"])
    assert list(record["predicted"]) == ["+", "-", "=B1"]


def test_labels_by_other_features_have_a_file_of_their_own():
    names = {features: label_mode._name(features) for features in ("trained", "untrained")}
    assert names == {"trained": "labels.csv", "untrained": "labels_untrained.csv"}


@pytest.mark.skipif(not shutil.which("node"), reason="runs the page's script")
def test_the_page_keeps_what_was_typed():
    """With the little of a browser that it takes: what is typed into one page is in the next."""
    script = pathlib.Path(label_page.__file__).with_name("label_page.js").read_text()
    browser = """
      const kept = {}, nothing = () => {};
      globalThis.localStorage = { getItem: (k) => kept[k] ?? null, setItem(k, v) { kept[k] = v; } };
      globalThis.location = { pathname: "/runs/mine/label_these.html" };
      globalThis.window = { addEventListener: nothing };
      class Element {
        heard = {}; dataset = {}; value = ""; classList = { add: nothing };
        addEventListener(name, act) { this.heard[name] = act; }
      }
      const input = (name) => Object.assign(new Element(), { dataset: { name, size: "1" } });
      function page(names) {
        const inputs = names.map(input), options = [], count = {};
        globalThis.document = {
          querySelectorAll: () => inputs, createElement: () => ({}),
          getElementById: () => ({ options, append: (option) => options.push(option) }),
          querySelector: (wanted) => wanted === ".bar span" ? count : new Element(),
          documentElement: new Element(),
        };
        new Function(SCRIPT)();
        return [inputs, options, count];
      }
      const [one] = page(["a.jpg", "b.jpg", "__proto__"]);
      one[1].value = " rose ";
      one[1].heard.input();
      const [two, options, count] = page(["b.jpg", "c.jpg", "toString"]);
      console.log(JSON.stringify([two.map((x) => x.value), options, count.textContent]));
    """.replace("SCRIPT", json.dumps(script))
    out = subprocess.run(["node", "-e", browser], check=True, capture_output=True, text=True).stdout
    assert json.loads(out) == [[" rose ", "", ""], [{"value": "rose"}], "1 of 3 labelled"]


@pytest.mark.skipif(not shutil.which("node"), reason="runs the page's script")
def test_the_page_saves_the_table_that_the_mode_writes():
    script = pathlib.Path(label_page.__file__).with_name("label_page.js").read_text()
    (code,) = re.findall(r"^  const plain = .*?^  const cell = .*?$", script, re.M | re.S)
    texts = ["=x.jpg", "+", "-1", "@a", "\ta", 'a,"b"', "=a,b", "a=b", " c.jpg", "'t", "ü"]
    call = f"{code}; console.log(JSON.stringify({json.dumps(texts)}.map(cell)))"
    out = subprocess.run(["node", "-e", call], check=True, capture_output=True, text=True).stdout
    read = [row[0] for row in csv.reader(json.loads(out))]
    assert read == [spreadsheet.cell(text) for text in texts]


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text elsewhere")
def test_the_name_of_the_folder_is_not_utf_8(go, tmp_path, capsys):
    write_images(tmp_path / "photos\udcff", ["a.png", "b.png", "c.png"])
    workdir = opened_run.write(
        tmp_path / "run", data__source=f"folder:{tmp_path}/photos\udcff", data__test_split=""
    )
    assert go("suggest", workdir)["suggested"] == 3
    assert "photos\\udcff" in (workdir / "label_these.html").read_text()
    assert "3 of 3 images of photos\\udcff (train) to label" in capsys.readouterr().out
    (tmp_path / "typed.csv").write_text("a.png,x\nb.png,y\n")
    assert go("label", workdir, label__csv=str(tmp_path / "typed.csv"))["images"] == 3


def test_labels_of_all_images_are_checked(run, go, capsys):
    """A mistyped one has a low probability, by classifiers that did not see it."""
    workdir, truth = run
    wrong = dict(truth)
    name = list(truth)[7]
    wrong[name] = next(colour for colour in COLOURS if colour != truth[name])
    target = workdir / "labels_typed.csv"
    target.write_text("".join(f"{n},{label}\n" for n, label in wrong.items()))
    record = go("label", label__csv=str(target))
    assert record["predicted"] == dict.fromkeys(sorted(COLOURS), 0) and record["given"] == 40
    assert "Predicted" not in capsys.readouterr().out
    rows = {row["file"]: float(row["probability"]) for row in table(workdir / "labels_pixels.csv")}
    assert min(rows, key=rows.get) == name
    assert record["cv_accuracy"] == pytest.approx(39 / 40)


def test_many_classes_are_counted_in_short(run, go, capsys):
    workdir, truth = run
    target = workdir / "labels_typed.csv"
    target.write_text("".join(f"{n},{i // 2}\n" for i, n in enumerate(list(truth)[:30])))
    assert len(go("label", label__csv=str(target))["predicted"]) == 15
    assert ", 3 more classes in results.jsonl. Least sure" in capsys.readouterr().out


def test_margin_suggests_what_the_classifier_is_least_sure_of(run, go):
    workdir, truth = run
    names, target = list(truth), workdir / "labels_typed.csv"
    target.write_text("".join(f"{n},{truth[n]}\n" for n in names[:10]))
    go("suggest", label__csv=str(target), suggest__by="margin", suggest__number=1)
    (row,) = table(workdir / "label_these.csv")
    assert row["cluster_size"] == "10"
    go("label", label__csv=str(target))
    rest = [x for x in table(workdir / "labels_pixels.csv") if x["given"] == "no"]
    rest.sort(key=lambda x: float(x["probability"]) - float(x["second_probability"]))
    assert row["file"] in [x["file"] for x in rest[:11]]  # of ten, but the table rounds


def test_page_shows_the_images_and_escapes_names(tmp_path, go):
    hostile = "<script>alert(1)<_script> & \"'\udcff.png"
    write_images(tmp_path / "photos", [hostile, "b.png", "c.png"])
    workdir = opened_run.write(
        tmp_path / "run", data__source=f"folder:{tmp_path}/photos", data__test_split=""
    )
    (tmp_path / "labels_pixels.csv").write_text("c.png,\"<b onclick='x'>\"\n")
    go("suggest", workdir, label__csv=str(tmp_path / "labels_pixels.csv"))
    text = (workdir / "label_these.html").read_text()
    page = Page(text)
    assert len(page.scripts) == 1 and "http" not in text.replace("http-equiv", "")
    assert "default-src 'none'" in text and str(tmp_path) not in text
    inputs = [a for t, a in page.elements if t == "input"]
    rows = table(workdir / "label_these.csv")
    assert [a["data-name"] for a in inputs] == [row["file"] for row in rows]
    assert "--eval.label.csv=FILE" in text  # the table is in the workdir, or among the downloads
    assert [a["data-size"] for a in inputs] == [row["cluster_size"] for row in rows]
    assert {a["data-name"] for a in inputs} == {hostile.replace("\udcff", "\\udcff"), "b.png"}
    assert sum(t == "img" and a["src"].startswith("data:image/") for t, a in page.elements) == 2
    assert [a["value"] for t, a in page.elements if t == "option"] == ["<b onclick='x'>"]
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)


def test_damaged_images_have_no_row_and_are_named(run, go, tmp_path, capsys):
    rng = np.random.default_rng(1)
    for i in range(12):
        paint(tmp_path / "photos" / f"{i:02d}.png", list(COLOURS)[i % 3], rng)
    for i in (2, 5):
        (tmp_path / "photos" / f"{i:02d}.png").write_bytes(b"no image")
    lines = [f"{i:02d}.png,{list(COLOURS)[i % 3]}\n" for i in (0, 1, 2, 3, 4, 8)]
    (tmp_path / "typed.csv").write_text("".join(lines))
    workdir = opened_run.write(
        tmp_path / "run", data__source=f"folder:{tmp_path}/photos", data__test_split="",
        data__on_corrupt="replace",
    )  # fmt: skip
    record = go("label", workdir, label__csv=str(tmp_path / "typed.csv"))
    out = capsys.readouterr().out
    assert "; 1 label of a damaged image unused: 02.png; 2 damaged images left out: 02" in out
    assert "Not scored, since it has one label: blue." in out
    assert (record["given"], record["images"], record["left_out"]) == (5, 10, 2)
    names = [row["file"] for row in table(workdir / "labels_pixels.csv")]
    assert names == [f"{i:02d}.png" for i in range(12) if i not in (2, 5)]
    assert go("suggest", workdir)["left_out"] == 2
    assert "02.png" not in (workdir / "label_these.csv").read_text()


def test_labels_of_folders_score_the_predictions(go, tmp_path, capsys):
    rng = np.random.default_rng(2)
    for i in range(24):
        paint(tmp_path / "photos" / "train" / list(COLOURS)[i % 3] / f"{i}.png",
              list(COLOURS)[(i + (i == 23)) % 3], rng)  # fmt: skip
    workdir = opened_run.write(
        tmp_path / "run", data__source=f"folder:{tmp_path}/photos", data__test_split=""
    )
    typed = tmp_path / "typed.csv"
    typed.write_text("".join(f"{i}.png,{list(COLOURS)[i % 3]}\n" for i in range(9)))
    record = go("label", workdir, label__csv=str(typed))
    assert record["folders_top1"] == pytest.approx(14 / 15) and record["folders_images"] == 15
    assert "By the folders' own labels: 93.33 % right of the 15 images not" in (
        capsys.readouterr().out
    )
    typed.write_text("".join(f"{i}.png,my {list(COLOURS)[i % 3]}\n" for i in range(9)))
    assert go("label", workdir, label__csv=str(typed))["folders_top1"] is None


@pytest.mark.parametrize(
    ("train", "test", "given", "whole"),
    [
        ("train[:90%]", "train[90%:]", "", "train"),
        ("train[:90%]", "", "", "train"),
        ("train[:90%]", "val", "", "train[:90%]"),
        ("train[:50%]", "train[90%:]", "train[:5]", "train[:5]"),
        ("unlabelled", "train[90%:]", "", "unlabelled"),
        (".[:90%]", ".[90%:]", "", "."),
    ],
)
def test_the_split_that_holds_all_images(run, train, test, given, whole):
    opened = opened_run.load(run[0], features="pixels", train_split=given)
    with opened.config.unlocked():
        opened.config.data.train_split = given or train
        opened.config.data.test_split = test
    assert everything._whole(opened) == whole


def test_all_images_of_shards_are_both_parts_that_were_prepared(run, tmp_path):
    """Those of a run without a label, a tenth of them held out, to be labelled or embedded."""
    workdir, truth = run
    c = opened_run.load(workdir, features="pixels").config.data
    shard_writer.write(c, tmp_path / "shards")
    own = opened_run.write(
        tmp_path / "run", data__source=f"shards:{tmp_path / 'shards'}", data__labels="none",
        data__train_split="train[:90%]", data__test_split="train[90%:]",
    )  # fmt: skip
    for open_it in (everything.open_all, embed_mode._open):
        source = open_it(opened_run.load(own, features="pixels"))
        assert source.split == "train[:90%]+train[90%:]"
        assert sorted(source.names(np.arange(40))) == sorted(truth)


def test_shards_and_sums_of_tfds_stay_as_they_are(run, monkeypatch):
    opened = opened_run.load(run[0], features="pixels")
    data = opened.config.data
    with opened.config.unlocked():
        data.source = "shards:x"
        monkeypatch.setattr(everything.shards, "holds", lambda path, split: split == "train[:90%]")
        monkeypatch.setattr(everything.shards, "with_rest", lambda path, split: f"{path} {split}")
        data.train_split, data.test_split = "train[:90%]", ""
        assert everything._whole(opened) == "x train[:90%]"
        data.test_split = "val"
        assert everything._whole(opened) == "train[:90%]"
        data.test_split = ""
        data.train_split = "train[:80%]"
        assert everything._whole(opened) == "train"
        data.source, data.train_split = "tfds:x", "train[:10%]+train[90%:]"
        assert everything._whole(opened) == data.train_split


def test_mistakes(run, go, tmp_path, monkeypatch):
    workdir, truth = run
    typed, names = tmp_path / "typed.csv", list(truth)

    def fails(message, mode="label", text="", **changes):
        typed.write_text(text)
        with pytest.raises(UserError, match=message) as caught:
            go(mode, **({"label__csv": str(typed)} | changes))
        assert "\n" not in str(caught.value)

    good = "".join(f"{name},{truth[name]}\n" for name in names)
    fails("--mode=label needs labels: give --eval.label.csv=FILE", label__csv="")
    fails("no file .*none.csv; --eval.label.csv takes", label__csv=str(tmp_path / "none.csv"))
    fails("has labels for 0 images: expected two or more", text="file,label\nx.png,\n")
    fails("has labels for 1 images: expected two", text=f"{names[0]},red")
    fails("all 2 labels in .* are 'red': expected two classes", text="".join(
        f"{name},red\n" for name in names[:2]))  # fmt: skip
    with monkeypatch.context() as nothing_is_encoded:  # which takes minutes
        nothing_is_encoded.setattr(everything, "features_of", None)
        for mode in ("label", "suggest"):
            fails("'x.png' .line 1 of .*is not among the 40", mode, text="x.png,red\n" + good)
    fails("'x.png' .line 1 of .*typed.csv. is not among the 40", text="x.png,red\n" + good)
    fails("eval.label.l2=0: expected a number above 0", text=good, label__l2=0.0)
    fails(
        "no split 'tset'.*.Another split of these data: --eval.label.split=NAME",
        text=good,
        label__split="tset",
    )
    fails("kNN temperature=0.0: it must be above 0", text=good[:300].rpartition("\n")[0],
          knn__temperature=0.0)  # fmt: skip
    fails("eval.suggest.number=0: expected at least one image", "suggest", suggest__number=0)
    fails("has a label for each of the 40 images already", "suggest", good)
    fails("eval.suggest.by=margin asks for what a classifier is", "suggest", suggest__by="margin")
    fails('"borders" is unknown: use one of clusters, margin', "suggest", suggest__by="borders")
    fails("no split 'tset'.*--eval.suggest.split=NAME", "suggest", suggest__split="tset")
    assert not list(workdir.glob("label*"))
