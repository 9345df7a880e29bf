"""Pipelines of DeepFloyd IF: the pictures of diffusers, both stages as one cascade, original files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import sfumato
from sfumato.core.random import Noise
from sfumato.core.types import Inputs
from sfumato.diffusion.constraints import Dynamic

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

WORDS = ["red", "heart", "blue", "a", "dull", "\u2581", ",", *"abcdehlrtu"]
TEXTS, NEGATIVES, SEEDS = ["Red heart", "a heart, blue"], ["dull", "red"], [3, 4]
UNET = {
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": (32, 128),
    "layers_per_block": 1,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "cross_attention_dim": 32,
    "encoder_hid_dim": 16,
    "attention_head_dim": 16,
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 2,
    "cross_attention_norm": "group_norm",
    "resnet_time_scale_shift": "scale_shift",
    "act_fn": "gelu",
}
SECOND = {
    "in_channels": 6,
    "sample_size": 32,
    "class_embed_type": "timestep",
    "time_embedding_act_fn": "gelu",
    "resnet_skip_time_act": True,
    "resnet_out_scale_factor": 1 / 0.7071,
    "mid_block_scale_factor": 1 / 0.7071,
}
STAGES = {
    "first": (UNET | {"sample_size": 8}, 1.5),
    "second": (UNET | SECOND, 1.0),
    "second, tokens alone": (UNET | SECOND | {"only_cross_attention": True}, 1.0),
}


def tokenizer() -> transformers.T5Tokenizer:
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0)]
    words = {word: -float(i + 2) for i, word in enumerate(WORDS)}
    words |= {f"\u2581{word}": -1.0 - i / 9 for i, word in enumerate(WORDS[:5])}
    return transformers.T5Tokenizer(vocab=[*specials, *words.items()], extra_ids=0, model_max_length=512)


def randomized(net: torch.nn.Module) -> torch.nn.Module:
    for p in net.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.1)
    return net.eval()


def pipeline(path: Path, name: str, *, text: bool = True) -> Path:
    """A whole pipeline of tiny random nets as diffusers writes it; pad tokens have states of their own."""
    options, most = STAGES[name]
    words = tokenizer()
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(vocab_size=len(words), feed_forward_proj="gated-gelu", **shape)
    torch.manual_seed(1)
    encoder = randomized(transformers.T5EncoderModel(config))
    parts = {
        "tokenizer": words if text else None,
        "text_encoder": encoder if text else None,
        "unet": randomized(diffusers.UNet2DConditionModel(**options)),
        "scheduler": diffusers.DDPMScheduler(
            beta_schedule="squaredcos_cap_v2",
            variance_type="learned_range",
            thresholding=True,
            dynamic_thresholding_ratio=0.95,
            sample_max_value=most,
        ),
    }
    none = dict.fromkeys(("safety_checker", "feature_extractor", "watermarker"))
    if name == "first":
        pipe = diffusers.IFPipeline(**parts, **none, requires_safety_checker=False)
    else:
        noising = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
        pipe = diffusers.IFSuperResolutionPipeline(
            **parts, image_noising_scheduler=noising, **none, requires_safety_checker=False
        )
    pipe.save_pretrained(path)
    return path


def drawn(path: Path, monkeypatch, **options) -> torch.Tensor:
    """What diffusers draws in [-1, 1] with the noise of our seeds, (B, 3, H, W)."""
    second = "image" in options
    pipe = (diffusers.IFSuperResolutionPipeline if second else diffusers.IFPipeline).from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    noise, calls = Noise(SEEDS), []
    augmenting = noise.fork("upsampler/conditioning")

    def draw(shape, **_):
        calls.append(shape)
        stream = augmenting if second and len(calls) == 2 else noise
        return stream(torch.empty(shape))

    for module in (type(pipe).__module__, "diffusers.schedulers.scheduling_ddpm"):
        monkeypatch.setattr(f"{module}.randn_tensor", draw)
    return pipe(TEXTS, negative_prompt=NEGATIVES, output_type="pt", **options).images


ASKED = Inputs(n=2, text=TEXTS, negative=NEGATIVES)


def test_the_first_stage_draws_the_same_pictures(tmp_path, monkeypatch):
    path = pipeline(tmp_path, "first")
    system = sfumato.load(path)
    (stage,) = system.stages
    assert stage.defaults.threshold == Dynamic(0.95, 1.5)
    assert (stage.name, stage.defaults.steps, stage.defaults.guidance.scale) == ("base", 100, 7.0)
    wanted = drawn(path, monkeypatch, num_inference_steps=20)
    assert wanted.std() > 0.1
    made = system.run(ASKED, system.resolve(steps=20), seed=SEEDS).low_res
    # 20 guided steps amplify the rounding of float32.
    torch.testing.assert_close(made, wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["second", "second, tokens alone"])
@pytest.mark.parametrize("level", [0, 250, 999])
def test_the_second_stage_draws_the_same_pictures(name, level, tmp_path, monkeypatch):
    path = pipeline(tmp_path, name)
    system = sfumato.load(path)
    small = torch.rand(2, 3, 8, 8) * 2 - 1
    wanted = drawn(path, monkeypatch, image=small, num_inference_steps=10, noise_level=level)
    assert wanted.std() > 0.1
    asked = replace(ASKED, low_res=small)
    if level != system.config.stages[0].conditioners[1].aug:
        asked = replace(asked, aug=torch.full((2,), level / 1000 if level < 999 else 1.0))
    made = system.run(asked, system.resolve(steps=10), seed=SEEDS).low_res
    torch.testing.assert_close(made, wanted, rtol=0, atol=1e-3)


def test_both_stages_are_one_cascade(tmp_path):
    """Stage by stage or at once, read by turns or held; the second without a text encoder of its own."""
    first = pipeline(tmp_path / "I", "first")
    second = pipeline(tmp_path / "II", "second", text=False)
    with pytest.raises(ValueError, match="IF reads texts with T5, and its encoder or tokenizer is missing"):
        sfumato.load(second)
    base = sfumato.load(first)
    up = sfumato.load(second, text=base)
    assert up.parts.nets["text_encoder"] is base.parts.nets["text_encoder"]
    both = sfumato.cascade(base, up)
    assert sorted(both.parts.nets) == ["net", "net-2", "text_encoder"]
    options = both.resolve(steps=3)
    made = both.run(ASKED, options, seed=SEEDS)
    assert made.low_res.shape == (2, 3, 32, 32)
    by_turns = sfumato.cascade(first, second, text=first)
    assert torch.equal(by_turns.run(ASKED, options, seed=SEEDS).low_res, made.low_res)
    small = both.run(ASKED, options, only=["base"], seed=SEEDS).low_res
    later = both.run(replace(ASKED, low_res=small), options, only=["upsampler"], seed=SEEDS)
    assert torch.equal(later.low_res, made.low_res)
    sfumato.save(both, tmp_path / "native")
    again = sfumato.load(tmp_path / "native").run(ASKED, options, seed=SEEDS)
    torch.testing.assert_close(again.low_res, made.low_res, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="'base' cannot follow 'upsampler': it reads no picture"):
        sfumato.cascade(up, base)


def test_only_the_upsampler_on_a_picture(tmp_path):
    both = sfumato.cascade(
        sfumato.load(pipeline(tmp_path / "I", "first")), sfumato.load(pipeline(tmp_path / "II", "second"))
    )
    wide = Image.new("RGB", (12, 8), "red")
    (made,) = both.generate("red heart", low_res=wide, steps=2)
    assert made.size == (48, 32)
    (square,) = both.generate("red heart", low_res=wide, size=32, steps=2)
    assert square.size == (32, 32)
    assert both.generate("red heart", only=["base"], steps=2)[0].size == (8, 8)
    asked = {"low_res": wide, "steps": 2}
    clean, noisy = (both.generate("red heart", aug=aug, **asked)[0] for aug in (0.0, 0.9))
    assert clean.tobytes() != noisy.tobytes()
    for wrong, said in (
        ({"aug": 1.5}, "aug is 1.5; allowed: 0"),
        ({"only": ["base"]}, "'base' would begin without it"),
        ({"only": ["base", "upsampler"]}, "'base', 'upsampler' would begin without it"),
        (
            {"low_res": torch.zeros(1, 3, 4, 4), "size": 32},
            "works on 32x32 and is given a picture that comes to 16x16",
        ),
    ):
        with pytest.raises(ValueError, match=said) as error:
            both.generate("red heart", **{**asked, **wrong})
        assert "\n" not in str(error.value)


def test_files_of_the_original_code_draw_with_its_steps(tmp_path):
    """The same nets in the original names draw the same, and by default as IF itself does."""
    base = sfumato.load(pipeline(tmp_path / "I", "first"))
    up = sfumato.load(pipeline(tmp_path / "II", "second"), text=base)
    options = {"att_pool_heads": 2, "num_head_channels": 16}
    for system, side, steps, limit in ((base, 8, 150, 1.5), (up, 32, 50, 1.0)):
        file = tmp_path / f"{side}.pt"
        sfumato.save_nets({"net": system.parts.nets["net"]}, file, layout="deepfloyd")
        again = sfumato.load(file, text=base, config={**options, "image_size": side})
        (stage,) = again.stages
        assert (stage.name, stage.pixels, stage.defaults.steps) == (
            system.stages[0].name,
            (side, side),
            steps,
        )
        assert len(stage.defaults.grid(stage.denoiser.schedule)) == steps
        assert stage.defaults.threshold == Dynamic(0.95, limit)
        asked = replace(ASKED, low_res=torch.rand(2, 3, 8, 8) * 2 - 1)
        walk = system.resolve(steps=3)
        made, wanted = (one.run(asked, walk, seed=SEEDS).low_res for one in (again, system))
        torch.testing.assert_close(made, wanted, rtol=0, atol=1e-4)
