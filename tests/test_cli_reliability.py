"""Training on disks that are full or read-only, and with losses that break, from the command line."""

from __future__ import annotations

import contextlib
import json
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

from sfumato import cli
from sfumato.core.png import save_png
from sfumato.training.state import Checkpoints

CADENCE = (
    "--trainer.log-every=12",
    "--trainer.preview-every=8",
    "--trainer.save-every=8",
    "--trainer.keep=1",
)


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """Train toy-dit in a folder to so many images; returns the exit code and the lines of stderr."""
    monkeypatch.chdir(tmp_path)
    for i, color in enumerate(("red", "green", "blue", "black") * 2):
        save_png(f"data/{i}.png", Image.new("RGB", (16, 16), color))
        Path(f"data/{i}.txt").write_text(f"{color} square")

    def command(out, images, *flags):
        # The schedule must not know the length of the run, for runs begin here with a shorter one.
        length = [f"--trainer.images={images}", "--optim.lr-schedule=constant"]
        code = cli.main(["train", "toy-dit", f"--out={out}", "--trainer.quiet", *length, *CADENCE, *flags])
        return code, capsys.readouterr().err.splitlines()

    return command


@pytest.fixture
def disk(tmp_path):
    """A file system of 16 MiB of its own; `disk.mount(option)` mounts it again."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(*options):
        return subprocess.run(["mount", *options, str(place)], capture_output=True).returncode

    try:
        if mount("-t", "tmpfs", "-o", "size=16m", "tmpfs"):
            pytest.skip("a small file system can be mounted by root alone")
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    yield place, lambda option: mount("-o", f"remount,{option}")
    subprocess.run(["umount", str(place)], check=True)


def state(out) -> dict:
    return Checkpoints(Path(out) / "checkpoints").load()


def weights(out) -> list[torch.Tensor]:
    return [tensor for module in state(out)["modules"].values() for tensor in module.values()]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


def refused(code, err, what) -> bool:
    """Whether a run ended with one line about an error of the file system; other lines are its news."""
    return (
        code == 2
        and err[-1].startswith("sfumato: ")
        and what in err[-1]
        and "Traceback" not in "\n".join(err)
    )


def test_a_full_disk_keeps_the_last_checkpoint_and_the_run_goes_on_when_there_is_room(train, disk):
    place, _ = disk
    assert train("whole", 24)[0] == 0
    assert train(place / "run", 8)[0] == 0
    filler = place / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    code, err = train(place / "run", 24)
    assert refused(code, err, "No space left on device"), err
    assert state(place / "run")["images"] == 8
    filler.unlink()
    assert train(place / "run", 24)[0] == 0
    assert same(place / "run", "whole")


def test_a_disk_that_turns_read_only_keeps_the_last_checkpoint(train, disk):
    place, remount = disk
    assert train("whole", 16)[0] == 0
    assert train(place / "run", 8)[0] == 0
    assert remount("ro") == 0
    code, err = train(place / "run", 16)
    assert refused(code, err, "Read-only file system"), err
    code, err = train(place / "other", 16)
    assert refused(code, err, "Read-only file system"), err
    assert remount("rw") == 0
    assert state(place / "run")["images"] == 8
    assert train(place / "run", 16)[0] == 0
    assert same(place / "run", "whole")


@pytest.mark.parametrize("limit", [1, 5_000, 200_000])
def test_files_that_may_not_grow_keep_the_last_checkpoint(train, limit):
    """A limit on the size of files is met in the recipe, in a preview, or in the checkpoint."""
    resource = pytest.importorskip("resource")
    assert train("whole", 16)[0] == 0
    assert train("run", 8)[0] == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        code, err = train("run", 16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert refused(code, err, "File too large"), err
    assert state("run")["images"] == 8
    assert train("run", 16)[0] == 0
    assert same("run", "whole")


def test_losses_that_break_roll_back_name_the_module_and_the_run_goes_on_with_another_rate(train, caplog):
    assert train("whole", 24)[0] == 0
    assert train("run", 8)[0] == 0
    code, err = train("run", 24, "--optim.lr=1e30", "--optim.clip=0", "--trainer.patience=2")
    assert code == 2
    assert (
        "is not finite, 2 steps in a row until step 5 (20 images); it begins with the output of " in err[-1]
    )
    assert f"back at its last checkpoint: {Path('run/checkpoints/000000000008')}" in err[-1]
    assert err[-1].endswith("go on with a lower --optim.lr or a longer --optim.warmup")
    assert "goes on with other settings: optim.clip: 1.0 -> 0.0; optim.lr: 0.001 -> 1e+30" in caplog.text
    assert train("run", 24)[0] == 0
    assert same("run", "whole")
    assert json.loads(Path("run/recipe.json").read_text())["optim"]["lr"] < 1
