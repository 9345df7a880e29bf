"""Scenes as a data path, and as shards."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sfumato.data.datasets import ImageFolder
from sfumato.data.order import Order
from sfumato.data.scenes.draw import render
from sfumato.data.scenes.sampling import draw_scenes
from sfumato.data.scenes.source import SceneSet, write_scenes
from sfumato.data.store import ShardStore


def test_a_data_path_draws_as_it_reads():
    folder = ImageFolder("scenes:40,size=32,seed=5")
    sample = folder.draw(Order(40).take(3, 4))[2]
    picture = render(draw_scenes("train", 40, seed=5), 32)[sample.index]
    assert (sample.image.permute(1, 2, 0).numpy() == picture).all()
    assert folder.texts[sample.index] == sample.text
    assert folder.sizes[0] == (32, 32)
    assert sample.fields["split"] == "train"
    assert sample.name == f"scenes:train,size=32,seed=5/{sample.index}"


def test_shards_hold_the_same_pictures_and_facts(tmp_path, monkeypatch):
    monkeypatch.setattr("sfumato.data.scenes.source.SHARD", 8)
    monkeypatch.setattr("sfumato.data.scenes.source.PART", 3)
    wanted = SceneSet(count=20, size=32, seed=5, split="combinations")
    told = []
    write_scenes(tmp_path / "set", wanted, progress=lambda *done: told.append(done))
    assert told[-1] == (20, 20)
    assert len(list((tmp_path / "set").iterdir())) == 3
    shards = ImageFolder(tmp_path / "set", store=ShardStore(tmp_path / "store"))
    direct = ImageFolder("scenes:20,size=32,seed=5,split=combinations")
    assert shards.texts == direct.texts
    assert (shards.images() == direct.images()).all()
    scenes, captions = wanted.scenes(0, 20)
    for entry, scene, caption in zip(shards.entries, scenes.unpack(), captions, strict=True):
        assert entry.fields["difficulty"] == caption.difficulty
        facts = json.loads(json.dumps(entry.fields))
        assert facts["scene"]["objects"][0]["color"] == scene.objects[0].color
        assert facts["facts"]["phrases"][0]["count"] == caption.phrases[0].count


def test_the_same_arguments_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_scenes(tmp_path / name, SceneSet(count=3, size=32))
    assert (tmp_path / "a/scenes-00000.tar").read_bytes() == (tmp_path / "b/scenes-00000.tar").read_bytes()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("scenes:", "write scenes:COUNT"),
        ("scenes:many", "write scenes:COUNT"),
        ("scenes:10,side=32", "write scenes:COUNT"),
        ("scenes:10,size", "write scenes:COUNT"),
        ("scenes:0", "0 scenes; allowed: at least 1"),
        ("scenes:10,size=48", "scenes of 48 pixels; allowed: 32, 64, 128"),
        ("scenes:10,split=test", "unknown split 'test' of scenes"),
    ],
)
def test_paths_that_say_nothing(path, message):
    with pytest.raises(ValueError, match=message) as caught:
        ImageFolder(path)
    assert "\n" not in str(caught.value)


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "note").write_text("mine")
    with pytest.raises(ValueError, match="is not an empty folder"):
        write_scenes(tmp_path, SceneSet(count=1))
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


@pytest.mark.slow
def test_ten_thousand_are_drawn_in_time():
    """Process time of one core, so that other work on the machine does not count; 20 s are promised."""
    from time import process_time

    start = process_time()
    scenes, captions = SceneSet(count=10_000).scenes(0, 10_000)
    pictures = render(scenes, 64)
    assert process_time() - start < 20
    assert len(captions) == len(pictures) == 10_000
    assert np.ptp(pictures) > 200
