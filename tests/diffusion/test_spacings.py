"""Spacings: properties over schedules and steps, the published lists of steps, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from sfumato.diffusion import SCHEDULES, SPACINGS, VE, Cosine, Flow
from sfumato.diffusion.spacings import respaced_indices

DISCRETE = [
    SCHEDULES["linear"](),
    SCHEDULES["scaled_linear"](),
    SCHEDULES["cosine"](),
    SCHEDULES["linear"](zero_snr=True),
    SCHEDULES["linear"](steps=137),
    SCHEDULES["jsd"](steps=40),
]
CONTINUOUS = [Cosine(), Cosine(offset=0.008, end=0.999), VE(), Flow(), Flow(shift=3), Flow(end=0.98)]
ONLY_DISCRETE = {"leading", "respaced", "distilled"}
BY_RATIO = {"karras", "exponential", "logsnr"}
schedules = st.sampled_from([*DISCRETE, *CONTINUOUS])


def bounds(schedule, spacing: str) -> dict[str, float]:
    """sigma_min and sigma_max where the schedule has none of its own; as many levels as it has."""
    if spacing == "distilled":
        return {"original": schedule.steps}
    if spacing not in BY_RATIO:
        return {}
    ends = schedule(torch.tensor(schedule.span, dtype=torch.float64))
    low = {"sigma_min": 0.05} if float(ends.sigma[0]) == 0 else {}
    return low | ({"sigma_max": 50.0} if float(ends.alpha[1]) == 0 else {})


def check(grid, steps: int) -> None:
    """The right count, strictly monotone scales, no step of zero length, times that increase with noise."""
    assert len(grid) == steps
    assert len(grid.alpha) == len(grid.sigma) == len(grid.t) == len(grid.points) == steps + 1
    assert grid.alpha.dtype == grid.sigma.dtype == grid.t.dtype == torch.float64
    ratio = torch.tensor([p.ratio for p in grid.points])
    assert (ratio[1:] < ratio[:-1]).all()
    assert (grid.sigma[1:] < grid.sigma[:-1]).all()
    assert (grid.alpha[1:] >= grid.alpha[:-1]).all()
    if not isinstance(grid.schedule, VE):
        assert (grid.alpha[1:] > grid.alpha[:-1]).all()
    assert (grid.t[1:-1] < grid.t[:-2]).all()
    assert not grid.t[:-1].isnan().any()


@pytest.mark.parametrize("total", [1000, 400, 4000])
def test_halves_are_rounded_as_in_published_code(total):
    """Steps for which the exact index is k + 1/2, where the order of float operations decides.

    Recorded from diffusers 0.40, DDIMScheduler.set_timesteps.
    """
    schedule = SCHEDULES["linear"](steps=total)
    trailing = {1000: (48, [(3, 936), (15, 686)]), 400: (96, [(3, 386)]), 4000: (960, [(9, 3962)])}
    linspace = {1000: (103, [(17, 833)]), 400: (183, [(13, 371)]), 4000: (211, [(35, 3333)])}
    for spacing, (steps, entries) in (("trailing", trailing[total]), ("linspace", linspace[total])):
        t = SPACINGS[spacing](schedule, steps).t
        assert [(i, int(t[i])) for i, _ in entries] == entries
    assert SPACINGS["linspace"](schedule, 1).t[0] == total - 1


@pytest.mark.parametrize("total", [1000, 137])
@given(steps=st.integers(2, 137))
def test_whole_indices_are_numpys(total, steps):
    schedule = SCHEDULES["linear"](steps=total)
    trailing = np.round(np.arange(total, 0, -total / steps))[:steps] - 1
    assert SPACINGS["trailing"](schedule, steps).t[:-1].tolist() == trailing.tolist()
    even = np.linspace(0, total - 1, steps).round()[::-1]
    assert SPACINGS["linspace"](schedule, steps).t[:-1].tolist() == even.tolist()


@pytest.mark.parametrize("spacing", SPACINGS)
@given(schedules, st.integers(1, 60) | st.integers(1, 1000), st.booleans())
def test_every_spacing_on_every_schedule(spacing, schedule, steps, clean_end):
    discrete = schedule in DISCRETE
    steps = min(steps, schedule.steps) if discrete else steps
    assume(discrete or spacing not in ONLY_DISCRETE)
    knobs = bounds(schedule, spacing)
    clean_grid = SPACINGS[spacing](schedule, steps, **knobs)
    check(clean_grid, steps)
    assert clean_grid.points[-1] == (1, 0)
    if clean_end:
        return
    cleanest = schedule(torch.tensor(schedule.span[0], dtype=torch.float64))
    if float(cleanest.sigma) > 0 and float(clean_grid.t[-2]) == pytest.approx(float(cleanest.t), abs=1e-8):
        with pytest.raises(ValueError, match="visits the cleanest level itself"):
            SPACINGS[spacing](schedule, steps, clean_end=False, **knobs)
        return
    grid = SPACINGS[spacing](schedule, steps, clean_end=False, **knobs)
    check(grid, steps)
    assert float(grid.sigma[-1]) == float(cleanest.sigma)


@given(st.sampled_from(DISCRETE), st.data())
def test_leading_with_an_offset(schedule, data):
    steps = data.draw(st.integers(1, schedule.steps))
    stride = schedule.steps // steps
    offset = data.draw(st.integers(0, schedule.steps - 1 - (steps - 1) * stride))
    grid = SPACINGS["leading"](schedule, steps, offset=offset)
    check(grid, steps)
    assert grid.t[:-1].tolist() == [offset + stride * k for k in reversed(range(steps))]


@given(st.integers(1, 1000), st.integers(1, 6), st.data())
def test_sections_keep_what_they_say(total, parts, data):
    """Each section keeps its count, its first and its last index, in strictly ascending order."""
    parts = min(parts, total)
    size, longer = divmod(total, parts)
    sizes = [size + (i < longer) for i in range(parts)]
    counts = [data.draw(st.integers(0, s)) for s in sizes]
    kept = respaced_indices(total, ",".join(map(str, counts)))
    assert len(kept) == sum(counts)
    assert kept == sorted(set(kept))
    start = 0
    for length, count in zip(sizes, counts, strict=True):
        part = [k for k in kept if start <= k < start + length]
        assert len(part) == count
        assert count == 0 or part[0] == start
        assert count < 2 or part[-1] == start + length - 1
        start += length


PUBLISHED = {
    "25": "0 42 83 125 166 208 250 291 333 375 416 458 500 541 583 624 666 708 749 791 832 874 916 957 999",
    "7": "0 166 333 500 666 832 999",
    "fast27": "0 22 44 66 88 111 133 155 177 199 200 222 244 266 288 311 333 355 377 399 400 500 599 600 799"
    " 800 997",
    "7,4,2,1,2,4,7": "0 24 47 71 95 118 142 143 190 238 285 286 428 429 572 714 715 762 810 857 858 882 905"
    " 928 952 976 999",
    "1,1,1,1,1,1,1,2,5,13": "0 100 200 300 400 500 600 700 799 800 825 850 874 899 900 908 916 925 933 941"
    " 950 958 966 974 982 991 999",
    "ddim25": " ".join(str(k) for k in range(0, 1000, 40)),
}


@pytest.mark.parametrize("sections", PUBLISHED)
def test_published_respacings(sections):
    """guided-diffusion, GLIDE and IF; "fast27" differs from its sections by 997 for 999."""
    expected = [int(k) for k in PUBLISHED[sections].split()]
    assert respaced_indices(1000, sections) == expected
    grid = SPACINGS["respaced"](SCHEDULES["linear"](), len(expected), sections=sections)
    assert grid.t[:-1].tolist() == expected[::-1]


def test_strides_are_accumulated():
    """21 is the first count for which round(i * stride) and the reference's running sum differ."""
    stride = 999 / 20
    assert respaced_indices(1000, "21") != [round(i * stride) for i in range(21)]
    assert respaced_indices(1000, "20") == [round(i * 999 / 19) for i in range(20)]
    differ = sum(
        respaced_indices(1000, str(n)) != [round(i * (999 / (n - 1))) for i in range(n)]
        for n in range(2, 1001)
    )
    assert differ == 278


