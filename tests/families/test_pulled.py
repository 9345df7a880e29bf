"""A pipeline from the model hub's cache: the files that are fetched are all that is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import sfumato
from sfumato.checkpoints.pulling import wanted


def test_what_is_fetched_of_a_pipeline_is_enough(
    tiny_stable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    files = [p.relative_to(tiny_stable).as_posix() for p in tiny_stable.rglob("*") if p.is_file()]
    chosen = wanted(files, lambda name: json.loads((tiny_stable / name).read_text()), None, where="org/sd")
    folder = tmp_path / "models--org--sd/snapshots/abc"
    for name in chosen:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tiny_stable / name, folder / name)
    (tmp_path / "models--org--sd/refs").mkdir()
    (tmp_path / "models--org--sd/refs/main").write_text("abc")
    drawn = [
        sfumato.load(path).generate("red heart", size=16, steps=2)[0].tobytes()
        for path in ("org/sd", tiny_stable)
    ]
    assert drawn[0] == drawn[1]
