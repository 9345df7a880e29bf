"""The commands as a user types them, on a tiny system with random weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato import __version__, cli
from sfumato.checkpoints.native import read_folder
from sfumato.core.png import read_record, read_text, save_png
from sfumato.systems.system import load_system, save_system


@pytest.fixture
def run(tiny_folder, tmp_path, monkeypatch, capsys):
    """Run a command in an empty folder with the tiny system: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def command(*args, system=tiny_folder):
        code = cli.main([*map(str, args), *(["--system", str(system)] if system else [])])
        said = capsys.readouterr()
        return code, said.out, said.err

    return command


def test_help_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {verb} " in said for verb in cli.VERBS)
    assert all((verb.__doc__ or "").splitlines()[0] in said for verb in cli.VERBS.values())
    assert cli.main([]) == 0
    assert capsys.readouterr().out == said


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"sfumato {__version__}\n"


@pytest.mark.parametrize("verb", ["generate", "rerun", "reconstruct", "info", "data", "evaluate", "bench"])
def test_every_command_has_help(verb, capsys):
    assert cli.main([verb, "--help"]) == 0
    assert f"usage: sfumato {verb}" in capsys.readouterr().out


def test_generate_writes_a_picture_and_prints_its_path(run):
    code, out, err = run("generate", "Red heart", "--seed", 7)
    assert (code, out, err) == (0, "out/red-heart-7.png\n", "")
    with Image.open("out/red-heart-7.png") as image:
        assert image.size == (16, 16)


def test_words_that_were_never_learned_are_told(run):
    code, out, err = run("generate", "A red heart, please!", "--negative", "ugly")
    assert (code, out) == (0, "out/a-red-heart-please-0.png\n")
    assert err == "sfumato: tiny was not trained on the words 'a', 'heart,', 'please!', 'ugly'\n"
    _, out, err = run("generate", "blue hart", "--json")
    assert json.loads(out)["unknown_words"] == ["hart"]
    assert err == ""


def test_how_clip_reads_a_prompt_is_asked_of_systems_that_have_it(run):
    code, out, err = run("generate", "a (red:1.3) heart", "--prompt-weights")
    assert (code, out) == (2, "")
    assert err == "sfumato: CLIP does not read the prompts of this system; leave out how it is to read\n"
    code, _, err = run("generate", "a heart", "--prompt-chunks", 0)
    assert (code, err) == (2, "sfumato: chunks of a prompt is 0; allowed: a whole number from 1 on\n")


def test_a_picture_tells_how_it_was_made(run, tiny_folder):
    run(
        "generate",
        "red heart",
        "--negative",
        "blue, dark",
        "--seed",
        7,
        "--steps",
        3,
        "--guidance",
        2.5,
        "--out",
        "a.png",
    )
    text = read_text("a.png")["parameters"]
    fingerprint = read_folder(tiny_folder).fingerprint
    assert text.splitlines() == [
        "red heart",
        "Negative prompt: blue, dark",
        f"Steps: 3, Sampler: Euler, CFG scale: 2.5, Seed: 7, Size: 16x16, Model hash: {fingerprint}, "
        f"Model: tiny, Version: sfumato {__version__}",
    ]
    record = read_record("a.png")
    assert (record["prompt"], record["negative"], record["seed"]) == ("red heart", "blue, dark", 7)
    assert record["system"] == {"name": "tiny", "fingerprint": fingerprint}
    assert record["license"] == "CC0-1.0"
    assert record["options"]["base"]["steps"] == 3
    assert str(tiny_folder) not in json.dumps(record)


def test_the_picture_is_the_one_of_the_python_interface(run, tiny_folder):
    run("generate", "red heart", "--seed", 7, "--out", "a.png")
    expected = load_system(tiny_folder).generate("red heart", seed=7)[0]
    with Image.open("a.png") as image:
        assert np.array_equal(np.asarray(image), np.asarray(expected))


