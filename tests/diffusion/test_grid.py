"""What can be done to a walk: levels, parts, reversal, RePaint jumps."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfumato.diffusion import SCHEDULES, SPACINGS, VE, Cosine, Flow, Grid, repaint
from sfumato.diffusion.grid import Point
from sfumato.diffusion.sampling import Run, _renoise

LINEAR = SCHEDULES["linear"]()


def trailing(steps: int) -> Grid:
    return SPACINGS["trailing"](LINEAR, steps)


def test_levels():
    grid = trailing(4)
    assert grid.t.tolist()[:4] == [999, 749, 499, 249]
    assert math.isnan(grid.t[4])
    level = grid.level(1)
    assert level.alpha == LINEAR.alpha_bar[749].sqrt()
    assert level.t.shape == level.alpha.shape == level.sigma.shape == ()
    assert Point.of(level) == grid.points[1]
    assert grid.points[4] == (1, 0)


def test_time_is_what_the_network_embeds():
    schedule = SCHEDULES["linear"](steps=500, rescale_timesteps=True)
    assert SPACINGS["trailing"](schedule, 2).t.tolist()[:2] == [998, 498]
    assert SPACINGS["linspace"](Flow(shift=3, multiplier=1000), 2).t.tolist()[:2] == [1000, 750]


def test_points_at_the_ends():
    clean, pure, unit = Point(1.0, 0.0), Point(0.0, 1.0), Point(1.0, 1.0)
    assert (clean.ratio, clean.log_snr, clean.tau) == (0, math.inf, 0)
    assert (pure.ratio, pure.log_snr, pure.tau) == (math.inf, -math.inf, 1)
    assert (unit.ratio, unit.log_snr, unit.tau) == (1, 0, 0.5)


def test_terminal_level():
    end = LINEAR(torch.tensor(0))
    on_table = Grid.of(LINEAR, torch.tensor([500, 100]), end)
    assert on_table.t.tolist() == [500, 100, 0]
    assert on_table.sigma[-1] == end.sigma
    free = Grid.of(LINEAR, torch.tensor([500, 100]), (0.9, 0.05))
    assert free.points[-1] == (0.9, 0.05)
    assert math.isnan(free.t[-1])


@pytest.mark.parametrize("times", [[100, 500], [100, 100]])
def test_levels_must_become_cleaner(times):
    with pytest.raises(ValueError, match="levels 0 and 1 of the grid"):
        Grid.of(LINEAR, torch.tensor(times))


def test_terminal_level_must_be_cleaner():
    with pytest.raises(ValueError, match="levels 1 and 2"):
        Grid.of(LINEAR, torch.tensor([500, 100]), LINEAR(torch.tensor(200)))


@pytest.mark.parametrize(
    "schedule", [LINEAR, SCHEDULES["scaled_linear"](), Cosine(), VE(), Flow(shift=3)], ids=str
)
@pytest.mark.parametrize("ratio", [0.05, 1.0, 7.0])
def test_level_at(schedule, ratio):
    level = SPACINGS["linspace"](schedule, 3).level_at(ratio)
    assert Point.of(level).ratio == pytest.approx(ratio, rel=1e-12)
    assert schedule(schedule.time_of(level.sigma / level.alpha)).t == pytest.approx(level.t)


def test_level_outside_a_table_is_its_end():
    assert trailing(3).level_at(1e6).t == 999


def test_which_schedules_begin_at_pure_noise():
    pure = [Flow(), Cosine(), SCHEDULES["linear"](zero_snr=True), SCHEDULES["cosine"]()]
    noisy = [LINEAR, SCHEDULES["scaled_linear"](), VE(), Flow(end=0.98), Cosine(end=0.99)]
    for schedule in (*pure, *noisy):
        grid = SPACINGS["linspace"](schedule, 4)
        assert grid.from_pure_noise == (schedule in pure)
        assert grid.window(0.5, 1).from_pure_noise == grid.from_pure_noise


def window_or_none(grid: Grid, start: float, stop: float) -> Grid | None:
    """The window, or None if that was refused because no step lies in it."""
    steps = len(grid)
    if math.ceil(start * steps - 1e-6) < math.ceil(stop * steps - 1e-6):
        return grid.window(start, stop)
    with pytest.raises(ValueError, match=f"holds none of {steps} steps"):
        grid.window(start, stop)
    return None


@given(st.integers(1, 60), st.floats(0, 1), st.floats(0, 1))
def test_windows_join(steps, a, b):
    """Neighboring windows share their border level, and together have every step once."""
    grid = trailing(steps)
    cuts = sorted({0.0, a, b, 1.0})
    taken = []
    for start, stop in pairwise(cuts):
        part = window_or_none(grid, start, stop)
        if part is None:
            continue
        if taken:
            assert part.points[0] == taken[-1].points[-1]
            assert part.t[0] == taken[-1].t[-1]
        taken.append(part)
    assert torch.cat([p.alpha[:-1] for p in taken]).tolist() == grid.alpha[:-1].tolist()
    assert taken[-1].points[-1] == (1, 0)


@pytest.mark.parametrize(
    ("steps", "strength", "left"), [(50, 0.8, 40), (50, 0.75, 37), (30, 0.1, 3), (7, 1.0, 7)]
)
def test_strength_of_img2img(steps, strength, left):
    """diffusers takes the last int(steps * strength) steps."""
    part = trailing(steps).window(1 - strength, 1)
    assert len(part) == left == int(steps * strength)
    assert part.t[:-1].tolist() == trailing(steps).t[steps - left : steps].tolist()


@pytest.mark.parametrize("window", [(-0.1, 1), (0.5, 0.5), (0.8, 0.2), (0, 1.1), (math.nan, 1)])
def test_wrong_windows(window):
    with pytest.raises(ValueError, match="need 0 <= start < stop <= 1"):
        trailing(10).window(*window)


def test_empty_window():
    with pytest.raises(ValueError, match="holds none of 10 steps; widen it or take more steps"):
        trailing(10).window(0.95, 1.0)


def test_reversed_starts_at_the_cleanest_noisy_level():
    """guided-diffusion's ddim_reverse_sample: table[first] ... table[last], then alpha = 0."""
    grid = trailing(4).reversed()
    assert grid.t.tolist()[:4] == [249, 499, 749, 999]
    assert grid.points[-1] == (0, 1)
    assert len(grid) == 4
    exact = trailing(4).reversed(end=None)
    assert exact.t.tolist() == [249, 499, 749, 999]
    assert len(exact) == 3


