"""The trackers against stand-ins of the programs, which need not be installed."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image

from sfumato.training.log import RunLog
from sfumato.training.trackers import TRACKERS, Tracked, open_trackers


class Recorder:
    """Notes every call as (name, positional, keywords)."""

    def __init__(self, **attributes):
        self.calls: list[tuple] = []
        self.__dict__.update(attributes)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))

    def named(self, name):
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


@pytest.fixture
def stand_in(monkeypatch):
    """Put a module of that name where imports look."""

    def make(name, **members):
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return make


def a_run(log_folder, names):
    run = Tracked(name="toy", folder=log_folder, settings={"lr": 0.5})
    sheet = log_folder / "sheet.png"
    Image.new("RGB", (6, 4), "red").save(sheet)
    log = RunLog(log_folder / "log.jsonl", 40, 20, quiet=True, trackers=open_trackers(names, run))
    with log:
        log.begin(20)
        log.step(40, {"g/loss": torch.tensor(0.25)})
        log.note(40, {"validation/loss": 0.5})
        log.picture(40, sheet)
    return log


def test_tensorboard_gets_every_number_and_picture_at_the_images_seen(stand_in, tmp_path):
    writer = Recorder()
    made = []

    def summary_writer(*args, **kwargs):
        made.append((args, kwargs))
        return writer

    stand_in("torch.utils.tensorboard", SummaryWriter=summary_writer)
    a_run(tmp_path, ["tensorboard"])
    assert made == [((str(tmp_path / "tensorboard"),), {"purge_step": 20})]
    numbers = [args for args, _ in writer.named("add_scalar")]
    assert ("g/loss", 0.25, 40) in numbers
    assert ("validation/loss", 0.5, 40) in numbers
    ((name, picture, images), _) = writer.named("add_image")[0]
    assert (name, picture.shape, images) == ("samples", (3, 4, 6), 40)
    assert len(writer.named("close")) == 1


def test_wandb_takes_up_the_run_by_its_id_and_counts_in_images(stand_in, tmp_path):
    opened = []

    def init(**settings):
        opened.append((settings, Recorder(id="a1b2")))
        return opened[-1][1]

    stand_in("wandb", init=init, Image=lambda path: f"image of {path}")
    for _ in range(2):
        a_run(tmp_path, ["wandb"])
    (first, run), (second, _) = opened
    assert first == {"project": "sfumato", "name": "toy", "config": {"lr": 0.5}, "resume": "allow"}
    assert second == {**first, "id": "a1b2"}
    assert run.named("define_metric") == [(("*",), {"step_metric": "images"})]
    rows = [args[0] for args, kwargs in run.named("log") if not kwargs]
    assert [row["images"] for row in rows] == [40, 40, 40]
    assert rows[0]["g/loss"] == 0.25
    assert rows[2]["samples"] == f"image of {tmp_path / 'sheet.png'}"
    assert len(run.named("finish")) == 1


def test_trackio_takes_the_images_as_step(stand_in, tmp_path):
    run = Recorder()
    stand_in("trackio", init=lambda **settings: run, Image=lambda path: path)
    a_run(tmp_path, ["trackio"])
    assert [kwargs for _, kwargs in run.named("log")] == [{"step": 40}] * 3
    assert run.named("define_metric") == []
    assert not (tmp_path / "trackio.id").exists()


@pytest.mark.parametrize("name", list(TRACKERS))
def test_a_program_that_is_not_installed_is_one_line(name, tmp_path, monkeypatch):
    for module in ("torch.utils.tensorboard", "wandb", "trackio"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"asks for {name}, which is not installed; pip install") as error:
        open_trackers([name], Tracked(name="toy", folder=tmp_path))
    assert "\n" not in str(error.value)


def test_an_unknown_tracker_is_told_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="unknown tracker 'wand'; did you mean 'wandb'"):
        open_trackers(["wand"], Tracked(name="toy", folder=tmp_path))


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(tmp_path, caplog):
    told = []

    def fail(images, values):
        told.append(images)
        raise ConnectionError("no route to host")

    tracker = SimpleNamespace(begin=lambda images: None, numbers=fail, end=lambda: told.append("end"))
    with RunLog(tmp_path / "log.jsonl", 40, 10, quiet=True, trackers=[tracker]) as log:
        log.begin(0)
        for images in (10, 20, 30):
            log.step(images, {"a": torch.tensor(1.0)})
    assert told == [10]
    assert caplog.text.count("no route to host") == 1
    assert (tmp_path / "log.jsonl").read_text().count("\n") == 3
