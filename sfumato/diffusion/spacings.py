"""Spacings: which levels of a schedule a walk of a given number of steps visits.

All take (schedule, steps, **knobs). The walk ends at (alpha, sigma) = (1, 0), no noise; with
`clean_end=False` at the schedule's own cleanest level, which is how latent diffusion and Stable Diffusion
sample ("set_alpha_to_one": false).
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sfumato.core.registry import unknown
from sfumato.diffusion.grid import SPACINGS, Grid, Point
from sfumato.diffusion.schedules import Discrete, NoiseSchedule

__all__ = [
    "distilled",
    "exponential",
    "karras",
    "leading",
    "linspace",
    "logsnr",
    "respaced",
    "respaced_indices",
    "trailing",
]


@SPACINGS("leading")
def leading(
    schedule: NoiseSchedule, steps: int, *, offset: int = 0, clean_end: bool = True, drop_last: bool = False
) -> Grid:
    """Every (T // steps)-th index from `offset` on; discrete schedules only.

    Args:
        drop_last: lay out one step more and leave out the cleanest, as diffusers does for DPM-Solver++ and
            UniPC, whose last step then goes farther.

    offset=1, clean_end=False is Stable Diffusion's DDIM: 981, 961, ..., 1, then the level of index 0. The
    walk does not start at the noisiest level.
    """
    table = _discrete(schedule, steps, "leading")
    t = (torch.arange(steps) + drop_last) * (table.steps // (steps + drop_last)) + offset
    if offset < 0 or int(t[-1]) >= table.steps:
        raise ValueError(
            f"offset={offset} moves {steps} leading steps out of the table 0..{table.steps - 1}; lower it"
        )
    return _grid(schedule, t.flip(0), clean_end)


@SPACINGS("trailing")
def trailing(schedule: NoiseSchedule, steps: int, *, clean_end: bool = True) -> Grid:
    """Evenly in time from the noisiest level on, without the cleanest.

    On T indices: round(T - k T / steps) - 1 (Lin et al. 2023, arXiv:2305.08891, table 2). Halves fall as in
    numpy's arange(T, 0, -T / steps), which everyone uses: 48 of 1000 steps visit 936, not 937.
    """
    _check_steps(schedule, steps)
    clean, noisy = schedule.span
    if isinstance(schedule, Discrete):
        # Rounding gives arange an entry too many for some numbers of steps, 61 of 1000 among them.
        t = torch.from_numpy(np.arange(schedule.steps, 0, -schedule.steps / steps)[:steps]).round() - 1
    else:
        t = _line(noisy, clean, steps + 1)[:-1]
    return _grid(schedule, t, clean_end)


@SPACINGS("distilled")
def distilled(schedule: NoiseSchedule, steps: int, *, original: int = 50, clean_end: bool = True) -> Grid:
    """Of the `original` levels that a student was trained on, every (original / steps)-th from the noisiest.

    Discrete schedules only. 4 steps of 50 visit 999, 759, 499, 259 (Luo et al. 2023, arXiv:2310.04378).

    Raises: ValueError for more steps than the student knows.
    """
    table = _discrete(schedule, steps, "distilled")
    if not steps <= original <= table.steps:
        raise ValueError(
            f"{steps} steps of a student that was trained on {original}; allowed: 1 to {original}"
        )
    chosen = torch.arange(steps, dtype=torch.float64).mul(original / steps).floor()
    return _grid(schedule, (original - chosen) * (table.steps // original) - 1, clean_end)


@SPACINGS("linspace")
def linspace(
    schedule: NoiseSchedule,
    steps: int,
    *,
    rounding: bool = True,
    clean_end: bool = True,
    last: float | None = None,
    drop_last: bool = False,
) -> Grid:
    """Evenly in time from the noisiest to the cleanest level, the latter only if it has noise (not in flow).

    Args:
        rounding: on a discrete schedule round to whole indices, half to even after numpy's linspace; False
            takes fractional ones (k-diffusion).
        last: the cleanest time visited, instead of the schedule's (0.04 for the SDE of SiT).
        drop_last: as of `leading`; where indices are rounded.
    """
    _check_steps(schedule, steps)
    clean, noisy = schedule.span
    if last is not None:
        if not clean < last < noisy:
            raise ValueError(f"last={last:g} is not inside this schedule; allowed: {clean:g} to {noisy:g}")
        return _grid(schedule, _line(noisy, last, steps), clean_end)
    if Point.of(schedule(torch.tensor(clean, dtype=torch.float64))).sigma > 0:
        t = _line(noisy, clean, steps)
    else:
        t = _line(noisy, clean, steps + 1)[:-1]
    if rounding and isinstance(schedule, Discrete):
        # torch's line is symmetric; numpy's goes up from 0, and that decides where exact halves fall.
        count = steps + drop_last
        t = torch.from_numpy(np.linspace(clean, noisy, count)[drop_last:]).round().flip(0) if count > 1 else t
    return _grid(schedule, t, clean_end)


@SPACINGS("respaced")
def respaced(
    schedule: NoiseSchedule, steps: int, *, sections: str | None = None, clean_end: bool = True
) -> Grid:
    """Indices as improved-diffusion's SpacedDiffusion chooses them; discrete schedules only.

    Args:
        sections: see `respaced_indices`; by default str(steps). It must yield exactly `steps` indices.

    Nichol & Dhariwal 2021 (arXiv:2102.09672), section 4.
    """
    table = _discrete(schedule, steps, "respaced")
    t = respaced_indices(table.steps, str(steps) if sections is None else sections)
    if len(t) != steps:
        raise ValueError(
            f"sections {sections!r} give {len(t)} steps, not {steps}; set steps={len(t)} or leave them out"
        )
    return _grid(schedule, torch.tensor(t[::-1]), clean_end)


@SPACINGS("karras")
def karras(  # noqa: PLR0913 (the ends, and what they are taken from)
    schedule: NoiseSchedule,
    steps: int,
    *,
    rho: float = 7.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    clean_end: bool = True,
    ends: str = "",
    offset: int = 0,
    rounding: bool = False,
) -> Grid:
    """Evenly in (sigma / alpha)^(1 / rho), both ends included (Karras et al. 2022, arXiv:2206.00364, eq. 5).

    Args:
        sigma_min, sigma_max: sigma / alpha of the ends, by default the schedule's; needed where those are 0
            or infinite.
        ends: "leading" or "trailing" = by default the ends of that spacing, as in diffusers' Euler and Heun.
        offset: of the spacing "leading" that ends are taken from.
        rounding: the net embeds the nearest whole index, as in diffusers' multistep solvers; discrete
            schedules only.
    """
    low, high = _bounds(schedule, steps, sigma_min, sigma_max, "karras", ends, offset)
    grid = _by_ratio(schedule, _line(high ** (1 / rho), low ** (1 / rho), steps).pow(rho), clean_end)
    if not rounding:
        return grid
    _discrete(schedule, steps, "karras")
    whole = schedule(schedule.time_of(grid.sigma[:-1] / grid.alpha[:-1]).round()).t
    return replace(grid, t=torch.cat([whole, grid.t[-1:]]))


@SPACINGS("exponential")
def exponential(
    schedule: NoiseSchedule,
    steps: int,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    clean_end: bool = True,
    ends: str = "",
    offset: int = 0,
) -> Grid:
    """Evenly in ln(sigma / alpha), both ends included; bounds, ends and offset as in `karras`."""
    low, high = _bounds(schedule, steps, sigma_min, sigma_max, "exponential", ends, offset)
    return _by_ratio(schedule, _line(math.log(high), math.log(low), steps).exp(), clean_end)


@SPACINGS("logsnr")
def logsnr(
    schedule: NoiseSchedule,
    steps: int,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    clean_end: bool = True,
) -> Grid:
    """Evenly in log-SNR with steps + 1 levels, of which the cleanest gives way to the terminal level.

    With clean_end=False this is DPM-Solver's uniform log-SNR grid (Lu et al. 2022, arXiv:2206.00927, section
    3.4); bounds as in `karras`.
    """
    low, high = _bounds(schedule, steps, sigma_min, sigma_max, "logsnr")
    return _by_ratio(schedule, _line(math.log(high), math.log(low), steps + 1)[:-1].exp(), clean_end)


def respaced_indices(total: int, sections: str) -> list[int]:
    """The indices of 0..total-1 that a respacing string keeps, ascending.

    "n" or "n1,n2,...": as many equal parts as there are numbers (the first total mod k of them one longer),
    n_i indices in part i. "ddimN": every k-th index from 0 for the first k that gives N. "fast27" (GLIDE):
    "10,10,3,2,2" of 1000 with 997 for 999.

    Raises: ValueError if the string is none of these, or does not fit `total`.
    """
    if sections == "fast27" and total == 1000:
        return [*respaced_indices(total, "10,10,3,2,2")[:-1], 997]
    if sections.startswith("ddim") and sections[4:].isdecimal():
        return _strided(total, int(sections[4:]))
    counts = sections.split(",")
    if not all(c.strip().isdecimal() for c in counts):
        raise ValueError(
            f"respacing {sections!r} of {total} levels; allowed: '50', '10,10,3,2,2', 'ddim50', 'fast27'"
        )
    kept: list[int] = []
    start, (size, longer) = 0, divmod(total, len(counts))
    for i, count in enumerate(counts):
        length = size + (i < longer)
        kept += _part(start, length, int(count), sections)
        start += length
    return kept


def _part(start: int, size: int, count: int, sections: str) -> list[int]:
    """`count` of `size` indices from `start`, the first and the last among them."""
    if count > size:
        raise ValueError(
            f"respacing {sections!r}: cannot keep {count} of {size} levels; lower it to at most {size}"
        )
    stride = (size - 1) / (count - 1) if count > 1 else 1.0
    at, kept = 0.0, []
    for _ in range(count):
        # The sum is accumulated, not i * stride: their roundings differ for 278 of the counts up to 1000.
        kept.append(start + round(at))
        at += stride
    return kept


def _strided(total: int, count: int) -> list[int]:
    for stride in range(1, total):
        if len(range(0, total, stride)) == count:
            return list(range(0, total, stride))
    raise ValueError(
        f"respacing 'ddim{count}': no whole stride keeps {count} of {total} levels; use respacing '{count}'"
    )


def _check_steps(schedule: NoiseSchedule, steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps={steps!r}: it must be a whole number of at least 1")
    if isinstance(schedule, Discrete) and steps > schedule.steps:
        raise ValueError(
            f"steps={steps}: this schedule has only {schedule.steps} levels; lower it to at most that"
        )


def _discrete(schedule: NoiseSchedule, steps: int, name: str) -> Discrete:
    if not isinstance(schedule, Discrete):
        raise ValueError(
            f"spacing {name!r} needs a discrete schedule; for this one use 'linspace', 'trailing' or 'karras'"
        )
    _check_steps(schedule, steps)
    return schedule


def _bounds(
    schedule: NoiseSchedule,
    steps: int,
    low: float | None,
    high: float | None,
    name: str,
    ends: str = "",
    offset: int = 0,
) -> tuple[float, float]:
    """The cleanest and the noisiest sigma / alpha of a grid that is spaced in it."""
    _check_steps(schedule, steps)
    clean, noisy = (Point.of(schedule(torch.tensor(t, dtype=torch.float64))).ratio for t in schedule.span)
    first, last = noisy, clean
    if ends:
        if ends not in ("leading", "trailing"):
            raise ValueError(unknown("ends", ends, ["leading", "trailing"]))
        grid = leading(schedule, steps, offset=offset) if ends == "leading" else trailing(schedule, steps)
        first, last = grid.points[0].ratio, grid.points[-2].ratio
    low, high = last if low is None else low, first if high is None else high
    if not 0 < low < high < math.inf:
        raise ValueError(
            f"spacing {name!r} got sigma/alpha from {high:g} to {low:g}; "
            "set 0 < sigma_min < sigma_max < inf, e.g. 0.002 and 80"
        )
    if low < clean * (1 - 1e-9) or high > noisy * (1 + 1e-9):
        raise ValueError(
            f"sigma_min={low:g}, sigma_max={high:g}: this schedule only has {clean:g} to {noisy:g}"
        )
    return low, high


def _by_ratio(schedule: NoiseSchedule, ratio: Tensor, clean_end: bool) -> Grid:
    return _grid(schedule, schedule.time_of(ratio), clean_end)


def _line(first: float, last: float, count: int) -> Tensor:
    return torch.linspace(first, last, count, dtype=torch.float64)


def _grid(schedule: NoiseSchedule, t: Tensor, clean_end: bool) -> Grid:
    """The grid over these times, noisy -> clean."""
    clean = torch.tensor(schedule.span[0], dtype=torch.float64)
    if clean_end or Point.of(schedule(clean)).sigma == 0:
        return Grid.of(schedule, t)
    # The slack is for times that come out of a logarithm.
    if float(t[-1] - clean) < 1e-9 * (schedule.span[1] - schedule.span[0]):
        raise ValueError(
            "clean_end=False, but this spacing visits the cleanest level itself; use leading, offset=1"
        )
    return Grid.of(schedule, t, schedule(clean))
