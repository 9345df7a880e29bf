"""What reports on trained systems are made of: cells recorded one by one, tables, charts and sheets."""

from __future__ import annotations

import json
import os
import signal
from functools import partial

import pytest
import torch
from PIL import Image

from sfumato.evaluation.measures import Proportion
from sfumato.reports.sweeps import Cell, Measured, Report, Sweep, page, run, write
from sfumato.training.signals import Stopped


def quiet(what, done, total):
    """Nobody is told."""


class Bench:
    """Cells that note that they ran; one of them may be stopped in its middle by a signal."""

    def __init__(self, stop=None):
        self.ran, self.stop = [], stop

    def measure(self, name, x):
        if (name, x) == self.stop:
            os.kill(os.getpid(), signal.SIGTERM)
        self.ran.append((name, x))
        row = torch.full((3, 4, 10), 10 * len(self.ran), dtype=torch.uint8)
        if x is None:
            return Measured({"error": 0.5})
        return Measured({"error": x / 2, "found": Proportion.of(int(x), 4)}, row)

    def report(self, system="a", xs=(1.0, 3.0)):
        told = {"systems": [system]}
        spots = [*((name, x) for name in ("one", "two") for x in xs), ("level", None)]
        cells = tuple(Cell(name=n, x=x, told=told, measure=partial(self.measure, n, x)) for n, x in spots)
        sweep = Sweep(name="part", title="Part", x="scale", note="Notes.", cells=cells)
        return Report(name="toy", title="Toy", plan={"xs": xs}, sweeps=(sweep,), notice={"Copyright": "me"})


ALL = [("one", 1.0), ("one", 3.0), ("two", 1.0), ("two", 3.0), ("level", None)]


def test_a_stopped_report_goes_on_and_runs_no_cell_twice(tmp_path):
    stopped, bench = Bench(stop=("two", 1.0)), Bench()
    with pytest.raises(Stopped):
        run(stopped.report(), tmp_path, quiet)
    assert stopped.ran == ALL[:2]
    assert len(json.loads((tmp_path / "toy.json").read_text())["cells"]) == 2
    outcomes = run(bench.report(), tmp_path, quiet)
    assert bench.ran == ALL[2:]
    assert [(one.name, one.x) for one in outcomes] == ALL
    assert [one.figures["error"] for one in outcomes] == [0.5, 1.5, 0.5, 1.5, 0.5]
    again = Bench()
    assert run(again.report(), tmp_path, quiet) == outcomes
    assert again.ran == []


def test_only_cells_that_differ_run_and_others_stay_recorded(tmp_path):
    run(Bench().report(), tmp_path, quiet)
    more, other, back = Bench(), Bench(), Bench()
    run(more.report(xs=(1.0, 2.0)), tmp_path, quiet)
    assert more.ran == [("one", 2.0), ("two", 2.0)]
    run(other.report(system="b"), tmp_path, quiet)
    assert other.ran == ALL
    run(back.report(), tmp_path, quiet)
    assert back.ran == []
    next((tmp_path / "toy-cells").iterdir()).unlink()
    lost = Bench()
    for system in ("a", "b"):  # a row of a sheet that is gone is drawn again
        run(lost.report(system, xs=(1.0, 2.0, 3.0)), tmp_path, quiet)
    assert len(lost.ran) == 1 + 2


def test_without_a_folder_nothing_is_kept_and_signals_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before, found = signal.getsignal(signal.SIGINT), []
    bench = Bench()
    report = bench.report()
    assert len(run(report, None, lambda *step: found.append(signal.getsignal(signal.SIGINT)))) == 5
    assert set(found) == {before}
    assert list(tmp_path.iterdir()) == []


def test_what_is_written(tmp_path):
    report = Bench().report()
    outcomes = run(report, tmp_path, quiet)
    files = [path.name for path in write(report, outcomes, tmp_path)]
    charts = ["toy-part-error.png", "toy-part-found.png"]
    assert files == ["toy.json", *charts, "toy-part-sheet.png", "toy.md"]
    text = (tmp_path / "toy.md").read_text()
    assert page(report, outcomes) in text
    assert "| two | 3 | 1.5 | 75.0 (30-95) % |" in text
    assert "| level |  | 0.5 |  |" in text
    assert "Rows from the top: one 1, one 3, two 1, two 3." in text
    for name in files[1:4]:
        assert f"({name})" in text
    with Image.open(tmp_path / "toy-part-sheet.png") as sheet:
        assert sheet.size == (10, 4 * 4 + 3 * 6)
        assert [sheet.getpixel((5, 1 + 10 * i)) for i in range(4)] == [(v, v, v) for v in (10, 20, 30, 40)]
        assert sheet.getpixel((5, 5)) == (255, 255, 255)
        assert sheet.info["Copyright"] == "me"


def test_a_file_that_is_no_report_is_refused_in_one_line(tmp_path):
    (tmp_path / "toy.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds no report; remove it, or choose another --out"):
        run(Bench().report(), tmp_path, quiet)
