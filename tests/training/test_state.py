from __future__ import annotations

import json
import os

import pytest
import torch

from sfumato.training.state import Checkpoints


def test_round_trip_and_only_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    assert checkpoints.load() is None
    for images in (100, 20, 300):
        checkpoints.save({"images": images, "w": torch.full((3,), float(images))}, images)
    assert [int(p.name) for p in checkpoints.paths()] == [100, 300]
    state = checkpoints.load()
    assert state["images"] == 300
    assert torch.equal(state["w"], torch.full((3,), 300.0))


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for images in (1, 2, 3):
        checkpoints.save({"images": images}, images)
    newest = checkpoints.paths()[-1] / "state.pt"
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    newest.write_bytes(damaged)
    assert checkpoints.load()["images"] == 2
    second = checkpoints.paths()[1] / "state.pt"
    second.write_bytes(second.read_bytes()[:-10])
    assert checkpoints.load()["images"] == 1


def test_a_save_that_dies_before_the_rename_leaves_the_last_one(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save({"images": 1}, 1)

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ValueError, match="No space left on device"):
        checkpoints.save({"images": 2}, 2)
    assert [int(p.name) for p in checkpoints.paths()] == [1]
    assert not list(tmp_path.glob(".writing-*"))
    assert checkpoints.load()["images"] == 1


def test_a_folder_without_manifest_is_not_a_checkpoint_and_no_reason_to_begin_again(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save({"images": 5}, 5)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["images"] == 5
    (path / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint .* can be used .*it has no manifest\.json") as error:
        checkpoints.load()
    assert "\n" not in str(error.value)
    checkpoints.save({"images": 9}, 9)
    assert checkpoints.load() == {"images": 9}


def test_nothing_but_tensors_and_plain_values_is_ever_loaded(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({"bad": pytest.raises}, 1)
    with pytest.raises(Exception, match="Weights only load failed"):
        checkpoints.load()


def test_keeping_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpoints(tmp_path, keep=0)
