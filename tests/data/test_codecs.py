"""Which files can be read here: what Pillow's build has, and HEIC with pillow-heif."""

import io
import sys
import types

import numpy as np
import pytest
from PIL import Image, features
from test_sources import picture

from common.data.images import decoding


@pytest.fixture(autouse=True)
def asked_anew():
    decoding.readable_suffixes.cache_clear()
    decoding.register_heif.cache_clear()
    yield
    decoding.readable_suffixes.cache_clear()
    decoding.register_heif.cache_clear()


def test_pillow_says_that_it_opens_them():
    """Its own table of extensions as oracle; where its codec is absent, it has no entry."""
    known = Image.registered_extensions()
    readable = {s for s, kind in known.items() if kind in Image.OPEN}
    for suffix in decoding.readable_suffixes():
        assert suffix in readable or suffix in (".heic", ".heif"), suffix
    assert {".jfif", ".jpe", ".jp2"} <= readable
    assert (".jp2" in decoding.readable_suffixes()) == features.check("jpg_2000")


def test_what_a_build_lacks_is_not_readable(monkeypatch):
    monkeypatch.setattr(features, "check", lambda name: name == "webp")
    found = decoding.readable_suffixes()
    assert ".webp" in found and not {".avif", ".jp2", ".j2k"} & set(found)
    decoding.readable_suffixes.cache_clear()
    monkeypatch.setattr(features, "modules", {})  # a Pillow that has not heard of AVIF
    monkeypatch.setattr(features, "check", lambda name: True)
    assert ".avif" not in decoding.readable_suffixes()


def test_heic_where_its_library_is(monkeypatch):
    calls = []
    heif = types.SimpleNamespace(register_heif_opener=lambda: calls.append(1))
    monkeypatch.setitem(sys.modules, "pillow_heif", heif)
    assert {".heic", ".heif"} <= set(decoding.readable_suffixes())
    assert decoding.register_heif() and calls == [1]
    for cached in (decoding.readable_suffixes, decoding.register_heif):
        cached.cache_clear()
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert not {".heic", ".heif"} & set(decoding.readable_suffixes())
    assert not decoding.register_heif()


@pytest.mark.parametrize(
    ("suffix", "kind", "options"),
    [(".jp2", "JPEG2000", {}), (".avif", "AVIF", {}), (".heic", "HEIF", {"quality": 90}),
     (".jfif", "JPEG", {})],
)  # fmt: skip
def test_what_is_readable_is_decoded(suffix, kind, options):
    from common.data.images import decode

    if suffix not in decoding.readable_suffixes():
        pytest.skip(f"no codec for {suffix} on this machine")
    buffer = io.BytesIO()
    Image.fromarray(picture(1)).save(buffer, kind, **options)
    want = np.asarray(Image.open(io.BytesIO(buffer.getvalue())).convert("RGB"))
    found = decode.decode(decode.tf.constant(buffer.getvalue())).numpy()
    np.testing.assert_array_equal(found, want)
    assert np.abs(found.astype(int) - picture(1)).mean() < 8
