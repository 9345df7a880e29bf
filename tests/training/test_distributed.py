"""Several processes give what one gives: losses, averages, order; shards go to any number of processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from sfumato.training.log import read_log

RANKS = Path(__file__).with_name("ranks.py")
# Means over processes are rounded differently than those over a batch.
CLOSE = {"rel": 1e-6, "abs": 1e-6}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Processes beside processes, and threads in each, would be too many."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def run(folder: Path, *scenarios: str, fails: bool = False) -> str:
    done = subprocess.run(
        [sys.executable, str(RANKS), str(folder), *scenarios], capture_output=True, text=True, timeout=300
    )
    assert (done.returncode != 0) is fails, done.stderr
    return done.stderr


def steps(folder: Path, name: str) -> list[dict[str, object]]:
    """What a run did step by step: the numbers of process 0, and the rows that all together took."""
    parts = [
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(folder.glob(f"{name}-*.jsonl"))
    ]
    return [
        {**step[0], "rows": [row for part in step for row in part["rows"]]}
        for step in zip(*parts, strict=True)
    ]


def assert_equal_runs(folder: Path, one: str, other: str, *, after: int = 0) -> None:
    mine, theirs = steps(folder, one)[after:], steps(folder, other)
    assert len(mine) == len(theirs) > 3
    for a, b in zip(mine, theirs, strict=True):
        assert a.pop("rows") == b.pop("rows")
        assert a == pytest.approx(b, **CLOSE)
        assert {"denoiser/loss", "denoiser/lr", "denoiser/grad_norm"} < a.keys()
    files = [p for kind in ("system", "averages") for p in (folder / one / kind).glob("*.safetensors")]
    assert files
    for path in files:
        pair = load_file(path), load_file(folder / other / path.relative_to(folder / one))
        assert pair[0].keys() == pair[1].keys()
        for key, tensor in pair[0].items():
            assert float((tensor.double() - pair[1][key].double()).abs().max()) <= CLOSE["abs"], (path, key)


def test_two_processes_equal_one_and_any_number_takes_up_what_they_have_saved(tmp_path):
    run(
        tmp_path,
        "one:toy-dit:1:replicate",
        "ddp:toy-dit:2:replicate",
        "fsdp:toy-dit:2:shard",
        "down:toy-dit:1:shard:fsdp",
        "up:toy-dit:3:shard:fsdp",
        "changed:toy-dit:2:replicate:fsdp",
        "back:toy-dit:2:shard:ddp",
    )
    for name in ("ddp", "fsdp"):
        assert_equal_runs(tmp_path, "one", name)
    for name in ("down", "up", "changed", "back"):
        assert_equal_runs(tmp_path, "one", name, after=2)
    assert len(list((tmp_path / "fsdp").glob("checkpoints/*36/shards/*.safetensors"))) == 2
    previews = [(tmp_path / name / "previews" / "000000000036.png").read_bytes() for name in ("one", "ddp")]
    assert previews[0] == previews[1]


def test_adapters_unets_and_both_phases_of_an_autoencoder_train_in_two_processes(tmp_path):
    run(
        tmp_path,
        "toy-dit:toy-dit:1:replicate",
        "lora1:toy-lora:1:replicate",
        "lora2:toy-lora:2:replicate",
        "unet1:toy-unet:1:replicate",
        "unet2:toy-unet:2:shard",
        "gan:toy-autoencoder:2:replicate",
    )
    assert_equal_runs(tmp_path, "lora1", "lora2")
    assert_equal_runs(tmp_path, "unet1", "unet2")
    assert "discriminator/loss" in read_log(tmp_path / "gan" / "log.jsonl")[-1]