def test_several_pictures_and_a_sheet(run):
    code, out, _ = run("generate", "red heart", "--n", 3, "--grid", "--size", "24x16", "--out", "pics")
    names = ["red-heart-0.png", "red-heart-1.png", "red-heart-2.png", "red-heart-0-grid.png"]
    assert code == 0
    assert out.splitlines() == [f"pics/{name}" for name in names]
    with Image.open("pics/red-heart-1.png") as one, Image.open("pics/red-heart-0-grid.png") as sheet:
        assert one.size == (24, 16)
        assert sheet.size == (2 * 24 + 2, 2 * 16 + 2)
        assert sheet.info["Copyright"] == "License: CC0-1.0"
    assert sorted(p.name for p in Path("pics").iterdir()) == sorted(names)


def test_a_picture_of_several_is_the_one_made_alone(run):
    run("generate", "red heart", "--n", 3, "--seed", 5, "--out", "many")
    run("generate", "red heart", "--seed", 7, "--out", "one.png")
    assert Path("many/red-heart-7.png").read_bytes() == Path("one.png").read_bytes()


@pytest.mark.parametrize(
    ("out", "n", "paths"),
    [
        ("a.png", 1, ["a.png"]),
        ("deep/er/a.PNG", 2, ["deep/er/a-0.PNG", "deep/er/a-1.PNG"]),
        ("v1.5", 1, ["v1.5/no-prompt-0.png"]),
    ],
)
def test_where_pictures_go(run, out, n, paths):
    code, said, _ = run("generate", "", "--n", n, "--out", out)
    assert code == 0
    assert said.splitlines() == paths
    assert all(Path(p).is_file() for p in paths)


def test_names_are_short_and_keep_other_scripts(run):
    _, out, _ = run("generate", "../Ein \u00c4pfelchen " + "x" * 200)
    name = Path(out.strip()).name
    assert name.startswith("ein-\u00e4pfelchen-xxx")
    assert len(name) < 80
    assert Path(out.strip()).parent == Path("out")


def test_json_for_programs(run):
    code, out, err = run("generate", "red heart", "--n", 2, "--grid", "--json")
    said = json.loads(out)
    assert (code, err) == (0, "")
    assert [p["path"] for p in said["pictures"]] == ["out/red-heart-0.png", "out/red-heart-1.png"]
    assert [p["seed"] for p in said["pictures"]] == [0, 1]
    assert said["grid"] == "out/red-heart-0-grid.png"
    assert said["seconds"] > 0


def test_rerun_makes_the_same_bytes(run):
    run(
        "generate",
        "red heart",
        "--seed",
        3,
        "--n",
        2,
        "--sampler",
        "euler_ancestral",
        "--negative",
        "blue",
        "--out",
        "p",
    )
    code, out, err = run("rerun", "p/red-heart-4.png")
    assert (code, out, err) == (0, "p/red-heart-4-rerun.png\nsame bytes\n", "")
    assert Path("p/red-heart-4.png").read_bytes() == Path("p/red-heart-4-rerun.png").read_bytes()
    code, out, _ = run("rerun", "p/red-heart-4.png", "--json", "--out", "b.png")
    assert json.loads(out) == {"path": "b.png", "same_bytes": True, "verdict": "same bytes"}


def test_rerun_with_another_system_says_so(run, tiny_folder, tmp_path):
    run("generate", "red heart", "--out", "a.png")
    system = load_system(tiny_folder)
    net = system.parts.nets["denoiser"]
    net.out.bias.data += 0.5
    save_system(system, tmp_path / "other")
    code, out, err = run("rerun", "a.png", system=tmp_path / "other")
    assert code == 1
    assert len(err.splitlines()) == 1
    assert "a.png was made with system tiny " in err
    assert "choose the right one with --system" in err
    assert "\ndifferent: " in out


def test_rerun_of_a_painted_picture_says_how_much_differs(run):
    run("generate", "red heart", "--out", "a.png")
    with Image.open("a.png") as image:
        painted = image.convert("RGB")
    r, g, b = painted.getpixel((0, 0))
    painted.putpixel((0, 0), (255 - r, g, b))
    save_png("b.png", painted, record=read_record("a.png"))
    code, out, _ = run("rerun", "b.png")
    assert code == 1
    assert "different: 0.13% of the values, by at most" in out  # 1 of 16 * 16 * 3
    save_png("c.png", Image.open("a.png").convert("RGB"), record=read_record("a.png"))
    assert "same pixels, but the files differ" in run("rerun", "c.png")[1]


