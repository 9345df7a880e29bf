from __future__ import annotations

import json
import os

import pytest
import torch

from sfumato.training.history import read_log
from sfumato.training.log import RunLog


def test_lines_hold_means_over_their_window_and_parse_as_json(tmp_path):
    path = tmp_path / "run" / "log.jsonl"
    with RunLog(path, total=30, every=20, quiet=True) as log:
        log.begin(0)
        for step, value in enumerate((1.0, 3.0, 5.0)):
            metrics = {"g/loss": torch.tensor(value)}
            if step == 1:
                metrics["d/loss"] = torch.tensor(7.0)
            log.step(10 * (step + 1), metrics)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["images"] for row in rows] == [20, 30]
    assert [row["g/loss"] for row in rows] == [2.0, 5.0]
    assert rows[0]["d/loss"] == 7.0  # the mean over the steps in which the phase ran, not over all
    assert "d/loss" not in rows[1]
    assert all(row["images_per_second"] > 0 for row in rows)
    assert rows[1]["seconds"] >= rows[0]["seconds"] >= 0


def test_resume_cuts_lines_beyond_the_checkpoint_and_adds_up_time(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"images": 10, "a": 1.0}\n{"images": 20, "a": 2.0}\n{"images": 30, "a"')
    with RunLog(path, total=40, every=5, quiet=True) as log:
        log.begin(10, {"images": 10, "seconds": (100.0, 0.0), "sums": {}, "counts": {}})
        log.step(15, {"a": torch.tensor(9.0)})
    rows = read_log(path)
    assert [row["images"] for row in rows] == [10, 15]
    assert rows[1]["seconds"] >= 100.0


def test_a_line_after_a_resume_is_that_of_a_run_that_was_never_stopped(tmp_path):
    """Numbers that are not exact in binary, so that another order of adding up would show."""
    logs = {name: tmp_path / name / "log.jsonl" for name in ("whole", "parts")}
    for name, path in logs.items():
        log, state = RunLog(path, total=80, every=30, quiet=True), None
        log.begin(0)
        for images in range(10, 90, 10):
            log.step(images, {"g/loss": torch.tensor(0.1 * images), "d/loss": torch.tensor(0.3)})
            if images == 50:
                state = log.state_dict()
        if name == "parts":
            log = RunLog(path, total=80, every=30, quiet=True)
            log.begin(50, state)
            for images in (60, 70, 80):
                log.step(images, {"g/loss": torch.tensor(0.1 * images), "d/loss": torch.tensor(0.3)})
    rows = {
        name: [{k: v for k, v in row.items() if "second" not in k} for row in read_log(path)]
        for name, path in logs.items()
    }
    assert [row["images"] for row in rows["whole"]] == [30, 60, 80]
    assert rows["parts"] == rows["whole"]


def test_a_death_while_the_log_is_cut_back_leaves_all_of_its_lines(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    path.write_text('{"images": 10, "a": 1.0}\n{"images": 20, "a": 2.0}\n')
    before = path.read_bytes()

    def die(source, target):
        assert target == path
        assert read_log(source) == [{"images": 10, "a": 1.0}]
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        RunLog(path, total=40, every=5, quiet=True).begin(10)
    assert path.read_bytes() == before


def test_a_cadence_of_zero_gives_one_line_at_the_end(tmp_path):
    log = RunLog(tmp_path / "log.jsonl", total=30, every=0, quiet=True)
    log.begin(0)
    for images in (10, 20, 30):
        log.step(images, {"a": torch.tensor(1.0)})
    assert [row["images"] for row in read_log(tmp_path / "log.jsonl")] == [30]


@pytest.mark.parametrize("quiet", [True, False])
def test_only_the_progress_bar_is_drawn_and_only_if_wanted(tmp_path, capfd, quiet):
    with RunLog(tmp_path / "log.jsonl", total=10, every=5, quiet=quiet) as log:
        log.begin(0)
        numbers = {"g/loss": 0.25, "g/lr": 0.001, "g/grad_norm": 3.5, "g/mse": 9.0, "d/loss": 0.5}
        log.step(10, {name: torch.tensor(value) for name, value in numbers.items()})
        log.note(10, {"validation/loss": 0.125, "validation/loss/0.00-0.25": 7.0})
    out, err = capfd.readouterr()
    assert out == ""
    wanted = (
        "10/10 images",
        "img/s",
        "g: loss 0.25, lr 0.001, gradient 3.5",
        "d: loss 0.5",
        "validation: loss 0.125",
    )
    assert [text in err for text in wanted] == [not quiet] * 5
    assert "mse" not in err


def test_a_note_is_a_line_of_its_own(tmp_path):
    with RunLog(tmp_path / "log.jsonl", total=40, every=20, quiet=True) as log:
        log.begin(0)
        log.step(10, {"g/loss": torch.tensor(1.0)})
        log.note(10, {"validation/loss": 2.0, "validation/psnr": float("inf")})
        log.step(20, {"g/loss": torch.tensor(3.0)})
    rows = read_log(tmp_path / "log.jsonl")
    assert [row["images"] for row in rows] == [10, 20]
    assert rows[0].keys() == {"images", "seconds", "validation/loss"}
    assert rows[1]["g/loss"] == 2.0  # the mean over both steps, as if nothing had been noted


def test_images_of_an_earlier_session_are_not_speed_of_this_one(tmp_path):
    log = RunLog(tmp_path / "log.jsonl", total=2_000_000, every=10, quiet=True)
    log.begin(1_000_000)
    assert log._bar.tasks[0].completed == 1_000_000
    log.step(1_000_010, {"a": torch.tensor(1.0)})
    log.step(1_000_020, {"a": torch.tensor(1.0)})
    task = log._bar.tasks[0]
    assert sum(sample.completed for sample in task._progress) == 20
