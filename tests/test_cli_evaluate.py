"""`sfumato evaluate SYSTEM --reference DIR` from the command line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sfumato import cli
from sfumato.checkpoints.native import Parts
from sfumato.cli import evaluating
from sfumato.core.png import save_png
from sfumato.diffusion.schedules import Discrete
from sfumato.evaluation.features import FeatureNet
from sfumato.evaluation.npz import PictureFile
from sfumato.nets.blocks import BlockConfig
from sfumato.nets.embedding import EmbeddingConfig
from sfumato.nets.unet import UNet, UNetConfig, levels
from sfumato.systems.config import StageConfig, SystemConfig
from sfumato.systems.options import SampleOptions
from sfumato.systems.system import assemble, save_system

SHORT = ("--n", "24", "--steps", "2", "--device", "cpu")


@pytest.fixture(autouse=True)
def inception(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five means of pixels in place of Inception's features."""

    def features(pixels: Tensor) -> dict[str, Tensor]:
        pool = nn.functional.adaptive_avg_pool2d(pixels.float() / 255, 2).flatten(1)[:, :5]
        return {"pool": pool, "spatial": pool[:, :3], "logits": 9 * pool}

    net = FeatureNet("inception", Path("toy.pth"), "ab" * 32, nn.Identity(), features)
    monkeypatch.setattr(evaluating, "open_net", lambda name, given, device: replace(net, name=name))


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    for i in range(24):
        save_png(tmp_path / f"ref/{i:02}.png", torch.randint(256, (3, 16, 16), dtype=torch.uint8))
        (tmp_path / f"ref/{i:02}.txt").write_text("red heart")
    return tmp_path / "ref"


def figures(printed: str) -> dict[str, float]:
    return {f["name"]: f["value"] for f in json.loads(printed)["figures"]}


