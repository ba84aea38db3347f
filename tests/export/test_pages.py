import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from geolrm_jax.export import pages
from geolrm_jax.export.files import written_whole


def decode(uri):
    head, data = uri.split(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_pictures_survive_embedding(rng):
    picture = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode(pages.data_uri(picture)), picture)


def test_to_uint8_rounds_and_clips():
    values = np.array([-0.5, 0.0, 0.5 / 255 + 1e-6, 0.5, 1.0, 7.0])
    np.testing.assert_array_equal(pages.to_uint8(values), [0, 0, 1, 128, 255, 255])
    with pytest.raises(ValueError, match="not finite"):
        pages.to_uint8(np.array([np.nan]))


def test_error_map_runs_from_black_to_white():
    reference = np.zeros((1, 4, 3), np.float32)
    image = np.array([0.0, 1 / 6, 1 / 3, 0.5], np.float32)[None, :, None].repeat(3, axis=2)
    np.testing.assert_array_equal(
        pages.error_map(image, reference)[0], [[0, 0, 0], [255, 0, 0], [255, 255, 0], [255, 255, 255]]
    )


def test_depth_map_shares_one_range_and_leaves_the_ground_white():
    depth = np.array([[[1.0, 2.0]], [[3.0, 9.0]]])
    shown = pages.depth_map(depth, np.array([[[1.0, 1.0]], [[1.0, 0.0]]]))[..., 0]
    near, middle, far, ground = shown.ravel().astype(int)
    assert near < middle < far < ground == 255 and abs(far - middle - (middle - near)) <= 1
    assert (pages.depth_map(depth, np.zeros_like(depth)) == 255).all()


def test_contact_sheet_places_every_picture(rng):
    a, b, c = rng.integers(0, 200, (3, 4, 6, 3), dtype=np.uint8)
    sheet = pages.contact_sheet([[a, b], [c]], gap=2)
    assert sheet.shape == (10, 14, 3)
    np.testing.assert_array_equal(sheet[:4, 8:], b)
    np.testing.assert_array_equal(sheet[6:, :6], c)
    assert (sheet[6:, 6:] == 255).all() and (sheet[4:6] == 255).all()
    with pytest.raises(ValueError, match=r"one size, got \[\(4, 5, 3\), \(4, 6, 3\)\]"):
        pages.contact_sheet([[a, b[:, :5]]])
    with pytest.raises(ValueError, match="got none"):
        pages.contact_sheet([[]])


class Balance(HTMLParser):
    """Every element that opens, closes, in order."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attributes):
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_page_is_well_formed_escaped_and_alone(tmp_path):
    picture = np.zeros((4, 4, 3), np.uint8)
    body = pages.table(["name", "dB"], [["<a & b>", "1.0"]]) + pages.figure(picture, 'view "3" <x>')
    pages.write_page(tmp_path / "a.html", "Title <1>", body, style=".x { color: red; }")
    text = (tmp_path / "a.html").read_text()
    parser = Balance()
    parser.feed(text)
    assert not parser.open
    assert "&lt;a &amp; b&gt;" in text and "Title &lt;1&gt;" in text and "view &quot;3&quot;" in text
    assert '<td class="number">1.0</td>' in text and "prefers-color-scheme: dark" in text
    assert not re.search(r'(src|href)="(?!data:)', text) and "http" not in text


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    with written_whole(path) as temporary:
        temporary.write_text("old")
        assert temporary.suffix == ".txt" and not path.exists()
    with pytest.raises(KeyError), written_whole(path) as temporary:
        temporary.write_text("new")
        raise KeyError
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["a.txt"]
