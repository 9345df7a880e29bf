"""Tables, continuous schedules, their inverses, their JSON, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfumato.core.config import from_json, to_json
from sfumato.diffusion import SCHEDULES, VE, Cosine, Discrete, Flow, ScheduleConfig
from sfumato.diffusion.betas import FORMULAS

FORMULA_SCHEDULES = [SCHEDULES[name]() for name in FORMULAS]
CONTINUOUS = [Cosine(), Cosine(offset=0.008, end=0.99), VE(), Flow(), Flow(shift=3, multiplier=1000)]
DISCRETE = [
    *FORMULA_SCHEDULES,
    SCHEDULES["linear"](steps=100),
    SCHEDULES["linear"](steps=1),
    SCHEDULES["scaled_linear"](start=0.0015, end=0.0195),
    SCHEDULES["linear"](zero_snr=True),
    SCHEDULES["cosine"](steps=4000, rescale_timesteps=True),
    SCHEDULES["betas"]((0.1, 0.3, 0.2)),
    SCHEDULES["alphas_cumprod"]((0.9, 0.5, 0.0)),
]
ALL = [*DISCRETE, *CONTINUOUS]
double = torch.float64


def name(schedule) -> str:
    return f"{schedule.kind}-{getattr(schedule, 'formula', '')}-{to_json(schedule)}"[:60]


# alphas_cumprod of the last level as publications and checkpoints quote it, to the digits that they give.
STATED = [
    ("linear", {}, "4.04e-05"),
    ("cosine", {}, "2.43e-09"),
    ("scaled_linear", {}, "4.6601e-03"),
    ("scaled_linear", {"start": 0.0015, "end": 0.0195}, "1.4230e-04"),
    ("scaled_linear", {"start": 0.0015, "end": 0.0155}, "6.6867e-04"),
    ("scaled_linear", {"start": 1e-4, "end": 2e-2}, "7.3341e-04"),
]


@pytest.mark.parametrize(("formula", "ends", "stated"), STATED)
def test_terminal_signal(formula, ends, stated):
    digits = len(stated.split("e")[0]) - 2
    assert f"{float(SCHEDULES[formula](**ends).alpha_bar[-1]):.{digits}e}" == stated


def test_stable_diffusion_sigmas():
    """k-diffusion and sgm quote sigma / alpha from 0.0292 to 14.6146."""
    table = SCHEDULES["scaled_linear"]().table
    ratio = table.sigma / table.alpha
    assert float(ratio[0]) == pytest.approx(0.029167, abs=1e-6)
    assert float(ratio[-1]) == pytest.approx(14.6146, abs=1e-4)


def test_betas_of_each_formula():
    """First, middle and last of 10 betas by hand."""
    linear = FORMULAS["linear"](10, None, None)
    assert linear[[0, -1]].tolist() == pytest.approx([100 * 1e-4, 100 * 2e-2])
    assert FORMULAS["linear"](10, 1e-4, 2e-2)[[0, -1]].tolist() == pytest.approx([1e-4, 2e-2])
    scaled = FORMULAS["scaled_linear"](3, 0.01, 0.09)
    assert scaled.tolist() == pytest.approx([0.01, 0.04, 0.09])
    assert FORMULAS["quad"](1000, None, None)[[0, -1]].tolist() == pytest.approx([1e-4, 2e-2])
    cosine = FORMULAS["cosine"](1000, None, None)
    assert float(cosine.max()) == 0.999
    assert int((cosine == 0.999).sum()) == 1
    sigmoid = FORMULAS["sigmoid"](11, None, None)
    assert float(sigmoid[5]) == pytest.approx((1e-4 + 2e-2) / 2)
    assert FORMULAS["const"](4, None, 0.3).tolist() == [0.3] * 4
    assert FORMULAS["warmup10"](20, 0.1, 0.2).tolist() == pytest.approx([0.1, 0.2] + [0.2] * 18)
    assert FORMULAS["warmup50"](6, 0.1, 0.3).tolist() == pytest.approx([0.1, 0.2, 0.3, 0.3, 0.3, 0.3])
    assert FORMULAS["jsd"](4, None, None).tolist() == pytest.approx([1 / 4, 1 / 3, 1 / 2, 1])


@pytest.mark.parametrize("formula", ["cosine", "jsd"])
def test_formulas_without_ends_refuse_them(formula):
    with pytest.raises(ValueError, match="no start and no end"):
        SCHEDULES[formula](start=0.1)


def test_zero_terminal_snr_keeps_the_first_level():
    plain, rescaled = SCHEDULES["linear"](), SCHEDULES["linear"](zero_snr=True)
    assert float(rescaled.alpha_bar[-1]) == 0
    assert float(rescaled.alpha_bar[0]) == pytest.approx(float(plain.alpha_bar[0]), rel=1e-14)
    root = plain.alpha_bar.sqrt()
    expected = (root - root[-1]) * root[0] / (root[0] - root[-1])
    assert torch.allclose(rescaled.alpha_bar.sqrt(), expected, rtol=1e-14)


@pytest.mark.parametrize("schedule", DISCRETE, ids=name)
def test_whole_times_give_the_table(schedule):
    t = torch.arange(schedule.steps)
    level = schedule(t)
    assert torch.equal(level.alpha, schedule.alpha_bar.sqrt())
    assert torch.allclose(
        level.alpha**2 + level.sigma**2, torch.ones(schedule.steps, dtype=double), atol=1e-15
    )


@pytest.mark.parametrize("schedule", ALL, ids=name)
def test_times_round_trip(schedule):
    """1e-12 of the time's range; and the level of the time of a ratio has that ratio."""
    clean, noisy = schedule.span
    t = torch.linspace(clean, noisy, 501, dtype=double)
    level = schedule(t)
    back = schedule.time_of(level.sigma / level.alpha)
    assert torch.allclose(back, t, rtol=0, atol=1e-12 * max(abs(clean), abs(noisy), 1))
    assert level.alpha.dtype == level.sigma.dtype == level.t.dtype == double
    again = schedule(back)
    assert torch.allclose(again.sigma, level.sigma, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("schedule", ALL, ids=name)
def test_noise_grows_with_time(schedule):
    level = schedule(torch.linspace(*schedule.span, 777, dtype=double))
    ratio = level.sigma / level.alpha
    assert (ratio[1:] > ratio[:-1]).all() or schedule.span[0] == schedule.span[1]
    assert schedule(torch.tensor(schedule.span[1])).alpha.shape == ()


@given(st.floats(0, 998.999))
def test_fractional_times_interpolate_log_snr(t):
    schedule = SCHEDULES["scaled_linear"]()
    low, weight = int(t), t - int(t)
    level = schedule(torch.tensor(t, dtype=double))
    expected = (1 - weight) * schedule.table.log_snr[low] + weight * schedule.table.log_snr[low + 1]
    assert float(torch.log(level.alpha / level.sigma)) == pytest.approx(float(expected), rel=1e-12, abs=1e-12)
    assert float(level.alpha**2 + level.sigma**2) == pytest.approx(1, abs=1e-15)


def test_last_interval_before_pure_noise_is_linear_in_alpha_over_sigma():
    schedule = SCHEDULES["linear"](zero_snr=True)
    level = schedule(torch.tensor([998.0, 998.25, 999.0], dtype=double))
    signal = level.alpha / level.sigma
    assert float(signal[1]) == pytest.approx(0.75 * float(signal[0]))
    assert float(signal[2]) == 0


def test_ratios_outside_a_table_give_its_ends():
    times = SCHEDULES["linear"]().time_of(torch.tensor([0.0, 1e-9, 1e9, math.inf], dtype=double))
    assert times.tolist() == [0, 0, 999, 999]


def test_what_the_network_embeds():
    rescaled = SCHEDULES["linear"](steps=4000, rescale_timesteps=True)
    assert float(rescaled(torch.tensor(3999)).t) == pytest.approx(3999 / 4)
    assert float(VE()(torch.tensor(math.log(0.5) / 4, dtype=double)).sigma) == pytest.approx(0.5)
    half = torch.tensor(0.5, dtype=double)
    assert float(Cosine(multiplier=1000)(half).t) == 500
    shifted = Flow(shift=3, multiplier=1000)(half)
    assert float(shifted.sigma) == pytest.approx(0.75)
    assert float(shifted.t) == pytest.approx(750)


def test_continuous_cosine_is_imagens():
    """log-SNR = -ln(cos^-2(pi/2 (u + 0.008) / 1.008) - 1), which is ln(alpha^2 / sigma^2)."""
    u = torch.linspace(0, 0.99, 50, dtype=double)
    level = Cosine(offset=0.008)(u)
    expected = -torch.log(torch.cos(math.pi / 2 * (u + 0.008) / 1.008) ** -2 - 1)
    assert torch.allclose(torch.log(level.alpha**2 / level.sigma**2), expected, rtol=1e-10, atol=1e-10)


def test_pure_noise_and_no_noise_are_exact():
    for schedule in (Cosine(), Flow(), Flow(shift=5)):
        level = schedule(torch.tensor([0.0, 1.0], dtype=double))
        assert level.alpha.tolist() == [1, 0]
        assert level.sigma.tolist() == [0, 1]


def test_times_of_any_dtype_and_device_end_in_double_on_the_cpu():
    level = SCHEDULES["linear"]()(torch.tensor([0, 999], dtype=torch.int32))
    assert level.t.dtype == level.alpha.dtype == double
    assert level.alpha.device.type == "cpu"


@pytest.mark.parametrize("schedule", ALL, ids=name)
def test_json_round_trip(schedule):
    data = to_json(schedule)
    assert from_json(ScheduleConfig, data) == schedule
    assert from_json(ScheduleConfig, data).span == schedule.span


def test_json_errors_are_one_line():
    with pytest.raises(ValueError, match="kind") as error:
        from_json(ScheduleConfig, {"kind": "linear"})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SCHEDULES["linaer"], "did you mean 'linear'"),
        (lambda: Discrete(formula="linaer"), "did you mean 'linear'"),
        (lambda: Discrete(steps=0), "at least 1"),
        (lambda: Discrete(values=(0.1,)), "takes no values"),
        (lambda: Discrete(formula="betas", values=(0.1,)), "must agree"),
        (lambda: SCHEDULES["betas"](()), "must agree"),
        (lambda: SCHEDULES["betas"]((0.1, 0.0)), "fall strictly"),
        (lambda: SCHEDULES["betas"]((0.1, -0.2)), "fall strictly"),
        (lambda: SCHEDULES["betas"]((0.1, 1.2)), "fall strictly"),
        (lambda: SCHEDULES["alphas_cumprod"]((0.5, 0.7)), "fall strictly"),
        (lambda: SCHEDULES["linear"](steps=5), "fall strictly"),  # its betas exceed 1
        (lambda: SCHEDULES["linear"]()(torch.tensor(1000)), "allowed: 0 to 999"),
        (lambda: SCHEDULES["linear"]()(torch.tensor([1.0, -0.5])), "allowed: 0 to 999"),
        (lambda: Cosine()(torch.tensor(1.01)), "allowed: 0 to 1"),
        (lambda: Flow()(torch.tensor(math.nan)), "allowed: 0 to 1"),
        (lambda: Cosine(end=0), "must be in"),
        (lambda: Cosine(offset=-1), "not be negative"),
        (lambda: Flow(shift=0), "must be positive"),
        (lambda: Flow(end=1.5), "must be in"),
        (lambda: VE(sigma_min=2, sigma_max=1), "0 < min < max"),
    ],
)
def test_mistakes_are_named_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
