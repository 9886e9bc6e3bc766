"""Images of more than 8 bits: one rule for the whole set, decided once."""

import io
import json

import numpy as np
import pytest
import tiny
import toy
from PIL import Image
from test_sources import config, write_tfds

from common import config as configs
from common.data.feed import feed, survey
from common.data.images import decode, decoding
from common.data.images.decoding import Decoding
from common.data.images.tensorflow_host import tf
from common.data.sources import shard_writer, subset
from common.data.sources.base import ArraySource
from common.data.sources.opening import open_source
from common.errors import UserError
from common.evaluate import knn, pretrained


def saved(values, kind="TIFF"):
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind)
    return buffer.getvalue()


def folder(path, images, kind="TIFF"):
    """Writes arrays as files; returns the source of them, with `auto`."""
    path.mkdir(parents=True, exist_ok=True)
    suffix = {"TIFF": "tif", "PNG": "png"}[kind]
    for i, values in enumerate(images):
        (path / f"{i:02}.{suffix}").write_bytes(saved(values, kind))
    return open_source(config(f"folder:{path}", image_size=8), "train")


def shown(source, size=8):
    """One channel of the images as evaluation sees them."""
    return next(iter(feed.eval_feed(source, [np.arange(source.num_examples)], size)))[0][..., 0]


RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (6, 8, 8), dtype=np.uint8)
BYTES[:, 0, :2] = 0, 255


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_of_k_bits_the_upper_eight_are_left(bits):
    values = np.arange(2**bits)
    np.testing.assert_array_equal(decoding.scaled(values, 0, 2**bits - 1), values >> (bits - 8))


def test_floats_made_of_bytes_are_those_bytes_again():
    values = np.arange(256)
    for dtype in (np.float32, np.float64):
        one = values.astype(dtype) / dtype(255)
        np.testing.assert_array_equal(decoding.scaled(one, 0, 1), values)
        np.testing.assert_array_equal(decoding.scaled(values.astype(dtype), 0, 255), values)
    odd = np.array([np.nan, -np.inf, -5, np.inf, 7, 0.5], np.float32)
    assert decoding.scaled(odd, 0, 1).tolist() == [0, 0, 0, 255, 255, 128]
    hounsfield = np.array([-2000, -1024, 0, 1023, 3071, 9000])
    assert decoding.scaled(hounsfield, -1024, 3071).tolist() == [0, 0, 64, 127, 255, 255]


@pytest.mark.parametrize(
    "low, high, whole, expected",
    [
        (0, 200, True, ("0:255", True)), (3, 256, True, ("0:1023", True)),
        (0, 1023, True, ("0:1023", True)), (0, 4000, True, ("0:4095", True)),
        (0, 4096, True, ("0:16383", True)), (0, 65535, True, ("0:65535", True)),
        (0, 2**31 - 256, True, ("0:2147483647", True)), (0, 0, True, ("0:255", True)),
        (-1024, 3071, True, ("-1024:3071", False)), (-3, -3, True, ("-3:-2", False)),
        (0.0, 1.0, False, ("0:1", True)), (0.25, 1.5, False, ("0:255", True)),
        (0.0, 255.0, False, ("0:255", True)), (-0.5, 1.25, False, ("-0.5:1.25", False)),
        (0.0, 300.5, False, ("0:300.5", False)),
    ],
)  # fmt: skip
def test_the_range_follows_from_the_values(low, high, whole, expected):
    assert survey.range_of([high, low], [high, high], whole) == expected


