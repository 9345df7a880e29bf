"""What a run refuses from the command line: one line before its first step, and nothing is overwritten."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from sfumato import cli
from sfumato.checkpoints.native import read_folder
from sfumato.core.png import save_png
from sfumato.training.history import read_log

COLORS = ("red", "green", "blue", "black") * 2
SHORT = ["--trainer.images", "8", "--trainer.quiet", "--trainer.preview-every", "0"]


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys) -> Callable[..., str]:
    """Run a command that must fail and leave every file as it was; returns the one line it says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SFUMATO_DEBUG", raising=False)
    for i, color in enumerate(COLORS):
        save_png(f"data/{i}.png", Image.new("RGB", (16, 16), color))
        Path(f"data/{i}.txt").write_text(f"{color} square")
        save_png(f"classes/{color}/{i}.png", Image.new("RGB", (16, 16), color))

    def command(*args) -> str:
        before = content(tmp_path)
        capsys.readouterr()
        assert cli.main(["train", *map(str, args), *SHORT]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("sfumato: ")
        assert said.err.count("\n") == 1, said.err
        assert content(tmp_path) == before
        return said.err.removeprefix("sfumato: ").rstrip("\n")

    return command


def content(folder: Path) -> dict[str, bytes]:
    return {p.as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def trained(*args) -> None:
    assert cli.main(["train", *map(str, args), *SHORT]) == 0


def test_an_empty_data_folder(refused):
    Path("empty").mkdir()
    said = refused("toy-dit", "--data.path", "empty")
    assert said.startswith("empty holds no pictures; allowed endings: ")


def test_a_data_folder_without_captions(refused):
    for path in Path("data").glob("*.txt"):
        path.unlink()
    said = refused("toy-dit", "--data.path", "data")
    assert said.startswith(
        "no picture of data has a caption, and the task learns from text; give a 'text' in"
    )
    assert refused("toy-perceptual", "--data.path", "data").count("no words")


def test_labels_out_of_range(refused):
    said = refused("toy-classes", "--data.path", "classes")
    assert said.startswith("2 of 8 labels are out of range, the first is 3 of classes/red/")
    assert said.endswith("the net has 3 classes, so labels go from 0 to 2")


def test_no_labels(refused):
    assert "has no label; give class folders" in refused("toy-classes", "--data.path", "data")


@pytest.mark.parametrize("name", ["toy-dit", "toy-autoencoder", "toy-perceptual"])
def test_a_batch_larger_than_the_data(refused, name):
    said = refused(name, "--data.path", "data", "--trainer.batch", "9")
    assert said == "trainer.batch 9 is more than the 8 pictures of data; lower it"


def test_a_checkpoint_of_another_architecture(refused):
    trained("toy-dit", "--out", "base")
    flags = ["--task.init", "base", "--out", "new"]
    said = refused("toy-dit", *flags, "--task.net.width", "32")
    assert said.startswith(
        "tensor 'patches.weight' is of shape (32, 48) by task.net and of shape (16, 48) in base/system"
    )
    assert "'blocks.1." in refused("toy-dit", *flags, "--task.net.depth", "2")
    assert refused("toy-unet", *flags).startswith("task.net is a UNet and base/system holds a DiT")
    said = refused("toy-dit", *flags, "--task.prediction", "v")
    assert said.startswith("task.prediction is v, but base/system was trained with flow")
    said = refused("toy-dit", "--task.autoencoder", "base", "--out", "new")
    assert said == "base/system holds 0 networks of kind Autoencoder; expected one"


def test_a_checkpoint_that_is_not_that_of_the_recipe_beside_it(refused):
    trained("toy-dit", "--out", "run")
    trained("toy-dit", "--out", "wide", "--task.net.width", "32")
    shutil.rmtree("run/checkpoints")
    shutil.copytree("wide/checkpoints", "run/checkpoints")
    said = refused("toy-dit", "--out", "run", "--trainer.images", "16")
    assert said.startswith(
        "the checkpoint is of another architecture: "
        "denoiser.patches.weight is (32, 48) there and (16, 48) here, "
    )
    assert "more; choose another --out" in said


def test_a_changed_recipe_lists_what_differs_and_needs_force(refused, capsys):
    trained("toy-dit", "--out", "run")
    flags = ["--out", "run", "--optim.eps", "0.5", "--task.net.depth", "2"]
    said = refused("toy-dit", *flags)
    assert said == (
        "run holds a run of another recipe (optim.eps: 1e-08 -> 0.5; task.net.depth: 1 -> 2); choose another "
        "--out, or --force to remove it and begin again"
    )
    said = refused("toy-unet", "--out", "run")
    assert "name: toy-dit -> toy-unet" in said
    assert "task.net.patch: 4 -> None" in said
    trained("toy-dit", *flags, "--force")
    assert json.loads(Path("run/recipe.json").read_text())["optim"]["eps"] == 0.5
    assert read_folder("run/system").parts.nets["denoiser"].config.depth == 2
    assert max(row["images"] for row in read_log(Path("run/log.jsonl"))) == 8


def test_the_same_recipe_needs_no_force_and_goes_on(refused):
    trained("toy-dit", "--out", "run")
    before = Path("run/log.jsonl").read_text()
    trained("toy-dit", "--out", "run", "--trainer.images", "16")
    assert Path("run/log.jsonl").read_text().startswith(before)


def test_a_folder_of_somebody_else_is_left_alone(refused):
    Path("run/checkpoints").mkdir(parents=True)
    Path("run/checkpoints/mine.pt").write_text("weights")
    said = refused("toy-dit", "--out", "run")
    assert said.startswith("run holds checkpoints and no recipe.json, so it is not known whose that is")
    Path("file").write_text("text")
    assert refused("toy-dit", "--out", "file").startswith("cannot write into file")


def test_force_does_not_remove_a_run_before_the_mistakes_are_found(refused):
    trained("toy-dit", "--out", "run")
    for mistake in (["--data.path", "nowhere"], ["--trainer.device", "abacus"]):
        refused("toy-dit", "--out", "run", "--force", "--optim.eps", "0.5", *mistake)
