from __future__ import annotations

import json

import pytest
import torch

from sfumato.training.log import RunLog, read_log


def test_lines_hold_means_over_their_window_and_parse_as_json(tmp_path):
    path = tmp_path / "run" / "log.jsonl"
    with RunLog(path, total=40, every=20, quiet=True) as log:
        log.begin(0, 0.0)
        for step, value in enumerate((1.0, 3.0, 5.0)):
            metrics = {"g/loss": torch.tensor(value)}
            if step == 1:
                metrics["d/loss"] = torch.tensor(7.0)
            log.step(10 * (step + 1), metrics)
        log.close(30)
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
        log.begin(10, 100.0)
        log.step(15, {"a": torch.tensor(9.0)})
    rows = read_log(path)
    assert [row["images"] for row in rows] == [10, 15]
    assert rows[1]["seconds"] >= 100.0


def test_a_cadence_of_zero_gives_one_line_at_the_end(tmp_path):
    log = RunLog(tmp_path / "log.jsonl", total=30, every=0, quiet=True)
    log.begin(0, 0.0)
    for images in (10, 20, 30):
        log.step(images, {"a": torch.tensor(1.0)})
    log.close(30)
    assert [row["images"] for row in read_log(tmp_path / "log.jsonl")] == [30]


@pytest.mark.parametrize("quiet", [True, False])
def test_only_the_progress_bar_is_drawn_and_only_if_wanted(tmp_path, capfd, quiet):
    with RunLog(tmp_path / "log.jsonl", total=10, every=5, quiet=quiet) as log:
        log.begin(0, 0.0)
        log.step(10, {"g/loss": torch.tensor(0.25)})
    out, err = capfd.readouterr()
    assert out == ""
    assert ("g/loss 0.25" in err) is not quiet