def test_respaced_betas_follow_from_the_levels():
    """1 - A_k / A_previous over the kept steps is what the grid's alphas give."""
    schedule = SCHEDULES["cosine"]()
    grid = SPACINGS["respaced"](schedule, 25)
    kept = schedule.alpha_bar[respaced_indices(1000, "25")]
    betas = 1 - kept / torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
    assert torch.allclose(1 - (grid.alpha[:-1] / grid.alpha[1:]) ** 2, betas.flip(0), rtol=1e-12)


@pytest.mark.parametrize(
    ("spacing", "steps", "knobs", "first", "last"),
    [
        ("leading", 50, {"offset": 1}, [981, 961], [21, 1]),
        ("leading", 30, {}, [957, 924], [33, 0]),
        ("trailing", 50, {}, [999, 979], [39, 19]),
        ("trailing", 7, {}, [999, 856], [285, 142]),
        ("linspace", 5, {}, [999, 749], [250, 0]),
        ("linspace", 5, {"rounding": False}, [999, 749.25], [249.75, 0]),
        ("karras", 3, {"rho": 1.0}, [999], [0]),
    ],
)
def test_times_on_a_table(spacing, steps, knobs, first, last):
    t = SPACINGS[spacing](SCHEDULES["scaled_linear"](), steps, **knobs).t[:-1].tolist()
    assert t[: len(first)] == pytest.approx(first)
    assert t[-len(last) :] == pytest.approx(last, abs=1e-9)


