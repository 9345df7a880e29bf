"""Wrong input gives one line that names the value, what is allowed and the fix; exit code 2; and no file."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sfumato import api, cli
from sfumato.checkpoints.files import sha256
from sfumato.core.png import save_png

RECORD = {"prompt": "x", "negative": "", "seed": 0, "size": [16, 16], "options": {"base": {}}}


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Run a command that must fail in an empty folder; returns the one line it says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SFUMATO_DEBUG", raising=False)

    def command(*args):
        before = files(tmp_path)
        code = cli.main([str(a) for a in args])
        said = capsys.readouterr()
        assert code == 2
        assert said.out == ""
        assert said.err.startswith("sfumato: ")
        assert said.err.count("\n") == 1, said.err
        assert files(tmp_path) == before
        return said.err.removeprefix("sfumato: ").rstrip("\n")

    return command


def files(folder: Path) -> list[tuple[str, int]]:
    return sorted((p.as_posix(), p.stat().st_size if p.is_file() else -1) for p in folder.rglob("*"))


@pytest.fixture
def system(tiny_folder, tmp_path):
    """A copy to damage."""
    return shutil.copytree(tiny_folder, tmp_path / "system")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--sampler", "eular"], "unknown sampler 'eular'; did you mean 'euler'? allowed: ddim, "),
        (["--size", "18"], "size 18x18: 18 is not allowed; allowed: multiples of 4, try 16 or 20"),
        (["--size", "16x30"], "size 16x30: 30 is not allowed; allowed: multiples of 4, try 28 or 32"),
        (["--size", "0"], "size 0x0: 0 is not allowed; allowed: multiples of 4, try 4"),
        (["--size", "big"], "size 'big' is neither a side nor WIDTHxHEIGHT; write 64, or 96x64"),
        (["--steps", "0"], "steps is 0; allowed: a whole number of at least 1; try 20"),
        (["--steps", "-4"], "steps is -4; allowed"),
        (["--steps", "many"], "Error parsing --steps: "),
        (["--n", "0"], "--n is 0; allowed: 1 or more"),
        (["--seed", "-1"], "seed is -1; allowed: a whole number from 0 to 2^63 - 1"),
        (["--guidance", "nan"], "guidance scale nan is not a finite number; 1 = off"),
        (["--device", "abacus"], "device 'abacus' cannot be used ("),
        (
            ["--stpes", "4"],
            "Unrecognized options: --stpes, 4; did you mean --steps?; see: sfumato generate --help",
        ),
    ],
)
def test_flags_of_generate(refused, system, flags, said):
    assert refused("generate", "red heart", "--system", system, *flags).startswith(said)


def test_no_prompt(refused):
    assert "Missing from sfumato generate: " in refused("generate")


def test_unknown_command(refused):
    said = refused("genrate", "red heart")
    assert said.startswith("unknown command 'genrate'; did you mean 'generate'? allowed: ")
    assert said.endswith("see: sfumato --help")
    assert refused("data", "chek").startswith("unknown data command 'chek'; did you mean 'check'?")
    assert refused("evaluate", "x").startswith(
        "unknown evaluation 'x'; allowed: bits, compare, openmoji, or the path"
    )


def test_no_system(refused, tmp_path):
    said = refused("generate", "x", "--system", tmp_path / "nowhere")
    assert (
        said == f"no system at {tmp_path}/nowhere: there is no system.json; give the folder of a saved system"
    )


def test_no_bundled_system(refused, monkeypatch, tmp_path):
    monkeypatch.setattr(api, "BUNDLED", tmp_path / "assets")
    assert refused("generate", "x").startswith(f"the bundled system is missing at {tmp_path}/assets; install")


def test_weights_missing(refused, system):
    (system / "denoiser.safetensors").unlink()
    said = refused("generate", "x", "--system", system)
    assert said.startswith(
        f"{system}/denoiser.safetensors is missing (system.json lists it as 'denoiser'); copy"
    )


def test_weights_cut_short(refused, system):
    path = system / "denoiser.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    said = refused("generate", "x", "--system", system)
    assert said.startswith(
        f"{path}: the file is cut short: it has {len(whole) // 2} bytes, its header expects"
    )


def damage(system, name, tensor):
    path = system / "text.safetensors"
    save_file(load_file(path) | {name: tensor}, path)
    data = json.loads((system / "system.json").read_text())
    data["nets"]["text"]["sha256"] = sha256(path)
    (system / "system.json").write_text(json.dumps(data))
    return path


def test_tensor_of_the_wrong_shape(refused, system):
    path = damage(system, "norm.weight", torch.ones(5))
    said = refused("generate", "x", "--system", system)
    assert said.startswith(f"{path}: tensor 'norm.weight' has shape (5,), expected (16,); ")


def test_nan_in_the_weights(refused, system):
    path = damage(system, "norm.weight", torch.full((16,), torch.nan))
    said = refused("generate", "x", "--system", system)
    assert said.startswith(
        f"{path}: tensor 'norm.weight' has 16 values that are NaN or infinite, expected finite"
    )


def test_weights_that_overflow(refused, system):
    path = damage(system, "norm.weight", torch.full((16,), 3e38))
    said = refused("generate", "x", "--system", system, "--out", "a.png")
    assert said.startswith("the sample is not finite after step 1 of 4"), path


@pytest.mark.parametrize("flags", [["--out", "file/a.png"], ["--out", "file/deep"], ["--out", "folder.png"]])
def test_output_that_cannot_be_written(refused, system, flags):
    Path("file").write_text("not a folder")
    Path("folder.png").mkdir()
    said = refused("generate", "x", "--system", system, *flags)
    assert said.startswith("cannot write ")
    assert "choose " in said


@pytest.mark.parametrize("command", [["generate", "x"], ["rerun", "a.png"], ["reconstruct", "a.png"]])
def test_other_kinds_of_picture(refused, system, command):
    save_png("a.png", Image.new("RGB", (8, 8)), record=RECORD)
    said = refused(*command, "--system", system, "--out", "b.jpg")
    assert said == "cannot write b.jpg: pictures are PNG files; call it b.png"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(refused, system):
    Path("locked").mkdir(mode=0o500)
    said = refused("generate", "x", "--system", system, "--out", "locked/a.png")
    assert "no permission in" in said


def test_permission_is_asked_before_the_work(refused, system, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(api, "load", lambda *_, **__: pytest.fail("loaded the system first"))
    assert "no permission in" in refused("generate", "x", "--system", system, "--out", "a.png")


def test_a_disk_that_fills_up(refused, system, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    said = refused("generate", "x", "--system", system, "--out", "a.png")
    assert said.startswith("cannot write a.png: No space left on device")


def test_pictures_that_cannot_be_rerun(refused, system):
    assert refused("rerun", "none.png", "--system", system).startswith("there is no picture at none.png")
    Image.new("RGB", (4, 4)).save("plain.png")
    assert "has no 'sfumato' text: it was not made by sfumato" in refused(
        "rerun", "plain.png", "--system", system
    )
    Path("text.png").write_text("hello")
    assert "it is not a PNG file" in refused("rerun", "text.png", "--system", system)
    save_png("odd.png", Image.new("RGB", (4, 4)), record={"prompt": "x"})
    said = refused("rerun", "odd.png", "--system", system)
    assert said.startswith(
        "the record in odd.png is not that of a picture to draw again: negative: Field required"
    )


def test_pictures_that_cannot_be_reconstructed(refused, system):
    save_png("a.png", Image.new("RGB", (32, 32), "red"))
    whole = Path("a.png").read_bytes()
    Path("a.png").write_bytes(whole[: len(whole) // 2])
    assert refused("reconstruct", "a.png", "--system", system).startswith("cannot read the picture a.png: ")
    Path("a.png").write_bytes(whole)
    said = refused("reconstruct", "a.png", "--size", "9", "--system", system)
    assert said.startswith("size 9x9: both sides must be positive multiples of 2")


def test_a_corrupt_picture_in_the_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for i in range(3):
        save_png(f"d/{i}.png", Image.new("RGB", (32, 32), (i * 90, 0, 0)))
    path = Path("d/1.png")
    path.write_bytes(path.read_bytes()[:60])
    assert cli.main(["data", "check", "d"]) == 2
    said = capsys.readouterr()
    assert "d: 3 pictures, 2 readable" in said.out
    assert said.err.startswith("sfumato: 1 of 3 pictures in d cannot be read, the first is 1.png (")
    assert said.err.endswith("replace or remove them\n")
    assert said.err.count("\n") == 1


def test_no_data(refused):
    assert "nowhere" in refused("data", "check", "nowhere")


def test_debugging_shows_the_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFUMATO_DEBUG", "1")
    assert cli.main(["generate", "x", "--system", "nowhere"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.splitlines()[-1].startswith("sfumato: no system at nowhere")


def test_an_interrupt_keeps_what_is_done(tiny_folder, tmp_path, monkeypatch, capsys):
    from sfumato.cli.drawing import Drawing

    monkeypatch.chdir(tmp_path)
    draw = Drawing.draw

    def tired(self, *args):
        if self.seed == 1:
            raise KeyboardInterrupt
        return draw(self, *args)

    monkeypatch.setattr(Drawing, "draw", tired)
    assert cli.main(["generate", "x", "--n", "3", "--system", str(tiny_folder)]) == 130
    said = capsys.readouterr()
    assert said.out == "out/x-0.png\n"
    assert said.err == "sfumato: interrupted\n"
    assert [p.name for p in Path("out").iterdir()] == ["x-0.png"]


def test_faults_of_the_program_are_not_hidden(monkeypatch):
    def broken(args):
        raise RuntimeError("a bug")

    monkeypatch.setitem(cli.VERBS, "info", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["info"])


def test_too_little_memory(refused, monkeypatch):
    def greedy(args):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:128] DefaultCPUAllocator: not enough memory: you tried\nmore"
        )

    monkeypatch.setitem(cli.VERBS, "generate", greedy)
    assert (
        refused("generate", "x") == "not enough memory; ask for a smaller --size, or choose another --device"
    )
