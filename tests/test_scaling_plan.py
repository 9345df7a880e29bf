"""The plan for many GPUs counts what it says, and adds up as docs/scaling.md does."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def scaling(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("scaling")


def test_a_plan_counts_what_the_paper_counts_and_what_is_kept(scaling):
    with FakeTensorMode(allow_non_fake_inputs=True):
        net, _ = scaling.example("dit-xl-2", 1)
        flops = scaling.operations("dit-xl-2", 2) - scaling.operations("dit-xl-2", 1)
        plain, less = (scaling.activations("dit-xl-2", 1, recomputed=r, half=False) for r in (False, True))
    positions = 256 * 1152  # are parameters in the published count
    assert sum(p.numel() for p in net.parameters()) + positions == 675_129_632
    assert flops / 6 == pytest.approx(118.64e9, rel=1e-3)  # multiply-adds forward
    assert less < plain / 10


def test_a_plan_adds_up_memory_and_time(scaling):
    cost = scaling.Cost(weights=10**9, block=10**7, gathers=2, flops=10**12, activations=2**30)
    machine = scaling.Machine(rate=1e14, inside=1e11, between=1e10)
    replicated, sharded = scaling.rows(cost, machine, 8, 16, copies=1, recomputed=False)
    # 20 bytes per weight and 1 GiB per picture; 0.16 s of work hides 7/8 * 8e9 / 1e11 = 0.07 s of sending.
    assert replicated.split("|")[4:7] == [f" {20e9 / 2**30 + 16:.1f} ", " 800 ", " 100% "]
    assert sharded.split("|")[4] == f" {(20e9 / 8 + 8e7) / 2**30 + 16:.1f} "
    (slow, _) = scaling.rows(cost, machine, 64, 16, copies=1, recomputed=False)
    # 63/64 * 8e9 / 1e10 = 0.7875 s, of which two thirds of 0.16 s are hidden
    assert float(slow.split("|")[5].replace(",", "")) == pytest.approx(
        1024 / (0.16 + 0.7875 - 0.32 / 3), abs=1
    )
