"""Every kind of image that people have in a folder: loaded right, or refused with its name."""

import io
import itertools
import os
import zlib

import numpy as np
import pytest
from PIL import Image
from test_sources import config, picture, write

from common.data.feed import corrupt, feed
from common.data.feed.recipe import FeedRecipe
from common.data.images import decode
from common.data.images.decoding import Decoding
from common.data.images.tensorflow_host import tf, traced
from common.data.sources.folder_source import shown
from common.data.sources.opening import open_source
from common.errors import UserError

RGB = Image.fromarray(picture(1))
OTHERS = [Image.fromarray(picture(i)) for i in (2, 3)]
WIDE = (np.arange(480).reshape(20, 24) * 136).astype(np.uint16)  # 16 bits a pixel


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me by 90 degrees"
    return encoded(RGB, "PNG", exif=exif)


MOVING = {"save_all": True, "append_images": OTHERS}
EXACT = {  # to the last bit what Pillow makes of the first frame
    "png": encoded(RGB, "PNG"),
    "alpha": encoded(RGB.convert("RGBA"), "PNG"),
    "grey": encoded(RGB.convert("L"), "PNG"),
    "grey and alpha": encoded(RGB.convert("LA"), "PNG"),
    "palette": encoded(RGB.convert("P"), "PNG"),
    "one bit": encoded(RGB.convert("1"), "PNG"),
    "gif": encoded(RGB, "GIF"),
    "animated gif": encoded(RGB, "GIF", **MOVING),
    "animated png": encoded(RGB, "PNG", **MOVING),
    "webp": encoded(RGB, "WEBP", lossless=True),
    "animated webp": encoded(RGB, "WEBP", lossless=True, **MOVING),
    "bmp": encoded(RGB, "BMP"),
    "tiff": encoded(RGB, "TIFF"),
    "ppm": encoded(RGB, "PPM"),
    "exif rotation": rotated(),
    "one pixel wide": encoded(RGB.resize((1, 20)), "PNG"),
    "20,000 pixels wide": encoded(RGB.resize((20_000, 2)), "PNG"),
    "jpeg": encoded(RGB, "JPEG", quality=95),
    "jpeg of quality 100": encoded(RGB, "JPEG", quality=100),
    "jpeg without subsampling": encoded(RGB, "JPEG", quality=75, subsampling=0),
    "jpeg with columns halved": encoded(RGB, "JPEG", quality=75, subsampling=1),
    "grey jpeg": encoded(RGB.convert("L"), "JPEG", quality=95),
    "progressive": encoded(RGB, "JPEG", quality=95, progressive=True),
}
NEARLY = {  # the inks are mixed in another way
    "cmyk": encoded(RGB.convert("CMYK"), "JPEG", quality=95),
}


def chunk(kind, data=b""):
    """Of a PNG."""
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


SIDES = (60_000).to_bytes(4, "big") * 2
HUGE = EXACT["png"][:8] + chunk(b"IHDR", SIDES + b"\x08\x02\x00\x00\x00") + chunk(b"IDAT")
BAD = {
    "empty": (b"", "the file is empty"),
    "text": (b"<html>404</html>", "not an image in any known format"),
    "cut jpeg": (EXACT["jpeg"][:300], "JPEG"),
    "cut png": (EXACT["png"][:300], "PNG"),
    "cut gif": (EXACT["gif"][:300], ""),
    "cut webp": (EXACT["webp"][:100], ""),
    "a png that says it has 3.6 billion pixels": (HUGE, "3600000000 pixels"),
    "zeros": (bytes(500), "not an image in any known format"),
}


@pytest.fixture(scope="module")
def graph():
    """The decoder as the pipeline runs it."""
    return traced(decode.decode, input_signature=[tf.TensorSpec([], tf.string)])


