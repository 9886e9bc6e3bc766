"""A folder that was cut into pieces is restored exactly, or not at all."""

import hashlib
import json
import pathlib
import shutil

import numpy as np
import pytest

from benchmarks import pieces
from common.errors import UserError


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "data"
    (root / "deep" / "er").mkdir(parents=True)
    rng = np.random.default_rng(0)
    (root / "noise.bin").write_bytes(rng.bytes(250_000))  # cannot be compressed
    (root / "deep" / "er" / "é 1.txt").write_text("text")
    (root / "empty").write_bytes(b"")
    return root


def content(root: pathlib.Path) -> dict[str, bytes]:
    return {
        p.relative_to(root).as_posix(): p.read_bytes()
        for p in root.rglob("*") if p.is_file() and p.name != ".pieces.json"
    }  # fmt: skip


def test_pieces_are_no_larger_than_asked_for_and_their_digests_are_those_of_the_files(
    folder, tmp_path
):
    index = pieces.cut(folder, tmp_path / "out", mb=0.1)
    assert len(index["pieces"]) == 3
    for piece in index["pieces"]:
        data = (tmp_path / "out" / piece["file"]).read_bytes()
        assert len(data) == piece["bytes"] <= 100_000
        assert hashlib.sha256(data).hexdigest() == piece["sha256"]
    assert json.loads((tmp_path / "out" / "data.json").read_text()) == index
    assert pieces.join(tmp_path / "out", tmp_path / "back") == []
    assert content(tmp_path / "back") == content(folder)


def test_pieces_arrive_one_by_one_in_any_order_and_some_twice(folder, tmp_path):
    index = pieces.cut(folder, tmp_path / "out", mb=0.1)
    names = [piece["file"] for piece in index["pieces"]]
    lacking = []
    for call, brought in enumerate(([2], [2, 0], [1])):
        arrived = tmp_path / f"call{call}"
        arrived.mkdir()
        shutil.copy(tmp_path / "out" / "data.json", arrived)
        for i in brought:
            shutil.copy(tmp_path / "out" / names[i], arrived)
        assert not (tmp_path / "back").exists()
        lacking.append(pieces.join(arrived, tmp_path / "back", tmp_path / "keep"))
        shutil.rmtree(arrived)
    assert lacking == [[names[0], names[1]], [names[1]], []]
    assert content(tmp_path / "back") == content(folder)
    # once more: nothing to do, and what is there is not touched
    assert pieces.join(tmp_path / "out", tmp_path / "back", tmp_path / "keep") == []


def test_a_damaged_piece_is_named_and_nothing_is_made(folder, tmp_path):
    index = pieces.cut(folder, tmp_path / "out", mb=0.1)
    path = tmp_path / "out" / index["pieces"][1]["file"]
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"data\.001 is damaged.*carry it anew"):
        pieces.join(tmp_path / "out", tmp_path / "back")
    path.write_bytes(data[:-1])  # and now into a store
    with pytest.raises(UserError, match=r"99,999 bytes of 100,000"):
        pieces.join(tmp_path / "out", tmp_path / "back", tmp_path / "keep")
    assert not (tmp_path / "back").exists()
    # valid pieces were kept, and a valid copy replaces a damaged one in the store
    assert (tmp_path / "keep" / "data.002").exists()
    data[5] ^= 1
    (tmp_path / "keep" / "data.001").write_bytes(b"damaged")
    path.write_bytes(data)
    assert pieces.join(tmp_path / "out", tmp_path / "back", tmp_path / "keep") == []
    assert content(tmp_path / "back") == content(folder)


def test_a_kill_while_unpacking_leaves_no_folder_and_the_next_call_makes_it(folder, tmp_path):
    pieces.cut(folder, tmp_path / "out", mb=0.1)
    (tmp_path / "back").mkdir()  # empty: nothing is lost
    (tmp_path / "back.unpacking").mkdir()
    (tmp_path / "back.unpacking" / "noise.bin").write_text("half")
    assert pieces.join(tmp_path / "out", tmp_path / "back") == []
    assert content(tmp_path / "back") == content(folder)


def test_what_is_in_the_way_stays(folder, tmp_path):
    pieces.cut(folder, tmp_path / "out", mb=0.1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    with pytest.raises(UserError, match="mine exists"):
        pieces.join(tmp_path / "out", tmp_path / "mine")
    with pytest.raises(UserError, match="not empty"):
        pieces.cut(folder, tmp_path / "mine")
    assert content(tmp_path / "mine") == {"file": b"mine"}


def test_links_and_pieces_within_the_folder_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="lies in"):
        pieces.cut(folder, folder / "pieces")
    (folder / "deep" / "link").symlink_to(folder / "empty")
    with pytest.raises(UserError, match="link is a link"):
        pieces.cut(folder, tmp_path / "out")


def test_mistakes(folder, tmp_path):
    with pytest.raises(UserError, match="expected a folder with something in it"):
        pieces.cut(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(UserError, match=r"holds no index.*nothing was taken in"):
        pieces.join(folder, tmp_path / "back")
    with pytest.raises(UserError, match="no folder"):
        pieces.join(tmp_path / "nowhere", tmp_path / "back")
    pieces.cut(folder, tmp_path / "one")
    (folder / "more").write_text("x")
    pieces.cut(folder, tmp_path / "two")
    pieces.join(tmp_path / "one", tmp_path / "back", tmp_path / "keep")
    with pytest.raises(UserError, match="differ"):
        pieces.join(tmp_path / "two", tmp_path / "back2", tmp_path / "keep")
    (tmp_path / "two" / "data.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        pieces.join(tmp_path / "two", tmp_path / "back2")


def test_the_command_line_says_what_is_lacking(folder, tmp_path, capsys):
    assert pieces.main(["cut", str(folder), str(tmp_path / "out"), "--mb=0.1"]) == 0
    (tmp_path / "out" / "data.001").unlink()
    arguments = ["join", str(tmp_path / "out"), str(tmp_path / "back")]
    assert pieces.main(arguments) == 3
    assert "pieces that are lacking: data.001" in capsys.readouterr().err
