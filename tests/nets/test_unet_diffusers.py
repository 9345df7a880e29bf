"""The U-Net computes what diffusers' nets compute, at toy width and with shared random weights."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from torch import Tensor, nn

from sfumato.core.types import Conditioning
from sfumato.nets.attention import AttentionConfig
from sfumato.nets.blocks import BlockConfig
from sfumato.nets.embedding import EmbedderConfig, EmbeddingConfig, Feature, TokensConfig
from sfumato.nets.unet import LevelConfig, UNet, UNetConfig, levels

# Both sides sum the same terms in float32 in another order; outputs are of order 1. Measured: at most 4e-6.
TOLERANCE = 1e-5
SIZE, BATCH, LENGTH = 16, 2, 5

# Inside a block: their name -> ours. 1x1 convolutions become linear layers by reshaping.
LEAVES = [
    (r"^(conv1|conv2|norm1|norm2)\.", r"\1."),
    (r"^time_emb_proj\.", "embed."),
    (r"^conv_shortcut\.", "skip."),
    (r"^transformer_blocks\.(\d+)\.", r"blocks.\1."),
    (r"\.attn1\.to_([qkv])\.", r".attention1.\1."),
    (r"\.attn2\.to_q\.", ".attention2.q."),
    (r"\.attn2\.to_([kv])\.", r".attention2.token_\1."),
    (r"\.attn([12])\.to_out\.0\.", r".attention\1.out."),
    (r"\.ff\.net\.0\.proj\.", ".mlp.up."),
    (r"\.ff\.net\.2\.", ".mlp.down."),
    (r"^group_norm\.", "norm."),
    (r"^norm_cross\.", "attention.token_norm."),
    (r"^to_([qkv])\.", r"attention.\1."),
    (r"^add_([kv])_proj\.", r"attention.token_\1."),
    (r"^to_out\.0\.", "attention.out."),
]


def block_names(config: UNetConfig) -> dict[str, str]:
    """Prefix of every block in diffusers' layout -> prefix in ours."""
    names = {
        "time_embedding.linear_": "encoder.embedding.time.linear",
        "conv_in.": "encoder.conv_in.",
        "conv_norm_out.": "norm_out.",
        "conv_out.": "conv_out.",
        "mid_block.resnets.0.": "encoder.middle.0.res.",
        "mid_block.attentions.0.": "encoder.middle.0.attention.",
        "mid_block.resnets.1.": "encoder.middle.1.res.",
    }
    down = up = 0
    last = len(config.levels) - 1
    for i, level in enumerate(config.levels):
        for j in range(level.blocks):
            names[f"down_blocks.{i}.resnets.{j}."] = f"encoder.blocks.{down}.res."
            names[f"down_blocks.{i}.attentions.{j}."] = f"encoder.blocks.{down}.attention."
            down += 1
        names[f"down_blocks.{i}.downsamplers.0."] = f"encoder.blocks.{down}.resample."
        down += i < last
    for i, level in enumerate(reversed(config.levels)):
        for j in range(level.blocks + 1):
            names[f"up_blocks.{i}.resnets.{j}."] = f"decoder.{up}.res."
            names[f"up_blocks.{i}.attentions.{j}."] = f"decoder.{up}.attention."
            up += 1
        names[f"up_blocks.{i}.upsamplers.0."] = f"decoder.{up - 1}.resample."
    return names


def load(net: UNet, state: dict[str, Tensor], extras: dict[str, str]) -> None:
    """Copy a diffusers state dict into ours; every tensor on both sides is used."""
    names = block_names(net.config) | extras
    ours = net.state_dict()
    renamed = {}
    for key, value in state.items():
        prefix = max((p for p in names if key.startswith(p)), key=len)
        rest = key.removeprefix(prefix)
        for pattern, replacement in LEAVES if "block" in prefix else []:
            rest = re.sub(pattern, replacement, rest)
        name = names[prefix] + rest
        if name not in ours:  # x4 upscaler: the first attention reads the tokens
            name = name.replace("attention1.", "attention1.token_")
        renamed[name] = value.reshape(ours[name].shape)
    net.load_state_dict(renamed)


