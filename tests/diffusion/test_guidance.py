"""Guidance against its formula, computed from separate passes of a toy network."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from sfumato.core.config import from_json, to_json
from sfumato.core.types import Conditioning, Level, expand
from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.guidance import CFG, AutoGuidance, GuidanceConfig, InstructPix2Pix, noise_fraction
from sfumato.diffusion.parameterization import PARAMETERIZATIONS, target
from sfumato.diffusion.schedules import VE, Discrete, Flow

SCHEDULE = Discrete(steps=100)
BATCH = 3


class ToyNet(nn.Module):
    """A convolution, a label, tokens that `prepare` projects, and t; counts its calls and the rows it saw."""

    def __init__(self, channels: int = 4, out: int = 4, extra: int = 0, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.conv = nn.Conv2d(channels + extra, out, 3, padding=1)
        self.label = nn.Embedding(11, out)
        self.project = nn.Linear(5, out)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) * 0.3
        self.calls, self.rows, self.prepared = 0, 0, 0

    def prepare(self, cond: Conditioning) -> Conditioning:
        self.prepared += 1
        h = self.project(cond.tokens)
        return replace(cond, kv=((h, h),))

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        self.calls += 1
        self.rows += len(x)
        kv = cond.kv or self.prepare(cond).kv
        signal = self.label(cond.label) + kv[0][1].mean(1) + torch.sin(t)[:, None]
        return torch.tanh(self.conv(x)) + signal[:, :, None, None]


def conditioning(label: int, seed: int, **fields: torch.Tensor) -> Conditioning:
    tokens = torch.randn(BATCH, 2, 5, generator=torch.Generator().manual_seed(seed))
    return Conditioning(label=torch.full((BATCH,), label), tokens=tokens, **fields)


COND, NULL = conditioning(3, 1), conditioning(10, 2)


@pytest.fixture
def x_t() -> torch.Tensor:
    return torch.randn(BATCH, 4, 6, 6)


def build(kind: str = "eps", *, learned_var: bool = False, **kwargs: int) -> Denoiser:
    schedule = {"edm": VE(), "flow": Flow()}.get(kind, SCHEDULE)
    net = ToyNet(out=8 if learned_var else 4, **kwargs)
    return Denoiser(net, schedule, PARAMETERIZATIONS[kind], learned_var)


def level_of(denoiser: Denoiser, fraction: float = 0.6) -> Level:
    low, high = denoiser.schedule.span
    return denoiser.schedule(
        torch.tensor(low + fraction * (high - low), dtype=torch.float64).round(decimals=2)
    )


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    # Batched convolutions may add up in another order: float32 rounding of values near 1, amplified by scale.
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_scale_one_is_the_conditional_denoiser_bit_for_bit(x_t):
    denoiser = build(learned_var=True)
    level = level_of(denoiser)
    ours = CFG(1.0, channels=2, rescale=0.5).bind(denoiser, COND, NULL)(x_t, level)
    assert denoiser.net.rows == BATCH
    plain = denoiser(x_t, level, COND)
    for name in ("x0", "eps", "var"):
        assert torch.equal(getattr(ours, name), getattr(plain, name))


@pytest.mark.parametrize("kind", ["eps", "x0", "v", "flow", "edm"])
@torch.no_grad()
def test_cfg_is_the_formula_on_two_passes(kind, x_t):
    denoiser = build(kind)
    level = level_of(denoiser)
    ours = CFG(3.0).bind(denoiser, COND, NULL)(x_t, level)
    assert (denoiser.net.calls, denoiser.net.rows) == (1, 2 * BATCH)
    cond, null = denoiser(x_t, level, COND), denoiser(x_t, level, NULL)
    same(ours.eps, null.eps + 3 * (cond.eps - null.eps))
    same(ours.x0, null.x0 + 3 * (cond.x0 - null.x0))
    same(expand(level.alpha, x_t) * ours.x0 + expand(level.sigma, x_t) * ours.eps, x_t)


@torch.no_grad()
def test_learned_variance_is_the_conditional_one(x_t):
    denoiser = build(learned_var=True)
    level = level_of(denoiser)
    ours = CFG(4.0).bind(denoiser, COND, NULL)(x_t, level)
    same(ours.var, denoiser(x_t, level, COND).var)


@torch.no_grad()
def test_a_level_per_row(x_t):
    denoiser = build()
    levels = SCHEDULE(torch.tensor([5.0, 50.0, 99.0]))
    ours = CFG(3.0).bind(denoiser, COND, NULL)(x_t, levels)
    for i in range(BATCH):
        one = CFG(3.0).bind(denoiser, COND, NULL)(x_t, Level(*(v[i] for v in levels)))
        same(ours.eps[i], one.eps[i])


@torch.no_grad()
def test_conditioning_is_prepared_once_per_walk(x_t):
    denoiser = build()
    fn = CFG(3.0, interval=(0.3, 0.7)).bind(denoiser, COND, NULL)
    for i in (99, 26, 15, 0):
        fn(x_t, SCHEDULE(torch.tensor(i)))
    assert denoiser.net.prepared == 1


@torch.no_grad()
def test_interval_skips_null_and_equals_the_conditional_denoiser_outside(x_t):
    denoiser = build()
    levels = [SCHEDULE(torch.tensor(i)) for i in (99, 26, 15, 0)]
    inside = [0.2 < float(noise_fraction(level)) <= 0.6 for level in levels]
    assert 0 < sum(inside) < len(levels)
    fn = CFG(3.0, interval=(0.2, 0.6)).bind(denoiser, COND, NULL)
    everywhere = CFG(3.0).bind(denoiser, COND, NULL)
    for level, guided in zip(levels, inside, strict=True):
        denoiser.net.rows = 0
        ours = fn(x_t, level)
        assert denoiser.net.rows == (2 if guided else 1) * BATCH
        expected = everywhere(x_t, level) if guided else denoiser(x_t, level, COND)
        assert torch.equal(ours.x0, expected.x0)


@torch.no_grad()
def test_interval_by_row(x_t):
    denoiser = build()
    levels = SCHEDULE(torch.tensor([99.0, 20.0, 0.0]))
    ours = CFG(3.0, interval=(0.2, 0.6)).bind(denoiser, COND, NULL)(x_t, levels)
    guided = CFG(3.0).bind(denoiser, COND, NULL)(x_t, levels)
    plain = denoiser(x_t, levels, COND)
    for i, inside in enumerate([0.2 < f <= 0.6 for f in noise_fraction(levels).tolist()]):
        same(ours.eps[i], (guided if inside else plain).eps[i])


def test_noise_fraction_does_not_depend_on_the_schedule():
    """The same ratio sigma / alpha on each schedule, and the time of the flow schedule."""
    ratio = torch.tensor([0.02, 0.5, 1.0, 20.0], dtype=torch.float64)
    for schedule in (Discrete(steps=1000), VE(), Flow()):
        torch.testing.assert_close(noise_fraction(schedule(schedule.time_of(ratio))), ratio / (1 + ratio))


@torch.no_grad()
def test_channel_subset_guides_the_first_channels_only(x_t):
    """DiT's published sampler guides 3 of 4 latent channels."""
    denoiser = build(learned_var=True)
    level = level_of(denoiser)
    ours = CFG(4.0, channels=3).bind(denoiser, COND, NULL)(x_t, level)
    full, plain = CFG(4.0).bind(denoiser, COND, NULL)(x_t, level), denoiser(x_t, level, COND)
    same(ours.eps[:, :3], full.eps[:, :3])
    same(ours.eps[:, 3:], plain.eps[:, 3:])
    same(ours.x0[:, 3:], plain.x0[:, 3:])


