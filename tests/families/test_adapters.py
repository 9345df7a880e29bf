"""What is put on top of Stable Diffusion: ControlNets, LoRA files, learned words, against diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import pre_tokenizers

import sfumato
from sfumato.core.image import from_pil, to_float
from sfumato.core.types import Inputs
from sfumato.nets.controlnet import ControlUse
from sfumato.systems.controlling import controlled

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

MERGES = ["r e", "re d</w>", "h e", "a r", "he ar", "hear t</w>"]
TEXTS, NEGATIVES, SEEDS, STEPS = ["red heart", "a heart, blue"], ["dull", "red"], [3, 4], 10


def randomized(net: torch.nn.Module, seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.1, generator=generator)
    return net.eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder of tiny random nets."""
    path = tmp_path_factory.mktemp("base")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{c}</w>" for c in alphabet), *(m.replace(" ", "") for m in MERGES)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), "utf-8")
    (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n", "utf-8")
    files = str(path / "vocab.json"), str(path / "merges.txt")
    words = transformers.CLIPTokenizer(*files, pad_token="<|endoftext|>", model_max_length=77)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
    )
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            eos_token_id=2,
        )
    )
    diffusers.StableDiffusionPipeline(
        vae=randomized(vae, 0),
        text_encoder=randomized(text, 1),
        tokenizer=words,
        unet=randomized(unet, 2),
        scheduler=diffusers.DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            clip_sample=False,
            set_alpha_to_one=False,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(path / "p")
    return path / "p"


@pytest.fixture(scope="module")
def controls(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three ControlNets for it; the last one pools."""
    paths = []
    for i in range(3):
        net = diffusers.ControlNetModel(
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=4,
            conditioning_embedding_out_channels=(8, 12),
            global_pool_conditions=i == 2,
        )
        paths.append(tmp_path_factory.mktemp("control") / "net")
        randomized(net, 5 + i).save_pretrained(paths[-1])
    return paths


def theirs(pipe: Any, **options: Any) -> torch.Tensor:
    """What a pipeline of diffusers draws, (B, 3, H, W) in [0, 1]."""
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    options = {"num_inference_steps": STEPS, "guidance_scale": 7.5, "output_type": "pt"} | options
    return pipe(TEXTS, negative_prompt=NEGATIVES, generator=generators, **options).images


def ours(system: sfumato.System, texts: list[str] = TEXTS, **inputs: Any) -> torch.Tensor:
    given = Inputs(n=2, text=texts, negative=NEGATIVES, size=(16, 16), **inputs)
    return (system.run(given, system.resolve(steps=STEPS), seed=SEEDS).low_res + 1) / 2


def hints(count: int) -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 255, (16, 16, 3), np.uint8)) for _ in range(count)]


USES: dict[str, tuple[tuple[int, ControlUse], ...]] = {
    "part of the walk": ((0, ControlUse(scale=0.7, start=0.2, stop=0.7)),),
    "guess": ((0, ControlUse(scale=0.5, guess=True)),),
    "pooled": ((2, ControlUse()),),
    "two": ((0, ControlUse(scale=0.6, stop=0.5)), (1, ControlUse(scale=0.2))),
}


@pytest.mark.parametrize("name", sorted(USES))
def test_controlled_pictures_are_the_same(name: str, base: Path, controls: list[Path]) -> None:
    chosen, uses = zip(*USES[name], strict=True)
    nets = [diffusers.ControlNetModel.from_pretrained(controls[i]) for i in chosen]
    pictures = hints(len(uses))
    pipe = diffusers.StableDiffusionControlNetPipeline.from_pretrained(base, controlnet=nets)
    expected = theirs(
        pipe,
        image=[[picture] * 2 for picture in pictures],
        controlnet_conditioning_scale=[u.scale for u in uses],
        control_guidance_start=[u.start for u in uses],
        control_guidance_end=[u.stop for u in uses],
        guess_mode=uses[0].guess,
        height=16,
        width=16,
    )
    system = plain = sfumato.load(base)
    for i, use in zip(chosen, uses, strict=True):
        system = controlled(system, controls[i], use)
    # 20 guided steps amplify the rounding of float32.
    hint = torch.cat([to_float(from_pil(picture)) for picture in pictures])[None].expand(2, -1, -1, -1)
    drawn = ours(system, hint=hint)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-3)
    assert (drawn - ours(plain)).abs().max() > 0.01
    assert system.fingerprint != plain.fingerprint


def test_a_controlled_system_is_kept_and_drawn_from_pictures(
    base: Path, controls: list[Path], tmp_path: Path
) -> None:
    system = controlled(sfumato.load(base), controls[0], ControlUse(scale=0.5))
    (picture,) = hints(1)
    first = system.generate("red", hint=picture, size=16, steps=2)[0]
    assert first.tobytes() != system.generate("red", hint=hints(2)[1], size=16, steps=2)[0].tobytes()
    sfumato.save(system, tmp_path / "kept")
    again = sfumato.load(tmp_path / "kept")
    assert again.generate("red", hint=[picture], size=16, steps=2)[0].tobytes() == first.tobytes()
    with pytest.raises(ValueError, match="1 ControlNets read a picture each, and there is none; give a hint"):
        system.generate("red", size=16, steps=2)
    with pytest.raises(ValueError, match="1 ControlNets read pictures of 3 channels .* a hint of 6 channels"):
        system.generate("red", hint=hints(2), size=16, steps=2)


def test_what_does_not_fit_is_not_controlled(base: Path, controls: list[Path], tmp_path: Path) -> None:
    system = sfumato.load(base)
    other = diffusers.ControlNetModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=4,
        conditioning_embedding_out_channels=(8, 12),
    )
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="for another base: for a U-Net with tokens of width 24, and .* 32"):
        controlled(system, tmp_path / "other")
    with pytest.raises(ValueError, match="unet holds UNet, not one ControlNet"):
        controlled(system, base / "unet")
    with pytest.raises(ValueError, match="control from 0.5 to 0.5 of the walk; allowed: 0 <= start < stop"):
        ControlUse(start=0.5, stop=0.5)