def test_a_system(tiny_folder: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    args = ["evaluate", str(tiny_folder), "--reference", str(reference), *SHORT]
    assert cli.main([*args, "--json", "--save", str(tmp_path / "s.npz")]) == 0
    said = capsys.readouterr().out
    found, protocol = figures(said), json.loads(said)["protocol"]
    assert set(found) == {"fid", "fid_inf", "sfid", "kid", "is", "precision", "recall", "density", "coverage"}
    assert protocol["samples"]["options"]["base"]["steps"] == 2
    assert protocol["samples"]["n"] == 24
    assert protocol["nets"]["inception"]["sha256"] == "ab" * 32
    with np.load(tmp_path / "s.npz") as arrays:
        assert arrays["arr_0"].shape == (24, 16, 16, 3)
    assert cli.main(["evaluate", str(tmp_path / "s.npz"), "--reference", str(reference), "--json"]) == 0
    again = figures(capsys.readouterr().out)
    assert again == pytest.approx(found, rel=1e-5)
    assert cli.main(args) == 0
    assert "fid_inf" in capsys.readouterr().out


def test_statistics_serve_as_reference(
    tiny_folder: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    statistics = str(tmp_path / "statistics.npz")
    args = ["evaluate", str(reference), "--metrics", "fid", "sfid", "--json", "--device", "cpu"]
    assert cli.main([*args, "--reference", str(reference), "--statistics", statistics]) == 0
    assert figures(capsys.readouterr().out) == pytest.approx({"fid": 0, "sfid": 0}, abs=1e-6)
    assert cli.main([*args, "--reference", statistics]) == 0
    assert figures(capsys.readouterr().out) == pytest.approx({"fid": 0, "sfid": 0}, abs=1e-6)


def test_reconstructions(tiny_folder: Path, reference: Path, capsys: pytest.CaptureFixture) -> None:
    args = ["evaluate", str(tiny_folder), "--reference", str(reference), "--reconstruct", "--json"]
    assert cli.main([*args, "--metrics", "fid", "psnr", "ssim", "--device", "cpu"]) == 0
    found = figures(capsys.readouterr().out)
    assert set(found) == {"rfid", "psnr", "ssim"}
    assert 0 < found["psnr"] < 40


def test_watching(tiny_folder: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = tmp_path / "run"
    (run / f"checkpoints/{8:012d}").mkdir(parents=True)
    (run / "recipe.json").write_text(json.dumps({"name": "toy", "trainer": {"images": 8}}))
    (run / f"checkpoints/{8:012d}/manifest.json").write_text("{}")
    shutil.copytree(tiny_folder, run / "system")
    os.utime(run / "system/system.json")
    args = ["evaluate", str(run), "--watch", "--reference", str(reference), *SHORT, "--metrics", "fid"]
    assert cli.main([*args, "--every", "0.1", "--timeout", "20"]) == 0
    assert capsys.readouterr().out.startswith("8 images: fid ")
    row = json.loads((run / "evaluation.jsonl").read_text())
    assert row["images"] == 8
    assert row["figures"][0]["name"] == "fid"


def test_two_processes_share_pictures_and_one_speaks(
    tiny_folder: Path, reference: Path, capsys: pytest.CaptureFixture, in_two: Callable
) -> None:
    args = ["evaluate", str(tiny_folder), "--reference", str(reference), "--metrics", "psnr", "ssim"]
    args += ["--reconstruct", "--json", "--batch", "5", "--device", "cpu"]
    assert cli.main(args) == 0
    alone = json.loads(capsys.readouterr().out)
    both = in_two("-m", "sfumato", *args)
    assert [(code, err) for code, _, err in both] == [(0, ""), (0, "")]
    assert (json.loads(both[0][1]), both[1][1]) == (alone, "")
    both = in_two("-m", "sfumato", *args, "--save", "s.npz")
    assert [(code, out) for code, out, _ in both] == [(2, ""), (2, "")]
    assert ("--watch and --save work in one process" in both[0][2], both[1][2]) == (True, "")


def test_results_of_one_protocol_are_compared_and_others_refused(
    tiny_folder: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    files = [tmp_path / "a.json", tmp_path / "b.json", tmp_path / "c.json"]
    for file, kind in zip(files, (["--seed", "1"], ["--seed", "1"], ["--seed", "2"]), strict=True):
        args = ["evaluate", str(tiny_folder), "--reference", str(reference), *SHORT, *kind, "--json"]
        assert cli.main([*args, "--metrics", "fid", "is"]) == 0
        file.write_text(capsys.readouterr().out)
    other = json.loads(files[1].read_text())
    other["protocol"]["samples"]["fingerprint"] = "of another system"
    other["figures"][0]["value"] = 1234.5
    files[1].write_text(json.dumps(other))
    assert cli.main(["evaluate", "compare", *map(str, files[:2])]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if not line.startswith(" ")] == [str(file) for file in files[:2]]
    assert said[4].split()[:2] == ["fid", "1234.5000"]
    assert said[2] == said[5]
    for wrong, message in (
        ([files[0]], "1 result to compare; give at least two"),
        (files, "c.json cannot be compared: samples.seed: 1, 2; measure both under one protocol"),
        ([files[0], reference / "00.txt"], "00.txt is no result of `sfumato evaluate --json`: not JSON"),
        ([files[0], tiny_folder / "system.json"], "system.json: figures: Field required"),
    ):
        assert cli.main(["evaluate", "compare", *map(str, wrong)]) == 2
        said = capsys.readouterr()
        assert (said.out, said.err.count("\n")) == ("", 1)
        assert message in said.err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["{system}", "--metrics", "fid"], "fid needs a reference; give --reference DIR"),
        (["{system}", "--metrics", "is"], "this system draws from captions; give a --reference"),
        (["{system}", "--metrics", "fidd"], "unknown metric 'fidd'; did you mean 'fid'?"),
        (["{system}", "--reference", "{ref}", "--n", "0"], "--n is 0 and --batch 32; allowed: 1 or more"),
        (["{system}", "--reference", "{ref}", "--n", "1", "--metrics", "fid"], "covariance of 1 samples"),
        (["{system}", "--reference", "{small}"], "smaller than the samples of 16x16"),
        (["{system}", "--reference", "{system}"], "no pictures"),
        (["{ref}", "--reconstruct", "--reference", "{ref}"], "--reconstruct needs a system"),
        (["{float}", "--metrics", "is"], "arr_0 is float32, pictures are uint8 in 0..255; they hold NaN"),
        (["{ref}", "--reference", "{npz}"], "has pictures of 8x8, the samples are 16x16"),
        (["{ref}", "--watch", "--metrics", "is"], "there is no run in"),
    ],
)
def test_wrong_input_is_one_line(
    args: list[str],
    message: str,
    tiny_folder: Path,
    reference: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    save_png(tmp_path / "small/0.png", torch.zeros(3, 8, 8, dtype=torch.uint8))
    np.savez(tmp_path / "float.npz", np.full((2, 16, 16, 3), np.nan, np.float32))
    with PictureFile(tmp_path / "8.npz", (2, 8, 8)) as file:
        file.add(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    places = {"system": tiny_folder, "ref": reference, "small": tmp_path / "small"}
    places |= {"float": tmp_path / "float.npz", "npz": tmp_path / "8.npz"}
    assert cli.main(["evaluate", *(a.format(**places) for a in args), "--device", "cpu"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert message in said.err


def test_nan_pictures_are_refused(
    tiny_folder: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from sfumato.api import load, save

    system = load(tiny_folder)
    parameter = next(iter(system.parts.nets["autoencoder"].decoder.parameters()))
    with torch.no_grad():
        parameter.fill_(3e38)  # finite weights whose pictures are not
    save(system, tmp_path / "broken")
    args = ["evaluate", str(tmp_path / "broken"), "--reference", str(reference), *SHORT, "--metrics", "fid"]
    assert cli.main([*args, "--save", str(tmp_path / "s.npz")]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert "not finite" in said.err
    assert not (tmp_path / "s.npz").exists()


def ddpm(path: Path) -> str:
    """The folder of a DDPM of six steps."""
    shape = {"levels": levels(8, (1,), 1), "embedding": EmbeddingConfig(time_dim=8, dim=16)}
    net = UNet(UNetConfig(in_channels=3, out_channels=3, block=BlockConfig(norm_groups=4), **shape))
    stage = StageConfig(
        schedule=Discrete(formula="cosine", steps=6),
        parameterization="eps",
        shape=(3, 16, 16),
        defaults=SampleOptions(sampler="ddpm", knobs={"variance": "large"}, steps=6, spacing="respaced"),
    )
    save_system(assemble(SystemConfig(stages=(stage,)), Parts({"denoiser": net})), path)
    return str(path)


def test_bits_per_dimension(reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    args = ["evaluate", "bits", ddpm(tmp_path / "ddpm"), str(reference), "--n", "6", "--steps", "3"]
    args += ["--batch", "4", "--device", "cpu"]
    assert cli.main([*args, "--json"]) == 0
    said = capsys.readouterr().out
    assert set(figures(said)) == {"bits_per_dim", "bits_prior", "bits_diffusion", "bits_decoder"}
    assert [(p["first"], p["stop"]) for p in json.loads(said)["curve"]] == [(0, 1), (1, 3), (3, 6)]
    assert json.loads(said)["figures"][0]["note"] == "3 of 6 steps, variance large"
    assert json.loads(said)["protocol"]["pictures"]["n"] == 6
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(said)
    assert cli.main(["evaluate", "compare", *(str(tmp_path / name) for name in ("a.json", "b.json"))]) == 0
    assert capsys.readouterr().out.count("bits_decoder") == 2
    assert cli.main(args) == 0
    printed = capsys.readouterr().out
    assert "bits_decoder" in printed
    assert "3..5" in printed.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch", "0"], "--batch is 0; allowed: 1 or more pictures"),
        (["--steps", "7"], "steps is 7, and this system has 6; allowed: 2 to 6"),
        (["--n", "0"], "n is 0"),
    ],
)
def test_bits_that_cannot_be_are_one_line(
    flags: list[str], message: str, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(["evaluate", "bits", ddpm(tmp_path / "d"), str(reference), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_schedule_that_is_not_discrete_has_no_bits(
    tiny_folder: Path, reference: Path, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(["evaluate", "bits", str(tiny_folder), str(reference), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "one stage on pixels with a discrete schedule" in error
    assert error.count("\n") == 1
