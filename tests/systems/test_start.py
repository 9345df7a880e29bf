from __future__ import annotations

import pytest
import torch

from sfumato.core.random import Noise
from sfumato.core.types import Denoised, Inputs
from sfumato.diffusion.sampling import SAMPLERS, Run, integrate
from sfumato.diffusion.schedules import VE, Discrete, Flow
from sfumato.diffusion.spacings import karras, linspace
from sfumato.systems.codec import Pixels
from sfumato.systems.options import SampleOptions
from sfumato.systems.start import Continue, FromImage, FromNoise, Inverted, Place, fitted


def place(schedule=None, steps=10, like=(1, 3, 8, 8)):
    schedule = schedule or Flow()
    spacing = karras if isinstance(schedule, VE) else linspace
    return Place(torch.zeros(like), spacing(schedule, steps), Pixels(), Noise([7]))


def test_noise_of_the_seeds():
    x = FromNoise().begin(Inputs(), place()).x
    assert torch.equal(x, Noise([7])(x))
    warm = FromNoise(temperature=0.5).begin(Inputs(), place()).x
    torch.testing.assert_close(warm, 0.5 * x)


def test_noise_on_the_scale_of_the_first_level():
    x = FromNoise(scale="sigma").begin(Inputs(), place(VE(sigma_max=80.0))).x
    torch.testing.assert_close(x, 80 * Noise([7])(x))


@pytest.mark.parametrize("strength", [1.0, 0.5, 0.25])
def test_image_is_noised_to_the_strength(strength):
    image = torch.full((1, 3, 8, 8), 0.5)
    grid = SampleOptions(steps=10).grid(Flow(), strength)
    there = Place(torch.zeros(1, 3, 8, 8), grid, Pixels(), Noise([7]))
    beginning = FromImage().begin(Inputs(image=image), there)
    assert beginning.project is None
    level = beginning.grid.points[0]
    assert level.sigma == pytest.approx(strength)
    expected = level.alpha * image + level.sigma * Noise([7])(image)
    torch.testing.assert_close(beginning.x, expected)


@pytest.mark.parametrize(
    ("spacing", "steps", "strength", "done"),
    [
        ("trailing", 10, 0.75, 10),
        ("leading", 20, 0.3, 20),
        ("leading", 50, 0.02, 10),
        ("linspace", 7, 1.0, 7),
    ],
)
def test_steps_done_are_steps_asked(spacing, steps, strength, done):
    """As long as a table has levels to do them at."""
    options = SampleOptions(steps=steps, spacing=spacing)
    schedule = Discrete(formula="scaled_linear")
    grid = options.grid(schedule, strength)
    assert len(grid) == done
    assert float(grid.t[0]) == pytest.approx(1000 * strength, abs=1000 / steps)


def test_image_is_fitted_to_the_sample():
    beginning = FromImage().begin(Inputs(image=torch.zeros(1, 3, 20, 12), strength=0.5), place())
    assert beginning.x.shape == (1, 3, 8, 8)
    assert fitted(beginning.x, (8, 8)) is beginning.x


def test_mask_puts_back_what_is_known():
    image, mask = torch.full((1, 3, 8, 8), 0.5), torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    beginning = FromImage().begin(Inputs(image=image, mask=mask), place())
    last = len(beginning.grid)
    x = beginning.project(torch.zeros(1, 3, 8, 8), last)
    assert x[..., :4].eq(0).all()
    assert x[..., 4:].eq(0.5).all()
    assert beginning.project(torch.zeros(1, 3, 8, 8), 2)[..., 4:].std() > 0.1  # noise of that level


def test_repaint_walks_back_and_forth():
    inputs = Inputs(image=torch.zeros(1, 3, 8, 8), mask=torch.ones(1, 1, 8, 8))
    plain = FromImage().begin(inputs, place()).grid
    jumping = FromImage(jump_length=2, resamples=3).begin(inputs, place()).grid
    assert not plain.jumps
    assert jumping.jumps
    assert len(jumping) > len(plain)


@pytest.mark.parametrize("strength", [0.0, -1.0, 1.5])
def test_strength_outside_its_range(strength):
    with pytest.raises(ValueError, match=r"strength .* is outside \(0, 1\]"):
        SampleOptions().grid(Flow(), strength)


def test_a_start_needs_its_input():
    with pytest.raises(ValueError, match="give an image, or start from noise"):
        FromImage().begin(Inputs(), place())
    with pytest.raises(ValueError, match="there is no latent"):
        Continue().begin(Inputs(), place())
    with pytest.raises(ValueError, match=r"has shape \(1, 3, 4, 4\), this stage works on \(1, 3, 8, 8\)"):
        Continue().begin(Inputs(latent=torch.zeros(1, 3, 4, 4)), place())


def gaussian(x, level):
    """The exact denoiser of data N(0.3, 0.5^2), and a little curved, so that no step is linear."""
    alpha, sigma = float(level.alpha), float(level.sigma)
    x0 = 0.3 + alpha * 0.25 / (alpha**2 * 0.25 + sigma**2) * (x - 0.3 * alpha)
    x0 = x0 + 0.1 * torch.tanh(x0)
    return Denoised(x0, (x - alpha * x0) / sigma)


@pytest.mark.parametrize("schedule", [Flow(), Discrete(formula="scaled_linear")])
def test_what_was_inverted_is_drawn_again(schedule):
    """The more rounds, the nearer; one is the usual inversion."""
    image = torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)
    grid = SampleOptions(steps=10).grid(schedule)
    sources = []

    def told(inputs):
        sources.append(inputs.text)
        return gaussian

    there = Place(torch.zeros(1, 3, 8, 8), grid, Pixels(), Noise([7]), told)
    errors = []
    for rounds in (1, 3, 20):
        start = Inverted("a ramp", rounds).begin(Inputs(image=image, text=["else"]), there)
        again = integrate(SAMPLERS["ddim"], Run(gaussian, start.grid, Noise([7])), start.x)
        errors.append(float((again - image).abs().max()))
    assert sources == [["a ramp"]] * 3
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[2] < 1e-4
    with pytest.raises(ValueError, match="rounds is 0; allowed: at least 1"):
        Inverted(rounds=0).begin(Inputs(image=image), there)


def test_continue_goes_on_with_the_latent():
    latent = torch.randn(1, 3, 8, 8)
    assert torch.equal(Continue().begin(Inputs(latent=latent), place()).x, latent)
