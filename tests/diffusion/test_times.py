"""Time samplers: their distributions, dependence on the seed alone, and the importance sampler's state."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sfumato.core.config import from_json, to_json
from sfumato.core.random import Noise
from sfumato.diffusion.schedules import VE, Cosine, Discrete, Flow
from sfumato.diffusion.times import LogitNormal, LogNormal, LossSecondMoment, TimesConfig, Uniform

MANY = 4000
TABLE = Discrete(steps=50)


def draw(sampler, schedule, count=MANY):
    return sampler.sample(schedule, Noise(range(count)))


def warm(sampler: LossSecondMoment, loss: torch.Tensor) -> LossSecondMoment:
    """Ten losses for every index."""
    for _ in range(sampler.history):
        sampler.observe(torch.arange(sampler.steps).double(), loss)
    return sampler


def test_uniform_on_a_table_draws_every_index_equally():
    times = draw(Uniform(), TABLE)
    counts = torch.bincount(times.t.long(), minlength=50)
    assert times.t.dtype == torch.float64
    assert torch.equal(times.t, times.t.floor())
    assert (times.importance == 1).all()
    assert float((counts - 80).abs().max()) < 4.5 * math.sqrt(80)  # 4.5 standard deviations, 50 bins


@pytest.mark.parametrize("schedule", [Flow(end=0.9), Cosine(), VE()])
def test_uniform_on_a_continuous_schedule_covers_its_span(schedule):
    low, high = schedule.span
    t = (draw(Uniform(), schedule).t - low) / (high - low)
    assert 0 <= float(t.min()) < 0.01
    assert 0.99 < float(t.max()) < 1
    assert float(t.mean()) == pytest.approx(0.5, abs=0.02)


def test_logit_normal_on_flow():
    t = draw(LogitNormal(0.5, 0.8), Flow()).t
    logits = torch.logit(t)
    assert (float(logits.mean()), float(logits.std())) == pytest.approx((0.5, 0.8), abs=0.05)
    indices = draw(LogitNormal(), TABLE).t
    assert torch.equal(indices, indices.floor())
    assert float((indices - 24.5).abs().lt(12).double().mean()) > 0.55


@pytest.mark.parametrize("schedule", [VE(), Flow(), Cosine(), Discrete(steps=1000)])
def test_log_normal_is_in_the_ratio_on_any_schedule(schedule):
    level = schedule(draw(LogNormal(-0.4, 1.0), schedule).t)
    logs = (level.sigma / level.alpha).log()
    assert (float(logs.mean()), float(logs.std())) == pytest.approx((-0.4, 1.0), abs=0.06)


def test_log_normal_on_flow_is_logit_normal():
    """logit(t) = ln(sigma / alpha) on the straight path."""
    a, b = draw(LogNormal(-0.2, 1.1), Flow(), 20), draw(LogitNormal(-0.2, 1.1), Flow(), 20)
    torch.testing.assert_close(a.t, b.t)


@pytest.mark.parametrize(
    "sampler", [Uniform(), LogitNormal(), LogNormal(), warm(LossSecondMoment(50), torch.rand(50))]
)
def test_a_time_depends_on_its_own_seed_alone(sampler):
    together = sampler.sample(TABLE, Noise([5, 6, 7]))
    alone = sampler.sample(TABLE, Noise([6]))
    assert float(together.t[1]) == float(alone.t[0])
    assert float(together.importance[1]) == float(alone.importance[0])


def test_importance_sampler_prefers_large_losses_and_stays_unbiased():
    loss = torch.linspace(0.1, 5.0, 50, dtype=torch.float64)
    sampler = LossSecondMoment(50)
    assert torch.equal(sampler.weights(), torch.ones(50, dtype=torch.float64))
    times = draw(warm(sampler, loss), TABLE)
    assert float(sampler.weights().sum()) == pytest.approx(1.0)
    torch.testing.assert_close(sampler.weights(), loss / loss.sum() * 0.999 + 0.001 / 50)
    index = times.t.long()
    assert float(loss[index].mean()) > 1.2 * float(loss.mean())
    # Weighted losses all equal their mean here, but for the uniform share: a nearly constant estimator.
    assert float((loss[index] * times.importance).mean()) == pytest.approx(float(loss.mean()), rel=1e-3)


def test_importance_sampler_keeps_the_last_losses():
    sampler = warm(LossSecondMoment(2, history=3, uniform=0.0), torch.tensor([1.0, 1.0]))
    for value in (2.0, 3.0, 4.0, 5.0):
        sampler.observe(torch.tensor([1.0]), torch.tensor([value]))
    expected = math.sqrt((9 + 16 + 25) / 3)
    torch.testing.assert_close(sampler.weights()[1] / sampler.weights()[0], torch.tensor(expected).double())


def test_importance_sampler_resumes():
    sampler = warm(LossSecondMoment(50), torch.rand(50))
    resumed = LossSecondMoment(50)
    resumed.load_state_dict(sampler.state_dict())
    sampler.observe(torch.tensor([3.0]), torch.tensor([9.0]))
    resumed.observe(torch.tensor([3.0]), torch.tensor([9.0]))
    assert torch.equal(sampler.weights(), resumed.weights())
    with pytest.raises(ValueError, match=r"\(50, 10\) does not fit steps and history \(20, 10\)"):
        LossSecondMoment(20).load_state_dict(sampler.state_dict())


def test_importance_sampler_needs_its_schedule():
    for schedule in (Flow(), Discrete(steps=51)):
        with pytest.raises(ValueError, match="steps=50 needs a discrete schedule"):
            LossSecondMoment(50).sample(schedule, Noise([0]))


RANK = """
import sys
import torch
from torch import distributed
from sfumato.diffusion.times import LossSecondMoment

rank, store = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
sampler = LossSecondMoment(3, history=1, uniform=0.0)
t, loss = ([0.0, 1.0], [1.0, 2.0]) if rank == 0 else ([2.0], [5.0])
sampler.observe(torch.tensor(t), torch.tensor(loss))
print([round(8 * w, 6) for w in sampler.weights().tolist()])
distributed.destroy_process_group()
"""


def test_ranks_share_their_losses_although_their_batches_differ(tmp_path: Path, repository: Path):
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen(
            [*command, str(r), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True, cwd=repository
        )
        for r in range(2)
    ]
    assert [rank.communicate(timeout=120)[0].strip() for rank in ranks] == ["[1.0, 2.0, 5.0]"] * 2


@pytest.mark.parametrize(
    "sampler", [Uniform(), LogitNormal(0.1, 2.0), LogNormal(-1.0, 1.4), LossSecondMoment(20, 5)]
)
def test_time_samplers_survive_json(sampler):
    restored = from_json(TimesConfig, to_json(sampler))
    assert restored == sampler
    assert len(restored.sample(Discrete(steps=20), Noise([1, 2])).t) == 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LogitNormal(std=0.0), "std 0.0"),
        (lambda: LogNormal(std=-1.0), "std -1.0"),
        (lambda: LossSecondMoment(0), "steps 0"),
        (lambda: LossSecondMoment(uniform=2.0), "uniform 2.0"),
    ],
)
def test_values_out_of_range_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
