"""Single files of latent diffusion of 2021: the pictures of diffusers' pipelines, or of its nets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sfumato
from sfumato.checkpoints.layouts import LAYOUTS
from sfumato.checkpoints.native import Parts
from sfumato.core.types import Inputs
from sfumato.diffusion.guidance import CFG
from sfumato.nets.presets import UNETS
from sfumato.nets.told import ClassToken, ClassTokenConfig
from sfumato.nets.unet import UNet
from sfumato.systems.codec import Pixels
from sfumato.systems.conditioning import LabelConfig
from sfumato.training.jobs.base import read_base

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

SEEDS, STEPS = [3, 4], 5
BETAS = {"beta_start": 0.0015, "beta_end": 0.0205, "beta_schedule": "scaled_linear"}
HEADS = {"num_head_channels": 16}
# Guided steps amplify the rounding of float32.
CLOSE = {"rtol": 0, "atol": 1e-3}


def randomized(net: nn.Module, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        nn.init.normal_(p, mean=float(p.ndim == 1), std=0.08, generator=generator)
    return net.eval()


def scheduler() -> Any:
    return diffusers.DDIMScheduler(**BETAS, steps_offset=1, set_alpha_to_one=False, clip_sample=False)


def first_stage() -> Any:
    """Codes where the latents are that the nets draw."""
    net = randomized(
        diffusers.VQModel(
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=3,
            num_vq_embeddings=64,
            scaling_factor=1.0,
        ),
        0,
    )
    nn.init.normal_(net.quantize.embedding.weight, std=1.0, generator=torch.Generator().manual_seed(1))
    return net


def plain(channels: int) -> Any:
    return randomized(
        diffusers.UNet2DModel(
            sample_size=8,
            in_channels=channels,
            out_channels=3,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=16,
        ),
        2,
    )


def transformer(channels: int) -> Any:
    return randomized(
        diffusers.UNet2DConditionModel(
            sample_size=8,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=24,
            attention_head_dim=(2, 4),
        ),
        3,
    )


def single(path: Path, layout: str, unet: Any, vae: Any, more: dict[str, Tensor]) -> Path:
    """The nets in one file, with the buffers of its schedule, and what only training needs."""
    nets: dict[str, nn.Module] = {}
    for name, net in (("unet", unet), ("vae", vae)):
        net.save_pretrained(path / name)
        nets |= sfumato.load_nets(path / name)
    state = {"betas": scheduler().betas, "model_ema.decay": torch.tensor(0.9999)}
    for part in LAYOUTS[layout].parts:
        if part.name in nets:
            named = part.names(nets[part.name].config).save(nets[part.name].state_dict(), where=layout)
            state |= {part.prefix + n: v.contiguous().clone() for n, v in named.items()}
    save_file(state | more, path / "model.safetensors")
    return path / "model.safetensors"


def drawn(system: sfumato.System, size: int = 16, guidance: float = 1.0, **told: Any) -> Tensor:
    """Ours in [0, 1]."""
    options = system.resolve(steps=STEPS, guidance=guidance, knobs={"eta": 0.0})
    inputs = Inputs(n=2, size=(size, size), **told)
    return (system.run(inputs, options, seed=SEEDS).low_res + 1) / 2


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


@torch.no_grad()
def loop(unet: Any, vae: Any, eps: Any) -> Tensor:
    """The walk of DDIM over diffusers' nets; `eps(x, t)` is what they predict, guided or not."""
    walk = scheduler()
    walk.set_timesteps(STEPS)
    x = torch.cat([torch.randn(1, 3, 8, 8, generator=g) for g in generators()])
    for t in walk.timesteps:
        x = walk.step(eps(x, t), t, x).prev_sample
    return (vae.decode(x).sample / 2 + 0.5).clamp(0, 1)


def test_an_unconditional_file_draws_the_pictures_of_its_pipeline(tmp_path: Path) -> None:
    from diffusers.pipelines.deprecated import LDMPipeline

    unet, vae = plain(3), first_stage()
    system = sfumato.load(single(tmp_path, "ldm-compvis", unet, vae, {}), config=HEADS)
    pipe = LDMPipeline(vqvae=vae, unet=unet, scheduler=scheduler())
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(batch_size=2, generator=generators(), num_inference_steps=STEPS, output_type="np").images
    expected = torch.from_numpy(expected).permute(0, 3, 1, 2)
    assert expected.std() > 0.05
    torch.testing.assert_close(drawn(system), expected, **CLOSE)
    pipe.save_pretrained(tmp_path / "folder")
    torch.testing.assert_close(drawn(sfumato.load(tmp_path / "folder")), expected, **CLOSE)
    assert system.config.stages[0].shape == (3, 128, 128)  # 256 pixels
    assert system.config.stages[0].schedule.end == 0.0205


