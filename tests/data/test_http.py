"""Shards from a web server: one on this machine, read through fsspec and aiohttp."""

from __future__ import annotations

import functools
import os
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from sfumato.data.datasets import ImageFolder
from sfumato.data.order import Order
from sfumato.data.store import ShardError, ShardStore

pytest.importorskip("fsspec")
pytest.importorskip("aiohttp", reason="aiohttp comes with the extra `remote`")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, write_shard, picture):
    """The address of a folder with a plain and a compressed shard of three pictures each."""
    for i, name in enumerate(("0.tar", "1.tar.gz")):
        write_shard(tmp_path / "set" / name, {f"{k}.png": picture(10 * i + k) for k in range(3)})
    handler = functools.partial(Quiet, directory=str(tmp_path / "set"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_address[1]}"
        serving.shutdown()


def test_plain_and_compressed_shards_are_those_of_the_disk(server, tmp_path):
    data = ImageFolder(f"{server}/{{0.tar,1.tar.gz}}", store=ShardStore(tmp_path / "store"))
    local = ImageFolder(tmp_path / "set", store=ShardStore(tmp_path / "local"))
    assert len(data) == len(local) == 6
    draws = Order(6, seed=3).take(2, 9)
    for one, other in zip(data.draw(draws), local.draw(draws), strict=True):
        assert torch.equal(one.image, other.image)
    assert len(list((tmp_path / "store").glob("*.tar"))) == 2


def test_a_shard_that_was_replaced_is_fetched_again(server, tmp_path, write_shard, picture):
    store = ShardStore(tmp_path / "store")
    before = [sample.image for sample in ImageFolder(f"{server}/0.tar", store=store)]
    path = tmp_path / "set" / "0.tar"
    size, later = path.stat().st_size, path.stat().st_mtime + 10
    write_shard(path, {f"{k}.png": picture(50 + k) for k in range(3)})
    os.utime(path, (later, later))
    assert path.stat().st_size == size  # only the time of change tells
    after = [sample.image for sample in ImageFolder(f"{server}/0.tar", store=store)]
    assert not any(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_a_shard_that_is_not_there_is_one_line(server, tmp_path, monkeypatch):
    monkeypatch.setattr("sfumato.data.store.PAUSES", ())
    with pytest.raises(ShardError, match=r"cannot read the shard http://127\.0\.0\.1:\d+/9\.tar") as error:
        ImageFolder(f"{server}/9.tar", store=ShardStore(tmp_path / "store"))
    assert "\n" not in str(error.value)
