"""Tables of labels as people and their spreadsheets write them."""

import re

import numpy as np
import pytest
from etils import epath

from common.errors import UserError
from common.evaluate import feature_files, label_file, label_match, spreadsheet
from common.evaluate.everything import Images

NAMES = ["a/1.jpg", "a/2.JPG", "b/1.jpg", "b/Blüte rot.jpg", "c/x,y.png", "\\udcff.png", "B/3.JPG"]
RED = "Blüte rot.jpg"


def read(tmp_path, data):
    path = epath.Path(tmp_path / "labels.csv")
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return label_file.read(path, "eval.label.csv")


def pairs(rows):
    return [(row.file.strip(), row.label) for row in rows]


WANTED = [(RED, "Rosé"), ("1.jpg", "x; y")]


@pytest.mark.parametrize(
    "text",
    [
        f'file,label\n{RED},Rosé\n1.jpg,"x; y"\n',
        f'file;label\r\n{RED};Rosé\r\n1.jpg;"x; y"\r\n',
        f"file\tlabel\n{RED}\tRosé\n\n1.jpg\tx; y",
        f'{RED},Rosé\n1.jpg,"x; y"\n',  # without a line that names the columns
        f'{RED};Rosé\n1.jpg;"x; y"',
        f" cluster_size,Label , FILE\n7,Rosé,{RED}\n8,,2.JPG\n9,x; y, 1.jpg \n",
        f"file,label,cluster_size\n{RED},Rosé,\n2.JPG,  ,4\n1.jpg,x; y\n3.jpg\n",
        f'sep=;\r\nfile;label\r\n{RED};Rosé\r\n1.jpg;"x; y"\r\n',  # Excel
        f"SEP=\t\n{RED}\tRosé\n1.jpg\tx; y\n",
        f'file;label;given\n{RED};Rosé;WAHR\n2.JPG;no rose;FALSE\n1.jpg;"x; y";\n',
        f'file,label,given\n{RED},Rosé,yes\n2.JPG,no rose,no\n1.jpg,"x; y",\n',
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_separators_headers_and_encodings(tmp_path, text, encoding):
    assert pairs(read(tmp_path, text.encode(encoding))) == WANTED


def test_what_is_written_is_read_again(tmp_path):
    path = epath.Path(tmp_path / "x.csv")
    written = [('ü "1",\n;.jpg', "=a,b"), ("2", "ß"), ("=1+2.jpg", "+"), (" 3.jpg", "'t")]
    spreadsheet.write(path, ("file", "label", "size"), [(*row, 3) for row in written])
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")  # which tells Excel that it is UTF-8
    assert b"\n'=1+2.jpg,'+,3" in path.read_bytes()  # no formulas
    rows = label_file.read(path, "")
    assert [row.label for row in rows] == [label for _, label in written]
    names = [file for file, _ in written]
    assert label_match.match(rows, names) == dict(enumerate(label for _, label in written))


def test_several_tables_are_one(tmp_path):
    for name, text in (("a,b.csv", "1.jpg,x"), ("c.csv", "file;label\n2.jpg;y"), ("d.csv", "")):
        (tmp_path / name).write_text(text)
    one = label_file.read_all(f"{tmp_path}/a,b.csv", "")
    assert pairs(one) == [("1.jpg", "x")]
    (tmp_path / "a.csv").write_text("3.jpg,z")
    rows = label_file.read_all(f"{tmp_path}/a.csv, {tmp_path}/c.csv,{tmp_path}/d.csv", "")
    assert pairs(rows) == [("3.jpg", "z"), ("2.jpg", "y")]
    both = label_file.read_all(f"{tmp_path}/c.csv,{tmp_path}/a,b.csv", "")
    assert pairs(both) == [("2.jpg", "y"), ("1.jpg", "x")]  # of `files.several`
    assert rows[1].place == f"line 2 of {tmp_path}/c.csv"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("1.jpg\n2.jpg\n", "line 1 of .*labels.csv has no second column"),
        ("a.jpg,rose\n\nb.jpg\n", "line 3 of .*: expected a file name and a label in each line"),
        (b"PK\x03\x04\x14", "is a workbook and not text: save the sheet as CSV"),
    ],
)
def test_files_that_are_no_tables(tmp_path, data, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, data)