def test_super_resolution_draws_the_pictures_of_its_pipeline(tmp_path: Path) -> None:
    unet, vae = plain(6), first_stage()
    system = sfumato.load(single(tmp_path, "ldm-compvis", unet, vae, {}), config=HEADS)
    options = system.config.stages[0].defaults
    assert (options.steps, options.knobs) == (100, {"eta": 1.0})
    small = torch.rand(2, 3, 8, 8) * 2 - 1
    pipe = diffusers.LDMSuperResolutionPipeline(vae, unet, scheduler())
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(image=small, generator=generators(), num_inference_steps=STEPS, output_type="pt").images
    assert expected.std() > 0.05
    torch.testing.assert_close(drawn(system, low_res=small), expected, **CLOSE)
    vae.register_to_config(scaling_factor=0.5)  # which this pipeline does not look at
    pipe.save_pretrained(tmp_path / "folder")
    torch.testing.assert_close(drawn(sfumato.load(tmp_path / "folder"), low_res=small), expected, **CLOSE)
    assert system.generate(low_res=small[:1], steps=1)[0].size == (16, 16)


def test_inpainting_reads_a_black_hole_and_a_signed_mask(tmp_path: Path) -> None:
    unet, vae = plain(7), first_stage()
    again = {"cond_stage_model.encoder.conv_in.bias": torch.zeros(32)}  # files have the first stage twice
    system = sfumato.load(single(tmp_path, "ldm-compvis", unet, vae, again), config=HEADS)
    image, mask = torch.rand(2, 3, 16, 16) * 2 - 1, torch.zeros(2, 1, 16, 16)
    mask[..., 4:] = 1
    black = ((image + 1) / 2 * (1 - mask)) * 2 - 1  # as the original script: in [0, 1], then rescaled
    told = torch.cat([vae.encode(black).latents, mask[..., ::2, ::2] * 2 - 1], 1)
    expected = loop(unet, vae, lambda x, t: unet(torch.cat([x, told], 1), t).sample)
    assert expected.std() > 0.05
    found = drawn(system, image=image, mask=mask)
    torch.testing.assert_close(found[..., 4:], expected[..., 4:], **CLOSE)
    assert torch.equal(found[..., :4], (image[..., :4] + 1) / 2)


@pytest.mark.parametrize("rows", [1001, 1000])
def test_a_class_is_a_token_and_the_last_of_1001_none(rows: int, tmp_path: Path) -> None:
    unet, vae = transformer(3), first_stage()
    table = torch.randn(rows, 24, generator=torch.Generator().manual_seed(5))
    file = single(tmp_path, "ldm-class-compvis", unet, vae, {"cond_stage_model.embedding.weight": table})
    system = sfumato.load(file, config={"num_head_channels": 16})
    labels, scale = torch.tensor([7, 999]), 3.0 if rows == 1001 else 1.0
    assert system.config.stages[0].defaults.guidance == CFG(scale)

    def eps(x: Tensor, t: Tensor) -> Tensor:
        cond = unet(x, t, table[labels][:, None]).sample
        if rows == 1000:
            return cond
        null = unet(x, t, table[1000].expand(2, 1, 24)).sample
        return null + scale * (cond - null)

    expected = loop(unet, vae, eps)
    assert expected.std() > 0.05
    torch.testing.assert_close(drawn(system, label=labels, guidance=scale), expected, **CLOSE)
    if rows == 1000:
        with pytest.raises(
            ValueError, match="this network is always told a class: give label, from 0 to 999"
        ):
            system.generate(steps=1)
    sfumato.save(system, tmp_path / "native")
    again = sfumato.load(tmp_path / "native")
    assert torch.equal(drawn(again, label=labels), drawn(system, label=labels))
    with pytest.raises(ValueError, match="is conditioned by a class as a token; only texts of a tower"):
        read_base(tmp_path / "native", torch.device("cpu"))


PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "heart", "a", "##s", "blue", ",", "cafe"]
TEXTS = ["A red heart", "Blue hearts, a café"]


