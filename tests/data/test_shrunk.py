"""`data.shrink`: what is made smaller, what is left alone, and that it is the same picture."""

import io
import struct
import zlib

import numpy as np
import pytest
import tiny
from PIL import Image

from common import config as configs
from common.config import section
from common.data.feed import pipeline
from common.data.sources import shrunk, slices, subset
from common.data.sources.opening import open_source
from common.errors import UserError


def picture(height, width, seed=0):
    """A smooth picture: what averaging blocks of it gives can be computed."""
    rng = np.random.default_rng(seed)
    small = rng.integers(60, 200, (4, 4, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, kind="JPEG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def deep_rgb_png(height, width):
    """A PNG of 3 x 16 bits, which Pillow reads as 8 bits."""
    row = b"\0" + np.full((width, 3), 4000, ">u2").tobytes()
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0),
        b"IDAT": zlib.compress(row * height),
        b"IEND": b"",
    }
    chunks = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts.items()
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def opened(data):
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP"])
@pytest.mark.parametrize(("height", "width"), [(96, 160), (97, 64), (400, 130), (256, 256)])
def test_the_shorter_side_is_between_once_and_twice_the_length_asked_for(kind, height, width):
    image = picture(height, width)
    small = opened(shrunk.smaller(encoded(image, kind), 32))
    assert small.format == "JPEG" and 32 <= min(small.size) < 64
    assert abs(small.width / small.height - width / height) < 0.05
    # a picture without detail is the same one, resized
    expected = np.asarray(image.resize(small.size, Image.Resampling.BOX), float)
    assert np.abs(np.asarray(small, float) - expected).mean() < 3


@pytest.mark.parametrize(
    "data",
    [
        encoded(picture(63, 200)),
        encoded(picture(200, 300))[:900],
        b"", b"text",
        encoded(Image.fromarray(np.full((200, 200), 4000, np.uint16)), "PNG"),
        deep_rgb_png(200, 200),
        encoded(picture(200, 200), "TIFF"),
        encoded(picture(200, 200).convert("RGBA"), "PNG"),
        encoded(picture(200, 200).convert("P"), "PNG"),
        encoded(picture(200, 200), "GIF", save_all=True, append_images=[picture(200, 200, 1)]),
    ],
    ids=[
        "small", "damaged", "empty", "text", "deep", "deep_rgb", "tiff", "alpha", "palette",
        "animation",
    ],
)  # fmt: skip
def test_what_is_left_as_it_is(data):
    assert shrunk.smaller(data, 32) is None


def test_the_orientation_stays_a_tag():
    image, exif = picture(100, 200), Image.Exif()
    exif[0x0112] = 6
    small = opened(shrunk.smaller(encoded(image, exif=exif), 32))
    assert small.getexif()[0x0112] == 6 and small.width > small.height
    assert 0x0112 not in opened(shrunk.smaller(encoded(image), 32)).getexif()


def test_a_grey_photograph_stays_grey():
    assert opened(shrunk.smaller(encoded(picture(90, 90).convert("L")), 32)).mode == "L"


@pytest.fixture
def folder(tmp_path):
    for i in range(6):
        side = 96 if i % 2 else 40
        (tmp_path / f"{i}.jpg").write_bytes(encoded(picture(side, side + 8, i), quality=98))
    return tmp_path


def opened_folder(folder, **fields):
    return open_source(section("data", source=f"folder:{folder}", **fields), "train")


def test_a_source_is_the_same_but_for_its_large_images(folder, monkeypatch):
    plain, small = opened_folder(folder), opened_folder(folder, shrink=32)
    assert small.kind == "encoded" and small.listing == plain.listing
    ids = np.array([3, 0, 1])
    assert small.names(ids).tolist() == plain.names(ids).tolist() == ["3.jpg", "0.jpg", "1.jpg"]
    assert small.describe(3) == plain.describe(3)
    images, labels = small.read(ids)
    assert labels.tolist() == [-1, -1, -1]
    assert [min(opened(x).size) for x in images] == [48, 40, 48]
    assert images[1] == (folder / "0.jpg").read_bytes()
    calls = []
    monkeypatch.setattr(shrunk, "smaller", lambda *a: calls.append(a))
    assert small.read(ids)[0].tolist() == images.tolist() and not calls  # once is enough
    seen = [pipeline.images_of(s, np.arange(6), 16) for s in (plain, small)]
    assert np.abs(seen[0].astype(float) - seen[1]).mean() < 2


def test_a_part_of_a_source_reads_the_right_images(folder):
    whole = opened_folder(folder, shrink=32)
    part = subset.select(whole, np.array([5, 2]))
    assert part.read(np.array([0]))[0].tolist() == whole.read(np.array([5]))[0].tolist()
    part = opened_folder(folder, shrink=32, train_split="train[:2]")
    chosen = slices.ids("train[:2]", ("", "2"), 6)
    assert part.read(np.arange(2))[0].tolist() == whole.read(chosen)[0].tolist()


def test_without_room_images_are_made_anew(folder):
    source = shrunk.shrunk(opened_folder(folder), 32, gib=0)
    before = source.read(np.array([1]))[0][0]
    assert not source.kept and source.read(np.array([1]))[0][0] == before
    assert min(opened(before).size) == 48


def test_a_damaged_or_missing_file_is_named_as_ever(folder):
    (folder / "1.jpg").write_bytes((folder / "1.jpg").read_bytes()[:300])
    source = opened_folder(folder, shrink=32)
    (folder / "3.jpg").unlink()
    with pytest.raises(Exception, match=r"cannot decode .*[13]\.jpg"):
        pipeline.images_of(source, np.arange(6), 16)
    source = opened_folder(folder, shrink=32, on_corrupt="replace")
    assert len(pipeline.images_of(source, np.arange(5), 16)) == 5 and source.replaced


def test_pixels_are_left_alone():
    source = open_source(section("data", source="embedded", shrink=8), "train")
    assert source.kind == "pixels"


def test_classes_are_those_of_the_training_split_by_name(tmp_path):
    """A test split that lacks the first class: its labels are not 0 and 1."""
    for split, classes in (("train", "abc"), ("test", "bc")):
        for name in classes:
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.jpg").write_bytes(encoded(picture(90, 90)))
    for shrink in (0, 32):
        source = open_source(section("data", source=f"folder:{tmp_path}", shrink=shrink), "test")
        assert source.read(np.arange(2))[1].tolist() == [1, 2] == source.labels.tolist()


def test_views_larger_than_what_is_kept_are_refused():
    c = tiny.config("simclr", data__shrink=31, data__image_size=16, augment__size=32)
    with pytest.raises(UserError, match=r"data\.shrink=31 makes photographs smaller than the 32"):
        configs.check(c)
    c.data.shrink = 32
    configs.check(c)