@pytest.mark.parametrize("name", [*EXACT, *NEARLY])
def test_each_kind_is_what_pillow_makes_of_it(name, graph):
    data = EXACT.get(name) or NEARLY[name]
    want = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    got = graph(tf.constant(data)).numpy()
    assert got.shape == want.shape and got.dtype == np.uint8
    bound = 0 if name in EXACT else 12
    assert np.abs(got.astype(int) - want).max() <= bound
    assert corrupt.fault_of(data) == ""


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_of_sixteen_bits_the_upper_eight_count(kind, graph):
    """Pillow's own conversion cuts them off at 255, which leaves a white picture."""
    got = graph(tf.constant(encoded(Image.fromarray(WIDE), kind))).numpy()
    np.testing.assert_array_equal(got, np.repeat((WIDE >> 8)[..., None], 3, axis=-1))


def test_a_png_too_large_to_decode_is_not_looked_into():
    wide = HUGE.replace(b"\x08\x02", b"\x10\x02")
    assert wide[24] == 16 and decode.deep_values(wide) is None


def test_runs_that_began_with_the_quick_decoder_keep_it():
    data = tf.constant(EXACT["jpeg of quality 100"])
    before = tf.io.decode_jpeg(data, channels=3).numpy()
    fast, exact = (decode.decode(data, Decoding(jpeg=kind)).numpy() for kind in ("fast", "exact"))
    np.testing.assert_array_equal(fast, before)
    assert (exact != before).any()


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_image_has_a_reason(name, graph):
    data, reason = BAD[name]
    with pytest.raises(tf.errors.OpError):
        graph(tf.constant(data))
    found = corrupt.fault_of(data)
    assert found and reason in found and "\n" not in found and len(found) <= 120


def folder(tmp_path, files):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def epoch(source, size=8):
    plan = [np.arange(source.num_examples)]
    return next(iter(feed.eval_feed(source, plan, size)))[0]


def test_a_folder_of_everything(tmp_path):
    """One file of each kind, with the names that people give; evaluation and training."""
    kinds = {**EXACT, **NEARLY}
    suffixes = {"animated gif": ".gif", "animated webp": ".webp", "tiff": ".tiff", "ppm": ".ppm"}
    names = [f"{i:02} ünï\n{kind}{suffixes.get(kind, '.png')}" for i, kind in enumerate(kinds)]
    folder(tmp_path, dict(zip(names, kinds.values(), strict=True)))
    source = open_source(config(f"folder:{tmp_path}"), "train")
    assert source.num_examples == len(kinds)
    assert epoch(source).shape == (len(kinds), 8, 8, 3)
    c = tiny_config(source, tmp_path)
    from common.data.feed import pipeline

    batch = next(pipeline.train_batches(source, FeedRecipe.of(c), rows=np.arange(len(kinds))))
    assert batch["images"].shape == (len(kinds), 2, 8, 8, 3)


def tiny_config(source, path, **changes):
    import tiny

    return tiny.config("simclr", data__source=f"folder:{path}", batch_size=source.num_examples,
                       **changes)  # fmt: skip


def test_bad_files_are_named_or_replaced_alike_each_time(tmp_path, caplog):
    good = {f"{i}.png": EXACT["png"] if i % 2 else EXACT["grey"] for i in range(4)}
    bad = {f"bad {i}\n.png": data for i, (data, _) in enumerate(BAD.values())}
    folder(tmp_path, good | bad)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    strict = open_source(config(f"folder:{tmp_path}"), "train")
    with pytest.raises(UserError, match=r"cannot decode '.*bad 0\\n.png' \(the file is empty\)"):
        epoch(strict)
    seen = []
    for _ in range(2):
        caplog.clear()
        c = config(f"folder:{tmp_path}", on_corrupt="replace")
        source = open_source(c, "train")
        seen.append(epoch(source))
        assert source.corrupt_count == len(BAD) + 1
        assert len([r for r in caplog.records if "corrupt image" in r.getMessage()]) == 9
        assert "gone.png (no such file) replaced" in caplog.text
    np.testing.assert_array_equal(*seen)
    assert (seen[0].std((1, 2, 3)) > 5).all()  # none is empty


