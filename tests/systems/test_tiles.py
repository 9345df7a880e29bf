from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from sfumato.conditioners.image import LowRes
from sfumato.core.random import Noise
from sfumato.core.types import Inputs
from sfumato.nets.autoencoder import Autoencoder, AutoencoderConfig
from sfumato.systems.codec import Latents
from sfumato.systems.options import SampleOptions
from sfumato.systems.tiles import decoding_bytes, starts, tiled


@pytest.mark.parametrize(("height", "width", "tile", "overlap"), [(9, 14, 6, 2), (5, 7, 8, 2), (16, 6, 6, 0)])
def test_what_sees_one_cell_is_the_same_in_tiles(height, width, tile, overlap):
    x = torch.arange(2 * 3 * height * width).float().reshape(2, 3, height, width)

    whole = F.interpolate(x, scale_factor=2.0, mode="nearest")

    def enlarged(part):
        assert max(part.shape[-2:]) <= tile
        return F.interpolate(part, scale_factor=2.0, mode="nearest")

    torch.testing.assert_close(tiled(enlarged, x, tile, overlap, 2), whole)


def test_a_seam_is_a_ramp():
    """Two tiles that disagree by 1 go over into each other in equal steps."""
    value = iter((0.0, 1.0))
    row = tiled(lambda part: torch.full_like(part, next(value)), torch.zeros(1, 1, 1, 8), 5, 2, 1)[0, 0, 0]
    torch.testing.assert_close(row, torch.tensor([0, 0, 0, 1 / 3, 2 / 3, 1, 1, 1]))


def test_tiles_cover_with_their_overlap():
    for length in range(6, 40):
        places = starts(length, 6, 2)
        assert places[0] == 0
        assert places[-1] == length - 6
        assert all(1 <= b - a <= 4 for a, b in pairwise(places))
    with pytest.raises(ValueError, match=r"tiles of 4 cannot overlap by 4; allowed: 0 to 3"):
        tiled(lambda x: x, torch.zeros(1, 1, 8, 8), 4, 4, 1)


def test_a_picture_is_decoded_in_tiles(attractor_stage):
    torch.manual_seed(0)
    config = AutoencoderConfig(
        channels=8, mults=(1, 2), blocks=1, z_channels=3, embed_dim=3, norm_groups=4, mid_attention=False
    )
    codec = Latents(Autoencoder(config))
    stage = attractor_stage(codec=codec, side=32)

    def drawn(tile):
        options = SampleOptions(sampler="euler", steps=2, tile=tile)
        return stage.run(Inputs(), options, Noise([0])).low_res

    latent = torch.full((1, 3, 32, 32), 0.25)  # where every walk of this stage ends
    with torch.no_grad():
        whole, parts = codec.decode(latent).clamp(-1, 1), tiled(codec.decode, latent, 16, 4, 2).clamp(-1, 1)
    torch.testing.assert_close(drawn(None), whole, rtol=0, atol=1e-4)
    torch.testing.assert_close(drawn(32), parts, rtol=0, atol=1e-4)
    assert float((whole - parts).abs().max()) > 0.1  # a group norm sees another picture in a tile


def test_a_picture_is_enlarged_in_tiles_with_noise_of_their_own(attractor_stage):
    stage = attractor_stage(side=16, conditioner=LowRes(factor=2))
    low = torch.zeros(1, 3, 12, 20)
    low[..., 10:] = 0.5
    options = SampleOptions(sampler="euler", steps=2, tile=16)
    done = stage.run(Inputs(low_res=low, size=(24, 40)), options, Noise([0]))
    assert done.low_res.shape == (1, 3, 24, 40)
    assert stage.denoiser.net.evaluations == 2 * 2 * 3
    # The net paints the mean of what it is told of: 0.25 on the left, 0.75 on the right, rising between.
    row = done.low_res[0, 0, 5]
    torch.testing.assert_close(row[:4], torch.full((4,), 0.25))
    torch.testing.assert_close(row[-4:], torch.full((4,), 0.75))
    assert (row.diff() >= -1e-6).all()


def test_memory_grows_with_the_picture():
    """The measured figures of the docstring, in GB."""
    config = AutoencoderConfig()
    for side, measured in ((256, 0.355), (320, 0.450), (448, 0.761)):
        assert decoding_bytes(config, (side, side)) / 1e9 == pytest.approx(measured, rel=0.06)
