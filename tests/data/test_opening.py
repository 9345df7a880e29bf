"""Folder or shards."""

from __future__ import annotations

import pytest

from sfumato.data.opening import open_pictures
from sfumato.data.store import ShardStore


def test_folders_and_shards(tmp_path, write_shard, picture):
    store = ShardStore(tmp_path / "store")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.png").write_bytes(picture(1))
    write_shard(tmp_path / "p" / "packed.tar", {"b.png": picture(2)})
    write_shard(tmp_path / "s" / "0.tar", {"c.png": picture(3)})
    assert [str(e.file) for e in open_pictures(tmp_path / "p", store)[0]] == [f"{tmp_path}/p/a.png"]
    assert [str(e.file) for e in open_pictures(tmp_path / "s", store)[0]] == [f"{tmp_path}/s/0.tar/c.png"]


def test_the_index_goes_to_the_cache_of_the_user(tmp_path, write_shard, picture, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    open_pictures(write_shard(tmp_path / "0.tar", {"c.png": picture(3)}))
    assert len(list((tmp_path / "cache" / "sfumato" / "shards").iterdir())) == 1


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match=r"the data folder .* does not exist"):
        open_pictures(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no pictures"):
        open_pictures(tmp_path / "empty")