@pytest.mark.parametrize(
    "make, kind, value_range",
    [
        (lambda x: (x / np.float32(255)).astype(np.float32), "TIFF", "0:1"),
        (lambda x: x.astype(np.float32), "TIFF", "0:255"),
        (lambda x: x.astype(np.uint16) * 4 + 3, "PNG", "0:1023"),
        (lambda x: x.astype(np.uint16) * 16, "PNG", "0:4095"),
        (lambda x: x.astype(np.uint16) * 16, "TIFF", "0:4095"),
        (lambda x: x.astype(np.uint16) * 257, "PNG", "0:65535"),
        (lambda x: x.astype(np.uint16) * 257, "TIFF", "0:65535"),
        (lambda x: x.astype(np.int32) << 23, "TIFF", "0:2147483647"),
        (lambda x: x.astype(np.int32) - 128, "TIFF", "-128:127"),
    ],
)
def test_a_set_of_any_depth_gives_the_bytes_it_was_made_of(make, kind, value_range, tmp_path):
    source = folder(tmp_path, make(BYTES), kind)
    want = BYTES if value_range != "-128:127" else decoding.scaled(BYTES, 0, 255)
    (line,) = survey.look(source)
    assert source.decoding.value_range == value_range
    assert f"data.value_range={value_range})" in line and "6 were looked at" in line
    assert ("values outside are clipped" in line) == (value_range == "-128:127")
    np.testing.assert_array_equal(shown(source), want)
    how = open_source(config(f"folder:{tmp_path}", value_range="upper8"), "train").decoding
    before = np.stack([decode.decode(tf.constant(saved(x, kind)), how) for x in make(BYTES)])
    # only where all 16 bits or whole bytes were used was each image's own rule right
    assert (before[..., 0] == BYTES).all() == (value_range in ("0:255", "0:65535"))


def test_colours_of_sixteen_bits_follow_the_range():
    values = RNG.integers(0, 1024, (5, 7, 3), dtype=np.uint16)
    data = tf.io.encode_png(values)
    assert decode.deep_values(data.numpy()).shape == (5, 7, 3)
    found = decode.decode(data, Decoding("0:1023")).numpy()
    np.testing.assert_array_equal(found, values >> 2)
    for how in (Decoding(), Decoding("upper8"), Decoding("0:65535")):
        np.testing.assert_array_equal(decode.decode(data, how).numpy(), values >> 8)
    eight = tf.constant(saved(BYTES[0], "PNG"))  # of 8 bits nothing changes
    found = decode.decode(eight, Decoding("0:1023")).numpy()
    np.testing.assert_array_equal(found[..., 0], BYTES[0])


def test_two_images_of_one_set_are_scaled_alike(tmp_path):
    """The rule before was each image's own: one with a maximum below 256 kept its values."""
    ramp = np.linspace(0, 1, 64).reshape(8, 8)
    images = [(ramp * top).astype(np.uint16) for top in (250, 300, 1000)]
    new = shown(folder(tmp_path, images)).astype(int)
    assert new.max((1, 2)).tolist() == [250 >> 2, 300 >> 2, 1000 >> 2]
    old = [decode.upper_8(x).max() for x in images]
    assert old == [250, 1, 3]


def test_knn_on_floats_is_that_on_the_same_pictures_in_bytes(tmp_path):
    """Two kinds of noisy stripes: 50 % is chance, and what black images give."""
    rng = np.random.default_rng(1)
    stripes = np.where(np.arange(8) % 2, 60, 180)
    kinds = [np.broadcast_to(stripes, (8, 8)), np.broadcast_to(stripes[:, None], (8, 8))]
    labels = np.arange(80) % 2
    bytes_ = np.stack([kinds[k] + rng.normal(0, 40, (8, 8)) for k in labels]).clip(0, 255)
    bytes_ = bytes_.astype(np.uint8)

    def score(images):
        x = images.reshape(80, -1)
        return knn.knn_top1(x[:60], labels[:60], x[60:], labels[60:], 2, center=True)

    source = folder(tmp_path, bytes_ / np.float32(255))
    assert score(shown(source)) == score(bytes_) == 1.0
    old = config(f"folder:{tmp_path}", image_size=8, value_range="upper8")
    black = shown(open_source(old, "train"))
    assert black.max() <= 1 and score(black) <= 0.65


def test_a_value_range_that_is_given_decides(tmp_path):
    folder(tmp_path, [BYTES[0].astype(np.uint16) * 4])
    c = config(f"folder:{tmp_path}", image_size=8, value_range="-100:155.0")
    source = open_source(c, "train")
    assert survey.look(source) == [] and source.decoding.bounds == (-100, 155)
    np.testing.assert_array_equal(
        shown(source)[0], np.minimum((BYTES[0] * 4.0 + 100) * 256 / 255, 255).astype(np.uint8)
    )


