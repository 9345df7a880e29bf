from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.checkpoints.native import Parts
from sfumato.conditioners.image import LowRes
from sfumato.core.types import Inputs
from sfumato.diffusion.schedules import Flow
from sfumato.systems.config import SystemConfig
from sfumato.systems.options import SampleOptions
from sfumato.systems.start import Continue, FromImage
from sfumato.systems.system import System, assemble, load_system, save_system

PROMPTS = ["red heart", "blue heart", "woman astronaut", ""]


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.int16)


def drawn(system: System, **inputs) -> torch.Tensor:
    seed = inputs.pop("seed", 0)
    return system.run(Inputs(**inputs), seed=seed).low_res


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_2m"])
def test_a_picture_is_the_same_alone_and_in_a_batch(tiny_system, sampler):
    options = {"base": replace(tiny_system.stages[0].defaults, sampler=sampler)}
    together = tiny_system.run(Inputs(n=4, text=PROMPTS), options, seed=5).low_res
    for i, prompt in enumerate(PROMPTS):
        alone = tiny_system.run(Inputs(n=1, text=[prompt]), options, seed=5 + i).low_res
        # Sums over another batch size are split differently: rounding of float32, amplified by guidance.
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-5)


def test_chunks_change_nothing(tiny_system):
    one, many = (tiny_system.generate(PROMPTS, seed=2, batch=b) for b in (1, 3))
    assert (
        max(np.abs(pixels(a) - pixels(b)).max() for a, b in zip(one, many, strict=True)) <= 1
    )  # uint8 rounding


def test_n_pictures_of_every_prompt(tiny_system):
    images = tiny_system.generate(["red heart", "blue heart"], n=2, seed=10)
    assert len(images) == 4
    same = tiny_system.generate("blue heart", seed=12)[0]
    assert np.abs(pixels(images[2]) - pixels(same)).max() <= 1
    assert np.abs(pixels(images[2]) - pixels(images[3])).max() > 5


def test_prompt_negative_and_guidance_matter(tiny_system):
    base = pixels(tiny_system.generate("red heart")[0])

    def apart(text="red heart", **request):
        return np.abs(base - pixels(tiny_system.generate(text, **request)[0])).max()

    assert apart() == 0
    assert apart(negative="") == 0
    assert apart("blue heart") > 5
    assert apart(negative="blue heart") > 5
    assert apart(guidance=1.0) > 5
    assert apart(steps=9) > 5
    assert apart(sampler="heun") > 5
    assert apart(seed=1) > 5


def test_without_guidance_the_negative_is_not_even_looked_at(tiny_system):
    a, b = (pixels(tiny_system.generate("red heart", guidance=1, negative=t)[0]) for t in ("", "blue"))
    assert np.array_equal(a, b)


def test_no_prompt_is_the_empty_prompt(tiny_system):
    assert np.array_equal(pixels(tiny_system.generate()[0]), pixels(tiny_system.generate("")[0]))


@pytest.mark.parametrize(("size", "shape"), [(24, (24, 24)), ((16, 32), (16, 32)), ((40, 8), (40, 8))])
def test_other_sizes(tiny_system, size, shape):
    image = tiny_system.generate("red heart", size=size)[0]
    assert (image.height, image.width) == shape


def test_two_windows_are_one_walk(tiny_system):
    config = tiny_system.config.stages[0]
    first = replace(
        config, name="first", emits="latent", defaults=replace(config.defaults, window=(0.0, 0.5))
    )
    second = replace(
        config, name="second", defaults=replace(config.defaults, window=(0.5, 1.0), start=Continue())
    )
    split = assemble(SystemConfig(stages=(first, second)), tiny_system.parts)
    whole = drawn(tiny_system, n=2, text=PROMPTS[:2])
    # The modulations of a walk are computed in one batch, whose float32 sums depend on its length.
    torch.testing.assert_close(drawn(split, n=2, text=PROMPTS[:2]), whole, rtol=0, atol=5e-6)


def test_a_cascade_and_its_parts(attractor_stage):
    base = attractor_stage("base", side=4)
    up = attractor_stage("up", side=8, conditioner=LowRes(factor=2, schedule=Flow(), aug=0.1))
    system = System((base, up), SystemConfig.__new__(SystemConfig), Parts())
    whole = system.run(Inputs(n=2), seed=3)
    assert whole.low_res.shape == (2, 3, 8, 8)
    small = system.run(Inputs(n=2), only=["base"], seed=3)
    assert small.low_res.shape == (2, 3, 4, 4)
    enlarged = system.run(Inputs(n=2, low_res=small.low_res), only=["up"], seed=3)
    # The second stage draws the same noise whether or not the first one ran.
    assert torch.equal(enlarged.low_res, whole.low_res)
    wide = system.run(Inputs(size=(8, 16)), seed=3)
    assert wide.low_res.shape == (1, 3, 8, 16)
    assert wide.size == (8, 16)


def test_img2img_at_full_strength_on_flow_is_text_to_image(tiny_system):
    image = Image.new("RGB", (16, 16), "red")
    a = tiny_system.generate("red heart", image=image, strength=1.0)[0]
    assert np.array_equal(pixels(a), pixels(tiny_system.generate("red heart")[0]))


