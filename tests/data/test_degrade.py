"""Damaged small pictures: their size, their seeds, and what each kind does to a picture."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sfumato.data.degrade import DegradeConfig, degraded


@pytest.mark.parametrize("kind", ["area", "blur", "bsr"])
def test_a_picture_depends_on_its_seed_alone(kind):
    torch.manual_seed(0)
    pictures = torch.rand(3, 3, 16, 24) * 2 - 1
    config = DegradeConfig(factor=2, kind=kind)
    small = degraded(pictures, config, [5, 6, 7])
    assert small.shape == (3, 3, 8, 12)
    assert float(small.abs().max()) <= 1
    assert torch.equal(degraded(pictures[1:2], config, [6]), small[1:2])
    assert torch.equal(degraded(pictures[1:2], config, [9]), small[1:2]) is (kind != "bsr")


def test_the_blur_is_gaussian_over_three_pixels():
    spot = torch.zeros(1, 3, 18, 18)
    spot[..., 8:10, 8:10] = 1.0
    small = degraded(spot, DegradeConfig(factor=2, kind="blur"), [0])[0, 0]
    line = torch.exp(-torch.tensor([-1.0, 0.0, 1.0]).square() / (2 * 0.6**2))
    expected = F.pad(torch.outer(line, line) / line.sum() ** 2, (3, 3, 3, 3))
    torch.testing.assert_close(small, expected)


def test_bsr_loses_fine_detail_and_keeps_the_mean():
    torch.manual_seed(0)
    coarse = F.interpolate(torch.rand(8, 3, 4, 4) - 0.5, (32, 32), mode="bicubic")
    fine = coarse + 0.3 * torch.randn(8, 3, 32, 32)
    small, plain = (degraded(fine, DegradeConfig(kind=k), range(8)) for k in ("bsr", "area"))
    wanted = F.avg_pool2d(coarse, 2)
    assert float((small - wanted).std()) < 0.9 * float((plain - wanted).std())
    assert float((small - wanted).mean().abs()) < 0.02


def test_a_crop_that_does_not_fit_the_factor_is_refused():
    with pytest.raises(ValueError, match="crop a multiple of it"):
        DegradeConfig(factor=4, crop=6)
