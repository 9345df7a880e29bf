"""Deterministic solvers that look back on earlier evaluations: plms, lms, deis, dpmpp_2m and unipc."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from sfumato.diffusion.grid import Point
from sfumato.diffusion.samplers.algebra import (
    Frame,
    check_order,
    exponential_moments,
    first_order,
    lagrange_weights,
    look_back,
    transfer,
)
from sfumato.diffusion.sampling import SAMPLERS, Correction, Past, Run

__all__ = ["deis", "dpmpp_2m", "lms", "plms", "unipc"]

ADAMS_BASHFORTH = ((1.0,), (1.5, -0.5), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


@SAMPLERS("plms")
def plms(run: Run, x: Tensor, i: int) -> Tensor:
    """Pseudo linear multistep: Adams-Bashforth of up to four slopes, as if the levels were evenly spaced.

    The first step takes the mean of its two ends' slopes (two evaluations), as latent diffusion does. Order 2
    on any smooth spacing; the higher weights reduce the error, not the order, since sigma / alpha is not
    linear in time.

    Liu et al. 2022 (arXiv:2202.09778), section 3.3.
    """
    now, after = run.grid.points[i : i + 2]
    frame, denoised = Frame(run.grid), run.folded(x, i)
    weights = ADAMS_BASHFORTH[min(len(run.history), 4) - 1]
    change = frame.time(after) - frame.time(now)
    if math.isinf(change) or (len(weights) == 1 and math.isnan(run.grid.level(i + 1).t)):
        return first_order(after, denoised)
    recent = list(reversed(run.history))[: len(weights)]
    slopes = [frame.slope(past.denoised) for past in recent]
    if len(weights) == 1:
        weights = (0.5, 0.5)
        slopes.append(frame.slope(run.between(first_order(after, denoised), run.grid.level(i + 1))))
    return frame.advance(x, now, after, *((change * w, s) for w, s in zip(weights, slopes, strict=True)))


@SAMPLERS("lms")
def lms(run: Run, x: Tensor, i: int, *, order: int = 4) -> Tensor:
    """Linear multistep: integrates the polynomial through the last `order` slopes over their own times.

    Adams-Bashforth with uneven steps, in the coordinates of `Frame`: order `order` once that many evaluations
    exist. Katherine Crowson's k-diffusion, for the equation of Karras et al. 2022 (arXiv:2206.00364).

    Raises: ValueError unless 1 <= order <= 4.
    """
    check_order("lms", order, 4)
    run.folded(x, i)
    return _adams_bashforth(run, x, i, order)


@SAMPLERS("deis")
def deis(run: Run, x: Tensor, i: int, *, order: int = 3) -> Tensor:
    """tAB-DEIS: exact integral of the polynomial in t = ln(sigma / alpha) through the last `order` eps.

    On schedules that reach alpha = 0 the polynomial is one in sigma / (alpha + sigma) through the velocities,
    the same idea in the coordinates of `Frame`. Order `order` once that many evaluations exist; Euler to
    sigma = 0.

    Zhang & Chen 2023 (arXiv:2204.13902), section 3.3.

    Raises: ValueError unless 1 <= order <= 3.
    """
    check_order("deis", order, 3)
    now, after = run.grid.points[i : i + 2]
    frame, denoised = Frame(run.grid), run.folded(x, i)
    if frame.straight:
        return _adams_bashforth(run, x, i, order)
    if after.sigma <= 0 or after.alpha <= 0:
        return first_order(after, denoised)
    # Over t the slope is weighted by exp(t), which grows towards the step's start: nodes count from its end.
    past, change = look_back(run, order), after.log_snr - now.log_snr
    nodes = [(after.log_snr - p.point.log_snr) / change for p in past]
    weights = lagrange_weights(nodes, exponential_moments(change, len(nodes)))
    return frame.advance(
        x, now, after, *((-now.ratio * w, p.denoised.eps) for w, p in zip(weights, past, strict=True))
    )


@SAMPLERS("dpmpp_2m")
def dpmpp_2m(run: Run, x: Tensor, i: int) -> Tensor:
    """DPM-Solver++(2M): x_s = sigma_s / sigma_t x_t - alpha_s expm1(-h) D, D = x0 extrapolated to mid-step.

    h is the growth of log-SNR. Order 2; the first step and the one to sigma = 0 are of order 1.

    Lu et al. 2022 (arXiv:2211.01095), algorithm 2.
    """
    now, after = run.grid.points[i : i + 2]
    denoised = run.folded(x, i)
    if after.sigma <= 0 or after.alpha <= 0:
        return first_order(after, denoised)
    newest, *older = look_back(run, 2)
    h = after.log_snr - now.log_snr
    gain, extra = -math.expm1(-h), 0.0
    if older:
        extra = gain * h / (2 * (now.log_snr - older[0].point.log_snr))
    weights = (gain + extra, newest.denoised.x0), *((-extra, past.denoised.x0) for past in older)
    return transfer(x, now, after, *weights)


@SAMPLERS("unipc")
def unipc(run: Run, x: Tensor, i: int, *, order: int = 2, variant: Literal["bh1", "bh2"] = "bh2") -> Tensor:
    """UniPC, predicting x0: corrects the previous step with the evaluation at its end, predicts the next one.

    One evaluation per step. Order `order` + 1 (the corrector adds one) once enough evaluations exist; towards
    sigma = 0 the order falls to 1. Where `project` changed the sample after the previous step, it is not
    corrected.

    Args:
        order: of the predictor, 1 to 3.
        variant: B(h) = h ("bh1") or expm1(h) ("bh2") in the simplified weights of order 1 and 2.

    Zhao et al. 2023 (arXiv:2302.04867), algorithms 5 to 8, appendix B.

    Raises: ValueError for another order or variant.
    """
    check_order("unipc", order, 3)
    if variant not in ("bh1", "bh2"):
        raise ValueError(f"unipc variant {variant!r}; allowed: bh1, bh2")
    now, after = run.grid.points[i : i + 2]
    denoised = run.folded(x, i)
    if after.alpha <= 0:
        return first_order(after, denoised)
    if run.correction is not None and run.correction.predicted is x and run.grid.points[i - 1].alpha > 0:
        x = _corrected(run, i, run.correction, variant)
    if run.grid.points[-1].sigma <= 0:
        order = min(order, len(run.grid) - i)
    past = look_back(run, order)
    weights = _unipc_weights(now, after, past, variant)
    predicted = transfer(x, now, after, *((w, p.denoised.x0) for w, p in zip(weights, past, strict=True)))
    run.correction = Correction(x, predicted, len(past))
    return predicted


def _corrected(run: Run, i: int, previous: Correction, variant: str) -> Tensor:
    """The end of step i - 1 again, now that x0 is known there."""
    now, after = run.grid.points[i - 1 : i + 1]
    newest, *past = look_back(run, previous.order + 1)
    h = after.log_snr - now.log_snr
    if previous.order == 1:
        simple = 0.5 * _amplitude(h, variant)
        weights = [-math.expm1(-h) - simple, simple]
    else:
        nodes = [*((p.point.log_snr - now.log_snr) / h for p in past), 1.0]
        weights = lagrange_weights(nodes, exponential_moments(h, len(nodes)))
    evaluations = [*past, newest]
    terms = ((w, p.denoised.x0) for w, p in zip(weights, evaluations, strict=True))
    return transfer(previous.start, now, after, *terms)


def _unipc_weights(now: Point, after: Point, past: list[Past], variant: str) -> list[float]:
    """Weights of the x0 predictions of `past`, newest first."""
    h = after.log_snr - now.log_snr
    gain = -math.expm1(-h)
    if len(past) == 1:
        return [gain]
    nodes = [(p.point.log_snr - now.log_snr) / h for p in past]
    if len(past) == 2:
        simple = 0.5 * _amplitude(h, variant) / nodes[1]
        return [gain - simple, simple]
    return lagrange_weights(nodes, exponential_moments(h, len(nodes)))


def _amplitude(h: float, variant: str) -> float:
    """-B(-h) of the paper."""
    return h if variant == "bh1" else -math.expm1(-h)


def _adams_bashforth(run: Run, x: Tensor, i: int, order: int) -> Tensor:
    """Integrate the polynomial through the last slopes over the times of `Frame`."""
    now, after = run.grid.points[i : i + 2]
    frame, past = Frame(run.grid), list(reversed(run.history))[:order]
    start, change = frame.time(now), frame.time(after) - frame.time(now)
    if math.isinf(change):
        return first_order(after, past[0].denoised)
    nodes = [(frame.time(p.point) - start) / change for p in past]
    weights = lagrange_weights(nodes, [1 / (k + 1) for k in range(len(nodes))])
    slopes = ((change * w, frame.slope(p.denoised)) for w, p in zip(weights, past, strict=True))
    return frame.advance(x, now, after, *slopes)
