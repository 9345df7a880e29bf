"""Karlo from a folder of diffusers: the pictures of its pipelines, and folders that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import pre_tokenizers

import sfumato
from sfumato.core.random import Noise
from sfumato.core.types import Inputs
from sfumato.systems.request import options_for

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from diffusers.pipelines.deprecated.unclip import pipeline_unclip, pipeline_unclip_image_variation  # noqa: E402
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel  # noqa: E402
from diffusers.schedulers import scheduling_unclip  # noqa: E402

MERGES = ["r e", "re d</w>", "h e", "a r", "he ar", "hear t</w>"]
TEXTS, SEEDS = ["red heart", "a heart, blue"], [3, 4]
DIM, SIZE, LARGE = 32, 8, 16


def tokenizer(folder: Path) -> transformers.CLIPTokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["!", *(c for c in alphabet if c != "!"), *(f"{c}</w>" for c in alphabet)]
    tokens += [*(m.replace(" ", "") for m in MERGES), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n", "utf-8")
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    return transformers.CLIPTokenizer(*files, pad_token="!", model_max_length=12)


def parts(words: transformers.CLIPTokenizer) -> dict[str, torch.nn.Module]:
    """Tiny random nets of every class in a pipeline of Karlo."""
    torch.manual_seed(0)
    tower = {"hidden_size": DIM, "intermediate_size": 48, "num_hidden_layers": 2, "projection_dim": DIM}
    res = ("ResnetDownsampleBlock2D",) * 2, ("ResnetUpsampleBlock2D",) * 2
    sizes = {"layers_per_block": 1, "block_out_channels": (32, 64)}
    upsampler = {**sizes, "sample_size": LARGE, "in_channels": 6, "out_channels": 3, "add_attention": False}
    upsampler |= {"down_block_types": res[0], "up_block_types": res[1]}
    nets = {
        "text_encoder": transformers.CLIPTextModelWithProjection(
            transformers.CLIPTextConfig(
                vocab_size=len(words),
                max_position_embeddings=12,
                num_attention_heads=2,
                eos_token_id=words.eos_token_id,
                **tower,
            )
        ),
        "image_encoder": transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(image_size=16, patch_size=8, num_attention_heads=4, **tower)
        ),
        "prior": diffusers.PriorTransformer(
            num_attention_heads=2, attention_head_dim=16, num_layers=2, embedding_dim=DIM, num_embeddings=12
        ),
        "text_proj": UnCLIPTextProjModel(
            clip_extra_context_tokens=2,
            clip_embeddings_dim=DIM,
            time_embed_dim=4 * 32,
            cross_attention_dim=24,
        ),
        "decoder": diffusers.UNet2DConditionModel(
            **sizes,
            sample_size=SIZE,
            out_channels=6,
            in_channels=3,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            cross_attention_dim=24,
            class_embed_type="identity",
            attention_head_dim=16,
            resnet_time_scale_shift="scale_shift",
        ),
        "super_res_first": diffusers.UNet2DModel(**upsampler),
        "super_res_last": diffusers.UNet2DModel(**upsampler),
    }
    for net in nets.values():
        for p in net.parameters():
            torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.08)
    nets["prior"].clip_std.data.abs_()
    nets["decoder"].conv_out.weight.data.mul_(0.1)  # else its variances are beyond all measure
    nets["decoder"].conv_out.bias.data.zero_()
    return nets


def pipeline(path: Path, *, varies: bool = False) -> diffusers.DiffusionPipeline:
    """A whole pipeline, and `p` as diffusers writes it."""
    words = tokenizer(path / "words")
    nets = parts(words)
    scheduler = diffusers.UnCLIPScheduler
    schedulers = {
        "decoder_scheduler": scheduler(variance_type="learned_range"),
        "super_res_scheduler": scheduler(),
    }
    if varies:
        del nets["prior"]
        extractor = transformers.CLIPImageProcessor(size=16, crop_size=16)
        build, more = (
            pipeline_unclip_image_variation.UnCLIPImageVariationPipeline,
            {"feature_extractor": extractor},
        )
    else:
        del nets["image_encoder"]
        prior = scheduler(prediction_type="sample", clip_sample_range=5.0)
        build, more = pipeline_unclip.UnCLIPPipeline, {"prior_scheduler": prior}
    pipe = build(**nets, **schedulers, **more, tokenizer=words)
    pipe.save_pretrained(path / "p")
    return pipe


def drawn(
    pipe: diffusers.DiffusionPipeline, monkeypatch: pytest.MonkeyPatch, **request: object
) -> torch.Tensor:
    """What diffusers draws, (B, 3, H, W) in [0, 1], from the noise of ours."""
    varies = "image_embeddings" in request
    module = pipeline_unclip_image_variation if varies else pipeline_unclip
    first = Noise(SEEDS)
    streams = {
        (DIM,): first,
        (3, SIZE, SIZE): first if varies else first.fork("decoder"),
        (3, LARGE, LARGE): first.fork("super_res"),
    }

    def noise(shape: torch.Size, **options: object) -> torch.Tensor:
        return streams[tuple(shape[1:])](torch.empty(tuple(shape)))

    monkeypatch.setattr(module, "randn_tensor", noise)
    monkeypatch.setattr(scheduling_unclip, "randn_tensor", noise)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(**request, output_type="np", decoder_num_inference_steps=5).images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


# diffusers has its schedule in float32. At the noisiest step x0 = (x_t - sigma eps) / alpha multiplies a
# rounding by 20,000, before guidance by 8; at the cleanest 1 - alpha^2 is 4e-5, known to 6e-8, and what
# should be 1 becomes 0.9995.
CLOSE = {"rtol": 0, "atol": 5e-3}


def test_the_pipeline_draws_the_same_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline(tmp_path)
    expected = drawn(pipe, monkeypatch, prompt=TEXTS, prior_num_inference_steps=6)
    system = sfumato.load(tmp_path / "p")
    assert [stage.name for stage in system.stages] == ["prior", "decoder", "super_res"]
    options = {
        name: options_for(option, {"steps": steps})
        for (name, option), steps in zip(system.resolve().items(), (6, 5, 7), strict=True)
    }
    done = system.run(Inputs(n=2, text=TEXTS), options, seed=SEEDS)
    assert expected.std() > 0.05
    torch.testing.assert_close((done.low_res + 1) / 2, expected, **CLOSE)
    assert float(((done.low_res + 1) / 2 - expected).abs().mean()) < 5e-4

    sfumato.save(system, tmp_path / "native")
    again = sfumato.load(tmp_path / "native").run(Inputs(n=2, text=TEXTS), options, seed=SEEDS)
    assert torch.equal(again.low_res, done.low_res)
    # The last step has a net of its own, however many steps there are.
    super_res = system.stages[-1].denoiser.net
    with torch.no_grad():
        super_res.last.conv_out.bias.add_(1.0)
    for steps in (1, 4, 7):
        options["super_res"] = options_for(options["super_res"], {"steps": steps})
        seen = list[torch.Tensor]()
        inputs = Inputs(n=2, low_res=done.low_res[..., ::2, ::2])
        for changed in (system, sfumato.load(tmp_path / "native")):
            changed.run(
                inputs, options, only=["super_res"], seed=SEEDS, observe=lambda p, kept=seen: kept.append(p.x)
            )
        assert [torch.equal(a, b) for a, b in zip(seen[:steps], seen[steps:], strict=True)] == [
            *[True] * (steps - 1),
            False,
        ]


def test_variations_of_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline(tmp_path, varies=True)
    embeddings = torch.randn(2, DIM, generator=torch.Generator().manual_seed(0))
    expected = drawn(pipe, monkeypatch, image_embeddings=embeddings)
    system = sfumato.load(tmp_path / "p")
    options = {"decoder": options_for(system.stages[0].defaults, {"steps": 5})}
    done = system.run(Inputs(n=2, image_embed=embeddings), options, seed=SEEDS)
    assert expected.std() > 0.05
    torch.testing.assert_close((done.low_res + 1) / 2, expected, **CLOSE)


def test_a_folder_that_lacks_a_part_is_one_line(tmp_path: Path) -> None:
    pipeline(tmp_path)
    index = json.loads((tmp_path / "p/model_index.json").read_text())
    del index["text_proj"]
    (tmp_path / "p/model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="and text_proj is missing; load_nets gives") as error:
        sfumato.load(tmp_path / "p")
    assert "\n" not in str(error.value)