def test_times_of_continuous_schedules():
    flow = SPACINGS["linspace"](Flow(shift=3), 4)
    assert flow.sigma.tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert SPACINGS["trailing"](Flow(), 4).sigma.tolist() == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    ve = SPACINGS["linspace"](VE(sigma_min=0.01, sigma_max=100), 5)
    assert ve.sigma.tolist() == pytest.approx([100, 10, 1, 0.1, 0.01, 0])
    assert SPACINGS["trailing"](VE(sigma_min=0.01, sigma_max=100), 4).sigma.tolist() == pytest.approx(
        [100, 10, 1, 0.1, 0]
    )


def test_karras_is_equation_5():
    grid = SPACINGS["karras"](VE(), 18)
    expected = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    assert grid.sigma[:-1].tolist() == pytest.approx(expected, rel=1e-12)
    assert grid.t[:-1].tolist() == pytest.approx([math.log(s) / 4 for s in expected], rel=1e-12)
    other = SPACINGS["karras"](VE(), 3, rho=1.0, sigma_min=1.0, sigma_max=5.0)
    assert other.sigma.tolist() == pytest.approx([5, 3, 1, 0])


def test_karras_between_the_ends_of_another_spacing():
    schedule = SCHEDULES["scaled_linear"]()
    other = SPACINGS["leading"](schedule, 5, offset=1)
    grid = SPACINGS["karras"](schedule, 5, ends="leading", offset=1, rounding=True)
    assert grid.points[0].ratio == pytest.approx(other.points[0].ratio)
    assert grid.points[-2].ratio == pytest.approx(other.points[-2].ratio)
    exact = SPACINGS["karras"](schedule, 5, ends="leading", offset=1)
    assert torch.equal(grid.sigma, exact.sigma)
    assert grid.t[:-1].tolist() == exact.t[:-1].round().tolist() != exact.t[:-1].tolist()
    with pytest.raises(ValueError, match=r"unknown ends 'linspace'; .*allowed: leading, trailing"):
        SPACINGS["karras"](schedule, 5, ends="linspace")
    with pytest.raises(ValueError, match="spacing 'karras' needs a discrete schedule"):
        SPACINGS["karras"](VE(), 5, rounding=True)


