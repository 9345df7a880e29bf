"""The benchmark of Stable Diffusion: both libraries compute the same from one folder; its figures."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield tuple(importlib.import_module(name) for name in ("sd", "sd_folder", "pacing"))
    for name in ("sd", "sd_folder", "train", "pacing", "setting"):
        sys.modules.pop(name, None)


def test_both_libraries_compute_the_same(modules, tmp_path):
    sd, folders, pacing = modules
    folders.write("tiny", tmp_path / "p")
    for part, loops in sd.LOOPS.items():
        answers = []
        for loop in loops.values():
            calls = []

            def pace(calls: list[int] = calls) -> None:
                calls.append(1)
                if len(calls) > 3:
                    raise pacing.Done

            answers.append(loop(tmp_path / "p", pace))
            assert len(calls) == 4
        assert answers[0].std() > 0.05, part
        torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-4, msg=part)


@pytest.mark.slow
def test_as_a_command(tmp_path):
    out = tmp_path / "out.json"
    small = ["--size", "tiny", "--turns", "2", "--threads", "1", "--seconds", "0.01"]
    command = [sys.executable, str(FOLDER / "sd.py"), *small, "--json", str(out)]
    env = {**os.environ, "PYTHONPATH": str(FOLDER.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    both = ["sfumato", "diffusers"]
    assert [(row["part"], row["library"]) for row in rows] == [
        (part, library) for part in ("step", "decode", "text", "start") for library in both
    ]
    for row in rows:
        assert row["seconds"] > 0
        assert row["part"] in done.stdout
        assert row["part"] == "start" or (row["difference"] < 1e-4 and row["peak_mb"] > 50)
