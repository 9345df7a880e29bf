"""Bits per dimension of systems: closed forms, the formulas once more in float64, and what is refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sfumato.checkpoints.native import Parts
from sfumato.core.config import from_json, to_json
from sfumato.core.image import to_float
from sfumato.core.png import save_png
from sfumato.core.random import Noise
from sfumato.diffusion.constraints import Static
from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.likelihood import training_transitions
from sfumato.diffusion.parameterization import PARAMETERIZATIONS
from sfumato.diffusion.schedules import Discrete, Flow, ScheduleConfig
from sfumato.evaluation.evaluate import Result
from sfumato.evaluation.likelihood import Bound, BoundProtocol, bits, parts_of
from sfumato.systems.codec import Embeddings
from sfumato.systems.conditioning import ConditionerConfig, LabelConfig, TokenTextConfig
from sfumato.systems.config import About, StageConfig, SystemConfig
from sfumato.systems.options import SampleOptions
from sfumato.systems.system import System

SIDE, SPREAD = 16, 0.2
SCHEDULE = Discrete(formula="cosine", steps=24)


class Exact(nn.Module):
    """E[x0 | x_t] of pixels N(0, SPREAD^2)."""

    def forward(self, x: Tensor, t: Tensor, cond: object) -> Tensor:
        level = SCHEDULE(t.cpu())
        gain = level.alpha * SPREAD**2 / (level.alpha**2 * SPREAD**2 + level.sigma**2)
        return gain.to(x)[:, None, None, None] * x


class Tiny(nn.Module):
    """Noise and a variance by a convolution whose weights grow with time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, cond: object) -> Tensor:
        return self.conv(x) * (1 + 0.05 * t.to(x))[:, None, None, None]