def test_a_folder_that_changes_while_it_is_read(tmp_path):
    """Deleted: replaced. Added: not seen. Another image under an old name: read as it is now."""
    for i in range(6):
        write(tmp_path / f"{i}.png", i)
    source = open_source(config(f"folder:{tmp_path}", on_corrupt="replace"), "train")
    first = epoch(source)
    (tmp_path / "2.png").unlink()
    write(tmp_path / "3.png", 33)
    write(tmp_path / "9.png", 9)
    second = epoch(source)
    same = [bool((a == b).all()) for a, b in zip(first, second, strict=True)]
    assert same == [True, True, False, False, True, True]
    np.testing.assert_array_equal(second[2], second[3])
    (tmp_path / "3.png").unlink()  # which stood in for another
    third = epoch(source)
    np.testing.assert_array_equal(third[2], third[4])
    np.testing.assert_array_equal(third[3], third[4])
    for i in itertools.chain(range(2), range(4, 6), [9]):
        (tmp_path / f"{i}.png").unlink()
    with pytest.raises(UserError, match="no such file"):  # there is nothing left to replace with
        epoch(source)


def test_a_search_for_corrupt_images_does_not_look_at_a_good_one_twice(tmp_path, monkeypatch):
    """Each search decodes what it looks at, which of a few large pictures can take minutes."""
    for i in range(12):
        write(tmp_path / f"{i:02}.png", i)
    for i in (1, 3, 4, 8, 11):
        (tmp_path / f"{i:02}.png").write_bytes(b"no image")
    looked = []
    fault_of = corrupt.fault_of

    def counted(payload, is_path):
        looked.append((payload, fault := fault_of(payload, is_path)))
        return fault

    monkeypatch.setattr(corrupt, "fault_of", counted)
    source = open_source(config(f"folder:{tmp_path}", on_corrupt="replace"), "train")
    epoch(source)
    assert source.replaced == {1: 2, 3: 5, 4: 5, 8: 9, 11: 0}
    good = [payload for payload, fault in looked if not fault]
    assert len(good) == len(set(good)) > 3


def test_the_listing_notices_a_renamed_file_and_not_a_moved_folder(tmp_path):
    for i in range(3):
        write(tmp_path / "a" / f"{i}.png", i)
    before = open_source(config(f"folder:{tmp_path}/a"), "train").listing
    (tmp_path / "a").rename(tmp_path / "b")
    assert open_source(config(f"folder:{tmp_path}/b"), "train").listing == before != ""
    (tmp_path / "b" / "1.png").rename(tmp_path / "b" / "7.png")
    assert open_source(config(f"folder:{tmp_path}/b"), "train").listing != before


def test_links_pipes_and_folders_with_the_names_of_images(tmp_path, caplog):
    write(tmp_path / "deep" / "deeper" / "1.png", 1)
    write(tmp_path / "2.png", 2)
    (tmp_path / "deep" / "deeper" / "up").symlink_to(tmp_path)
    (tmp_path / "self.png").symlink_to(tmp_path / "self.png")
    (tmp_path / "album.png").mkdir()
    write(tmp_path / "album.png" / "3.png", 3)
    os.mkfifo(tmp_path / "pipe.png")  # to read it would be to wait for ever
    source = open_source(config(f"folder:{tmp_path}", labels="none"), "train")
    names = [os.path.relpath(p, tmp_path) for p in source.paths]
    assert names == ["2.png", "self.png", "album.png/3.png", "deep/deeper/1.png"]
    assert "links to a folder that holds it" in caplog.text


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    """Root may read all, so the refusal is played."""
    from common.data.sources import folder_source

    write(tmp_path / "a" / "1.png", 1)
    write(tmp_path / "locked" / "2.png", 2)
    real = type(folder_source.epath.Path("x")).iterdir

    def iterdir(self):
        if self.name == "locked":
            raise PermissionError(13, "Permission denied")
        return real(self)

    monkeypatch.setattr(type(folder_source.epath.Path("x")), "iterdir", iterdir)
    for on_corrupt in ("error", "replace"):
        c = config(f"folder:{tmp_path}", on_corrupt=on_corrupt)
        with pytest.raises(UserError, match=r"cannot read the folder .*locked \(Permission denied"):
            open_source(c, "train")


def test_names_in_messages_stay_on_one_line():
    assert shown("a b/ü.png") == "a b/ü.png"
    assert shown("a\nb.png") == "'a\\nb.png'"
    assert "\\udcff" in shown(os.fsdecode(b"\xff.png"))
