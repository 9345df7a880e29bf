"""The report on an image folder."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from sfumato.data.check import check
from sfumato.data.store import ShardStore


def noise(seed, height=8, width=6, channels=3):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    )


@pytest.fixture
def folder(tmp_path):
    noise(0).save(tmp_path / "a.png")
    noise(1).save(tmp_path / "b.jpg")
    noise(2, channels=4).save(tmp_path / "c.png")
    noise(0).save(tmp_path / "d.bmp")  # the picture of a.png
    shutil.copy(tmp_path / "a.png", tmp_path / "e.png")
    (tmp_path / "f.png").write_bytes((tmp_path / "a.png").read_bytes()[:80])
    (tmp_path / "g.jpg").write_text("<html>")
    noise(3, 4, 4).save(tmp_path / "h.png")
    (tmp_path / "a.txt").write_text("one")
    return tmp_path


def test_findings(folder):
    seen = []
    report = check(folder, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 8) for i in range(1, 9)]
    assert report.count == 8
    assert report.sizes == {"6x8": 5, "4x4": 1}
    assert report.formats == {"PNG RGB": 3, "JPEG RGB": 1, "PNG RGBA": 1, "BMP RGB": 1}
    assert report.uncaptioned == ("b.jpg", "c.png", "d.bmp", "e.png", "f.png", "g.jpg", "h.png")
    assert set(report.failed) == {"f.png", "g.jpg"}
    assert "truncated" in report.failed["f.png"]
    assert report.failed["g.jpg"] == "not a picture of a known format"
    assert report.same_file == (("a.png", "e.png"),)
    assert report.same_pixels == (("a.png", "d.bmp"),)
    assert report.unlisted == ()
    assert not report.ok


def test_text(folder):
    lines = check(folder).lines(limit=2)
    assert lines[0] == f"{folder}: 8 pictures, 6 readable"
    assert lines[1:4] == ["sizes (2):", "  6x8: 5", "  4x4: 1"]
    assert "  ... and 2 more" in lines
    assert "without caption (7):" in lines
    assert "  a.png, e.png" in lines
    assert not any("\n" in line for line in lines)


def test_is_json(folder):
    report = check(folder).as_dict()
    assert json.loads(json.dumps(report))["same_file"] == [["a.png", "e.png"]]


def test_metadata(folder):
    rows = [
        {"file_name": n, "text": "x", "label": c}
        for n, c in (("a.png", "cat"), ("h.png", "dog"), ("z.png", "dog"))
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = check(folder)
    assert report.count == 3
    assert report.failed == {"z.png": "the metadata names it but there is no such file"}
    assert report.unlisted == ("b.jpg", "c.png", "d.bmp", "e.png", "f.png", "g.jpg")
    assert report.classes == {"cat": 1, "dog": 2}


def test_sizes_are_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(0, 10, 20).save(tmp_path / "a.jpg", exif=exif)
    report = check(tmp_path)
    assert report.sizes == {"10x20": 1}
    assert report.ok


def test_wrong_folder(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        check(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no pictures"):
        check(tmp_path)


def test_shards(tmp_path, write_shard, picture):
    members = {"a.png": picture(1), "a.txt": "one", "a.cls": "3", "b.png": picture(2)[:60]}
    write_shard(tmp_path / "s" / "0.tar", members)
    write_shard(
        tmp_path / "s" / "1.tar.gz", {"c.jpg": picture(3, kind="JPEG"), "d.png": picture(1), "d.json": "["}
    )
    write_shard(tmp_path / "s" / "2.tar", {"e.png": picture(1), "e.cls": "0"})
    report = check(tmp_path / "s", store=ShardStore(tmp_path / "store"))
    assert report.count == 5
    assert report.sizes == {"8x8": 3}
    assert report.classes == {"0": 1, "3": 1}
    assert list(report.failed) == ["0.tar/b.png", "1.tar.gz/d.png"]
    assert report.failed["1.tar.gz/d.png"].startswith("its .json is not JSON")
    assert "truncated" in report.failed["0.tar/b.png"]
    assert report.uncaptioned == ("0.tar/b.png", "1.tar.gz/c.jpg", "1.tar.gz/d.png", "2.tar/e.png")
    assert report.same_file == (("0.tar/a.png", "2.tar/e.png"),)
    assert report.unlisted == ()
