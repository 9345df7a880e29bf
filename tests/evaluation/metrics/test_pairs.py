"""Likeness in pairs, against scipy's filters and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from sfumato.evaluation.metrics.pairs import clip_score, ssim


def by_scipy(x: Tensor, y: Tensor) -> float:
    """One channel in [0, 255]; the filter reaches 5 pixels, and what the border touches is cut off."""

    def blur(v: np.ndarray) -> np.ndarray:
        return gaussian_filter(v, 1.5, radius=5)[5:-5, 5:-5]

    a, b = x.double().numpy(), y.double().numpy()
    ma, mb = blur(a), blur(b)
    va, vb, cov = blur(a * a) - ma**2, blur(b * b) - mb**2, blur(a * b) - ma * mb
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float(np.mean((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))))


def test_ssim_against_scipy() -> None:
    x = torch.randint(256, (2, 3, 19, 25))
    y = (x + torch.randint(-60, 60, x.shape)).clamp(0, 255)
    found = ssim(x / 127.5 - 1, y / 127.5 - 1)
    for i in range(2):
        expected = np.mean([by_scipy(x[i, c], y[i, c]) for c in range(3)])
        assert float(found[i]) == pytest.approx(expected, abs=1e-6)  # pictures are float32
    assert 0.3 < float(found[0]) < 0.95


def test_ssim_of_flat_pictures_has_a_closed_form() -> None:
    found = ssim(torch.full((1, 3, 16, 16), 0.5), torch.full((1, 3, 16, 16), -0.5))
    assert float(found) == pytest.approx((2 * 0.75 * 0.25 + 1e-4) / (0.75**2 + 0.25**2 + 1e-4), rel=1e-9)
    same = torch.rand(1, 3, 16, 16)
    assert float(ssim(same, same)) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("shape", [(1, 3, 16, 15), (1, 3, 10, 16)])
def test_ssim_of_other_sizes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"one size of at least 11x11, not"):
        ssim(torch.zeros(shape), torch.zeros(1, 3, 16, 16) if shape[2] == 16 else torch.zeros(shape))


def test_clip_score() -> None:
    image = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    text = torch.tensor([[3.0, 0.0], [0.0, -1.0], [1.0, 0.0]])
    torch.testing.assert_close(clip_score(image, text), torch.tensor([100, 0, 100 / 2**0.5]).double())
