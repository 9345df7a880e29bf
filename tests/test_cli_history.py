"""`sfumato runs`: the table, JSON, the chart, and wrong input."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from sfumato import cli


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two runs in runs/, one of them with validations."""
    monkeypatch.chdir(tmp_path)
    for name, factor in (("first", 1.0), ("second", 2.0)):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "recipe.json").write_text(json.dumps({"name": "toy-dit", "trainer": {"images": 4000}}))
        rows = [
            {"images": n, "seconds": n / 10, "images_per_second": 10.0, "denoiser/loss": factor * 100 / n}
            for n in range(1000, 4001, 1000)
        ]
        if name == "second":
            rows.append({"images": 4000, "seconds": 400.0, "validation/loss": 0.125})
        (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "runs"


def test_the_table_has_a_line_for_each_run(runs, capsys):
    assert cli.main(["runs"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["first", "toy-dit", "finished", "4k/4k", "0.025", "-", "10.0", "0.11"] in lines
    assert ["second", "toy-dit", "finished", "4k/4k", "0.05", "0.125", "at", "4k", "10.0", "0.11"] in lines


def test_json_has_the_same(runs, capsys):
    assert cli.main(["runs", "runs/second", "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)
    assert run["losses"] == {"denoiser": 0.05}
    assert run["best_validation"] == {"loss": 0.125, "images": 4000}


@pytest.mark.parametrize("more", [[], ["--scale", "linear"], ["--metrics", "validation/loss"]])
def test_the_chart_is_a_picture(runs, capsys, more):
    assert cli.main(["runs", "runs/first", "runs/second", "--plot", "curves.png", *more]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "curves.png"
    with Image.open("curves.png") as image:
        assert image.size == (960, 600)
        assert len(image.getcolors(100_000)) > 20


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["none"], "there is no run in none"),
        (
            ["runs", "--plot", "a.png", "--metrics", "x/y"],
            "no run has logged x/y; their logs have: denoiser/loss",
        ),
        (["runs", "--plot", "a.jpg"], "cannot write a.jpg: pictures are PNG files"),
    ],
)
def test_wrong_input_is_one_line(runs, capsys, args, said):
    assert cli.main(["runs", *args]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"sfumato: {said}")
    assert err.count("\n") == 1
    assert not (runs.parent / "a.png").exists()