@dataclass(frozen=True)
class Case:
    """A published kind of net at toy size."""

    config: UNetConfig
    reference: type[nn.Module]
    options: dict[str, Any]
    extras: dict[str, str]


HEAD_16 = AttentionConfig(head_dim=16)
TRANSFORMER = AttentionConfig(kind="transformer", heads=4)
WIDTHS = (32, 64)
EMBEDDING = EmbeddingConfig(time_dim=32, dim=128)
ADM = BlockConfig(film=True, resample="residual")
CROSS = {
    "block_out_channels": WIDTHS,
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": 4,  # the number of heads, in spite of its name
}
SIMPLE = CROSS | {
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "resnet_time_scale_shift": "scale_shift",
    "attention_head_dim": 16,
    "in_channels": 3,
    "out_channels": 6,
}


def extra(kind: str, *features: Feature, heads: int = 0) -> tuple[EmbedderConfig, ...]:
    return (EmbedderConfig(kind=kind, features=features, heads=heads),)


def latent(attention: AttentionConfig = TRANSFORMER, *, in_channels: int = 4, extras: Any = ()) -> UNetConfig:
    return UNetConfig(
        in_channels=in_channels,
        out_channels=4,
        levels=levels(32, (1, 2), 1, attention=attention, at=(1,)),
        middle=attention,
        embedding=replace(EMBEDDING, extras=extras),
        tokens=TokensConfig(dim=24),
        block=BlockConfig(norm_groups=16),
    )


def appended(attention: AttentionConfig, tokens: TokensConfig, extras: Any, **block: Any) -> UNetConfig:
    return UNetConfig(
        in_channels=3,
        out_channels=6,
        levels=levels(32, (1, 2), 1, attention=attention, at=(1,)),
        middle=attention,
        embedding=replace(EMBEDDING, extras=extras),
        tokens=tokens,
        block=replace(ADM, norm_groups=16, **block),
    )


def ddpm() -> Case:
    attention = AttentionConfig(heads=1)
    config = UNetConfig(
        in_channels=3,
        out_channels=3,
        levels=levels(32, (1, 2), 2, attention=attention, at=(1,)),
        middle=attention,
        embedding=replace(EMBEDDING, cos_first=False, shift=1.0),
        block=BlockConfig(resample="conv_asymmetric", norm_eps=1e-6),
    )
    options = {
        "block_out_channels": WIDTHS,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": None,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
    }
    return Case(config, UNet2DModel, options, {})


def adm() -> Case:
    config = UNetConfig(
        in_channels=3,
        out_channels=6,
        levels=levels(32, (1, 2), 2, attention=HEAD_16, at=(0, 1)),
        middle=HEAD_16,
        embedding=replace(EMBEDDING, extras=extra("table", Feature(field="label", dim=10))),
        block=ADM,
    )
    options = {
        "out_channels": 6,
        "block_out_channels": WIDTHS,
        "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"),
        "attention_head_dim": 16,
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 32,
        "num_class_embeds": 10,
    }
    return Case(config, UNet2DModel, options, {"class_embedding.": "encoder.embedding.extras.0.table."})


def sd1() -> Case:
    return Case(latent(), UNet2DConditionModel, CROSS, {})


def sd2() -> Case:
    attention = AttentionConfig(kind="transformer", head_dim=16)
    return Case(latent(attention), UNet2DConditionModel, CROSS | {"use_linear_projection": True}, {})


def sdxl() -> Case:
    features = (Feature(field="pooled", dim=8), Feature(field="micro", dim=6, sinusoid=16))
    base = latent(replace(TRANSFORMER, depth=2), extras=extra("mlp", *features))
    first = LevelConfig(channels=32, blocks=1, attention=TRANSFORMER)
    options = CROSS | {
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 16,
        "projection_class_embeddings_input_dim": 8 + 6 * 16,
    }
    extras = {"add_embedding.linear_": "encoder.embedding.extras.0.proj.linear"}
    return Case(replace(base, levels=(first, base.levels[1])), UNet2DConditionModel, options, extras)


