"""Local copies of shards."""

from __future__ import annotations

import gzip
import os

import pytest

from sfumato.data import store as module
from sfumato.data.store import ShardError, ShardStore


def read(store, path, offset=0, size=4):
    name = str(path)
    return store.read(name, store.stamp(name), offset, size)


def copies(store):
    return sorted(path for path in store.folder.glob("*") if path.is_file())


def test_a_plain_file_is_read_where_it_is(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"0123456789")
    store = ShardStore(tmp_path / "store")
    assert read(store, tmp_path / "a.tar", 3, 4) == b"3456"
    assert copies(store) == []


def test_a_compressed_one_is_unpacked_once(tmp_path, monkeypatch):
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(b"0123456789"))
    store = ShardStore(tmp_path / "store")
    assert read(store, tmp_path / "a.tar.gz", 3, 4) == b"3456"
    monkeypatch.setattr(module, "_copy", lambda *_: pytest.fail("unpacked again"))
    assert read(store, tmp_path / "a.tar.gz", 0, 2) == b"01"
    assert [path.read_bytes() for path in copies(store)] == [b"0123456789"]


def test_a_changed_one_is_unpacked_again(tmp_path):
    path = tmp_path / "a.tgz"
    store = ShardStore(tmp_path / "store")
    for text in (b"first", b"second one"):
        path.write_bytes(gzip.compress(text))
        assert read(store, path, 0, 5) == text[:5]


def test_an_address_is_fetched_once_and_unpacked(tmp_path, monkeypatch):
    system = pytest.importorskip("fsspec").filesystem("memory")
    system.pipe_file("/set/0.tar", b"0123456789")
    system.pipe_file("/set/1.tar.gz", gzip.compress(b"abcdefghij"))
    store = ShardStore(tmp_path)
    assert read(store, "memory://set/0.tar", 8, 2) == b"89"
    assert read(store, "memory://set/1.tar.gz", 0, 3) == b"abc"
    monkeypatch.setattr(module, "_copy", lambda *_: pytest.fail("fetched again"))
    assert read(store, "memory://set/0.tar", 0, 2) == b"01"
    system.rm("/set", recursive=True)


def test_fetching_is_tried_again_and_leaves_no_half(tmp_path, monkeypatch):
    system = pytest.importorskip("fsspec").filesystem("memory")
    system.pipe_file("/set/0.tar", b"0123")
    store, copy, pauses = ShardStore(tmp_path), module._copy, []
    monkeypatch.setattr(module.time, "sleep", pauses.append)

    def flaky(name, target):
        copy(name, target)
        if len(pauses) < 2:
            raise ConnectionResetError("reset by peer")

    monkeypatch.setattr(module, "_copy", flaky)
    assert read(store, "memory://set/0.tar") == b"0123"
    assert pauses == [1.0, 4.0]
    pauses[:] = []
    monkeypatch.setattr(
        module, "_copy", lambda *_: (_ for _ in ()).throw(ConnectionResetError("reset by peer"))
    )
    (copied,) = copies(store)
    copied.unlink()
    with pytest.raises(ShardError, match=r"cannot read the shard memory://set/0\.tar: reset by peer"):
        read(store, "memory://set/0.tar")
    assert pauses == [1.0, 4.0, 16.0]
    assert copies(store) == []
    system.rm("/set", recursive=True)


def test_the_least_recently_used_copies_make_room(tmp_path):
    paths = [tmp_path / f"{i}.tgz" for i in range(3)]
    for i, path in enumerate(paths):
        path.write_bytes(gzip.compress(bytes([i]) * 100))
    store = ShardStore(tmp_path / "store", limit=250)
    for i in (0, 1):
        read(store, paths[i])
    for age, path in enumerate(copies(store)):  # file systems may round what two readings in a row leave
        os.utime(path, (1000 + age, 1000 + age))
    read(store, paths[0])
    read(store, paths[2])
    assert sorted(path.read_bytes()[0] for path in copies(store)) == [0, 2]
    assert read(store, paths[1]) == bytes([1]) * 4  # and comes back when it is wanted


@pytest.mark.parametrize(
    "data",
    [b"junk", gzip.compress(bytes(range(256)) * 4)[:200], gzip.compress(b"x" * 99)[:-9]],
    ids=["junk", "cut", "without its end"],
)
def test_damaged_compression(tmp_path, data):
    (tmp_path / "a.tar.gz").write_bytes(data)
    store = ShardStore(tmp_path / "store")
    with pytest.raises(ShardError, match=r"cannot read the shard .*a\.tar\.gz: ") as error:
        read(store, tmp_path / "a.tar.gz")
    assert "\n" not in str(error.value)
    assert copies(store) == []


def test_absent_and_short(tmp_path):
    store = ShardStore(tmp_path / "store")
    with pytest.raises(ShardError, match=r"cannot read the shard .*none\.tar: No such file"):
        store.stamp(str(tmp_path / "none.tar"))
    (tmp_path / "a.tar").write_bytes(b"0123")
    with pytest.raises(ShardError, match=r"a\.tar was changed while it was in use"):
        read(store, tmp_path / "a.tar", 2, 4)
