"""Pictures that are drawn from pictures, by commands."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato import cli
from sfumato.cli.editing import tile_for
from sfumato.core.image import center_crop, load
from sfumato.systems.system import load_system


@pytest.fixture
def run(tiny_folder, tmp_path, monkeypatch, capsys):
    """Run a command on a system of 16x16 pictures, in a folder with a picture and a mask: code, out, err."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save("photo.png")
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (0, 0, 7, 16))
    mask.save("mask.png")
    mask.resize((12, 12)).save("small.png")

    def call(*args: str) -> tuple[int, str, str]:
        code = cli.main([*args, "--system", str(tiny_folder)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def pixels(path: str) -> np.ndarray:
    return np.asarray(load(Path(path)), dtype=np.int16)


def test_an_edit_is_drawn_again_to_the_byte(run):
    args = ("--image", "photo.png", "--mask", "mask.png", "--strength", "0.5", "--steps", "4")
    assert run("generate", "red heart", *args, "--out", "a.png") == (0, "a.png\n", "")
    apart = np.abs(pixels("a.png") - pixels("photo.png")).max(-1)
    assert apart[:, 7:].max() == 0
    assert apart[:, :7].max() > 0
    assert run("rerun", "a.png")[:2] == (0, "a-rerun.png\nsame bytes\n")
    Path("photo.png").write_bytes(Path("a.png").read_bytes())
    code, _, err = run("rerun", "a.png")
    assert code == 2
    assert err == "sfumato: photo.png is not the picture that it was; give the one of then\n"


def test_strength_and_inversion_decide_what_stays(run):
    def apart(*args: str) -> float:
        assert run("generate", "red heart", "--image", "photo.png", *args, "--out", "b.png")[0] == 0
        return float(np.abs(pixels("b.png") - near).mean())

    run("reconstruct", "photo.png", "--out", "near.png")
    near = pixels("near.png")
    weak, strong = apart("--strength", "0.05"), apart("--strength", "1")
    assert weak < strong
    inverted = apart("--invert", "red heart", "--guidance", "1", "--steps", "20")
    assert inverted < 0.5 * strong


@pytest.mark.parametrize(
    ("extend", "size", "kept"), [("8,0,16,4", (40, 20), (8, 0)), ("4", (24, 24), (4, 4))]
)
def test_a_picture_is_extended(run, extend, size, kept):
    code, _, err = run(
        "generate", "heart", "--image", "photo.png", "--extend", extend, "--steps", "2", "--out", "c.png"
    )
    assert (code, err) == (0, "")
    found = pixels("c.png")
    assert found.shape[1::-1] == size
    left, top = kept
    assert np.array_equal(found[top : top + 16, left : left + 16], pixels("photo.png"))


def test_a_second_pass_begins_with_the_first(run, tiny_folder):
    first, second = ("--seed", "3", "--steps", "2"), ("--enlarge", "1.5", "--strength")
    for args in ((*first, "--out", "d.png"), (*first, *second, "0.001", "--out", "e.png")):
        assert run("generate", "red heart", *args)[0] == 0
    enlarged = center_crop(load(Path("d.png")), (24, 24))
    near = np.asarray(load_system(tiny_folder).reconstruct(enlarged), dtype=np.int16)
    assert np.abs(pixels("e.png") - near).mean() < 10
    assert run("rerun", "e.png")[1].endswith("same bytes\n")


def bomb(path: str) -> None:
    """A PNG of a few bytes that claims 30000x30000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0" * 1000)), chunk(b"IEND", b"")]
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("--image photo.png --mask small.png", "the mask is 12x12 pixels and the image 16x16; give a mask"),
        ("--mask mask.png", "--mask, --extend and --invert are about a picture; give it as --image"),
        ("--image photo.png --strength 0", "strength 0 is outside (0, 1]"),
        ("--image photo.png --extend 4,4", "--extend is '4,4'; write one number, or LEFT,TOP,RIGHT,BOTTOM"),
        ("--image photo.png --extend -4", "--extend is '-4'; write one number"),
        ("--image photo.png --extend 3", "size 22x22: 22 is not allowed; allowed: multiples of 4"),
        ("--image photo.png --extend 4 --mask mask.png", "--extend makes a mask of its own"),
        ("--image nowhere.png", "there is no picture at nowhere.png"),
        (
            "--image bomb.png",
            "cannot read the picture bomb.png: it has more than 178 million pixels, or claims",
        ),
        ("--enlarge 1", "--enlarge is 1; allowed: more than 1, up to 8"),
    ],
)
def test_mistakes(run, args, said):
    bomb("bomb.png")
    code, out, err = run("generate", "x", *args.split())
    assert (code, out) == (2, "")
    assert err.startswith(f"sfumato: {said}")
    assert err.count("\n") == 1
    assert not Path("out").exists()


def test_tiles_are_chosen_by_the_memory_there_is(tiny_folder, monkeypatch, capsys):
    system = load_system(tiny_folder)
    monkeypatch.setattr("sfumato.cli.editing._free_bytes", lambda: 2.0**40)
    assert tile_for(system, (1024, 1024), None) is None
    assert capsys.readouterr().err == ""
    assert tile_for(system, (1024, 1024), 128) == 128
    assert tile_for(system, (1024, 1024), 0) is None
    monkeypatch.setattr("sfumato.cli.editing._free_bytes", lambda: 2.0**26)
    assert tile_for(system, (1024, 2048), None) == 256
    said = capsys.readouterr().err
    assert said.startswith("sfumato: decoding 2048x1024 takes about ")
    assert said.endswith(" GiB of 0.1 free: in tiles of 256 pixels\n")
