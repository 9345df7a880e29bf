from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from sfumato.training.batches import Batch
from sfumato.training.log import RunLog
from sfumato.training.optim import OptimConfig
from sfumato.training.posthoc import PostHocConfig, reconstruct
from sfumato.training.state import Checkpoints
from sfumato.training.task import Loss, Phase
from sfumato.training.trainer import Trainer, TrainerConfig


class TwoPhases:
    """Two linear nets; the second sees what the first has become, as a discriminator does."""

    def __init__(self, break_at: int | None = None, where: str = "loss") -> None:
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 1)
        self.modules = {"first": self.first, "second": self.second}
        self.phases = {
            "one": Phase(("first",)),
            "two": Phase(("second",), OptimConfig(lr=0.5, lr_schedule="constant", betas=(0.5, 0.9)), 8),
        }
        self.averaged = ("first",)
        self.memories = {}
        self.break_at, self.where = break_at, where
        self.seen: list[int] = []
        self.first_weights: list[torch.Tensor] = []

    def losses(self, batch, noise, moment):
        self.seen += batch.index.tolist()
        x = torch.nn.functional.dropout(batch.images + noise(batch.images), 0.3)
        value = self.first(x).square().mean()
        if self.break_at is not None and moment.images >= self.break_at:
            value = value * torch.nan if self.where == "loss" else (value - value.detach()).sqrt()
        before = self.first.weight.detach().clone()
        yield Loss("one", value, {"half": value.detach() / 2})
        assert not torch.equal(
            before, self.first.weight
        )  # the loop stepped before it asked for the next loss
        if moment.reached(8):
            yield Loss("two", (self.second(self.first(x).detach()) - 1).square().mean(), {})

    def preview(self, averaged):
        return averaged["first"].weight


def batches(images: int) -> Batch:
    index = torch.arange(images, images + 4)
    return Batch(images=torch.stack([index, index % 3], 1).float() / 50, text=("",) * 4, index=index)


def trainer(folder, *, total=40, task=None, preview=None, **config) -> Trainer:
    config = {"images": total, "batch": 4, "log_every": 8, "save_every": 12, "device": "cpu"} | config
    settings = TrainerConfig(**config)
    log = RunLog(folder / "log.jsonl", total, settings.log_every, quiet=True)
    optim = OptimConfig(lr=0.05, warmup=8, kind="muon")
    checkpoints = Checkpoints(folder / "checkpoints", settings.keep)
    made = Trainer(task or TwoPhases(), batches, settings, optim=optim, log=log, checkpoints=checkpoints)
    made.preview = preview
    return made


def test_it_sees_each_position_once_and_stops_at_the_last(tmp_path):
    run = trainer(tmp_path)
    run.fit()
    assert run.task.seen == list(range(40))
    assert (run.images, run.steps) == (40, 10)


def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, same):
    whole = trainer(tmp_path / "whole")
    whole.fit()
    first = trainer(tmp_path / "parts")
    first.task.losses = _cut(first.task.losses, at=28)
    with pytest.raises(RuntimeError, match="power cut"):
        first.fit()
    second = trainer(tmp_path / "parts")
    second.fit()
    assert second.task.seen == list(range(24, 40))  # the last checkpoint before the cut was at 24
    assert same(whole.state_dict(), second.state_dict())
    logs = [
        [json.loads(x) for x in (tmp_path / n / "log.jsonl").read_text().splitlines()]
        for n in ("whole", "parts")
    ]
    assert [row["images"] for row in logs[0]] == [row["images"] for row in logs[1]]
    assert logs[0][-1]["one/loss"] == logs[1][-1]["one/loss"]


def _cut(losses, at):
    def until(batch, noise, moment):
        if moment.images >= at:
            raise RuntimeError("power cut")
        yield from losses(batch, noise, moment)

    return until