def test_img2img_keeps_more_the_weaker_it_is(tiny_system):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
    goal = pixels(tiny_system.reconstruct(image))
    distances = []
    for strength in (0.02, 0.5, 1.0):
        out = tiny_system.generate("red heart", image=image, strength=strength, steps=20)[0]
        distances.append(np.abs(pixels(out) - goal).mean())
    assert distances == sorted(distances)
    assert distances[0] < 0.3 * distances[2]


@pytest.mark.parametrize("start", [FromImage(), FromImage(jump_length=1, resamples=2)])
def test_inpainting_changes_the_mask_and_nothing_else(tiny_system, start):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (0, 0, 7, 16))
    out = tiny_system.generate("red heart", image=image, mask=mask, start=start, n=2)
    for made in out:
        apart = np.abs(pixels(made) - pixels(image)).max(-1)
        assert apart[:, 7:].max() == 0
        assert (apart[:, :7] > 0).mean() > 0.9
    assert np.abs(pixels(out[0]) - pixels(out[1])).max() > 5


def test_pictures_to_edit_are_fitted(tiny_system):
    photo = Image.new("RGB", (50, 30), "green")
    assert tiny_system.generate("x", image=photo, strength=0.5)[0].size == (16, 16)
    assert tiny_system.generate("x", image=photo, strength=0.5, size=(8, 24))[0].size == (24, 8)
    tensor = torch.zeros(3, 30, 50)
    assert tiny_system.generate("x", image=tensor, strength=0.5)[0].size == (16, 16)


def test_reconstruct_keeps_the_size_or_takes_another(tiny_system):
    image = Image.new("RGB", (31, 18), "green")
    assert tiny_system.reconstruct(image).size == (30, 18)
    assert tiny_system.reconstruct(image, size=(8, 12)).size == (12, 8)
    with pytest.raises(ValueError, match="size 9x9: both sides must be positive multiples of 2"):
        tiny_system.reconstruct(image, size=9)


def test_system_size_does_not_leak_between_requests(tiny_system):
    tiny_system.generate("x", size=24)
    assert tiny_system.generate("x")[0].size == (16, 16)


@pytest.mark.parametrize(
    ("text", "request_", "said"),
    [
        ([], {}, "the list of prompts is empty; give at least one"),
        ("x", {"n": 0}, "n is 0; allowed: a whole number of at least 1"),
        ("x", {"batch": 0}, "batch is 0"),
        ("x", {"steps": 0}, "steps is 0"),
        ("x", {"sampler": "eular"}, r"unknown sampler 'eular'; did you mean 'euler'\?"),
        ("x", {"guidence": 3}, r"unknown option 'guidence'; did you mean 'guidance'\?"),
        ("x", {"size": 18}, r"size 18x18: 18 is not allowed; allowed: multiples of 4, try 16 or 20"),
        ("x", {"seed": -1}, "seed is -1; allowed: a whole number from 0"),
        ("x", {"seed": 1.5}, r"seed is 1\.5"),
        (["a", "b"], {"negative": ["c"]}, "negative has 1 texts for 2 prompts"),
        ("x", {"only": ["up"]}, "unknown stage 'up'; allowed: base"),
        ("x", {"options": {"bse": SampleOptions()}}, r"unknown stage 'bse'; did you mean 'base'\?"),
        ("x", {"guidance": float("nan")}, "guidance scale nan is not a finite number"),
        ("x", {"spacing": "leading"}, "spacing 'leading' needs a discrete schedule"),
        ("x", {"only": []}, "make no picture"),
    ],
)
def test_wrong_requests_are_named(tiny_system, text, request_, said):
    with pytest.raises(ValueError, match=said) as error:
        tiny_system.generate(text, **request_)
    assert "\n" not in str(error.value)


def test_seeds_and_pictures_agree_in_number(tiny_system):
    with pytest.raises(ValueError, match="3 seeds for 2 pictures"):
        tiny_system.run(Inputs(n=2), seed=[1, 2, 3])


def test_half_precision_draws_nearly_the_same(tiny_system, tmp_path):
    save_system(tiny_system, tmp_path / "half", dtype=torch.float16)
    whole = drawn(tiny_system, n=1, text=["red heart"])
    stored = load_system(tmp_path / "half")
    # 11 bits of mantissa in weights of order 0.1 through four steps.
    torch.testing.assert_close(drawn(stored, n=1, text=["red heart"]), whole, rtol=0, atol=0.05)
    computed = load_system(tmp_path / "half", dtype=torch.bfloat16)
    assert computed.parts.nets["denoiser"].out.weight.dtype == torch.bfloat16
    image = drawn(computed, n=1, text=["red heart"])
    assert image.dtype == torch.float32
    assert float((image - whole).abs().mean()) < 0.1  # 8 bits of mantissa


def test_a_saved_system_draws_the_same(tiny_system, tiny_folder):
    loaded = load_system(tiny_folder)
    assert loaded.config == tiny_system.config
    assert loaded.about == tiny_system.about
    assert len(loaded.fingerprint) == 16
    # Convolutions with the channels last sum in another order than those in memory.
    mine, theirs = (drawn(s, n=1, text=["red heart"]) for s in (tiny_system, loaded))
    torch.testing.assert_close(theirs, mine, rtol=0, atol=1e-5)
    assert torch.equal(drawn(load_system(tiny_folder), n=1, text=["red heart"]), theirs)