def bert(path: Path, length: int = 77) -> tuple[Any, Any, dict[str, Tensor]]:
    """The tower of diffusers, its tokenizer, and the same tensors as original files name them."""
    path.mkdir()
    (path / "vocab.txt").write_text("\n".join(PIECES) + "\n", "utf-8")
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    shape = {"d_model": 24, "encoder_layers": 2, "encoder_ffn_dim": 96, "encoder_attention_heads": 8}
    shape |= {"max_position_embeddings": length, "head_dim": 64}
    tower = randomized(LDMBertModel(LDMBertConfig(vocab_size=len(PIECES), **shape)), 4)
    names = {"model.embed_tokens": "token_emb", "model.embed_positions": "pos_emb.emb"}
    names |= {"model.layer_norm": "norm", "to_logits": "to_logits"}
    for i in range(2):
        ours, at = f"model.layers.{i}", f"attn_layers.layers.{2 * i}"
        names |= {f"{ours}.self_attn_layer_norm": f"{at}.0", f"{ours}.self_attn.out_proj": f"{at}.1.to_out"}
        names |= {f"{ours}.self_attn.{n}_proj": f"{at}.1.to_{n}" for n in "qkv"}
        at = f"attn_layers.layers.{2 * i + 1}"
        names |= {f"{ours}.final_layer_norm": f"{at}.0"}
        names |= {f"{ours}.fc1": f"{at}.1.net.0.0", f"{ours}.fc2": f"{at}.1.net.2"}
    state = {}
    for name, v in tower.state_dict().items():
        layer, _, tensor = name.rpartition(".")
        state[f"cond_stage_model.transformer.{names[layer]}.{tensor}"] = v
    return tower, transformers.BertTokenizerFast.from_pretrained(path), state


def test_a_text_file_draws_the_pictures_of_its_pipeline(tmp_path: Path) -> None:
    tower, words, state = bert(tmp_path / "tokenizer")
    unet, vae = (
        transformer(4),
        diffusers.AutoencoderKL(
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
        ),
    )
    file = single(tmp_path, "ldm-text-compvis", unet, randomized(vae, 6), state)
    system = sfumato.load(file, config=HEADS)
    pipe = diffusers.LDMTextToImagePipeline(vae, tower, words, unet, scheduler())
    pipe.set_progress_bar_config(disable=True)
    told = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "output_type": "pt"}
    expected = pipe(TEXTS, height=64, width=64, generator=generators(), **told).images
    assert expected.std() > 0.05
    torch.testing.assert_close(drawn(system, guidance=5.0, text=TEXTS), expected, **CLOSE)
    assert system.config.stages[0].defaults.guidance == CFG(5.0)
    sfumato.save(system, tmp_path / "native")
    assert torch.equal(drawn(sfumato.load(tmp_path / "native"), text=TEXTS), drawn(system, text=TEXTS))
    sfumato.save_nets(dict(system.parts.nets), tmp_path / "again.safetensors", layout="ldm-text-compvis")
    before, after = load_file(file), load_file(tmp_path / "again.safetensors")
    assert {n.split(".")[-2] for n in before.keys() - after.keys() if "." in n} == {"to_logits", "model_ema"}
    assert all(torch.equal(v, before[n]) for n, v in after.items())
    (tmp_path / "tokenizer/vocab.txt").unlink()
    with pytest.raises(ValueError, match=r"there is no vocabulary of BERT; copy vocab.txt"):
        sfumato.load(file, config=HEADS)


def test_a_layout_is_read_by_the_same_tower(tmp_path: Path) -> None:
    """30 boxes on a grid as large as the ids allow: 3 x 3 for twelve."""
    tower, _, state = bert(tmp_path / "tokenizer", 92)
    unet, vae = transformer(3), first_stage()
    system = sfumato.load(single(tmp_path, "ldm-text-compvis", unet, vae, state), config=HEADS)
    ids = torch.full((2, 92), len(PIECES) - 1)
    ids[:, -2:] = torch.tensor([0, 8])
    ids[0, :3], ids[1, :6] = torch.tensor([5, 0, 4]), torch.tensor([1, 4, 8, 9, 1, 8])
    tokens = tower(ids)[0]
    expected = loop(unet, vae, lambda x, t: unet(x, t, tokens).sample)
    assert expected.std() > 0.05
    texts = ["5 0 0 0.5 0.5", "1 0.5 0.5 1 1; 9 0.5 0 1 1"]
    torch.testing.assert_close(drawn(system, text=texts), expected, **CLOSE)
    sfumato.save(system, tmp_path / "native")
    assert torch.equal(drawn(sfumato.load(tmp_path / "native"), text=texts), drawn(system, text=texts))