@pytest.mark.parametrize("kind", ["eps", "v", "flow", "edm"])
@torch.no_grad()
def test_rescale_is_the_published_formula_on_the_network_output(kind, x_t):
    denoiser, phi = build(kind), 0.7
    level = level_of(denoiser)
    ours = CFG(6.0, rescale=phi).bind(denoiser, COND, NULL)(x_t, level)
    cond, null = denoiser.raw(x_t, level, COND).prediction, denoiser.raw(x_t, level, NULL).prediction
    guided = null + 6 * (cond - null)
    std = lambda f: f.std(dim=(1, 2, 3), keepdim=True)  # noqa: E731
    expected = phi * guided * std(cond) / std(guided) + (1 - phi) * guided
    c = denoiser.parameterization(level)
    same(ours.x0, expand(c.skip, x_t) * x_t + expand(c.out, x_t) * expected)
    same(target(denoiser.parameterization, level, ours.x0, ours.eps), expected)


@torch.no_grad()
def test_rescale_of_one_gives_the_conditional_deviation(x_t):
    denoiser = build("v")
    level = level_of(denoiser)
    ours = CFG(6.0, rescale=1.0).bind(denoiser, COND, NULL)(x_t, level)
    output = target(denoiser.parameterization, level, ours.x0, ours.eps)
    same(output.std(dim=(1, 2, 3)), denoiser.raw(x_t, level, COND).prediction.std(dim=(1, 2, 3)))