def system(
    net: nn.Module,
    prediction: str = "x0",
    schedule: ScheduleConfig = SCHEDULE,
    conditioners: Sequence[ConditionerConfig] = (),
    **options: object,
) -> System:
    """One stage on pixels."""
    defaults = SampleOptions(sampler="ddpm", **options)
    config = StageConfig(
        schedule=schedule, parameterization=prediction, shape=(3, SIDE, SIDE), defaults=defaults
    )
    stage = config.build(Parts({"denoiser": net}, {}))
    learned = isinstance(net, Tiny)
    stage = replace(
        stage, denoiser=Denoiser(net, schedule, PARAMETERIZATIONS[prediction], learned_var=learned)
    )
    told = SystemConfig(stages=(replace(config, conditioners=tuple(conditioners)),))
    return System((stage,), told, Parts({"denoiser": net}, {}), About(name="toy"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """48 pictures of Gaussian pixels."""
    for i in range(48):
        pixels = (127.5 + 127.5 * SPREAD * torch.randn(3, SIDE, SIDE)).round().clamp(0, 255)
        save_png(tmp_path / f"data/{i:02}.png", pixels.to(torch.uint8))
    return tmp_path / "data"


def named(bound: Bound) -> dict[str, float]:
    return {figure.name: figure.value for figure in bound.figures}


def test_each_term_of_gaussian_data_has_its_closed_form(folder: Path) -> None:
    bound = bits(system(Exact()), folder, protocol=BoundProtocol(), batch=20)
    assert [(p.first, p.stop) for p in bound.curve] == [(t, t + 1) for t in range(24)]
    table = training_transitions(SCHEDULE)
    for p in bound.curve:
        level, step = SCHEDULE(torch.tensor(p.first)), table.at(p.first)
        left = SPREAD**2 * level.sigma**2 / (level.alpha**2 * SPREAD**2 + level.sigma**2)
        # 36,864 squares of normal numbers have a mean to 0.7 %.
        assert p.x0_mse == pytest.approx(float(left), rel=0.03)
        assert p.eps_mse == pytest.approx(float(left * (level.alpha / level.sigma) ** 2), rel=0.03)
        if p.first:
            nats = 0.5 * step.on_x0**2 * left / step.log_small.exp()
            assert p.bits == pytest.approx(float(nats) / math.log(2), rel=0.03)
    found = named(bound)
    assert found["bits_decoder"] == pytest.approx(bound.curve[0].bits)
    assert found["bits_diffusion"] == pytest.approx(sum(p.bits for p in bound.curve[1:]))
    parts = ("bits_prior", "bits_diffusion", "bits_decoder")
    assert found["bits_per_dim"] == pytest.approx(sum(found[name] for name in parts))
    # A bound: the entropy of the pixels is 8 bits less the logarithm of 2 / their spread.
    entropy = 0.5 * math.log2(2 * math.pi * math.e) + math.log2(127.5 * SPREAD)
    assert entropy < found["bits_per_dim"] < entropy + 1


def test_some_steps_estimate_the_same_sum(folder: Path) -> None:
    whole, some = (
        bits(system(Exact()), folder, protocol=BoundProtocol(steps=steps), batch=24) for steps in (None, 5)
    )
    assert [(p.first, p.stop) for p in some.curve] == [(0, 1), (1, 6), (6, 12), (12, 18), (18, 24)]
    assert some.curve[0].bits == pytest.approx(whole.curve[0].bits, rel=0.01)
    for p in some.curve[1:]:
        inside = [q.bits for q in whole.curve[p.first : p.stop]]
        assert min(inside) <= p.bits / (p.stop - p.first) <= max(inside)
    (all_of, part_of) = (bound.figures[0] for bound in (whole, some))
    assert part_of.high is not None
    assert all_of.high is not None
    assert abs(part_of.value - all_of.value) < 2 * (part_of.high - part_of.value)
    assert part_of.high - part_of.value > all_of.high - all_of.value


@pytest.mark.parametrize(("total", "steps"), [(1, 1), (2, 2), (24, 24), (1000, 2), (1000, 27), (1000, 1000)])
def test_parts_cover_every_step_once(total: int, steps: int) -> None:
    bounds = parts_of(total, steps)
    assert bounds[:2].tolist() == [0, 1]
    assert int(bounds[-1]) == total
    sizes = set(bounds.diff()[1:].tolist())
    assert min(sizes, default=1) >= 1
    assert max(sizes, default=1) - min(sizes, default=1) <= 1


def test_pictures_have_noise_of_their_own(folder: Path) -> None:
    protocol = BoundProtocol(n=5, steps=4, seed=3)
    one, other = (bits(system(Exact()), folder, protocol=protocol, batch=size) for size in (1, 5))
    for a, b in zip(one.curve, other.curve, strict=True):
        assert to_json(a) == pytest.approx(to_json(b), rel=1e-5)
    assert one.protocol == other.protocol
    again = bits(system(Exact()), folder, protocol=replace(protocol, seed=4), batch=5)
    assert named(again)["bits_per_dim"] != pytest.approx(named(one)["bits_per_dim"], rel=1e-5)
    assert from_json(Result, to_json(one)).figures == one.figures  # for `evaluate compare`


def test_the_formulas_of_nichol_and_dhariwal_once_more(folder: Path) -> None:
    """Their loop over all steps, in float64, with learned variances and clipping."""
    net, seed = Tiny(), 7
    plan = SampleOptions(sampler="ddpm", threshold=Static(1.0))
    bound = bits(
        system(net, "eps", threshold=plan.threshold), folder, protocol=BoundProtocol(n=2, seed=seed), batch=2
    )
    pixels = [to_float(torch.from_numpy(read)) for read in pictures(folder)]
    expected, prior = terms(copy.deepcopy(net).double(), torch.stack(pixels), [seed, seed + 24])
    np.testing.assert_allclose([p.bits for p in bound.curve], expected, rtol=3e-5)
    assert named(bound)["bits_prior"] == pytest.approx(prior, rel=1e-3)
    assert named(bound)["bits_per_dim"] == pytest.approx(sum(expected) + prior, rel=2e-6)
    assert bound.figures[0].note == "24 of 24 steps, variance learned"


def pictures(folder: Path) -> list[np.ndarray]:
    """The first and the 25th, which are two of 48 at equal distances."""
    from PIL import Image

    files = sorted(folder.glob("*.png"))
    return [np.asarray(Image.open(files[i])).transpose(2, 0, 1).copy() for i in (0, 24)]


def terms(net: nn.Module, x0: Tensor, seeds: Sequence[int]) -> tuple[list[float], float]:
    """Terms by step t = 0 to T - 1 and the prior's, in bits, as means over pictures."""
    steps, noise, x = SCHEDULE.steps, Noise(seeds), x0.double()
    f = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
    beta = [min(1 - f[i + 1] / f[i], 0.999) for i in range(steps)]
    bar = [math.prod(1 - b for b in beta[: i + 1]) for i in range(steps)]
    before = [1.0, *bar[:-1]]
    left = [beta[i] * (1 - before[i]) / (1 - bar[i]) for i in range(steps)]
    left[0] = left[1]
    out = []
    for t in range(steps):
        x_t = math.sqrt(bar[t]) * x + math.sqrt(1 - bar[t]) * noise(x0).double()
        with torch.no_grad():
            eps, share = net(x_t, torch.full((len(x),), t), None).chunk(2, dim=1)
        guess = ((x_t - math.sqrt(1 - bar[t]) * eps) / math.sqrt(bar[t])).clamp(-1, 1)
        log_var = (share + 1) / 2 * math.log(beta[t]) + (1 - share) / 2 * math.log(left[t])
        on_x0 = math.sqrt(before[t]) * beta[t] / (1 - bar[t])
        on_x = math.sqrt(1 - beta[t]) * (1 - before[t]) / (1 - bar[t])
        mean, true = on_x0 * guess + on_x * x_t, on_x0 * x + on_x * x_t
        if t:
            variance = left[t] + (true - mean) ** 2
            nats = 0.5 * (log_var - math.log(left[t]) - 1 + variance * (-log_var).exp())
        else:
            nats = -decoded(x, mean, log_var)
        out.append(float(nats.mean()) / math.log(2))
    last = 0.5 * (-1 - math.log(1 - bar[-1]) + (1 - bar[-1]) + bar[-1] * x**2)
    return out, float(last.mean()) / math.log(2)


def decoded(x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """Log-probability of 8-bit values, with the published approximation of the distribution function."""

    def below(v: Tensor) -> Tensor:
        z = (v - mean) * (-log_var / 2).exp()
        return (1 + (math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)).tanh()) / 2

    high = torch.where(x > 0.999, torch.ones_like(x), below(x + 1 / 255))
    low = torch.where(x < -0.999, torch.zeros_like(x), below(x - 1 / 255))
    return (high - low).clamp_min(1e-12).log()


class Told(nn.Module):
    """Keeps what it is told."""

    def forward(self, x: Tensor, t: Tensor, cond: object) -> Tensor:
        self.label = cond.label
        return torch.zeros_like(x)


def test_classes_of_the_pictures_are_told(tmp_path: Path) -> None:
    for i, name in enumerate(("cat", "dog", "dog")):
        save_png(tmp_path / name / f"{i}.png", torch.randint(256, (3, SIDE, SIDE), dtype=torch.uint8))
    own = LabelConfig(num_classes=2)
    classes, net = system(Told(), conditioners=(own,)), Told()
    stage = replace(classes.stages[0], conditioner=own.build(Parts({}, {}), classes.stages[0].codec))
    stage = replace(stage, denoiser=replace(stage.denoiser, net=net))
    bound = bits(replace(classes, stages=(stage,)), tmp_path, protocol=BoundProtocol(steps=2))
    assert net.label.tolist() == [0, 1, 1]
    assert bound.protocol["told"] == "classes"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("flow", "a discrete schedule, such as DDPM's, and toy has a schedule of kind flow; choose another"),
        ("two", "toy has the stages base, more"),
        ("codec", "toy has the codec Embeddings"),
        ("steps", "steps is 25, and this system has 24; allowed: 2 to 24"),
        ("one", "n is None and steps 1; allowed: from 1 picture and from 2 steps on"),
        ("texts", "told captions; give pictures that have them"),
        ("labels", "has no label; give class folders"),
    ],
)
def test_what_has_no_bound_is_one_line(change: str, message: str, folder: Path) -> None:
    own, steps = system(Exact()), {"steps": 25, "one": 1}.get(change)
    (stage,) = own.stages
    if change == "flow":
        own = system(Exact(), schedule=Flow())
    if change == "two":
        own = replace(own, stages=(stage, replace(stage, name="more")))
    if change == "codec":
        own = replace(own, stages=(replace(stage, codec=Embeddings()),))
    if change in ("texts", "labels"):
        told = TokenTextConfig() if change == "texts" else LabelConfig(num_classes=2)
        own = system(Exact(), conditioners=(told,))
    with pytest.raises(ValueError, match=message) as error:
        bits(own, folder, protocol=BoundProtocol(steps=steps))
    assert "\n" not in str(error.value)