def test_semantic_synthesis_reads_a_map_of_classes(tmp_path: Path) -> None:
    unet, vae = plain(6), first_stage()
    mix = torch.randn(3, 182, 1, 1, generator=torch.Generator().manual_seed(7))
    more = {"cond_stage_model.channel_mapper.weight": mix}
    system = sfumato.load(single(tmp_path, "ldm-semantic-compvis", unet, vae, more), config=HEADS)
    classes = torch.randint(182, (2, 16, 16))
    hot = nn.functional.one_hot(classes, 182).permute(0, 3, 1, 2).float()
    told = nn.functional.conv2d(nn.functional.interpolate(hot, scale_factor=0.5, mode="bilinear"), mix)
    expected = loop(unet, vae, lambda x, t: unet(torch.cat([x, told], 1), t).sample)
    assert expected.std() > 0.05
    hint = classes[:, None].expand(2, 3, 16, 16) / 127.5 - 1
    torch.testing.assert_close(drawn(system, hint=hint), expected, **CLOSE)


def test_buffers_and_averages_of_a_file_are_what_it_draws_with(tmp_path: Path) -> None:
    """A scale that was measured, betas in half precision or of no formula, weights averaged over training."""
    unet, vae = plain(3), first_stage()
    file = single(tmp_path, "ldm-compvis", unet, vae, {"scale_factor": torch.tensor(0.8)})
    state, prefix = load_file(file), "model.diffusion_model."
    stage = sfumato.load(file, config=HEADS).stages[0]
    torch.testing.assert_close(stage.codec.std, (1.25,), rtol=1e-6, atol=0)
    names = [n for n in state if n.startswith(prefix)]
    averages = {f"model_ema.{n.removeprefix('model.').replace('.', '')}": state[n] + 1 for n in names}
    save_file(state | averages | {"betas": state["betas"].half()}, file)
    system = sfumato.load(file, config=HEADS)
    name = "encoder.conv_in.bias"
    for more, nets in (
        (1, system.parts.nets),
        (0, sfumato.load_nets(file, config={**HEADS, "use_ema": False})),
    ):
        torch.testing.assert_close(nets["net"].state_dict()[name], unet.conv_in.bias.detach() + more)
    schedule = system.config.stages[0].schedule
    assert (schedule.formula, schedule.start, schedule.end) == ("scaled_linear", 0.0015, 0.0205)
    save_file(state | {"betas": torch.linspace(1e-4, 0.02, 1000)}, file)
    schedule = sfumato.load(file, config=HEADS).config.stages[0].schedule
    assert (schedule.formula, len(schedule.values)) == ("betas", 1000)
    del state["betas"]
    save_file(state, file)
    assert sfumato.load(file, config=HEADS).config.stages[0].schedule.end == 0.0195


@pytest.mark.parametrize("name", [n for n in UNETS if n.startswith("ldm-")])
def test_shape_and_heads_of_the_published_nets_are_found(name: str) -> None:
    config = UNETS[name]()
    layout = "ldm-text-compvis" if config.tokens else "ldm-compvis"
    part = LAYOUTS[layout].parts[0]
    with torch.device("meta"):
        state = part.names(config).save(UNet(config).state_dict(), where=name)
    assert part.config(part.settings({n: tuple(v.shape) for n, v in state.items()}, {})) == config


def test_what_makes_no_system_says_so(tmp_path: Path) -> None:
    file = single(tmp_path, "ldm-compvis", plain(5), first_stage(), {})
    with pytest.raises(ValueError, match=r"5 input channels for 3 of the latents; allowed: 0 more \(uncond"):
        sfumato.load(file, config=HEADS)
    with pytest.raises(ValueError, match="tensors do not tell the heads of this U-Net; give num_heads or"):
        sfumato.load(file)
    token = ClassToken(ClassTokenConfig(rows=4, width=8))
    with pytest.raises(ValueError, match="must be a ClassToken of at least 5 classes"):
        LabelConfig(num_classes=4, encoder="label").build(Parts({"label": token}), Pixels())
