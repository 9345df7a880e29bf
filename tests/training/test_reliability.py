"""Signals, kills, micro-batches and numbers that are not finite: no run loses what it has learned."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sfumato.training.batches import Batch
from sfumato.training.log import RunLog, read_log
from sfumato.training.optim import OptimConfig
from sfumato.training.signals import Stop, Stopped
from sfumato.training.state import Checkpoints
from sfumato.training.task import Loss, Phase
from sfumato.training.trainer import Trainer, TrainerConfig

DYING = Path(__file__).with_name("dying.py")
RECIPES = ["toy-dit", "toy-autoencoder", "toy-lora"]


class Regression:
    """Two phases, each a mean over the samples; `at` is called with the images seen before each batch."""

    def __init__(self, at=lambda images: None, broken=()) -> None:
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 1)
        self.modules = {"first": self.first, "second": self.second}
        self.phases = {"one": Phase(("first",)), "two": Phase(("second",))}
        self.averaged = ("first", "second")
        self.memories = {}
        self.at, self.broken = at, broken

    def losses(self, batch, noise, moment):
        self.at(moment.images)
        value = (self.first(batch.images + noise(batch.images)) - 1).square().mean()
        yield Loss("one", value * torch.nan if moment.images in self.broken else value, {})
        yield Loss("two", (self.second(self.first(batch.images).detach()) - 1).square().mean(), {})

    def preview(self, averaged):
        return averaged["first"].weight


def batches(images: int) -> Batch:
    index = torch.arange(images, images + 4)
    return Batch(images=torch.stack([index, index % 3], 1).float() / 50, text=("",) * 4, index=index)


def trainer(folder, task, stop=None, **config) -> Trainer:
    settings = TrainerConfig(
        **{"images": 40, "batch": 4, "log_every": 4, "save_every": 16, "device": "cpu"} | config
    )
    log = RunLog(folder / "log.jsonl", settings.images, settings.log_every, quiet=True)
    kept = Checkpoints(folder / "checkpoints", settings.keep)
    return Trainer(task, batches, settings, optim=OptimConfig(lr=0.05), log=log, checkpoints=kept, stop=stop)


def weights(task) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for m in task.modules.values() for p in m.parameters()])


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("when", [0, 20, 36])
def test_a_signal_ends_with_a_checkpoint_from_which_the_run_ends_as_if_nothing_had_been(
    tmp_path, signum, when
):
    whole = Regression()
    trainer(tmp_path / "whole", whole).fit()

    def at(images):
        if images == when:
            os.kill(os.getpid(), signum)

    with Stop() as stop:
        run = trainer(tmp_path / "cut", Regression(at), stop)
        with pytest.raises(Stopped):
            run.fit()
    assert [int(path.name) for path in run.checkpoints.paths()][-1] == run.images
    assert when <= run.images <= when + 4
    again = Regression()
    trainer(tmp_path / "cut", again).fit()
    assert torch.equal(weights(again), weights(whole))


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_make_the_step_of_the_whole_batch(tmp_path, parts):
    whole, cut = Regression(), Regression()
    trainer(tmp_path / "whole", whole).fit()
    trainer(tmp_path / "cut", cut, accumulate=parts).fit()
    torch.testing.assert_close(weights(cut), weights(whole), rtol=1e-5, atol=1e-6)


def test_a_batch_that_cannot_be_cut_evenly_is_refused():
    with pytest.raises(ValueError, match=r"trainer\.batch 4 cannot be cut into 3"):
        TrainerConfig(images=8, batch=4, accumulate=3)


def test_a_step_whose_loss_is_not_finite_is_skipped_counted_and_changes_nothing(tmp_path):
    before: dict[int, torch.Tensor] = {}
    task = Regression(broken=(12, 16))
    task.at = lambda images: before.setdefault(images, weights(task))
    run = trainer(tmp_path, task)
    run.fit()
    assert run.skipped == 2
    assert torch.equal(before[12], before[16])
    assert torch.equal(before[16], before[20])
    assert not torch.equal(before[20], before[24])
    rows = {row["images"]: row.get("skipped") for row in read_log(tmp_path / "log.jsonl")}
    assert [images for images, skipped in rows.items() if skipped] == [16, 20]
    assert run.images == 40


def test_after_too_many_in_a_row_the_run_is_back_at_its_checkpoint_and_names_the_module(tmp_path):
    task = Regression(broken=range(20, 40))
    run = trainer(tmp_path, task, patience=3)
    with pytest.raises(ValueError, match="3 steps in a row") as error:
        run.fit()
    assert "\n" not in str(error.value)
    assert run.images == 16
    assert torch.isfinite(weights(task)).all()


def result(folder) -> tuple:
    """Weights at the newest checkpoint and the lines of the log, without times."""
    state = Checkpoints(folder / "checkpoints").load()
    rows = read_log(folder / "log.jsonl")
    return (
        state["modules"],
        state["log"]["sums"],
        [{k: v for k, v in r.items() if "second" not in k} for r in rows],
    )


def test_signals_while_showing_change_neither_what_is_shown_nor_the_log(tmp_path):
    """A preview and a validation that were cut short are made before the next step when the run goes on."""
    logs = []
    for name, kill in (("whole", set()), ("cut", {"preview", "validation"})):
        shown, runs = set(), len(kill) + 1
        for _ in range(runs):
            with Stop() as stop, contextlib.suppress(Stopped):
                run = trainer(tmp_path / name, Regression(), stop, preview_every=12, validate_every=12)

                def show(images, what, kill=kill, shown=shown):
                    if what in kill and images == 24:
                        kill.remove(what)
                        os.kill(os.getpid(), signal.SIGTERM)
                    shown.add((what, images))
                    return {f"{what}/value": float(weights(run.task).sum())}  # noqa: B023  called at once

                run.preview = lambda images, show=show: show(images, "preview")
                run.validate = lambda images, show=show: show(images, "validation")
                run.fit()
        assert not kill
        logs.append((shown, result(tmp_path / name)[2]))
    assert {at for _, at in logs[0][0]} == {12, 24, 36, 40}
    assert logs[0] == logs[1]


def newest(checkpoints: Path) -> int:
    return max((int(path.parent.name) for path in checkpoints.glob("[0-9]*/manifest.json")), default=-1)


class Died(BaseException):
    """Nothing works from here on, as for a process that was killed."""


@pytest.mark.parametrize("kind", ["death", "full", "read-only"])
def test_at_every_operation_on_a_file_a_run_may_end_and_go_on_to_the_same_bits(
    tmp_path, same, intercepted, kind
):
    def run(name, act=lambda what: None):
        end = intercepted.intercept(act)
        try:
            with torch.random.fork_rng():
                trainer(tmp_path / name, Regression(), images=24, save_every=8, log_every=12, keep=1).fit()
        finally:
            end()

    error = {"death": Died(), "full": OSError(28, "No space"), "read-only": OSError(30, "Read-only")}[kind]
    seen: list[str] = []
    run("first")  # in which torch makes a folder of its own
    run("whole", seen.append)
    expected, folder = result(tmp_path / "whole"), tmp_path / "cut" / "checkpoints"
    numbers = [i for i, what in enumerate(seen) if kind != "full" or what in intercepted.NEED_SPACE]
    assert len(numbers) > 40
    for number in numbers:
        left, kept = iter(range(number)), list[int]()

        def act(what, left=left, kept=kept):
            if next(left, None) is None:
                kept.append(newest(folder))
                if kind != "full" or what in intercepted.NEED_SPACE:
                    raise error

        try:
            run("cut", act)
            assert kind != "death"  # that an old checkpoint cannot be removed ends no run
        except (Died, ValueError, OSError) as ended:
            assert "\n" not in str(ended)  # noqa: PT017  what is raised depends on the operation
        assert newest(folder) >= kept[0]
        run("cut")
        assert same(result(tmp_path / "cut"), expected), (number, seen[number])
        shutil.rmtree(tmp_path / "cut")


def test_no_checkpoint_is_made_of_weights_after_a_skipped_step(tmp_path):
    """The one at 16 is not pushed out by others while steps are skipped; the next comes when they are not."""
    run = trainer(tmp_path, Regression(broken=(20, 24, 28)), save_every=8, keep=9)
    run.fit()
    assert [int(path.name) for path in run.checkpoints.paths()] == [8, 16, 36, 40]


def dying(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(DYING), *arguments], capture_output=True, text=True, check=False, timeout=3000
    )
    assert done.returncode == 0, done.stdout + done.stderr
    print(arguments, done.stdout)  # its counts, for -rP
    return done.stdout


@pytest.mark.parametrize("recipe", RECIPES)
def test_stopped_after_17_of_40_steps_and_resumed_equals_uninterrupted(recipe):
    assert '"wrong": []' in dying("exact", recipe)


def test_runs_that_were_killed_in_a_save_end_as_undisturbed_ones():
    assert '"wrong": []' in dying("boundaries", "toy-autoencoder", "--count", "2")


def test_signals_in_some_parts_of_a_run_leave_a_checkpoint_and_the_exit_code_of_each():
    assert '"wrong": []' in dying("signals", "latents", "--count", "4")


@pytest.mark.slow
def test_signals_in_each_part_of_a_run_leave_a_checkpoint_and_the_exit_code_of_each():
    assert '"wrong": []' in dying("signals", "latents")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("how", ["kills", "terms", "boundaries", "full", "locked"])
def test_all_runs_that_met_the_worst_end_as_undisturbed_ones(how, recipe):
    assert '"wrong": []' in dying(how, recipe)
