from __future__ import annotations

import importlib.util
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from sfumato.core.png import save_png

COLORS = {"red": (255, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 255)}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Twelve captioned pictures of 16x16: a coloured bar, which wanders, on white; blue ones are held out."""
    folder = tmp_path / "pictures"
    rows = []
    for i, (name, color) in enumerate(item for _ in range(4) for item in COLORS.items()):
        image = torch.full((3, 16, 16), 255, dtype=torch.uint8)
        image[:, 2 : 4 + i, i : i + 4] = torch.tensor(color, dtype=torch.uint8).view(3, 1, 1)
        save_png(folder / f"{i}.png", image)
        split = "held_out" if name == "blue" else "train"
        rows.append({"file_name": f"{i}.png", "text": f"{name} bar {i}", "concept": name, "split": split})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def intercepted() -> ModuleType:
    """The module intercepted.py beside this file, which is a script's too."""
    spec = importlib.util.spec_from_file_location("intercepted", Path(__file__).with_name("intercepted.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(k == "seconds" or _same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b


@pytest.fixture
def same() -> Callable[[object, object], bool]:
    """Whether two states of a run hold the same bits; seconds of wall time apart."""
    return _same


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Ctrl-C as in the foreground: a shell lets what it starts in the background ignore it."""
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
