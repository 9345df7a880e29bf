from __future__ import annotations

import torch
from PIL import Image

from sfumato.diffusion.sampling import NotFinite
from sfumato.training.preview import PreviewFiles


def test_a_grid_is_written_under_the_number_of_images(tmp_path):
    def draw():
        assert not torch.is_grad_enabled()
        return torch.stack([torch.full((3, 4, 4), v) for v in (-1.0, 1.0, 0.0)])

    path = PreviewFiles(tmp_path, draw, columns=2)(640)
    assert path == tmp_path / "previews" / "000000000640.png"
    with Image.open(path) as sheet:
        assert sheet.size == (10, 10)
        assert [sheet.getpixel(at) for at in ((0, 0), (9, 0), (0, 9))] == [(0,) * 3, (255,) * 3, (128,) * 3]


def test_pictures_that_are_not_finite_are_shown_black(tmp_path):
    path = PreviewFiles(tmp_path, lambda: torch.full((1, 3, 4, 4), torch.nan))(1)
    with Image.open(path) as sheet:
        assert sheet.getextrema() == ((0, 0),) * 3


def test_a_walk_that_cannot_be_finished_is_shown_black_and_ends_no_run(tmp_path):
    def draw():
        raise NotFinite("the sample is not finite after step 1 of 2")

    with Image.open(PreviewFiles(tmp_path, draw)(1)) as sheet:
        assert sheet.getextrema() == ((0, 0),) * 3


def test_a_sheet_carries_license_and_attribution(tmp_path):
    notice = {"Copyright": "by somebody"}
    path = PreviewFiles(tmp_path, lambda: torch.zeros(1, 3, 4, 4), notice=notice)(1)
    with Image.open(path) as image:
        assert image.text["Copyright"] == "by somebody"
