from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from subprocess import run

import pytest

from sfumato.training.history import Best, find_runs, read_log, read_run

NOW = 1_000_000.0


def a_run(folder: Path, rows=(), total=100, name="toy", age=10.0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.json").write_text(json.dumps({"name": name, "trainer": {"images": total}}))
    if rows:
        log = folder / "log.jsonl"
        log.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.utime(log, (NOW - age, NOW - age))
    return folder


def row(images, **values):
    return {"images": images, "seconds": images * 36.0, "images_per_second": 5.0, **values}


def test_a_run_tells_its_last_losses_and_its_best_validation(tmp_path):
    rows = [
        row(10, **{"g/loss": 4.0, "d/loss": 9.0, "g/mse": 1.0}),
        {"images": 10, "seconds": 361.0, "validation/loss": 2.0},
        {"images": 20, "seconds": 361.0, "validation/loss": 1.0, "validation/loss/0.00-0.25": 0.1},
        row(30, **{"g/loss": 3.0}),
        {"images": 50, "seconds": 1800.0, "validation/loss": 1.5},
    ]
    run = read_run(a_run(tmp_path / "first", rows), now=NOW)
    assert (run.name, run.recipe, run.images, run.total) == ("first", "toy", 50, 100)
    assert run.losses == {"g": 3.0, "d": 9.0}
    assert run.best == Best(1.0, 20)
    assert (run.images_per_second, run.hours) == (5.0, 0.5)
    assert run.curve("validation/loss") == ([10, 20, 50], [2.0, 1.0, 1.5])
    assert run.curve("x") == ([], [])
    assert run.as_dict()["best_validation"] == {"loss": 1.0, "images": 20}


@pytest.mark.parametrize(
    ("images", "age", "pause", "state"),
    [
        ([], 0, 0, "new"),
        ([50, 100], 1e6, 10, "finished"),
        ([50, 60], 60, 10, "running"),
        ([50, 60], 200, 10, "stopped"),
        ([50, 60], 200, 100, "running"),  # its lines are 100 seconds apart
        ([50, 60], 400, 100, "stopped"),
    ],
)
def test_states(images, age, pause, state, tmp_path):
    rows = [{**row(n), "seconds": i * pause} for i, n in enumerate(images)]
    assert read_run(a_run(tmp_path, rows, age=age), now=NOW).state == state


def test_runs_are_found_in_a_folder_of_runs_and_by_name(tmp_path):
    for name in ("b", "a", "deep/c"):
        a_run(tmp_path / name)
    assert find_runs([tmp_path]) == [tmp_path / name for name in ("a", "b", "deep/c")]
    assert find_runs([tmp_path / "b", tmp_path]) == [tmp_path / name for name in ("b", "a", "deep/c")]
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"there is no run in .*none"):
        find_runs([tmp_path, tmp_path / "none"])


def test_a_recipe_that_is_none_is_named(tmp_path):
    (a_run(tmp_path) / "recipe.json").write_text('{"name": "x"}')
    with pytest.raises(ValueError, match=r"recipe\.json is not the recipe of a run") as error:
        read_run(tmp_path, now=NOW)
    assert "\n" not in str(error.value)


def test_a_line_that_was_cut_short_is_left_out(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"images": 10}\n{"images": 2')
    assert read_log(tmp_path / "log.jsonl") == [{"images": 10}]


def test_it_needs_no_torch(repository):
    modules = "sfumato.cli.history, sfumato.training.history, sfumato.core.chart"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    assert (
        run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True).stdout == "False\n"
    )
