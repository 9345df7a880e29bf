"""Tensors on disk by key."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sfumato.training.cache import TensorCache, fingerprint, key_of


def items(*numbers):
    return [(key_of(n), {"a": torch.full((4,), float(n)), "b": torch.tensor([n])}) for n in numbers]


def holds(cache, *numbers):
    return [
        key_of(n) in cache and cache[key_of(n)]["a"].tolist() == [n] * 4 and cache[key_of(n)]["b"].item() == n
        for n in numbers
    ]


@pytest.fixture
def files(tmp_path):
    return lambda: sorted((tmp_path / "cache").glob("*"))


def test_what_is_added_is_there_again(tmp_path, files):
    cache = TensorCache(tmp_path / "cache")
    assert key_of(1) not in cache
    assert files() == []
    cache.add(items(1, 2, 3))
    cache.add([])
    again = TensorCache(tmp_path / "cache")
    assert len(again) == 3
    assert all(holds(cache, 1, 2, 3) + holds(again, 1, 2, 3))
    assert again[key_of(1)]["b"].dtype == torch.int64
    with pytest.raises(KeyError):
        again[key_of(4)]
    assert len(files()) == 1


def test_files_are_bounded(tmp_path, files):
    cache = TensorCache(tmp_path / "cache", limit=60)  # an item has 24 bytes
    cache.add(iter(items(*range(5))))
    assert len(files()) == 3
    assert all(holds(TensorCache(tmp_path / "cache"), *range(5)))


def test_what_was_written_before_an_interruption_stays(tmp_path):
    def interrupted():
        yield from items(*range(5))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TensorCache(tmp_path / "cache", limit=60).add(interrupted())
    assert holds(TensorCache(tmp_path / "cache"), *range(5)) == [True] * 4 + [False]


@pytest.mark.parametrize("damage", ["cut", "flipped", "renamed"])
def test_a_damaged_file_is_removed_with_a_word(tmp_path, files, caplog, damage):
    TensorCache(tmp_path / "cache", limit=1).add(items(1, 2))
    path, other = files()
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[:-1])
    elif damage == "flipped":
        data[-1] ^= 1
        path.write_bytes(data)
    else:
        path.write_bytes(other.read_bytes())
    cache = TensorCache(tmp_path / "cache")
    assert sorted(holds(cache, 1, 2)) == [False, True]
    assert f"{path} is damaged; what it held is computed again" in caplog.text
    assert files() == [other]


def test_pruning_removes_files_that_serve_nobody(tmp_path, files):
    cache = TensorCache(tmp_path / "cache", limit=60)
    cache.add(items(1, 2))
    cache.add(items(3, 4))
    cache.prune([key_of(1)])
    assert holds(cache, 1, 2, 3, 4) == [True, True, False, False]
    assert len(files()) == 1
    assert holds(TensorCache(tmp_path / "cache"), 1, 2, 3, 4) == [True, True, False, False]


def test_in_memory():
    cache = TensorCache(None, limit=1)
    cache.add(items(1, 2))
    assert all(holds(cache, 1, 2))
    assert len(cache) == 2


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ValueError, match=r"cannot write .*choose a folder you may write to"):
        TensorCache(tmp_path / "cache").add(items(1))


def test_keys_and_fingerprints():
    assert key_of("a", 1) == key_of("a", "1")
    assert len({key_of("ab", "c"), key_of("a", "bc"), key_of("abc")}) == 3
    net = nn.Linear(2, 2)
    first = fingerprint(net, "config")
    assert fingerprint(net, "config") == first
    assert fingerprint(net, "other") != first
    with torch.no_grad():
        net.bias[0] += 1e-3
    assert fingerprint(net, "config") != first