def test_averages_for_later_are_snapshots_in_the_run_folder_and_resume_exactly(tmp_path):
    settings = {"posthoc": PostHocConfig(sigma_rel=(0.05, 0.1), every=8)}
    trainer(tmp_path / "whole", **settings).fit()
    first = trainer(tmp_path / "parts", **settings)
    first.task.losses = _cut(first.task.losses, at=36)
    with pytest.raises(RuntimeError, match="power cut"):
        first.fit()
    trainer(tmp_path / "parts", **settings).fit()
    whole, parts = (
        {p.name: p.read_bytes() for p in (tmp_path / name / "averages").iterdir()}
        for name in ("whole", "parts")
    )
    assert len(whole) == 10
    assert whole == parts
    assert set(reconstruct(tmp_path / "whole", 0.2).modules["first"]) == {"weight", "bias"}


def test_a_finished_run_is_not_trained_again(tmp_path):
    trainer(tmp_path).fit()
    again = trainer(tmp_path)
    again.fit()
    assert again.task.seen == []
    assert again.images == 40


def test_previews_and_checkpoints_come_at_their_cadence_and_at_the_end(tmp_path):
    shown = []
    run = trainer(tmp_path, total=32, preview=shown.append, preview_every=16, save_every=12, keep=9)
    run.fit()
    assert shown == [16, 32]
    assert [int(p.name) for p in run.checkpoints.paths()] == [12, 24, 32]


def test_averages_are_published_with_each_checkpoint_and_again_on_a_resume(tmp_path):
    published = []
    for _ in range(2):
        run = trainer(tmp_path, total=24, save_every=8)
        run.publish = lambda averaged: published.append(averaged["first"].weight.clone())
        run.fit()
    assert len(published) == 4
    assert not torch.equal(published[0], published[2])
    assert torch.equal(published[2], published[3])


def test_no_preview_with_a_cadence_of_zero(tmp_path):
    shown = []
    trainer(tmp_path, preview=shown.append, preview_every=0).fit()
    assert shown == []


def test_log_names_metrics_by_phase_with_the_learning_rate_of_each(tmp_path):
    trainer(tmp_path).fit()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["images"] for row in rows] == [8, 16, 24, 32, 40]
    assert "two/loss" not in rows[0]
    assert rows[-1]["two/lr"] == 0.5
    assert {"one/loss", "one/half", "one/lr", "one/grad_norm"} <= rows[0].keys()
    assert rows[-1]["one/lr"] < rows[1]["one/lr"]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, where):
    run = trainer(tmp_path, task=TwoPhases(break_at=16, where=where), patience=1)
    with pytest.raises(
        ValueError,
        match=f"the {where} of phase 'one' is not finite, 1 step in a row until step 5 .20 images.",
    ) as error:
        run.fit()
    assert "\n" not in str(error.value)
    assert f"last checkpoint: {run.checkpoints.paths()[-1]}" in str(error.value)
    assert [int(p.name) for p in run.checkpoints.paths()] == [12]
    assert all(torch.isfinite(p).all() for m in run.task.modules.values() for p in m.parameters())


def test_noise_of_a_sample_depends_on_its_position_not_on_the_batch_size(tmp_path):
    drawn: dict[str, list] = {}
    for name, size in (("four", 4), ("two", 2)):
        run = trainer(tmp_path / name, total=8)
        run.batches = lambda images, n=size: _first(batches(images), n)
        kept = drawn.setdefault(name, [])
        original = run.task.losses

        def spy(batch, noise, moment, kept=kept, original=original):
            kept.append(noise(torch.empty(len(batch), 5)))
            yield from original(batch, noise, moment)

        run.task.losses = spy
        run.fit()
    assert torch.equal(torch.cat(drawn["four"]), torch.cat(drawn["two"]))


def _first(batch: Batch, n: int) -> Batch:
    return Batch(images=batch.images[:n], text=batch.text[:n], index=batch.index[:n])


@pytest.mark.parametrize("bad", [{"images": 0}, {"images": 5, "batch": 0}])
def test_lengths_below_one_are_refused(bad):
    with pytest.raises(ValueError, match="must be at least 1"):
        TrainerConfig(**bad)
