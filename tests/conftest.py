"""What holds for every test: no network, one thread, seeded, and the same examples on every run."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before torch is imported: pytest-xdist already keeps every core busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A test that asks a hub for a file must fail here as it would on a machine without a network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Commands that tests start must not color or wrap what the tests read.
os.environ.update(NO_COLOR="1", COLUMNS="120")

# No deadline: a loaded machine is slow, not wrong. Derandomized: a failure is there again on the next run.
settings.register_profile(
    "sfumato", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("sfumato")

ROOT = Path(__file__).resolve().parent.parent
LOCAL = ("127.0.0.1", "::1", "localhost")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder that holds pyproject.toml."""
    return ROOT


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOCAL:
            raise RuntimeError(f"tests must not use the network, and this one connects to {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Each test draws the same numbers whatever ran before it, and leaves the default dtype as it was."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    dtype = torch.get_default_dtype()
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