@pytest.mark.parametrize("text", ["", "1", "5:5", "9:1", "0:inf", "0:1:2", "a:b", "12 bits"])
def test_ranges_that_are_none(text):
    with pytest.raises(UserError, match="expected 'auto', or LOW:HIGH with LOW below HIGH"):
        open_source(config("embedded", value_range=text), "train")


def test_the_decoder_of_jpegs_is_checked():
    with pytest.raises(UserError, match=r"data.jpeg is 'quick'; expected 'exact' \(as Pillow"):
        open_source(config("embedded", jpeg="quick"), "train")


def test_shards_parts_and_tfds_follow_the_same_rule(tmp_path):
    deep = BYTES.astype(np.uint16) * 16
    source = folder(tmp_path / "photos", deep, "PNG")
    c = tiny.config("simclr", data__source=f"folder:{tmp_path}/photos", data__test_split="")
    shard_writer.write(c.data, tmp_path / "shards")
    copy = open_source(config(f"shards:{tmp_path}/shards", image_size=8), "train")
    np.testing.assert_array_equal(shown(copy), shown(source))
    part = subset.select(copy, np.array([2, 0]))
    assert part.decoding.value_range == copy.decoding.value_range == "0:4095"
    np.testing.assert_array_equal(shown(part), BYTES[[2, 0]])


def test_sets_that_are_pixels_already_are_left_alone(tmp_path):
    write_tfds(tmp_path)
    c = config("tfds:tiny", dir=str(tmp_path))
    for whole in (tiny.config("simclr"), tiny.config("simclr", data=c)):
        source = open_source(whole.data, "train")
        assert source.kind == "pixels"
        found, lines = survey.decide_value_range(whole.data, source)
        assert (found, lines, whole.data.value_range) == ("auto", [], "auto")


def test_a_stream_is_looked_at_too(tmp_path):
    write_tfds(tmp_path, shape=(None, None, 3))
    c = config("tfds:tiny", dir=str(tmp_path), cache_gib=0.0)
    source = open_source(c, "train")
    assert source.kind == "stream" and survey.look(source) == []
    assert source.decoding.value_range == "0:65535"


def test_the_training_images_decide_and_the_run_keeps_it(tmp_path):
    source = folder(tmp_path, BYTES.astype(np.uint16) * 4, "PNG")
    c = tiny.config("simclr", data__source=f"folder:{tmp_path}")
    kept = c.copy_and_resolve_references()
    kept.data.value_range, _ = survey.decide_value_range(c.data, source)
    assert (kept.data.value_range, c.data.value_range) == ("0:1023", "auto")
    on_disk = json.loads(json.dumps(configs.as_dict(kept)))
    again, newer = configs.as_begun(c, on_disk)
    assert (again.data.value_range, newer) == ("0:1023", {})
    configs.check_same_run(on_disk, configs.as_dict(again), "x")
    # a run from before: each image by itself, and the quick decoder
    for name in ("value_range", "jpeg", "exif_rotation"):
        del on_disk["data"][name]
    old, newer = configs.as_begun(c, on_disk)
    assert newer == {"data.value_range": "upper8", "data.jpeg": "fast"}
    how = decoding.of(old.data)
    assert (how.bounds, how.dct_method, how.exif_rotation) == (None, "INTEGER_FAST", False)
    configs.check_same_run(on_disk, configs.as_dict(old), "x")