def x4_upscaler() -> Case:
    base = latent(in_channels=7, extras=extra("table", Feature(field="aug", dim=50)))
    first = LevelConfig(channels=32, blocks=1, attention=replace(TRANSFORMER, to_pixels=False))
    options = CROSS | {
        "in_channels": 7,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "only_cross_attention": (True, False),
        "num_class_embeds": 50,
    }
    extras = {"class_embedding.": "encoder.embedding.extras.0.table."}
    return Case(replace(base, levels=(first, base.levels[1])), UNet2DConditionModel, options, extras)


def sd_unclip() -> Case:
    features = (Feature(field="image_embed", dim=12), Feature(field="aug", dim=1, sinusoid=12))
    options = CROSS | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 24}
    extras = {"class_embedding.linear_": "encoder.embedding.extras.0.proj.linear"}
    return Case(latent(extras=extra("mlp", *features)), UNet2DConditionModel, options, extras)


POOL = {
    "encoder_hid_proj.": "encoder.tokens.proj.",
    "add_embedding.norm": "encoder.embedding.extras.0.pool.norm",
    "add_embedding.proj.": "encoder.embedding.extras.0.pool.proj.",
    "add_embedding.pool.positional_embedding": "encoder.embedding.extras.0.pool.position",
    "add_embedding.pool.q_proj.": "encoder.embedding.extras.0.pool.q.",
    "add_embedding.pool.k_proj.": "encoder.embedding.extras.0.pool.k.",
    "add_embedding.pool.v_proj.": "encoder.embedding.extras.0.pool.v.",
}
IF = SIMPLE | {
    "cross_attention_dim": 32,
    "encoder_hid_dim": 24,
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 4,
    "cross_attention_norm": "group_norm",
    "act_fn": "gelu",
}


def if_base() -> Case:
    attention = AttentionConfig(kind="appended", head_dim=16, norm_tokens=True)
    pool = extra("pool", Feature(field="tokens", dim=24), heads=4)
    config = appended(attention, TokensConfig(dim=24, width=32), pool, activation="gelu")
    config = replace(config, block=replace(config.block, norm_groups=32))  # theirs is fixed for the tokens
    return Case(config, UNet2DConditionModel, IF | {"norm_num_groups": 32}, POOL)


def if_upsampler() -> Case:
    """With tokens only in the attention, scaled residuals, and the augmentation level."""
    base = if_base()
    attention = AttentionConfig(kind="appended", head_dim=16, norm_tokens=True, to_pixels=False)
    extras = (*base.config.embedding.extras, *extra("mlp", Feature(field="aug", dim=1, sinusoid=32)))
    config = replace(
        base.config,
        levels=levels(32, (1, 2), (1, 2), attention=attention, at=(1,)),
        middle=attention,
        embedding=replace(base.config.embedding, extras=extras),
        block=replace(base.config.block, residual_scale=0.7071),
    )
    options = base.options | {
        "layers_per_block": (1, 2),
        "class_embed_type": "timestep",
        "time_embedding_act_fn": "gelu",
        "resnet_skip_time_act": True,
        "resnet_out_scale_factor": 1 / 0.7071,
        "mid_block_scale_factor": 1 / 0.7071,
        "only_cross_attention": True,
    }
    aug = {"class_embedding.linear_": "encoder.embedding.extras.1.proj.linear"}
    return Case(config, UNet2DConditionModel, options, POOL | aug)


CASES = [ddpm, adm, sd1, sd2, sdxl, x4_upscaler, sd_unclip, if_base, if_upsampler]


def randomize(module: nn.Module) -> nn.Module:
    """Biases and norms away from their initial zeros and ones, so that a swap of two shows."""
    for p in module.parameters():
        if p.ndim == 1:
            nn.init.normal_(p, mean=float(p.detach().mean()), std=0.2)
    return module.eval()


def conditioning(config: UNetConfig) -> Conditioning:
    """Random values of every field that the net reads."""
    fields: dict[str, Tensor] = {}
    for feature in (f for e in config.embedding.extras for f in e.features):
        fields[feature.field] = {
            "label": torch.tensor([3, 7]),
            "aug": torch.tensor([2, 41]),
            "micro": torch.rand(BATCH, feature.dim) * 1000,
        }.get(feature.field, torch.randn(BATCH, feature.dim))
    if config.tokens:
        fields["tokens"] = torch.randn(BATCH, LENGTH, config.tokens.dim)
    return Conditioning(**fields)