@torch.no_grad()
def test_instruct_pix2pix_is_the_formula_on_three_passes(x_t):
    denoiser = build(extra=2)
    level, picture = level_of(denoiser), torch.randn(BATCH, 2, 6, 6)
    cond, null = replace(COND, concat=picture), replace(NULL, concat=picture)
    ours = InstructPix2Pix(7.5, 1.5).bind(denoiser, cond, null)(x_t, level)
    assert (denoiser.net.calls, denoiser.net.rows) == (1, 3 * BATCH)
    full, image = denoiser(x_t, level, cond).eps, denoiser(x_t, level, null).eps
    none = denoiser(x_t, level, replace(null, concat=torch.zeros_like(picture))).eps
    same(ours.eps, none + 1.5 * (image - none) + 7.5 * (full - image))
    same(expand(level.alpha, x_t) * ours.x0 + expand(level.sigma, x_t) * ours.eps, x_t)


@torch.no_grad()
def test_instruct_pix2pix_off_and_without_a_picture(x_t):
    denoiser = build(extra=2)
    level, picture = level_of(denoiser), torch.randn(BATCH, 2, 6, 6)
    cond, null = replace(COND, concat=picture), replace(NULL, concat=picture)
    ours = InstructPix2Pix(1.0, 1.0).bind(denoiser, cond, null)(x_t, level)
    assert denoiser.net.rows == BATCH
    assert torch.equal(ours.eps, denoiser(x_t, level, cond).eps)
    with pytest.raises(ValueError, match="picture to edit"):
        InstructPix2Pix().bind(denoiser, COND, NULL)


@torch.no_grad()
def test_autoguidance_with_identical_nets_is_the_denoiser(x_t):
    denoiser = build()
    level = level_of(denoiser)
    ours = AutoGuidance(build(), scale=2.5).bind(denoiser, COND, NULL)(x_t, level)
    same(ours.eps, denoiser(x_t, level, COND).eps)


@torch.no_grad()
def test_autoguidance_is_the_formula_and_tells_both_the_same(x_t):
    good, bad = build(), build("v", seed=7)
    level = level_of(good)
    fn = AutoGuidance(bad, scale=2.5, interval=(0.0, 0.9)).bind(good, COND, NULL)
    ours = fn(x_t, level)
    strong, weak = good(x_t, level, COND), bad(x_t, level, COND)
    same(ours.x0, weak.x0 + 2.5 * (strong.x0 - weak.x0))
    bad.net.calls = 0
    assert torch.equal(fn(x_t, SCHEDULE(torch.tensor(99))).x0, good(x_t, SCHEDULE(torch.tensor(99)), COND).x0)
    assert bad.net.calls == 0


@pytest.mark.parametrize(
    "guidance", [CFG(), CFG(3.0, channels=3, rescale=0.7, interval=(0.1, 0.8)), InstructPix2Pix(6.0, 1.2)]
)
def test_guidance_of_numbers_survives_json(guidance):
    assert from_json(GuidanceConfig, to_json(guidance)) == guidance
    assert TypeAdapter(GuidanceConfig).json_schema()["discriminator"]["propertyName"] == "kind"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: CFG(float("nan")), "guidance scale nan"),
        (lambda: CFG(2.0, channels=0), "channels 0"),
        (lambda: CFG(2.0, rescale=1.5), r"rescale 1.5 is outside \[0, 1\]"),
        (lambda: CFG(2.0, interval=(0.8, 0.2)), r"interval \(0.8, 0.2\)"),
        (lambda: InstructPix2Pix(text=float("inf")), "guidance text inf"),
        (lambda: AutoGuidance(build(), interval=(-1.0, 2.0)), "interval"),
    ],
)
def test_values_out_of_range_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
