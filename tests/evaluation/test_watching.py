"""Watching a run: every system whole, with the images it had seen, until the end."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from sfumato.evaluation import watching
from sfumato.evaluation.watching import watch


def run_folder(tmp_path: Path, total: int) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.json").write_text(json.dumps({"name": "toy", "trainer": {"images": total}}))
    return run


def publish(run: Path, images: int, files: int = 2) -> None:
    """As the trainer does: a checkpoint, then a new folder system/ renamed into place."""
    checkpoint = run / "checkpoints" / f"{images:012d}"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "manifest.json").write_text("{}")
    staging = run / f".system.{images}"
    staging.mkdir()
    for i in range(files):
        (staging / f"{i}.bin").write_bytes(str(images).encode())
    (staging / "system.json").write_text(json.dumps({"images": images}))
    system, old = run / "system", run / f".system.{images}.old"
    if system.exists():
        os.rename(system, old)
    os.rename(staging, system)
    shutil.rmtree(old, ignore_errors=True)


def contents(folder: Path) -> set[str]:
    return {file.read_text() for file in folder.glob("*.bin")}


def test_what_is_there_comes_first_and_the_last_ends_it(tmp_path: Path) -> None:
    run = run_folder(tmp_path, 20)
    publish(run, 10)
    seen = []
    for found in watch(run, every=0.01, timeout=30):
        seen.append((found.images, found.last, contents(found.folder)))
        kept = found.folder
        if not found.last:
            publish(run, 20)
    assert seen == [(10, False, {"10"}), (20, True, {"20"})]
    assert not kept.exists()


def test_a_copy_stays_while_the_run_publishes_the_next(tmp_path: Path) -> None:
    run = run_folder(tmp_path, 20)
    publish(run, 10)
    follow = watch(run, every=0.01, timeout=30)
    found = next(follow)
    publish(run, 20)
    assert contents(found.folder) == {"10"}
    follow.close()
    assert not found.folder.exists()


def test_a_copy_is_never_a_mixture(tmp_path: Path) -> None:
    run = run_folder(tmp_path, 300)
    publish(run, 1)
    writer = threading.Thread(target=lambda: [publish(run, i, files=20) for i in range(2, 301)])
    writer.start()
    seen = [(found.images, contents(found.folder)) for found in watch(run, every=0, timeout=30)]
    writer.join()
    assert all(len(texts) == 1 for _, texts in seen)
    assert seen[-1] == (300, {"300"})


def test_a_mixture_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_folder(tmp_path, 20)
    publish(run, 10)
    copytree = shutil.copytree

    def interrupted(source: Path, target: Path) -> None:
        monkeypatch.setattr(watching.shutil, "copytree", copytree)
        copytree(source, target)
        (target / "0.bin").write_text("20")
        publish(run, 20)

    monkeypatch.setattr(watching.shutil, "copytree", interrupted)
    assert [contents(found.folder) for found in watch(run, every=0.01, timeout=30)] == [{"20"}]


def test_images_are_those_of_the_checkpoint_before_the_system(tmp_path: Path) -> None:
    """The next checkpoint may be there already while its system is not."""
    run = run_folder(tmp_path, 30)
    publish(run, 10)
    later = run / "checkpoints" / f"{20:012d}"
    later.mkdir()
    (later / "manifest.json").write_text("{}")
    ahead = (run / "system" / "system.json").stat().st_mtime_ns + 1
    os.utime(later / "manifest.json", ns=(ahead, ahead))
    assert next(watch(run)).images == 10


def test_a_silent_run_ends_by_the_timeout(tmp_path: Path) -> None:
    run = run_folder(tmp_path, 20)
    publish(run, 10)
    started = time.monotonic()
    assert [found.images for found in watch(run, every=0.01, timeout=0.2)] == [10]
    assert 0.2 <= time.monotonic() - started < 20


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no run in .*: no recipe.json"):
        next(watch(tmp_path))
    (tmp_path / "recipe.json").write_text("[]")
    with pytest.raises(ValueError, match="is not the recipe of a run"):
        next(watch(tmp_path))
