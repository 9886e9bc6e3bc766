"""EXIF rotation, for all eight orientations, against Pillow's own."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps
from test_augment import PLAIN, encode, noise, recipe
from test_sources import config, picture

from common.data.augment import draws, on_host
from common.data.feed import feed, survey
from common.data.images import decode, orientation
from common.data.images.decoding import Decoding
from common.data.images.tensorflow_host import tf
from common.data.sources.opening import open_source

ALL = range(1, 9)
ON, OFF = Decoding(exif_rotation=True), Decoding()


def photo(turn, kind="JPEG", size=(37, 50), **options):
    """A file with an orientation, of sides that no block of libjpeg divides."""
    exif = Image.Exif()
    exif[0x0112] = turn
    buffer = io.BytesIO()
    Image.fromarray(picture(turn, *size)).save(buffer, kind, exif=exif, **options)
    return buffer.getvalue()


def pillow(data, rotate):
    image = Image.open(io.BytesIO(data))
    return np.asarray((ImageOps.exif_transpose(image) if rotate else image).convert("RGB"))


@pytest.mark.parametrize(
    "kind, options",
    [("JPEG", {"quality": 90}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})],
)
def test_all_orientations_are_pillows(kind, options):
    for turn in ALL:
        data = photo(turn, kind, **options)
        for how in (ON, OFF):
            found = decode.decode(tf.constant(data), how).numpy()
            np.testing.assert_array_equal(found, pillow(data, how is ON))


def test_of_deep_images_too():
    wide = np.arange(6, dtype=np.uint16).reshape(2, 3) * 800
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(wide).save(buffer, "PNG", exif=exif)
    how = Decoding("0:4095", exif_rotation=True)
    found = decode.decode(tf.constant(buffer.getvalue()), how).numpy()
    np.testing.assert_array_equal(found[..., 1], np.rot90(wide >> 4, -1))


def test_a_box_is_the_same_pixels_stored_and_shown():
    image = noise(1, 11, 17)[0]
    for turn in map(tf.constant, ALL):
        shown = orientation.turned(tf.constant(image), turn).numpy()
        shape = tf.constant(image.shape[:2])
        assert orientation.shape_shown(shape, turn).numpy().tolist() == list(shown.shape[:2])
        box = tf.constant([2, 3, 4, 7])
        top, left, h, w = orientation.box_stored(box, shape, turn).numpy()
        cut = orientation.turned(tf.constant(image[top : top + h, left : left + w]), turn)
        np.testing.assert_array_equal(cut, shown[2:6, 3:10])
        back = orientation.box_shown(tf.constant([top, left, h, w]), shape, turn)
        assert back.numpy().tolist() == [2, 3, 4, 7]


def test_crops_are_of_the_rotated_image():
    """Decoded whole or in part: the views of a file that Pillow has turned before."""
    a = recipe("moco_v2", 16, **PLAIN)
    parameters, crops = draws.draw_views((a, a), 5, 0, np.arange(9), None)
    for turn in ALL:
        data = photo(turn, size=(90, 120), quality=90, subsampling=2 * (turn % 2))
        turned = tf.constant(encode(pillow(data, True), "PNG"))
        want = on_host.augment_encoded(turned, parameters[turn], crops[turn], (a, a))
        for whole in (True, False):
            found = on_host.augment_encoded(
                tf.constant(data), parameters[turn], crops[turn], (a, a), whole, ON
            )
            difference = np.abs(found.numpy().astype(int) - want.numpy())
            assert difference.max() <= (0 if whole else 1), turn


def test_files_without_exif_and_files_that_are_none():
    for data in (encode(noise(1)[0], "JPEG"), encode(noise(1)[0], "PNG"), b"", b"\xff\xd8Exif\0\0",
                 photo(6)[:60], photo(3, "TIFF")):  # fmt: skip
        assert orientation.stored(data) == 1
    assert orientation.stored(photo(6)) == orientation.stored(photo(6)[:-20]) == 6
    assert orientation.stored(photo(8, "PNG")) == 8


def test_one_line_says_that_it_is_off(tmp_path):
    for turn in ALL:
        (tmp_path / f"{turn}.jpg").write_bytes(photo(turn))

    def seen(on):
        c = config(f"folder:{tmp_path}", image_size=8, exif_rotation=on)
        source = open_source(c, "train")
        images = next(iter(feed.eval_feed(source, [np.arange(8)], 8)))[0]
        return survey.look(source), images

    (line,), off = seen(False)
    assert "7 of 8 images that were looked at carry an EXIF rotation" in line
    assert "data.exif_rotation=True applies it" in line
    none, on = seen(True)
    assert none == []
    same = [bool((a == b).all()) for a, b in zip(off, on, strict=True)]
    assert same == [True] + 7 * [False]
