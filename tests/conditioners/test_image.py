from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sfumato.conditioners.image import Depth, Edit, Inpaint, LowRes, shrink_mask
from sfumato.core.random import Noise
from sfumato.core.types import Inputs
from sfumato.diffusion.schedules import Flow


def test_low_res_is_enlarged_and_never_dropped():
    picture = torch.linspace(-1, 1, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
    conditioner = LowRes(factor=2)
    cond = conditioner(Inputs(n=2, low_res=picture))
    assert cond.concat.shape == (2, 3, 8, 8)
    assert cond.aug is None
    # Each 2x2 block of a bilinear enlargement by 2 averages to nearly its pixel; constants are exact.
    torch.testing.assert_close(
        conditioner(Inputs(n=1, low_res=torch.full((1, 3, 4, 4), 0.25))).concat,
        torch.full((1, 3, 8, 8), 0.25),
    )
    assert conditioner.null(Inputs(n=2), cond) is cond


def test_augmentation_follows_the_seeds_and_is_told():
    inputs = Inputs(n=2, low_res=torch.zeros(2, 3, 4, 4))
    conditioner = LowRes(factor=2, schedule=Flow(multiplier=1000.0), aug=0.25)
    cond = conditioner(inputs, Noise([5, 6]))
    assert cond.aug.tolist() == [250, 250]
    assert 0.15 < float(cond.concat.std()) < 0.35  # sigma = 0.25 on a black picture
    again = conditioner(Inputs(n=1, low_res=torch.zeros(1, 3, 4, 4)), Noise([6]))
    assert torch.equal(again.concat[0], cond.concat[1])


def test_augmentation_without_noise_is_refused():
    with pytest.raises(ValueError, match=r"needs noise; pass Noise\(seeds\)"):
        LowRes(schedule=Flow(), aug=0.1)(Inputs(n=1, low_res=torch.zeros(1, 3, 4, 4)))


def test_no_low_res_picture():
    with pytest.raises(ValueError, match="run the stage before it or give low_res"):
        LowRes()(Inputs(n=1))


@pytest.mark.parametrize("mask_first", [True, False])
def test_inpaint_shows_the_known_part_and_the_mask(mask_first):
    image, mask = torch.ones(1, 3, 8, 8), torch.zeros(1, 1, 8, 8)
    mask[..., :3] = 1
    conditioner = Inpaint(encode=lambda x: torch.nn.functional.avg_pool2d(x, 2), mask_first=mask_first)
    concat = conditioner(Inputs(n=1, image=image, mask=mask)).concat
    assert concat.shape == (1, 4, 4, 4)
    shown, told = (concat[:, 1:], concat[:, :1]) if mask_first else (concat[:, :3], concat[:, 3:])
    assert told[0, 0, 0].tolist() == [1, 1, 0, 0]  # three pixels touch two cells
    assert shown[0, 0, 0].tolist() == [0, 0.5, 1, 1]


def test_inpaint_with_a_black_hole_and_a_signed_mask():
    image, mask = torch.full((1, 3, 4, 4), 0.5), torch.zeros(1, 1, 4, 4)
    mask[..., :1] = 1
    concat = Inpaint(encode=lambda x: x, mask_first=False, black=True)(
        Inputs(n=1, image=image, mask=mask)
    ).concat
    assert concat[0, 0, 0].tolist() == [-1, 0.5, 0.5, 0.5]
    assert concat[0, 3, 0].tolist() == [1, -1, -1, -1]


def test_inpaint_needs_both():
    with pytest.raises(ValueError, match="give an image and a mask"):
        Inpaint(encode=lambda x: x)(Inputs(n=1, image=torch.ones(1, 3, 8, 8)))


def test_a_cell_is_repainted_if_any_pixel_is():
    mask = torch.zeros(1, 1, 8, 8)
    mask[0, 0, 5, 2] = 1
    assert shrink_mask(mask, (4, 4)).nonzero().tolist() == [[0, 0, 2, 1]]


def test_depth_is_stretched_and_a_flat_one_is_zero():
    hint = torch.full((2, 1, 16, 16), 0.5)
    hint[0, :, :, 8:] = 0.75
    depth = Depth(factor=8)(Inputs(n=2, hint=hint)).concat
    assert depth.shape == (2, 1, 2, 2)
    torch.testing.assert_close(depth[0, 0], torch.tensor([[-1.0, 1.0], [-1.0, 1.0]]))
    assert depth[1].eq(0).all()
    with pytest.raises(ValueError, match="give a depth picture as hint"):
        Depth()(Inputs())


def test_an_edit_needs_a_picture():
    image = torch.ones(1, 3, 8, 8)
    cond = Edit(encode=lambda x: 2 * x)(Inputs(image=image))
    assert torch.equal(cond.concat, 2 * image)
    with pytest.raises(ValueError, match="edits a picture, and there is none; give an image"):
        Edit(encode=lambda x: x)(Inputs())


def test_the_noise_level_of_a_request_goes_before_the_usual_one():
    inputs = Inputs(n=1, low_res=torch.zeros(1, 3, 64, 64), aug=torch.tensor([0.75]))
    cond = LowRes(factor=1, schedule=Flow(), aug=0.25)(inputs, Noise([5]))
    assert cond.aug.tolist() == [0.75]
    assert float(cond.concat.std()) == pytest.approx(0.75, rel=0.05)
    with pytest.raises(ValueError, match="aug is 2; allowed: 0, "):
        LowRes(factor=1, schedule=Flow(), aug=0.25)(replace(inputs, aug=torch.tensor([2.0])), Noise([5]))