def test_reconstruct(run):
    Image.new("RGB", (21, 16), "green").save("photo.jpg")
    code, out, _ = run("reconstruct", "photo.jpg")
    assert code == 0
    assert out.startswith("out/photo-reconstruction.png\nPSNR ")
    with Image.open("out/photo-reconstruction.png") as image:
        assert image.size == (20, 16)
    code, out, _ = run("reconstruct", "photo.jpg", "--size", "8", "--out", "small.png", "--json")
    said = json.loads(out)
    assert said["path"] == "small.png"
    assert 0 < said["psnr_db"] < 60
    with Image.open("small.png") as image:
        assert image.size == (8, 8)
        assert image.info["Copyright"] == "License: CC0-1.0"


def test_info_of_a_file_that_needs_a_config(run):
    file = Path(__file__).parent / "golden/adm_classifier/model.safetensors"
    code, _, error = run("info", file, system=None)
    assert code == 2
    assert "no tensor tells the attention heads" in error


def test_info_of_a_file_tells_its_settings(run, tmp_path):
    """Of networks that are no system: what was read, and what was given."""
    file = Path(__file__).parent / "golden/adm_classifier/model.safetensors"
    (tmp_path / "a.json").write_text('{"num_head_channels": 16}')
    code, out, _ = run("info", file, "--config", tmp_path / "a.json", system=None)
    assert code == 0
    assert "classifier    layout adm-classifier, 0.92M parameters" in out
    told = dict(line.split(maxsplit=1) for line in out.splitlines()[1:])
    assert told["num_head_channels"] == "16"
    assert told["use_new_attention_order"] == "False"
    assert told["channel_mult"] == "[1, 2, 3]"
    assert "noise_schedule" not in told
    _, out, _ = run("info", file, "--config", tmp_path / "a.json", "--json", system=None)
    assert json.loads(out)["settings"]["classifier"]["pool"] == "attention"


def test_info(run, tiny_folder):
    code, out, _ = run("info", tiny_folder, system=None)
    assert code == 0
    for line in (
        "license       CC0-1.0",
        "  schedule    flow",
        "  prediction  flow",
        "stage         base",
        "pictures      16x16",
    ):
        assert line in out
    _, out, _ = run("info", tiny_folder, "--json", system=None)
    said = json.loads(out)
    nets = load_system(tiny_folder).parts.nets
    assert said["parameters"] == {k: sum(p.numel() for p in net.parameters()) for k, net in nets.items()}
    assert said["size"] == [16, 16]
    assert said["stages"][0]["schedule"]["kind"] == "flow"


def test_data_check(run, tmp_path):
    for i, caption in enumerate(("one", "two")):
        save_png(f"d/{i}.png", Image.new("RGB", (8, 8), (i * 90, 0, 0)))
        Path(f"d/{i}.txt").write_text(caption)
    code, out, err = run("data", "check", "d", system=None)
    assert (code, err) == (0, "")
    assert "d: 2 pictures, 2 readable" in out
    code, out, _ = run("data", "check", "d", "--json", system=None)
    assert json.loads(out)["count"] == 2


def test_the_program_itself(tiny_folder, tmp_path, repository):
    """One walk through a fresh process: exit codes, streams, no colors, and the bytes of this process."""

    def sfumato(*args):
        return subprocess.run(
            [sys.executable, "-m", "sfumato", *args, "--system", str(tiny_folder)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(repository)},
            capture_output=True,
            text=True,
            timeout=300,
        )

    done = sfumato("generate", "red heart", "--seed", "7", "--out", "a.png")
    assert (done.returncode, done.stdout, done.stderr) == (0, "a.png\n", "")
    expected = load_system(tiny_folder).generate("red heart", seed=7)[0]
    with Image.open(tmp_path / "a.png") as image:
        # Another process may use another number of threads, hence another order of sums.
        assert np.abs(np.asarray(image, np.int16) - np.asarray(expected, np.int16)).max() <= 1
    wrong = sfumato("generate", "red heart", "--sampler", "eular", "--out", "b.png")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("sfumato: unknown sampler 'eular'; did you mean 'euler'?")
    assert wrong.stderr.count("\n") == 1
    assert not (tmp_path / "b.png").exists()
