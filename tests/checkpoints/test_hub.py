"""Weights found where other programs keep them."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfumato.checkpoints.hub import located, snapshot, torch_hub


@pytest.fixture(autouse=True)
def _caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_CACHE", "TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HOME", str(tmp_path))


def cached(tmp_path: Path, repository: str, file: str, commit: str = "abc") -> Path:
    folder = tmp_path / "hf/hub" / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(commit)
    place = folder / "snapshots" / commit
    place.mkdir(parents=True)
    (place / file).write_bytes(b"x")
    return place


def test_the_hub_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch_hub() == tmp_path / ".cache/torch/hub/checkpoints"
    torch_hub().mkdir(parents=True)
    (torch_hub() / "b.pth").write_bytes(b"x")
    assert located(None, "net", files=("a.pth", "b.pth")) == torch_hub() / "b.pth"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "elsewhere"))
    assert torch_hub() == tmp_path / "elsewhere/hub/checkpoints"


def test_the_model_hub(tmp_path: Path) -> None:
    place = cached(tmp_path, "org/net", "pytorch_model.bin")
    assert snapshot("org/net") == place
    assert snapshot("org/net", "abc") == place
    assert snapshot("org/net", "other") is None
    assert located(None, "net", repositories=("org/no", "org/net")) == place / "pytorch_model.bin"
    assert located(Path("org/net"), "net") == place / "pytorch_model.bin"
    assert located(Path("org/net@abc"), "net") == place / "pytorch_model.bin"
    (place / "model.safetensors").write_bytes(b"x")
    assert located(Path("org/net"), "net") == place / "model.safetensors"


def test_paths(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(b"x")
    assert located(tmp_path / "x.pth", "net") == tmp_path / "x.pth"
    with pytest.raises(ValueError, match=r"holds no weights of net: none of model.safetensors"):
        located(tmp_path, "net")
    with pytest.raises(ValueError, match="there are no weights of net at org/no: no such file or folder"):
        located(Path("org/no"), "net")


def test_what_is_nowhere() -> None:
    with pytest.raises(
        ValueError, match=r"not on this machine \(looked for .*a.pth, org/net of the model hub\)"
    ):
        located(None, "net", files=("a.pth",), repositories=("org/net",))