def test_other_data_are_read_by_rules_of_their_own(tmp_path, monkeypatch):
    """Whatever path leads to them, the run's own are not others."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    own = f"folder:{tmp_path / 'a'}"

    def read(source, value_range="0:4095", labels="none", **given):
        data = config(own, value_range=value_range, labels=labels)
        s = configs.eval_config()
        s.update(given)
        pretrained.set_source(s, data, source)
        return data.value_range, data.labels, data.source

    for same in (own, own + "/", "folder:a", "folder:./a/../a"):
        assert read(same) == ("0:4095", "none", same)
    assert read("folder:b") == ("auto", "auto", "folder:b")
    assert read("folder:b", "upper8", "legacy") == ("upper8", "auto", "folder:b")
    assert read(own, value_range="0:1023") == ("0:1023", "none", own)
    assert read("embedded", labels="folders")[1] == "auto"


def test_what_is_given_counts_for_any_data():
    data, s = config("folder:a", value_range="0:4095"), configs.eval_config()
    s.value_range, s.labels = "0:1", "folders"
    for source in ("folder:a", "folder:b"):
        pretrained.set_source(s, data, source)
        assert (data.value_range, data.labels) == ("0:1", "folders")


def test_images_of_nearly_one_colour_are_counted(tmp_path):
    dark = [np.full((8, 8), i, np.uint16) + (np.arange(8) % 3 == 0) for i in range(10)]
    dark[0][0, 0] = 4000  # of the ten only this one has contrast
    lines = survey.look(folder(tmp_path, dark))
    assert "9 of 10 images that were looked at are nearly one colour" in lines[1]
    assert "(now 0:4095)" in lines[1]
    pixels = ArraySource("x", "train", "pixels", 20, 0, (), np.zeros(20), (8, 8),
                                 images=np.repeat(BYTES[:1, ..., None], 20, 0))  # fmt: skip
    assert survey.look(pixels) == []
    pixels.images[::2] = 7
    (line,) = survey.look(pixels)
    assert "10 of 20 images" in line


def test_signed_values_of_other_data_have_the_range_of_the_run_where_they_are_inside(tmp_path):
    """The least and greatest of a sample are no scale; that of the images of training is."""
    signed = [(BYTES[0].astype(np.int32) - 128) * 4]
    for known, found in (
        ("-1024:3071", "-1024:3071"), ("-500:3071", "-512:508"), ("upper8", "-512:508"),
    ):  # fmt: skip
        source = folder(tmp_path, signed)
        (line,) = survey.look(source, known)
        assert source.decoding.value_range == found and f"data.value_range={found})" in line
    source = folder(tmp_path / "usual", [BYTES[0].astype(np.uint16) * 4])
    survey.look(source, "-1024:3071")
    assert source.decoding.value_range == "0:1023"


def test_transparency_is_no_value():
    values = np.full((4, 4, 4), 65535, np.uint16)
    values[..., :3] = RNG.integers(0, 4096, (4, 4, 3))
    found = decode.deep_values(tf.io.encode_png(values).numpy())
    np.testing.assert_array_equal(found, values[..., :3])


def test_the_sample_is_spread_over_the_set(tmp_path, monkeypatch):
    """Folders are sorted by class: of the first files only, the later classes would not count."""
    monkeypatch.setattr(survey, "SAMPLE", 4)
    monkeypatch.setattr(survey, "_DEEP", (2, 2))
    plain = [BYTES[0]] * 8
    source = folder(tmp_path, [*plain, *(BYTES[:4].astype(np.uint16) * 16)], "PNG")
    survey.look(source)
    assert source.decoding.value_range == "0:4095"


def test_integers_among_floats_are_said_and_bad_files_are_passed_over(tmp_path):
    source = folder(tmp_path, [BYTES[0].astype(np.uint16) * 16, BYTES[1] / np.float32(255)])
    (tmp_path / "02.tif").write_bytes(b"no image")
    source = open_source(config(f"folder:{tmp_path}"), "train")
    line = survey.look(source)[0]
    assert "1 have floats and the others integers: give LOW:HIGH" in line


def test_a_run_goes_on_with_the_range_that_it_began_with(tmp_path, capsys):
    """Written into its config.json, of all its splits, whatever the files have become meanwhile."""
    for split in ("train", "test"):
        folder(tmp_path / "x" / split, np.repeat(BYTES, 4, 0).astype(np.uint16) * 16, "PNG")
    fields = {"augment__jitter": 0.0, "augment__grey": 0.0, "augment__blur": 0.0}  # traced sooner
    c = toy.config(data__source=f"folder:{tmp_path}/x", data__test_split="test", **fields)
    toy.train_until(5, c, tmp_path / "run")
    assert capsys.readouterr().err.count("(data.value_range=0:4095)") == 1
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["value_range"] == (
        "0:4095"
    )
    assert c.data.value_range == "auto"
    first = tmp_path / "x" / "train" / "00.png"
    first.write_bytes(saved(BYTES[0].astype(np.uint16) * 256, "PNG"))
    toy.train(c, tmp_path / "run")
    assert "value_range" not in capsys.readouterr().err
    c.data.value_range = "0:65535"
    with pytest.raises(UserError, match=r"another config: data.value_range"):
        toy.train(c, tmp_path / "run")
