from __future__ import annotations

import hashlib
import os

import pytest

from sfumato.training.durable import BLOCK, Entry, fault_of, replace_file, write_file


def test_small_writes_are_joined_and_the_digest_is_that_of_the_file(tmp_path, intercepted):
    seen, data = [], os.urandom(BLOCK // 64)
    end = intercepted.intercept(seen.append)
    try:
        entry = write_file(tmp_path / "a", lambda sink: [sink.write(data) for _ in range(4 * 64)])
    finally:
        end()
    assert seen.count("write") == 4
    assert entry == Entry(4 * BLOCK, hashlib.sha256(data * 4 * 64).hexdigest())
    assert fault_of(tmp_path / "a", entry) is None


def test_a_write_larger_than_the_buffer_is_whole(tmp_path):
    data = os.urandom(3 * BLOCK + 5)
    entry = write_file(tmp_path / "a", lambda sink: (sink.write(b"1"), sink.write(data), sink.write(b"2")))
    assert (tmp_path / "a").read_bytes() == b"1" + data + b"2"
    assert fault_of(tmp_path / "a", entry) is None


def test_a_file_is_the_old_or_the_new_one_whatever_fails(tmp_path, intercepted):
    seen: list[str] = []
    file = tmp_path / "a"
    file.write_bytes(b"old")
    end = intercepted.intercept(seen.append)
    replace_file(file, b"old")
    end()
    for number in range(len(seen)):
        left = iter(range(number))

        def act(what, left=left):
            if next(left, None) is None:
                raise OSError(28, "No space left on device")

        end = intercepted.intercept(act)
        try:
            with pytest.raises(OSError, match="No space left"):
                replace_file(file, b"new")
        finally:
            end()
        assert file.read_bytes() == (b"old" if number <= seen.index("replace") else b"new")
        file.write_bytes(b"old")
