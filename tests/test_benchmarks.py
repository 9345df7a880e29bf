"""The benchmark of training runs, and what it reports is of the right kind; its figures are for docs/."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from sfumato.core.png import save_png

pytest.importorskip("diffusers")
FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
SIDES = ["sfumato-unet", "diffusers-unet", "sfumato-dit", "plain-dit", "sfumato-cached", "sfumato-uncached"]
TINY = ["--size", "tiny", "--turns", "2", "--steps", "1", "--threads", "1", "--seconds", "0.01"]


@pytest.fixture
def benchmark(monkeypatch):
    """The script as a module, with threads in place of processes: torch is not imported six times."""
    monkeypatch.syspath_prepend(str(FOLDER))
    pacing, train = importlib.import_module("pacing"), importlib.import_module("train")

    class Threaded(pacing.Worker):
        def __init__(self, command, threads) -> None:
            arguments = train.parse(command[2:])
            (asked, stdin), (stdout, answers) = pipes = [
                [os.fdopen(end, mode) for end, mode in zip(os.pipe(), "rw", strict=True)] for _ in range(2)
            ]
            self._process = type("Ends", (), {"stdin": stdin, "stdout": stdout, "args": command})
            self._thread = threading.Thread(target=train.work, args=(arguments, asked, answers))
            self._thread.start()
            self._files = [*pipes[0], *pipes[1]]

        def end(self):
            self._process.stdin.close()
            return self._line()

        def kill(self) -> None:
            self._process.stdin.close()
            self._thread.join()
            for file in self._files:
                file.close()

    monkeypatch.setattr(train, "Worker", Threaded)
    yield train
    for name in ("pacing", "train", "setting", "ours", "plain_dit", "on_diffusers"):
        sys.modules.pop(name, None)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    rows = []
    for i in range(4):
        save_png(folder / f"{i}.png", torch.full((3, 64, 64), 60 * i, dtype=torch.uint8))
        rows.append(json.dumps({"file_name": f"{i}.png", "text": f"gray {i}", "concept": str(i)}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def check(report: dict, printed: str) -> None:
    """All pairs, positive figures, and both sides of a net cost the same operations."""
    assert [side["name"] for pair in report["pairs"] for side in pair["sides"]] == SIDES
    assert report["gemm_gflops"] > 0
    for pair in report["pairs"]:
        for ratios in (pair["speed"], pair["cpu"]):
            assert 0 < ratios["min"] <= ratios["median"] <= ratios["max"]
        for side in pair["sides"]:
            assert side["name"] in printed
            assert side["images_per_second"] > 0
            assert side["peak_mb"] > 50
            assert side["gflop"] > 0
            assert 0 < side["gemm_share"] < 1
    flops = {side["name"]: side["gflop"] for pair in report["pairs"] for side in pair["sides"]}
    assert flops["sfumato-unet"] == flops["diffusers-unet"]
    assert flops["sfumato-dit"] == pytest.approx(flops["plain-dit"], rel=0.01)
    assert flops["sfumato-cached"] < flops["sfumato-uncached"]
    assert all(name in printed for name in ("images/s", "peak MB", "of GEMM", "GFLOP/s"))


def test_every_pair_is_measured_and_reported(benchmark, pictures, tmp_path, capsys):
    benchmark.main([*TINY, "--data", str(pictures), "--json", str(tmp_path / "out.json")])
    check(json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out)


def test_both_sides_of_a_pair_have_the_same_parameters(benchmark):
    from diffusers import UNet2DConditionModel

    from sfumato.nets.dit import DiT
    from sfumato.nets.unet import UNet

    setting, plain, theirs = (importlib.import_module(n) for n in ("setting", "plain_dit", "on_diffusers"))
    assert theirs.UNet2DConditionModel is UNet2DConditionModel
    for size in setting.SIZES.values():
        with torch.device("meta"):
            pairs = [
                (UNet(size.unet()), theirs.net(size)),
                (DiT(size.dit), plain.PlainDiT(size.dit, size.side)),
            ]
        for ours, other in pairs:
            shapes = [
                sorted(p.squeeze().numel() for p in net.parameters()) for net in (ours, other)
            ]  # 1x1 convolutions are linear layers there
            assert shapes[0] == shapes[1]


def test_without_pictures_it_says_how_to_get_them(benchmark, tmp_path):
    with pytest.raises(SystemExit, match=r"there are no pictures in .*; `sfumato data openmoji` makes them"):
        benchmark.main([*TINY, "--data", str(tmp_path / "none")])


@pytest.mark.slow
def test_as_a_command_with_a_process_for_each_loop(pictures, tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, str(FOLDER / "train.py"), *TINY, "--data", str(pictures), "--json", str(out)]
    env = {**os.environ, "PYTHONPATH": str(FOLDER.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr
    check(json.loads(out.read_text()), done.stdout)