def test_predictions_that_do_not_count_are_counted(tmp_path, capsys):
    text = "file,label,given\n1.jpg,x,yes\n2.jpg,y,no\n3.jpg,x,no\n"
    assert pairs(read(tmp_path, text)) == [("1.jpg", "x")]
    assert (
        "labels that count: 1; predictions, which do not (given: no): 2. Write"
        in capsys.readouterr().err
    )


def test_no_file(tmp_path):
    with pytest.raises(UserError, match=r"no file .*--eval.label.csv takes a table with the"):
        label_file.read(epath.Path(tmp_path / "none.csv"), "eval.label.csv")
    with pytest.raises(UserError, match=r"is a folder; --eval.label.csv takes the path of a CSV"):
        label_file.read(epath.Path(tmp_path), "eval.label.csv")


def rows_of(*cells):
    return [label_file.Row("t.csv", i, *cell) for i, cell in enumerate(cells, 2)]


@pytest.mark.parametrize(
    ("file", "found"),
    [
        ("a/1.jpg", 0),
        ("./a/1.jpg", 0),
        ("2.JPG", 1),  # the only one of that name
        ("2.jpg", 1),  # nor is there another in upper or lower case
        ("A/2.jpg", 1),
        ("Blu\u0308te rot.jpg", 3),  # decomposed, as macOS writes it
        ("BLÜTE ROT.JPG", 3),
        ("x,y.png", 4),
        ("\\udcff.png", 5),  # a byte that is no UTF-8, as it is shown
        ("B/3.JPG", 6),
        ("b\\Blüte rot.jpg", 3),  # of Windows
    ],
)
def test_names_that_fit_one_image(file, found):
    assert label_match.match(rows_of((file, "x")), NAMES) == {found: "x"}


@pytest.mark.parametrize(
    ("file", "found"),
    [
        pytest.param(" a.jpg", 0, id="space"),  # exactly
        ("a.jpg", 1),
        (" b.jpg ", 2),
        ("'=x.jpg", 3),  # of `spreadsheet.cell`
        (" '=X.jpg", 3),
        ("=x.jpg", 3),
        ("'-y.jpg", 4),  # exactly
        ("-y.jpg", 5),
        ("'b.jpg", None),
    ],
)
def test_names_with_space_or_an_apostrophe(file, found):
    names = [" a.jpg", "a.jpg", "b.jpg", "=x.jpg", "'-y.jpg", "-y.jpg"]
    if found is None:
        with pytest.raises(UserError, match="is not among the 6 images"):
            label_match.match(rows_of((file, "x")), names)
    else:
        assert label_match.match(rows_of((file, "x")), names) == {found: "x"}


