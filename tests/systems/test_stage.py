from __future__ import annotations

import pytest
import torch

from sfumato.conditioners.image import LowRes
from sfumato.core.random import Noise
from sfumato.core.types import Inputs
from sfumato.diffusion.constraints import Static
from sfumato.diffusion.sampling import SAMPLERS, Cancelled
from sfumato.systems.codec import Embeddings
from sfumato.systems.options import SampleOptions
from sfumato.systems.stage import Progress


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"lcm"}))  # that one is for indices of a table
def test_every_sampler_reaches_the_data(attractor_stage, name):
    stage = attractor_stage()
    options = SampleOptions(sampler=name, steps=8)
    image = stage.run(Inputs(n=2), options, Noise([0, 1])).low_res
    # The data is one constant and the net exact, so every solver ends on it, up to rounding in float32.
    torch.testing.assert_close(image, torch.full((2, 3, 8, 8), 0.25), rtol=0, atol=1e-4)


def test_pictures_stay_in_range(attractor_stage):
    image = attractor_stage(level=3.0).run(Inputs(), SampleOptions(steps=2), Noise([0])).low_res
    assert image.eq(1).all()


def test_threshold_bounds_x0(attractor_stage):
    seen = []
    options = SampleOptions(steps=3, threshold=Static(0.1))
    attractor_stage(emits="latent").run(
        Inputs(), options, Noise([0]), lambda p: seen.append(p.denoised.x0.max())
    )
    assert max(seen) <= 0.1


def test_what_a_stage_emits(attractor_stage):
    run = dict(options=SampleOptions(steps=2), noise=Noise([0]))
    latent = attractor_stage(emits="latent").run(Inputs(), **run)
    assert latent.latent.shape == (1, 3, 8, 8)
    assert latent.low_res is None
    codec = Embeddings(mean=(1.0,), std=(2.0,))
    embedding = attractor_stage(emits="image_embed", codec=codec).run(Inputs(), **run)
    torch.testing.assert_close(embedding.image_embed, torch.full((1, 3, 8, 8), 1.5), rtol=0, atol=1e-4)


def test_conditioning_pictures_are_told_to_the_net(attractor_stage):
    stage = attractor_stage("up", conditioner=LowRes(factor=2))
    low = torch.stack([torch.full((3, 4, 4), v) for v in (-0.5, 0.5)])
    image = stage.run(Inputs(n=2, low_res=low), SampleOptions(steps=3), Noise([0, 1])).low_res
    assert image.mean((1, 2, 3)).tolist() == pytest.approx([-0.25, 0.75], abs=1e-4)


def test_observe_sees_every_step(attractor_stage):
    seen: list[Progress] = []
    stage = attractor_stage()
    stage.run(Inputs(n=2), SampleOptions(steps=5), Noise([0, 1]), seen.append)
    assert [(p.step, p.steps) for p in seen] == [(i, 5) for i in range(1, 6)]
    assert seen[0].stage is stage
    assert seen[0].x.shape == seen[0].denoised.x0.shape == (2, 3, 8, 8)


def test_cancelled_stops_the_walk(attractor_stage):
    stage = attractor_stage()

    def stop(progress):
        if progress.step == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        stage.run(Inputs(), SampleOptions(sampler="euler", steps=9), Noise([0]), stop)
    assert stage.denoiser.net.evaluations == 2


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((18, 16), r"size 16x18: 18 is not allowed; allowed: multiples of 4, try 16 or 20"),
        ((16, 2), r"size 2x16: 2 is not allowed; allowed: multiples of 4, try 4"),
        ((0, 16), "0 is not allowed"),
        ((-4, 16), "-4 is not allowed"),
    ],
)
def test_sizes_that_do_not_fit(tiny_system, size, said):
    with pytest.raises(ValueError, match=said):
        tiny_system.stages[0].shape_for(size)


def test_sizes_that_fit(tiny_system):
    stage = tiny_system.stages[0]
    assert stage.factor == 4  # codec 2, patch 2
    assert stage.pixels == (16, 16)
    assert stage.shape_for((24, 32)) == (4, 12, 16)
    assert stage.shape_for(None) == (4, 8, 8)