def test_even_log_snr():
    exponential = SPACINGS["exponential"](VE(sigma_min=0.1, sigma_max=10), 3)
    assert exponential.sigma.tolist() == pytest.approx([10, 1, 0.1, 0])
    uniform = SPACINGS["logsnr"](VE(sigma_min=0.1, sigma_max=10), 4, clean_end=False)
    assert uniform.sigma.tolist() == pytest.approx([10, 10**0.5, 1, 0.1**0.5, 0.1])
    gaps = [b.log_snr - a.log_snr for a, b in zip(uniform.points, uniform.points[1:], strict=False)]
    assert gaps == pytest.approx([gaps[0]] * 4)
    vp = SPACINGS["logsnr"](SCHEDULES["linear"](), 10, clean_end=False)
    gaps = [b.log_snr - a.log_snr for a, b in zip(vp.points, vp.points[1:], strict=False)]
    assert gaps == pytest.approx([gaps[0]] * 10)


def test_terminal_level_of_stable_diffusion():
    schedule = SCHEDULES["scaled_linear"]()
    grid = SPACINGS["leading"](schedule, 50, offset=1, clean_end=False)
    assert float(grid.alpha[-1]) ** 2 == pytest.approx(0.99915)
    assert float(grid.t[-1]) == 0


LINEAR = SCHEDULES["linear"]()


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    ("steps", "message"), [(0, "at least 1"), (-3, "at least 1"), (1001, "only 1000 levels")]
)
def test_wrong_steps(spacing, steps, message):
    with pytest.raises(ValueError, match=message) as error:
        SPACINGS[spacing](LINEAR, steps)
    assert str(steps) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("steps", [2.5, True, "7"])
def test_steps_that_are_no_whole_number(steps):
    with pytest.raises(ValueError, match="whole number"):
        SPACINGS["trailing"](LINEAR, steps)


@pytest.mark.parametrize("spacing", sorted(ONLY_DISCRETE))
def test_continuous_schedules_have_no_table(spacing):
    with pytest.raises(ValueError, match="needs a discrete schedule; for this one use 'linspace'"):
        SPACINGS[spacing](Flow(), 5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SPACINGS["lineading"], "did you mean 'leading'"),
        (lambda: SPACINGS["leading"](LINEAR, 50, offset=20), "lower it"),
        (lambda: SPACINGS["distilled"](LINEAR, 51), "that was trained on 50; allowed: 1 to 50"),
        (lambda: SPACINGS["leading"](LINEAR, 50, offset=-1), "lower it"),
        (lambda: SPACINGS["respaced"](LINEAR, 50, sections="fast27"), "set steps=27"),
        (lambda: SPACINGS["respaced"](LINEAR, 500, sections="ddim500x"), "allowed: '50'"),
        (lambda: respaced_indices(1000, "10,a"), "allowed: '50'"),
        (lambda: respaced_indices(1000, ""), "allowed: '50'"),
        (lambda: respaced_indices(500, "fast27"), "allowed: '50'"),
        (lambda: respaced_indices(1000, "ddim300"), "use respacing '300'"),
        (lambda: respaced_indices(1000, "600,10"), "at most 500"),
        (lambda: SPACINGS["karras"](Flow(), 5), "set 0 < sigma_min < sigma_max"),
        (lambda: SPACINGS["karras"](LINEAR, 5, sigma_min=2, sigma_max=1), "set 0 < sigma_min < sigma_max"),
        (lambda: SPACINGS["exponential"](LINEAR, 5, sigma_max=500), "this schedule only has"),
        (lambda: SPACINGS["linspace"](LINEAR, 5, clean_end=False), "use leading, offset=1"),
    ],
)
def test_mistakes_are_named_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