def test_reversed_keeps_a_noisy_terminal_level():
    grid = SPACINGS["leading"](SCHEDULES["scaled_linear"](), 4, offset=1, clean_end=False)
    assert grid.reversed(end=None).t.tolist() == [0, 1, 251, 501, 751]
    assert trailing(4).window(0, 0.5).reversed(end=None).t.tolist() == [499, 749, 999]


def test_reversed_has_no_step_of_zero_length():
    grid = SPACINGS["linspace"](Flow(), 4).reversed()
    assert grid.sigma.tolist() == [0.25, 0.5, 0.75, 1]
    assert grid.t.tolist() == [0.25, 0.5, 0.75, 1]


def test_twice_reversed():
    grid = SPACINGS["karras"](VE(), 6, clean_end=False, sigma_min=0.1)
    again = grid.reversed(end=None).reversed(end=None)
    assert torch.equal(again.sigma, grid.sigma)
    assert torch.equal(again.t, grid.t)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: repaint(trailing(10), 2, 2).reversed(), "cannot be reversed"),
        (lambda: trailing(1).reversed(end=None), "take more steps"),
        (lambda: repaint(trailing(10), 0, 2), "at least 1"),
        (lambda: repaint(trailing(10), 2, 0), "at least 1"),
        (lambda: repaint(repaint(trailing(10), 2, 2), 2, 2), "without jumps"),
    ],
)
def test_mistakes_are_named_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def published_repaint(steps: int, jump_length: int, resamples: int) -> list[int]:
    """The times that RePaint visits (its appendix B): index of the table, -1 = clean, climbing one by one."""
    left = {t: resamples - 1 for t in range(0, steps - jump_length, jump_length)}
    t, times = steps, []
    while t >= 1:
        t -= 1
        times.append(t)
        if left.get(t, 0) > 0:
            left[t] -= 1
            for _ in range(jump_length):
                t += 1
                times.append(t)
    return [*times, -1]


@pytest.mark.parametrize(
    ("steps", "jump_length", "resamples"), [(12, 3, 2), (250, 10, 10), (9, 4, 3), (5, 1, 2)]
)
def test_repaint_visits_the_published_levels(steps, jump_length, resamples):
    """Ours jumps in one step where theirs climbs in `jump_length`."""
    grid = repaint(SPACINGS["trailing"](SCHEDULES["linear"](steps=250), steps), jump_length, resamples)
    plain = SPACINGS["trailing"](SCHEDULES["linear"](steps=250), steps)
    index = {float(s): steps - 1 - i for i, s in enumerate(plain.sigma)}
    visited = [index[float(s)] for s in grid.sigma]
    expected = published_repaint(steps, jump_length, resamples)
    summits = [
        v
        for k, v in enumerate(expected)
        if not (0 < k < len(expected) - 1 and expected[k - 1] < v < expected[k + 1])
    ]
    assert visited == summits
    rises = {i for i, (a, b) in enumerate(pairwise(visited)) if b > a}
    assert grid.jumps == rises


def test_repaint_with_one_sample_is_the_plain_walk():
    assert torch.equal(repaint(trailing(10), 3, 1).sigma, trailing(10).sigma)


def test_windows_of_a_grid_with_jumps():
    grid = repaint(trailing(8), 2, 2)
    part = grid.window(0.5, 1)
    first = len(grid) - len(part)
    assert part.jumps == {j - first for j in grid.jumps if j >= first}
    for j in part.jumps:
        assert part.sigma[j + 1] > part.sigma[j]


def test_going_back_adds_the_noise_that_is_missing():
    """sqrt(sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2): from 0.49 to 0.5 of Imagen's cosine it is 0.1749."""
    back = repaint(Grid.of(Cosine(offset=0.008), torch.tensor([0.5, 0.49], dtype=torch.float64)), 1, 2)
    (jump,) = back.jumps
    run = Run(lambda x, level: pytest.fail("no step"), back, torch.ones_like)
    added = _renoise(run, torch.zeros(1, 1), jump)
    assert float(added) == pytest.approx(0.1749, abs=5e-5)