def test_rows_that_agree_and_order():
    rows = rows_of(("b/1.jpg", "x"), ("a/1.jpg", "y"), ("B/1.jpg", "x"))
    assert list(label_match.match(rows, NAMES).items()) == [(0, "y"), (2, "x")]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([("9.jpg", "x")], "'9.jpg' (line 2 of t.csv) is not among the 7 images, whose names are "
         "like 'a/1.jpg': give the path below the folder"),
        ([("8.jpg", "x")], "or the file name, and leave out rows of images that are gone"),
        ([("1.jpg", "x")], "'1.jpg' (line 2 of t.csv) fits several images, a/1.jpg, b/1.jpg: give"),
        ([("c/1.jpg", "x")], "'c/1.jpg' (line 2 of t.csv) is not among"),
        ([("a/1.jpg", "x"), ("./a/1.jpg", "y")],
         "'./a/1.jpg' has two labels, 'x' in line 2 of t.csv and 'y' in line 3 of t.csv: keep one"),
        ([(f"{i}.x", "x") for i in range(5)], "'0.x' (line 2 of t.csv), '1.x' (line 3 of t.csv), "
         "'2.x' (line 4 of t.csv) and 2 more are not among the 7 images"),
    ],
)  # fmt: skip
def test_rows_that_fit_no_image_or_too_many(cells, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        label_match.match(rows_of(*cells), NAMES)
    assert "\n" not in str(caught.value)


def test_a_first_line_that_may_be_a_heading_is_named():
    rows = [label_file.Row("t.csv", i, *cell) for i, cell in enumerate(
        [("name", "class"), ("a/1.jpg", "x")], 1)]  # fmt: skip
    with pytest.raises(UserError) as caught:
        label_match.match(rows, NAMES)
    assert "'name' (line 1 of t.csv) is not among" in str(caught.value)
    assert str(caught.value).endswith(
        "if the first line (name, class) is a heading, call the columns 'file' and 'label'"
    )


def test_the_line_that_tells_the_separator_counts(tmp_path):
    assert [row.line for row in read(tmp_path, "sep=;\nfile;label\n1.jpg;x\n")] == [3]
    with pytest.raises(UserError, match=r"line 2 of .* has no second column"):
        read(tmp_path, "sep=;\n1.jpg,x\n")


def test_labels_of_damaged_images_are_counted():
    images = Images(
        np.zeros((2, 1)), np.full(2, -1), np.array([0, 2]),
        np.array(["1.png", "3.png"]), np.array(["2.png"]),
    )  # fmt: skip
    rows = rows_of(("3.png", "y"), ("2.png", "z"), ("1.png", "x"))
    found, words = label_match.given(rows, images)
    assert found == {0: "x", 1: "y"}
    assert words == "; 1 label of a damaged image unused: 2.png"


def test_names_of_shards_lose_the_folder_that_they_share():
    shown = feature_files.shown_names(["/home/me/a/b.png", "/home/me/a/bc/d.png"])
    assert shown == ["b.png", "bc/d.png"]
    assert feature_files.shown_names(["a/b.png", "\udcff.png"]) == ["a/b.png", "\\udcff.png"]


def test_names_do_not_change_with_the_images_that_are_damaged():
    root, none = "/home/me/photos", np.zeros(2)
    kept, damaged = np.array([f"{root}/a/1.png", f"{root}/a/2.png"]), np.array([f"{root}/b/3.png"])
    images = Images(none, none, none, kept, damaged)
    assert label_match.names_of(images) == ["a/1.png", "a/2.png", "b/3.png"]
    rows = rows_of(*((name, "x") for name in label_match.names_of(images)))
    assert label_match.given(rows, images)[0] == {0: "x", 1: "x"}


def test_a_table_that_must_be_kept_gets_a_successor(tmp_path):
    first = epath.Path(tmp_path / "t.csv")
    assert label_file.free(first, lambda _: False) == first
    first.touch()
    (tmp_path / "t_2.csv").touch()
    assert label_file.free(first, lambda _: True) == first
    assert label_file.free(first, lambda old: old.name == "t_2.csv").name == "t_2.csv"
    assert label_file.free(first, lambda _: False).name == "t_3.csv"


def test_classes_are_sorted():
    classes, numbers = label_match.classes_of(["b", "a", "b", "ü"])
    assert classes == ("a", "b", "ü") and numbers.tolist() == [1, 0, 1, 2]


@pytest.mark.parametrize(
    "text",
    [
        'file,label\n"Käfer.jpg,ant\na b.jpg,bee\n',
        'file,label\na b.jpg,bee\nc.jpg,"ant\nd.jpg,ant\n',
        "file;label\na.jpg;bee\nc.jpg;" + '"' + "x" * 200_000,
    ],
)
def test_a_quote_that_is_not_closed_loses_no_label_unseen(tmp_path, text):
    with pytest.raises(UserError, match="look for a quotation mark that is not closed"):
        read(tmp_path, text)


def test_a_table_is_as_written_while_its_digest_is_among_the_results(tmp_path):
    path = epath.Path(tmp_path / "labels.csv")
    path.write_text("file,label\n")
    assert not label_file.as_written(path)
    (tmp_path / "results.jsonl").write_text(f'{{"sha256": "{label_file.digest(path)}"}}\n')
    assert label_file.as_written(path)
    path.write_text("file,label\n,ant\n")
    assert not label_file.as_written(path)
