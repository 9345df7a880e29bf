"""Training and measuring from the command line, with tiny twins of the recipes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from sfumato import cli
from sfumato.core.png import save_png
from sfumato.evaluation import openmoji
from sfumato.families import RECIPES


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder of eight captioned pictures, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    for i, color in enumerate(("red", "green", "blue", "black") * 2):
        save_png(f"data/{i}.png", Image.new("RGB", (16, 16), color))
        Path(f"data/{i}.txt").write_text(f"{color} square")
    return tmp_path / "data"


def test_train_lists_the_recipes(capsys):
    assert cli.main(["train"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in RECIPES)


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_has_flags(name, capsys):
    assert cli.main(["train", name, "--help"]) == 0
    said = capsys.readouterr().out
    assert all(flag in said for flag in ("--data.path", "--trainer.images", "--optim.lr", "--task."))


def test_a_run_from_data_to_picture(data, capsys):
    flags = ["--trainer.images", "8", "--trainer.quiet", "--optim.lr", "0.002", "--data.path", data]
    assert cli.main(["train", "toy-dit", *map(str, flags)]) == 0
    folder = capsys.readouterr().out.strip().splitlines()[-1]
    assert Path(folder) == Path("runs/toy-dit/system")
    recipe = json.loads(Path("runs/toy-dit/recipe.json").read_text())
    assert recipe["optim"]["lr"] == 0.002
    assert recipe["trainer"]["images"] == 8
    assert cli.main(["generate", "red square", "--system", folder, "--out", "a.png"]) == 0
    with Image.open("a.png") as image:
        assert image.size == (16, 16)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["train", "toy-dt"], "unknown recipe 'toy-dt'; did you mean 'toy-dit'? allowed: "),
        (
            ["train", "toy-dit", "--data.pth", "x"],
            "Unrecognized options: --data.pth, x; did you mean --data.path?",
        ),
        (["train", "toy-dit", "--data.path", "nowhere"], "the data folder nowhere does not exist; "),
        (["train", "toy-dit", "--trainer.batch", "100"], "trainer.batch"),
        (["evaluate", "openmoji", "data"], "the metadata has no field 'split'"),
    ],
)
def test_wrong_flags_are_one_line(data, tiny_folder, capsys, args, said):
    args = [*args, "--system", str(tiny_folder)] if args[0] == "evaluate" else args
    assert cli.main(args) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"sfumato: {said}")
    assert err.count("\n") == 1


def test_a_damaged_picture_stops_a_run_in_one_line(data, capsys):
    (data / "3.png").write_bytes((data / "3.png").read_bytes()[:50])
    code = cli.main(
        ["train", "toy-dit", "--data.path", str(data), "--trainer.images", "16", "--trainer.quiet"]
    )
    err = capsys.readouterr().err
    assert code == 2
    assert "3.png" in err


def test_evaluate_passes_its_flags_on(tiny_folder, tmp_path, monkeypatch, capsys):
    from sfumato.cli import measuring

    seen = {}

    def measure(system, directory, *, protocol, sheet, progress, world):
        seen.update(system=system, directory=directory, protocol=protocol, sheet=sheet)
        progress("drawing", 1, 2)
        share = openmoji.Proportion.of(1, 4)
        found = openmoji.Retrieval(share, share)
        return openmoji.OpenMojiResult(
            protocol=protocol,
            system=system.fingerprint,
            references=4,
            size=16,
            psnr=20.0,
            psnr_pictures=2,
            training=found,
            toneless=found,
            held_out=found,
        )

    monkeypatch.setattr(measuring, "measure", measure)
    monkeypatch.chdir(tmp_path)
    flags = ["data", "--steps", "3", "--training", "7", "--sheet", "s.png", "--system", str(tiny_folder)]
    assert cli.main(["evaluate", "openmoji", *flags]) == 0
    assert "reconstruction PSNR   20.00 dB" in capsys.readouterr().out
    assert (seen["directory"], seen["sheet"]) == (Path("data"), Path("s.png"))
    assert (seen["protocol"].steps, seen["protocol"].training, seen["protocol"].toneless) == (3, 7, 200)
    assert cli.main(["evaluate", "openmoji", *flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["psnr"] == 20.0
