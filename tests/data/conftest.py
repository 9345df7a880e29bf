"""Tar shards for tests."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def encoded(seed: int, height: int = 8, width: int = 8, kind: str = "PNG") -> bytes:
    """The bytes of a picture of noise."""
    out = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(out, kind)
    return out.getvalue()


def tarred(members: Mapping[str, bytes | str]) -> bytes:
    """The bytes of a tar file."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            raw = data.encode() if isinstance(data, str) else data
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return out.getvalue()


@pytest.fixture
def picture() -> Callable[..., bytes]:
    return encoded


@pytest.fixture
def write_shard() -> Callable[[Path, Mapping[str, bytes | str]], Path]:
    """Write a shard, compressed if its name ends in gz."""

    def write(path: Path, members: Mapping[str, bytes | str]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        data = tarred(members)
        path.write_bytes(gzip.compress(data, 1) if path.name.endswith("gz") else data)
        return path

    return write
