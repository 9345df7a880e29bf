"""`sfumato bench` and the recipes of the scenes, on twins that are trained for a few steps."""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import sfumato
from sfumato import cli
from sfumato.evaluation.scenes.benchmark import REVISION
from sfumato.families import RECIPES
from sfumato.nets.autoencoder import AutoencoderConfig
from sfumato.nets.dit import DiTConfig
from sfumato.nets.text import TextTransformerConfig
from sfumato.training.run import train

FEW = ["--pictures", "2", "--steps", "1", "--train", "20", "--device", "cpu"]


def small(name, out, **task):
    """A recipe at toy size: 32 pixels, 16 images."""
    recipe = RECIPES[name]()
    settings = replace(
        recipe.trainer,
        images=16,
        batch=4,
        device="cpu",
        quiet=True,
        preview_every=16,
        save_every=8,
        log_every=8,
    )
    data = replace(recipe.data, path=Path("scenes:20,size=32"), size=32)
    return replace(recipe, task=replace(recipe.task, **task), trainer=settings, data=data, out=out / name)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of the tiny twin of scenes-dit, on that of scenes-autoencoder."""
    out = tmp_path_factory.mktemp("runs")
    net = AutoencoderConfig(channels=8, mults=(1, 2), blocks=1, mid_attention=False, norm_groups=4, patch=2)
    train(small("scenes-autoencoder", out, net=net))
    tower = TextTransformerConfig(vocab_size=512, context=32, width=16, depth=1, heads=2)
    dit = DiTConfig(patch=2, width=16, depth=1, heads=2, text_dim=16, pooled_dim=16)
    task = {
        "net": dit,
        "text": tower,
        "autoencoder": out / "scenes-autoencoder",
        "prompts": ("a red circle",),
    }
    train(small("scenes-dit", out, **task))
    return out / "scenes-dit"


def test_losses_are_finite_and_the_words_are_known(run):
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = [v for row in rows for k, v in row.items() if k.endswith("loss")]
    assert losses
    assert torch.tensor(losses).isfinite().all()


def command(capsys, *args):
    code = cli.main([str(a) for a in args])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_bench_scenes_prints_a_table_and_writes_result_and_sheet(run, tmp_path, capsys):
    code, out, err = command(capsys, "bench", "scenes", run, "--out", tmp_path / "b", *FEW)
    assert (code, err) == (0, "")
    assert "2 pictures of each split, seed 0; euler, 1 steps, guidance 2" in out
    assert all(word in out for word in ("combinations", "valid", "joint", "scenes of training", "EMA 0.995"))
    result = json.loads((tmp_path / "b/scenes.json").read_text())
    assert result["protocol"]["steps"] == 1
    assert result["ema"] == 0.995
    assert result["splits"]["seen"]["facts"]["joint"]["total"] == 2
    with Image.open(tmp_path / "b/scenes.png") as sheet:
        assert sheet.size == (12 * 40 - 2, 5 * 40 - 2)


def test_two_processes_share_the_scenes_and_give_what_one_gives(run, tmp_path, capsys, in_two):
    flags = [*FEW, "--splits", "seen", "counts", "--batch", "1"]
    code, out, _ = command(capsys, "bench", "scenes", run, "--out", tmp_path / "one", *flags)
    assert code == 0
    both = in_two("-m", "sfumato", "bench", "scenes", run, "--out", tmp_path / "two", *flags)
    assert both == [(0, out, ""), (0, "", "")]
    for name in ("scenes.json", "scenes.png"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    both = in_two("-m", "sfumato", "bench", "scenes", run, "--out", tmp_path / "b", *flags, "--sampler", "x")
    assert [(code, out, err != "") for code, out, err in both] == [(2, "", True), (2, "", False)]
    assert "unknown sampler 'x'" in both[0][2]
    assert not (tmp_path / "b").exists()


def test_results_of_one_protocol_are_compared_and_others_refused(run, tmp_path, capsys):
    files = [tmp_path / name / "scenes.json" for name in ("a", "b")]
    for file, seed in zip(files, "01", strict=True):
        flags = [*FEW, "--splits", "seen", "--seed", seed]
        assert command(capsys, "bench", "scenes", run, "--out", file.parent, *flags)[0] == 0
    code, out, _ = command(capsys, "bench", "compare", files[0], files[0])
    assert code == 0
    assert "joint" in out
    code, out, err = command(capsys, "bench", "compare", *files)
    assert (code, out) == (2, "")
    assert "cannot be compared: seed is 0 in the one and 1 in the other" in err
    assert err.count("\n") == 1


def test_a_run_is_followed_and_its_curve_kept(run, tmp_path, capsys):
    flags = ["bench", "scenes", run, "--watch", "--out", tmp_path / "b", *FEW, "--splits", "seen"]
    code, out, err = command(capsys, *flags)
    assert (code, err) == (0, "")
    assert out.startswith("16 images: all facts of seen 0.0 % (0 of 2")
    rows = [json.loads(line) for line in (tmp_path / "b/curve.jsonl").read_text().splitlines()]
    assert [row["images"] for row in rows] == [16]
    assert (tmp_path / "b/curve.png").is_file()
    code, _, err = command(capsys, *flags, "--guidance", "3")
    assert code == 2
    assert "guidance is 2.0 in the one and 3.0 in the other" in err
    assert len((tmp_path / "b/curve.jsonl").read_text().splitlines()) == 1


def test_a_curve_of_another_revision_is_not_continued(run, tmp_path, capsys):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/curve.jsonl").write_text('{"protocol": {"revision": 1}}\n')
    code, _, err = command(capsys, "bench", "scenes", run, "--watch", "--out", tmp_path / "b", *FEW)
    assert code == 2
    assert "curve.jsonl:1 was made by revision 1 of the benchmark" in err
    assert err.count("\n") == 1


def test_the_reader_is_measured(tmp_path, capsys):
    default = Path(sfumato.__file__).parent / "assets" / "default"
    args = ["--count", "5", "--damaged", "3", "--autoencoders", default, default]
    code, out, _ = command(capsys, "bench", "reader", "--out", tmp_path, *args)
    assert code == 0
    assert out.splitlines()[0].startswith("32 px, none 0: exact 100.0 % (5 of 5")
    rows = json.loads((tmp_path / "reader.json").read_text())
    assert {row["damage"] for row in rows} == {"none", "blur", "noise", "codec"}
    assert [row["level"] for row in rows if row["damage"] == "codec"] == [1, 2]
    assert (tmp_path / "reader.png").is_file()


def test_data_scenes_writes_shards(tmp_path, capsys):
    code, out, _ = command(capsys, "data", "scenes", tmp_path / "s", "--count", "3", "--split", "counts")
    assert (code, out) == (0, f"{tmp_path / 's'}\n")
    with tarfile.open(tmp_path / "s/scenes-00000.tar") as tar:
        assert len(tar.getnames()) == 6


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["bench", "scene"], "unknown benchmark 'scene'; did you mean 'scenes'?"),
        (["bench", "scenes", "--pictures", "0"], "pictures is 0; allowed: a whole number from 1"),
        (["bench", "scenes", "--splits", "train"], "unknown split 'train'"),
        (["bench", "scenes", "nowhere"], "nowhere"),
        (["bench", "scenes", "--watch"], "--watch follows a run in one process; give its folder"),
        (["bench", "scenes", "nowhere", "--watch"], "there is no run in nowhere"),
        (["bench", "reader", "--out", "x", "--autoencoders", "nowhere"], "nowhere"),
        (["bench", "compare", "a.json"], "1 result to compare; give at least two"),
        (["bench", "compare", "a.json", "b.json"], "No such file or directory: 'a.json'"),
        (
            ["bench", "compare", "bad.json", "b.json"],
            "bad.json is no result of `sfumato bench scenes`",
        ),
        (["bench", "compare", "other.json", "b.json"], "other.json was made by revision 1 of the benchmark"),
        (["bench", "compare", "lacks.json", "b.json"], "lacks.json: protocol.pictures"),
        (["data", "scenes", "new", "--count", "0"], "0 scenes; allowed: at least 1"),
        (
            ["data", "scenes", "new", "--count", "1", "--size", "48"],
            "scenes of 48 pixels; allowed: 32, 64, 128",
        ),
        (["data", "check", "scenes:x"], "cannot read the data path 'scenes:x'; write scenes:COUNT"),
    ],
)
def test_wrong_input_is_one_line(args, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text("{")
    Path("other.json").write_text('{"protocol": {"revision": 1}}')
    Path("lacks.json").write_text(json.dumps({"protocol": {"revision": REVISION, "pictures": "many"}}))
    code, out, err = command(capsys, *args)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.json", "lacks.json", "other.json"]


def test_systems_of_other_sizes_are_refused(tiny_folder, tmp_path, capsys):
    code, _, err = command(capsys, "bench", "scenes", tiny_folder, "--out", tmp_path / "b")
    assert code == 2
    assert "this system makes pictures of 16x16; scenes are read at sides of 32, 64, 128" in err
    assert not (tmp_path / "b").exists()
