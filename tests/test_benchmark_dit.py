"""The benchmark of guided steps: its loops compute the same, and it reports figures of the right kind."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("dit"), importlib.import_module("pacing")
    for name in ("dit", "train", "pacing", "setting", "plain_dit"):
        sys.modules.pop(name, None)


def test_every_loop_computes_the_same_and_stops_when_it_is_told(benchmark):
    """Both conventions of time are close at this tiny size; a plain loop with other numbers would not be."""
    dit, pacing = benchmark
    answers = {}
    for name, loop in dit.LOOPS.items():
        calls = []

        def pace(calls: list[int] = calls) -> None:
            calls.append(1)
            if len(calls) > 260:  # beyond the end of the first walk
                raise pacing.Done

        answers[name] = loop(dit.TINY, pace)
        assert len(calls) == 261
    assert answers["plain"] == pytest.approx(answers["sfumato"], rel=1e-5)
    assert answers["diffusers"] == pytest.approx(answers["sfumato"], rel=0.05)


def test_the_driver_is_timed(benchmark):
    dit, _ = benchmark
    assert 0 < dit.driver_seconds() < 1


@pytest.mark.slow
def test_as_a_command(tmp_path):
    out = tmp_path / "out.json"
    small = ["--size", "tiny", "--turns", "2", "--steps", "1", "--threads", "1", "--seconds", "0.01"]
    command = [sys.executable, str(FOLDER / "dit.py"), *small, "--json", str(out)]
    env = {**os.environ, "PYTHONPATH": str(FOLDER.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert [side["name"] for side in report["sides"]] == ["sfumato", "diffusers", "plain"]
    for side in report["sides"]:
        assert side["name"] in done.stdout
        assert side["seconds"] > 0
        assert side["gflop"] > 0
        assert 0 < side["gemm_share"] < 1
        assert side["peak_mb"] > 50
    gflop = {side["name"]: side["gflop"] for side in report["sides"]}
    assert gflop["sfumato"] <= gflop["plain"] < gflop["diffusers"]
