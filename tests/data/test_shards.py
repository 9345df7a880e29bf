"""WebDataset shards."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.core.image import from_pil, load
from sfumato.data import shards as module
from sfumato.data.datasets import ImageFolder
from sfumato.data.order import Order
from sfumato.data.shards import read_shards
from sfumato.data.store import ShardError, ShardStore


@pytest.fixture
def store(tmp_path):
    return ShardStore(tmp_path / "store")


def told(entries):
    return [(e.file.name, e.text, e.label, e.size, e.block, dict(e.fields)) for e in entries]


def test_members_of_a_key(tmp_path, write_shard, picture, store):
    first = {
        "d/001.json": json.dumps({"text": "no", "caption": "kept", "label": 5, "url": "u"}),
        "d/001.txt": " a red\n heart ",
        "d/001.cls": "2\n",
        "d/001.PNG": picture(1, 4, 6),
        "d/001.seg.png": b"another field",
        "d/._001.jpg": b"of another file system",
        "./002.webp": picture(2, 5, 5, "WEBP"),
        "note.txt": "a key without a picture",
    }
    second = {"1.jpg": picture(3, kind="JPEG"), "1.json": '{"caption": "blue", "label": 0}'}
    names = [str(write_shard(tmp_path / f"{i}.tar", m)) for i, m in enumerate((first, second))]
    entries, classes = read_shards(names, store)
    assert told(entries) == [
        ("d/001.PNG", "a red heart", 2, (4, 6), 0, {"caption": "kept", "url": "u"}),
        ("./002.webp", None, None, (5, 5), 0, {}),
        ("1.jpg", "blue", 0, (8, 8), 1, {"caption": "blue"}),
    ]
    assert classes == ()
    assert str(entries[0].file) == f"{tmp_path}/0.tar/d/001.PNG"
    assert entries[0].file.read_bytes() == first["d/001.PNG"]
    assert entries[2].file.read_bytes() == second["1.jpg"]


def test_class_names_are_numbered_over_all_shards(tmp_path, write_shard, picture, store):
    names = [
        str(write_shard(tmp_path / f"{i}.tar", {"a.png": picture(i), "a.cls": name}))
        for i, name in enumerate(["zebra", "ape", "zebra"])
    ]
    entries, classes = read_shards(names, store)
    assert classes == ("ape", "zebra")
    assert [e.label for e in entries] == [1, 0, 1]
    write_shard(tmp_path / "2.tar", {"a.png": picture(2), "a.cls": "7"})
    with pytest.raises(ValueError, match=r"2\.tar/a\.png: label 7 must be a str like those before it"):
        read_shards(names, store)


def test_the_index_is_made_once_and_again_after_a_change(tmp_path, write_shard, picture, store, monkeypatch):
    name = str(write_shard(tmp_path / "0.tar", {"a.png": picture(1), "a.txt": "one"}))
    scanned, scan = [], module._scan
    monkeypatch.setattr(module, "_scan", lambda *a: scanned.append(a[0]) or scan(*a))
    first = told(read_shards([name], store)[0])
    assert told(read_shards([name], store)[0]) == first
    assert scanned == [name]
    write_shard(tmp_path / "0.tar", {"a.png": picture(1), "a.txt": "longer", "b.png": picture(2)})
    assert [row[1] for row in told(read_shards([name], store)[0])] == ["longer", None]
    for path in store.folder.glob("*.json"):
        path.write_text(path.read_text()[:20])
    assert len(read_shards([name], store)[0]) == 2
    assert scanned == [name] * 3


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"b.txt": b"\xff\xfe\xff"}, r"its \.txt is not UTF-8 text"),
        ({"b.json": "{"}, r"its \.json is not JSON: .* at column 2"),
        ({"b.json": "[]"}, r"its \.json is no JSON object"),
        ({"b.json": '{"caption": 3}'}, "its caption must be a string, not 3"),
        ({"b.jpg": b"x"}, "its key occurs twice"),
    ],
)
def test_a_malformed_sample_counts_as_damaged(tmp_path, write_shard, picture, store, members, reason):
    path = write_shard(tmp_path / "0.tar", {"a.png": picture(1), "b.png": picture(2), **members})
    data = ImageFolder(path, store=store)
    assert [s.index for s in data.draw(Order(2).take(0, 2))] == [0, 0]
    assert list(data.skipped) == [f"{path}/b.png"]
    with pytest.raises(ValueError, match=rf"cannot use the picture .*0\.tar/b\.png: {reason}"):
        data[1]


def test_pictures_are_those_of_a_folder(tmp_path, write_shard, store):
    """Orientation and alpha too: one decoder for both."""
    folder = tmp_path / "folder"
    folder.mkdir()
    noise = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise.integers(0, 256, (4, 8, 3), dtype=np.uint8)).save(folder / "a.jpg", exif=exif)
    Image.fromarray(noise.integers(0, 256, (5, 8, 4), dtype=np.uint8)).save(folder / "b.png")
    members = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    data = ImageFolder(write_shard(tmp_path / "s" / "0.tar.gz", members).parent, store=store)
    plain = ImageFolder(folder)
    for one, other in zip(data, plain, strict=True):
        assert torch.equal(one.image, other.image)
        assert one.size == other.size
    assert [e.size for e in data.entries] == [(8, 4), (5, 8)]


def test_draws_from_compressed_and_plain_shards(tmp_path, write_shard, picture, store):
    for i, ending in enumerate(("tar", "tgz", "tar.gz")):
        members = {f"{k}.png": picture(10 * i + k) for k in range(4)}
        write_shard(tmp_path / "set" / f"{i}.{ending}", members)
    data = ImageFolder(tmp_path / "set" / "*", store=store)
    assert len(data) == 12
    samples = data.draw(Order(12, seed=3).take(5, 12))
    for sample in samples:
        shard, key = divmod(sample.index, 4)
        wanted = tmp_path / "one.png"
        wanted.write_bytes(picture(10 * shard + key))
        assert torch.equal(sample.image, from_pil(load(wanted)))


def test_damaged_pictures_in_shards_are_skipped_and_listed(tmp_path, write_shard, picture, store):
    members = {f"{k}.png": picture(k) if k != 2 else picture(k)[:70] for k in range(5)}
    data = ImageFolder(write_shard(tmp_path / "0.tar", members), store=store)
    assert sorted(s.index for s in data.draw(Order(5).take(0, 5))) == [0, 1, 3, 3, 4]
    assert list(data.skipped) == [f"{tmp_path}/0.tar/2.png"]


@pytest.mark.parametrize("cut", [700, 1600, 512 * 9])
def test_a_shard_that_is_cut_short_is_an_error(tmp_path, write_shard, picture, store, cut):
    """Not a shorter data set: tarfile alone takes some of these for the end."""
    path = write_shard(tmp_path / "0.tar", {f"{k}.png": picture(k) for k in range(8)})
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ShardError, match=r"1 of 1 shards cannot be read: .*0\.tar is damaged: .*again"):
        read_shards([str(path)], store)


def test_damage_between_members_is_an_error(tmp_path, write_shard, picture, store):
    path = write_shard(tmp_path / "0.tar", {f"{k}.png": picture(k) for k in range(3)})
    data = bytearray(path.read_bytes())
    data[1024:1034] = b"\xff" * 10  # in the header of the second member
    path.write_bytes(data)
    with pytest.raises(ShardError, match="what follows is no header, at byte 1024"):
        read_shards([str(path)], store)


def test_many_damaged_shards_are_counted_and_ten_named(tmp_path, write_shard, picture, store):
    names = [str(tmp_path / f"{i:02d}.tar") for i in range(12)]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    names.append(str(write_shard(tmp_path / "good.tar", {"a.png": picture(1)})))
    with pytest.raises(ShardError, match=r"12 of 13 shards cannot be read") as error:
        read_shards(names, store)
    said = str(error.value)
    assert "09.tar" in said
    assert "10.tar" not in said
    assert said.endswith("(and 2 more)")


def test_no_pictures(tmp_path, write_shard, store):
    path = write_shard(tmp_path / "0.tar", {"a.txt": "only words"})
    with pytest.raises(
        ValueError, match=r"the 1 shards, the first is .*0\.tar, hold no pictures; allowed: \.avif"
    ):
        read_shards([str(path)], store)


def test_a_shard_that_vanishes_stops_the_run(tmp_path, write_shard, picture, store):
    path = write_shard(tmp_path / "0.tar", {"a.png": picture(1)})
    data = ImageFolder(path, store=store)
    path.unlink()
    with pytest.raises(ShardError, match="cannot read the shard"):
        data.draw(Order(1).take(0, 1))
    assert not data.skipped
