"""Runs, settings and pages for the tests of `--mode=embed`."""

import base64
import csv
import html
import html.parser
import io
import json
import os
import re

import numpy as np
import tiny
from ml_collections import ConfigDict
from PIL import Image

from common import config as configs
from common.evaluate import findings
from common.evaluate.page import build
from common.evaluate.pretrained import Pretrained


def eval_settings(**changes) -> ConfigDict:
    c = configs.eval_config()
    c.features = "untrained"
    for name, value in changes.items():
        section, _, last = name.rpartition("__")
        (c[section] if section else c)[last] = value
    return c


def make_run(workdir, **changes) -> None:
    """A workdir as a run leaves it, except for the checkpoint."""
    workdir.mkdir()
    c = tiny.config("simclr", **changes)
    (workdir / "config.json").write_text(json.dumps(configs.as_dict(c)))
    lines = [{"step": 0, "epoch": 0.0, "knn_top1": 0.25, "knn_top1_raw_pixels": 0.5}]
    lines[0] |= {"rankme": 4.25, "rankme_at_init": 4.25, "rankme_raw_pixels": 187.0}
    lines += [{"step": s, "epoch": s / 4, "loss": 3 / s, "knn_top1": s / 10} for s in (1, 2, 3)]
    lines[-1] |= {"rankme": 60.5, "view_agreement": 0.125}
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    results = {"mode": "knn", "top1": 0.125, "k": 3, "source": f"folder:{workdir}/x", "seed": 5}
    (workdir / "results.jsonl").write_text(json.dumps(results) + "\n{torn")


def write_images(folder, names, seed=0) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for name in names:
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        with open(os.path.join(os.fsencode(folder), os.fsencode(name)), "wb") as file:
            Image.fromarray(pixels).save(file, "PNG")


def reopened(opened, workdir, s) -> Pretrained:
    """The same encoder with other settings, as `pretrained.load` would open it."""
    c = opened.config.copy_and_resolve_references()
    with c.unlocked():
        c.data.source = s.source or c.data.source
        c.data.test_split = s.test_split or c.data.test_split
        c.data.on_corrupt = s.on_corrupt or c.data.on_corrupt
    return Pretrained(c, s, workdir, opened.mesh, opened.method, opened.state, 0)


class Page(html.parser.HTMLParser):
    """The elements of a page: `(tag, attributes)` and the text of scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.scripts, self.text, self._inside = [], [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = tag == "script"
        if self._inside:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        if self._inside:
            self.scripts[-1] += data
        else:
            self.text += data


def write_page(path, run, source, embedded, points, clusters=0, queries=()) -> findings.Findings:
    found = findings.find(source, embedded, run.image_size, 0, clusters, list(queries))
    drawn = build.draw(source, embedded, found, points, 0)
    build.write(path, run, source, embedded, found, drawn)
    return found


def pictures_on(page, section=("neighbours", "views")) -> list[Image.Image]:
    """Those of single images in some sections, in order; the curves are not among them."""
    sources, inside = [], ""
    for tag, a in page.elements:
        inside = a.get("id", "") if tag == "section" else inside
        if tag == "img" and inside in section:
            sources.append(a["src"])
    return [Image.open(io.BytesIO(base64.b64decode(s.partition(",")[2]))) for s in sources]


def shown(text, section):
    """`(name, note)` of the cards of a section, in order."""
    part = re.search(rf'<section id="{section}">.*?</section>', text, re.S)[0]
    cards = re.findall(r"<figure.*?</figure>", part, re.S)
    names = [html.unescape(re.search(r'<span title="([^"]*)"', card)[1]) for card in cards]
    return [
        (n, (re.findall("<b>(.*?)</b>", c) or [""])[0]) for n, c in zip(names, cards, strict=True)
    ]


def rows_of(path):
    data = path.read_bytes()
    assert data.startswith(b"\xef\xbb\xbf")  # for Excel
    return list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline="")))