def their_arguments(case: Case, cond: Conditioning) -> dict[str, Any]:
    """The same conditioning as arguments of the reference's forward."""
    options = case.options
    arguments: dict[str, Any] = {}
    if cond.tokens is not None:
        arguments["encoder_hidden_states"] = cond.tokens
    if options.get("num_class_embeds") or options.get("class_embed_type") == "timestep":
        arguments["class_labels"] = cond.label if cond.label is not None else cond.aug
    if options.get("class_embed_type") == "projection":
        level = get_timestep_embedding(cond.aug, 12, flip_sin_to_cos=True, downscale_freq_shift=0)
        arguments["class_labels"] = torch.cat([cond.image_embed, level], dim=1)
    if options.get("addition_embed_type") == "text_time":
        arguments["added_cond_kwargs"] = {"text_embeds": cond.pooled, "time_ids": cond.micro}
    return arguments


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_same_output_as_diffusers(make: Any) -> None:
    torch.manual_seed(0)
    case = make()
    reference = randomize(case.reference(sample_size=SIZE, **case.options))
    net = UNet(case.config).eval()
    load(net, reference.state_dict(), case.extras)
    x, t = torch.randn(BATCH, case.config.in_channels, SIZE, SIZE), torch.tensor([3.0, 741.5])
    cond = conditioning(case.config)
    with torch.no_grad():
        theirs = reference(x, t, **their_arguments(case, cond)).sample
        ours = net(x, t, cond)
        prepared = net(x, t, net.prepare(cond))
    assert theirs.std() > 0.05, "the reference is too quiet to test against"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(prepared, ours, rtol=0, atol=0)


def test_same_output_as_the_unclip_decoder() -> None:
    """Karlo's decoder: image tokens before masked text tokens, both embeddings added to that of time."""
    torch.manual_seed(0)
    projection = randomize(
        UnCLIPTextProjModel(
            clip_extra_context_tokens=4, clip_embeddings_dim=20, time_embed_dim=128, cross_attention_dim=40
        )
    )
    options = SIMPLE | {"cross_attention_dim": 40, "class_embed_type": "identity"}
    reference = randomize(UNet2DConditionModel(sample_size=SIZE, **options))
    config = appended(
        AttentionConfig(kind="appended", head_dim=16),
        TokensConfig(dim=20, width=40, norm=True, image_tokens=4, image_dim=20, masked=True),
        extra("linear", Feature(field="image_embed", dim=20))
        + extra("linear", Feature(field="pooled", dim=20)),
    )
    net = UNet(config).eval()
    text = {f"text_proj.{k}": v for k, v in projection.state_dict().items() if "classifier_free" not in k}
    extras = {
        "text_proj.embedding_proj.": "encoder.embedding.extras.1.proj.",
        "text_proj.clip_image_embeddings_project_to_time_embeddings.": "encoder.embedding.extras.0.proj.",
        "text_proj.clip_extra_context_tokens_proj.": "encoder.tokens.image.",
        "text_proj.encoder_hidden_states_proj.": "encoder.tokens.proj.",
        "text_proj.text_encoder_hidden_states_norm.": "encoder.tokens.norm.",
    }
    load(net, reference.state_dict() | text, extras)
    x, t = torch.randn(BATCH, 3, SIZE, SIZE), torch.tensor([3.0, 741.5])
    mask = torch.tensor([[True] * LENGTH, [True, True, False, False, False]])
    cond = Conditioning(
        tokens=torch.randn(BATCH, LENGTH, 20),
        mask=mask,
        pooled=torch.randn(BATCH, 20),
        image_embed=torch.randn(BATCH, 20),
    )
    with torch.no_grad():
        tokens, embedding = projection(
            image_embeddings=cond.image_embed,
            prompt_embeds=cond.pooled,
            text_encoder_hidden_states=cond.tokens,
            do_classifier_free_guidance=False,
        )
        theirs = reference(
            x,
            t,
            encoder_hidden_states=tokens,
            class_labels=embedding,
            attention_mask=nn.functional.pad(mask, (4, 0), value=True),
        ).sample
        ours = net(x, t, cond)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)
