"""Fields that follow from the number of images: the rules by hand, and what config.json keeps."""

import json

import numpy as np
import pytest
import tiny
import toy
from PIL import Image

from common import config as configs
from common.config import base_config, section
from common.errors import UserError
from common.run import saved_config
from common.train import by_number
from configs import moco_photos
from moco_jax.method import MoCo


@pytest.mark.parametrize(
    ("images", "most", "multiple", "expected"),
    [
        (150, 64, 1, 32), (256, 64, 1, 32), (511, 64, 1, 32), (512, 64, 1, 64), (5000, 64, 1, 64),
        (5000, 1024, 1, 512), (10**6, 1024, 1, 1024), (20, 64, 1, 16), (1, 64, 1, 1),
        (None, 1024, 1, 1024), (300, 64, 8, 32), (300, 64, 24, 48), (5000, 100, 1, 64),
    ],
)  # fmt: skip
def test_the_batch_is_a_power_of_two_and_an_eighth_of_the_images(images, most, multiple, expected):
    assert by_number.batch_size(images, most, multiple) == expected


@pytest.mark.parametrize(
    ("images", "expected"),
    [(150, 200), (500, 200), (1_000, 100), (3_300, 30), (5_000, 20), (10**6, 20), (None, 20)],
)
def test_the_epochs_show_so_many_images_within_limits(images, expected):
    rule = section("auto", images=100_000, least_epochs=20, most_epochs=200)
    assert by_number.epochs(images, rule) == expected


@pytest.mark.parametrize(
    ("images", "batch", "expected"),
    [(150, 32, 128), (3_300, 64, 1024), (150, 256, 256), (10**6, 256, 65_536), (None, 64, 65_536)],
)
def test_the_queue_is_a_power_of_two_and_half_the_images(images, batch, expected):
    assert by_number.queue_length(images, batch) == expected


def test_what_is_given_stays_and_the_rest_follows_from_it():
    c = tiny.config("moco", batch_size=24, duration="auto", moco__queue_length=0)
    c.auto.update(batch_size=512, images=9_000, least_epochs=1)
    found = by_number.decide(c, 900, devices=8)
    assert (found.batch_size, found.duration, found.moco.queue_length) == (24, "10 epochs", 256)
    assert (c.duration, c.moco.queue_length) == ("auto", 0)  # a copy
    whole = tiny.config("moco")
    assert by_number.decide(whole, 900) is whole


def test_the_batch_can_be_split_among_devices_and_batch_norm_groups():
    c = tiny.config("moco", batch_size=0, model__bn_groups=3)
    assert by_number.decide(c, 900, devices=4).batch_size % 12 == 0
    run = tiny.prepared(tiny.config("moco", batch_size=0, moco__queue_length=0), devices=4)
    assert run.config.batch_size == 256 and run.config.moco.queue_length == 65_536


def test_values_that_stand_for_others_are_no_mistakes_and_are_replaced_once():
    c = tiny.config("moco", batch_size=0, duration="auto", moco__queue_length=0)
    configs.check(c)
    decided = by_number.decide(c, 900)
    saved, now = configs.as_dict(decided), configs.as_dict(c)
    assert configs.with_decided(now, saved) == saved
    begun, newer = configs.as_begun(c, saved)
    assert configs.as_dict(begun) == saved and not newer
    configs.check_same_run(now, saved, "w")  # of weights that were imported
    assert not configs.is_open("seed", 0) and not configs.is_open("batch_size", False)


@pytest.mark.parametrize(
    ("images", "groups", "words"),
    [
        (0, 1, "0 images to train on"),
        (1, 1, "1 image to train on (the others are held out, with data.test_split=auto): this "
         "recipe takes 2 at least, and learns something from 150 on"),
        (6, 8, "6 images to train on .*: this recipe takes 8 at least"),
    ],
)  # fmt: skip
def test_fewer_images_than_a_batch_can_be(images, groups, words):
    c = tiny.config("moco", batch_size=0, model__bn_groups=groups)
    with pytest.raises(UserError, match=words.replace("(", r"\(").replace(")", r"\)")):
        by_number.decide(c, images)
    assert by_number.decide(c, max(2, groups)).batch_size == max(2, groups)


def write_photos(folder, n, side=12):
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(n):
        pixels = rng.integers(0, 255, (side, side + 2, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")
    return folder


def test_a_folder_of_photographs_needs_only_its_path(tmp_path, capfd):
    """Trains, is stopped, resumes when the rules are others, and keeps what was decided."""
    photos = write_photos(tmp_path / "photos", 40)
    c = moco_photos.get_config("laptop")
    c.data.source = f"folder:{photos}"
    c.data.image_size, c.augment.size = 8, 8
    c.model.stages, c.model.width, c.head.dim = (1,), 4, 4
    c.auto.update(batch_size=32, images=60, least_epochs=1)
    c.evaluate.pictures, c.checkpoint.every = False, "1 step"
    toy.train_until(2, c, tmp_path / "run")
    saved = saved_config.read(tmp_path / "run")
    # 10 of 40 are held out, a power of two up to 30 is 16, and 60 images are two epochs
    assert saved["data"]["train_split"] == "train[:-10]"
    assert saved["data"]["test_split"] == "train[-10:]"
    assert (saved["batch_size"], saved["duration"]) == (16, "2 epochs")
    assert saved["moco"]["queue_length"] == 128
    c.auto.update(batch_size=8, images=10_000)
    summary = toy.train(c, tmp_path / "run")
    assert "30 images are few to learn from" in capfd.readouterr().err
    assert summary["steps"] == 2 and saved_config.read(tmp_path / "run") == saved | {
        "auto": saved["auto"]
    }


def test_older_runs_have_no_rule_and_need_none(tmp_path):
    c = toy.config()
    toy.train_until(3, c, tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    del saved["auto"], saved["data"]["shrink"]
    path.write_text(json.dumps(saved))
    toy.train(c, tmp_path)
    assert saved_config.load(tmp_path, {"simclr": toy.Toy}).data.shrink == 0


def test_the_methods_own_field_is_one_of_its_section():
    c = base_config("moco", MoCo.default_config())
    assert "queue_length" in c.moco and configs.is_open("moco.queue_length", 0)
