"""`config.json`: what is in it, and that one file reads and writes it."""

import json
import pathlib

import tiny

from common import config
from common.run import saved_config, workdir

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_a_run_writes_its_config_as_it_is_read_back(tmp_path):
    c = tiny.config("moco", data__source="fake")
    with workdir.claim(tmp_path, c) as (path, _):
        pass
    text = (tmp_path / "config.json").read_text()
    assert text == json.dumps(config.as_dict(c), indent=2) + "\n"
    assert list(json.loads(text))[:3] == ["method", "seed", "batch_size"]
    assert saved_config.load(path, tiny.METHODS) == c


def test_one_file_reads_and_writes_it():
    readers = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "common").rglob("*.py"))
        if '"config.json"' in path.read_text()
    ]
    assert readers == ["common/run/saved_config.py"]
