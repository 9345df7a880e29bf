"""Pipeline folders of Stable Diffusion: the pictures of diffusers, and folders that diffusers reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers

import sfumato
from sfumato.checkpoints.layouts import LAYOUTS
from sfumato.core.types import Conditioning, Inputs
from sfumato.diffusion.guidance import Embedded
from sfumato.families.stable import predicts

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

MERGES = ["r e", "re d</w>", "h e", "a r", "he ar", "hear t</w>"]
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEADING = BETAS | {"steps_offset": 1, "timestep_spacing": "leading"}
SCHEDULERS = {
    "ddim": ("DDIMScheduler", LEADING | {"clip_sample": False, "set_alpha_to_one": False}),
    "plms": ("PNDMScheduler", LEADING | {"skip_prk_steps": True, "set_alpha_to_one": False}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", LEADING),
    "dpmpp_2m_linspace": ("DPMSolverMultistepScheduler", BETAS),
    "unipc": ("UniPCMultistepScheduler", LEADING),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", LEADING),
    "v": (
        "DDIMScheduler",
        LEADING | {"clip_sample": False, "set_alpha_to_one": False, "prediction_type": "v_prediction"},
    ),
    "euler_linspace": ("EulerDiscreteScheduler", BETAS),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", LEADING | {"use_karras_sigmas": True}),
    "euler_karras": ("EulerDiscreteScheduler", LEADING | {"use_karras_sigmas": True}),
}
LCM = {"lcm": ("LCMScheduler", BETAS)}
SCHEDULERS["eps2"] = SCHEDULERS["ddim"]  # the second version that predicts eps
TEXTS, NEGATIVES, SEEDS = ["red heart", "a heart, blue"], ["dull", "red"], [3, 4]


def tokenizer(folder: Path, pad: str) -> transformers.CLIPTokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{c}</w>" for c in alphabet), *(m.replace(" ", "") for m in MERGES)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n", "utf-8")
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    return transformers.CLIPTokenizer(*files, pad_token=pad, model_max_length=77)


def pipeline(path: Path, kind: str) -> Path:
    """A whole pipeline of tiny random nets as diffusers writes it; of the second version for kind "v"."""
    torch.manual_seed(0)
    second = kind in ("v", "eps2")
    words = tokenizer(path / "words", "!" if second else "<|endoftext|>")
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=(2, 4) if second else 4,
        use_linear_projection=second,
        norm_num_groups=32,
        time_cond_proj_dim=48 if kind == "lcm" else None,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=32,
    )
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=64,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=1,  # of width 64, as in all published towers
            hidden_act="gelu" if second else "quick_gelu",
            eos_token_id=2,
        )
    )
    for net in (unet, vae, text):
        for p in net.parameters():
            torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.1)
    name, options = (SCHEDULERS | LCM)[kind]
    kind_of = diffusers.LatentConsistencyModelPipeline if kind == "lcm" else diffusers.StableDiffusionPipeline
    kind_of(
        vae=vae,
        text_encoder=text,
        tokenizer=words,
        unet=unet,
        scheduler=getattr(diffusers, name)(**options),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(path / "p")
    return path / "p"


def drawn(path: Path, steps: int = 20) -> torch.Tensor:
    """What diffusers draws, (B, 3, H, W) in [0, 1]."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    return pipe(
        TEXTS,
        negative_prompt=NEGATIVES,
        num_inference_steps=steps,
        guidance_scale=7.5,
        generator=generators,
        output_type="pt",
    ).images


def ours(system: sfumato.System, steps: int = 20) -> torch.Tensor:
    options = system.resolve(steps=steps)
    inputs = Inputs(n=2, text=TEXTS, negative=NEGATIVES, size=(16, 16))
    return (system.run(inputs, options, seed=SEEDS).low_res + 1) / 2


@pytest.mark.parametrize("kind", list(SCHEDULERS))
def test_a_pipeline_draws_the_same_pictures(kind: str, tmp_path: Path) -> None:
    path = pipeline(tmp_path, kind)
    system = sfumato.load(path)
    expected = drawn(path)
    assert expected.std() > 0.05
    # 20 guided steps amplify the rounding of float32.
    torch.testing.assert_close(ours(system), expected, rtol=0, atol=1e-3)


def test_folders_are_written_bit_for_bit_and_drawn_by_both(tmp_path: Path) -> None:
    path = pipeline(tmp_path, "v")
    system = sfumato.load(path)
    sfumato.save(system, tmp_path / "again", layout="unet-diffusers")
    for part, name in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        before = load_file(path / part / f"{name}.safetensors")
        after = load_file(tmp_path / "again" / part / f"{name}.safetensors")
        after = {n.removeprefix("text_model."): v for n, v in after.items()}
        assert {n: v.shape for n, v in after.items()} == {n: v.shape for n, v in before.items()}
        assert all(torch.equal(v, after[n]) for n, v in before.items())
    assert torch.equal(drawn(tmp_path / "again", 3), drawn(path, 3))
    picture = ours(system, 3)
    assert torch.equal(ours(sfumato.load(tmp_path / "again"), 3), picture)
    sfumato.save(system, tmp_path / "native")
    assert torch.equal(ours(sfumato.load(tmp_path / "native"), 3), picture)


def test_levels_that_go_by_sigma_are_written_back(tmp_path: Path) -> None:
    system = sfumato.load(pipeline(tmp_path, "euler_karras"))
    sfumato.save(system, tmp_path / "again", layout="unet-diffusers")
    again = sfumato.load(tmp_path / "again").config.stages[0].defaults
    assert again == system.config.stages[0].defaults
    assert (again.spacing, again.spacing_knobs) == ("karras", {"ends": "leading", "offset": 1})


def test_old_text_files_have_a_prefix_and_positions(tmp_path: Path) -> None:
    path = pipeline(tmp_path, "ddim")
    picture = ours(sfumato.load(path), 2)
    file = path / "text_encoder/model.safetensors"
    state = {f"text_model.{n}": v for n, v in load_file(file).items()}
    save_file(state | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, file)
    assert torch.equal(ours(sfumato.load(path), 2), picture)


def test_what_is_no_system_yet_says_so(tmp_path: Path) -> None:
    path = pipeline(tmp_path, "ddim")
    with pytest.raises(ValueError, match="this system needs net, vae, text_encoder, and vae is missing"):
        sfumato.load(path / "unet")
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps(index | {"tokenizer": [None, None]}))
    with pytest.raises(ValueError, match="there is no CLIP vocabulary"):
        sfumato.load(path)
    (path / "model_index.json").write_text(json.dumps(index))
    config = path / "unet/config.json"
    system = sfumato.load(path)
    assert system.config.stages[0].defaults.guidance.scale == 7.5
    wide = diffusers.UNet2DConditionModel.from_config(json.loads(config.read_text()) | {"in_channels": 11})
    wide.save_pretrained(path / "unet")
    with pytest.raises(
        ValueError, match=r"this U-Net has 11 input channels .*: no system here tells it that"
    ):
        sfumato.load(path)


def test_another_system_is_not_written_as_stable_diffusion(tmp_path: Path) -> None:
    system = sfumato.load(pipeline(tmp_path, "ddim"))
    stage = system.config.stages[0]
    text = stage.conditioners[0]
    bare = replace(text, towers=(replace(text.towers[0], norm=False),))
    config = replace(system.config, stages=(replace(stage, conditioners=(bare,)),))
    with pytest.raises(ValueError, match="pipelines of Stable Diffusion have one stage with a text"):
        sfumato.save(replace(system, config=config), tmp_path / "a", layout="unet-diffusers")
    assert not (tmp_path / "a").exists()


def single(system: sfumato.System, layout: str, path: Path) -> None:
    """The networks of a system in one file, with what else such files hold."""
    nets = dict(system.parts.nets)
    state = {"betas": torch.zeros(1000), "model_ema.decay": torch.tensor(0.9999)}
    for part in LAYOUTS[layout].parts:
        net = nets[part.name]
        tensors, config = dict(net.state_dict()), net.config
        if layout == "sd2-compvis" and part.name == "text_encoder":
            # The published tower has one block more, of which nothing is read, and a projection.
            last = {n.replace("blocks.1", "blocks.2"): v + 1 for n, v in tensors.items() if "blocks.1" in n}
            tensors |= last | {"projection.weight": torch.ones(64, 64)}
            config = replace(config, depth=3, embed=64)
            state["cond_stage_model.model.logit_scale"] = torch.tensor(1.0)
        named = part.names(config).save(tensors, where=layout)
        state |= {part.prefix + name: v.contiguous().clone() for name, v in named.items()}
    save_file(state, path)


@pytest.mark.parametrize(
    ("layout", "kind", "config"),
    [
        ("sd1-compvis", "ddim", {"num_heads": 4}),
        ("sd2-compvis", "v", {"num_head_channels": 16, "parameterization": "v"}),
    ],
)
def test_single_files_draw_what_the_folder_draws(
    layout: str, kind: str, config: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sfumato.text.clip.packages", lambda folders: ())
    folder = sfumato.load(pipeline(tmp_path, kind))
    file = tmp_path / "alone" / "model.safetensors"
    file.parent.mkdir()
    single(folder, layout, file)
    with pytest.raises(ValueError, match=r"copy a folder 'tokenizer' .* or install open_clip"):
        sfumato.load(file, config=config)
    (tmp_path / "words").rename(file.parent / "tokenizer")
    system = sfumato.load(file, config=config)
    # The folder of the second version fills with "!", as the layout says of its files.
    torch.testing.assert_close(ours(system, 3), ours(folder, 3), rtol=0, atol=1e-5)
    torch.save({"state_dict": load_file(file), "global_step": 7}, file.with_suffix(".ckpt"))
    again = sfumato.load(file.with_suffix(".ckpt"), config=config)
    assert torch.equal(ours(again, 3), ours(system, 3))


def test_the_prediction_of_a_second_version_is_said_or_found(tmp_path: Path) -> None:
    single(sfumato.load(pipeline(tmp_path, "v")), "sd2-compvis", tmp_path / "words/a.safetensors")
    heads = {"num_head_channels": 16}
    with pytest.raises(ValueError, match="parameterization is 'x0'; allowed: eps, v"):
        sfumato.load(tmp_path / "words/a.safetensors", config={**heads, "parameterization": "x0"})
    said = sfumato.load(tmp_path / "words/a.safetensors", config={**heads, "parameterization": "eps"})
    assert said.config.stages[0].parameterization == "eps"
    assert "predicts eps, as was said" in said.about.summary
    found = sfumato.load(tmp_path / "words/a.safetensors", config=heads)
    assert found.config.stages[0].parameterization == "v"
    assert "predicts v, as found" in found.about.summary


def test_noise_returned_is_eps_and_a_picture_is_v() -> None:
    x0 = torch.linspace(-1, 1, 8)
    assert predicts(lambda x, t, cond: x + 0.3 * x0, Conditioning(), 4, 2) == "eps"
    assert predicts(lambda x, t, cond: 0.07 * x - x0.expand_as(x), Conditioning(), 4, 2) == "v"


@pytest.mark.parametrize(("layout", "kind"), [("sd1-compvis", "ddim"), ("sd2-compvis", "eps2")])
def test_single_files_are_written_and_read_by_both(layout: str, kind: str, tmp_path: Path) -> None:
    """The second version's tower lacks the block that nobody reads, as in files that diffusers converts."""
    path = pipeline(tmp_path, kind)
    system = sfumato.load(path)
    file = tmp_path / "words/model.safetensors"
    sfumato.save(system, file, layout=layout)
    heads = {"num_heads": 4} if layout == "sd1-compvis" else {"num_head_channels": 16}
    again = sfumato.load(file, config={**heads, "parameterization": "eps"})
    assert again.config.stages[0].conditioners == system.config.stages[0].conditioners
    for name, net in system.parts.nets.items():
        tensors = again.parts.nets[name].state_dict()
        assert all(torch.equal(v, tensors[n]) for n, v in net.state_dict().items())
    kind_of = diffusers.StableDiffusionPipeline
    single = kind_of.from_single_file(str(file), config=str(path), local_files_only=True)
    whole = kind_of.from_pretrained(path)
    for name in ("unet", "vae", "text_encoder"):
        theirs = getattr(single, name).state_dict()
        assert all(torch.equal(v, theirs[n]) for n, v in getattr(whole, name).state_dict().items())


def test_a_published_tower_is_shortened_for_a_folder(tmp_path: Path) -> None:
    folder = sfumato.load(pipeline(tmp_path, "v"))
    file = tmp_path / "words/a.safetensors"
    single(folder, "sd2-compvis", file)
    system = sfumato.load(file, config={"num_head_channels": 16, "parameterization": "v"})
    assert system.config.stages[0].conditioners[0].towers[0].skip == 1
    sfumato.save(system, tmp_path / "again", layout="unet-diffusers")
    torch.testing.assert_close(ours(sfumato.load(tmp_path / "again"), 3), ours(system, 3), rtol=0, atol=1e-5)
    drawn(tmp_path / "again", 1)
    with pytest.raises(ValueError, match="files of layout 'sd1-compvis' have another text towers"):
        sfumato.save(system, tmp_path / "b.safetensors", layout="sd1-compvis")
    sfumato.save(system, tmp_path / "words/b.safetensors", layout="sd2-compvis")
    before, after = (load_file(tmp_path / f"words/{n}.safetensors") for n in "ab")
    dropped = {"betas", "model_ema.decay", "cond_stage_model.model.logit_scale"}
    assert before.keys() - after.keys() == dropped
    assert all(torch.equal(v, before[n]) for n, v in after.items())


def test_a_latent_consistency_model_draws_the_same_pictures(tmp_path: Path) -> None:
    """Four of the fifty steps that it was trained on, the scale told to the net."""
    path = pipeline(tmp_path, "lcm")
    system = sfumato.load(path)
    options = system.config.stages[0].defaults
    assert (options.sampler, options.steps, options.guidance) == ("lcm", 4, Embedded(8.5))

    def theirs(folder: Path, scale: float) -> torch.Tensor:
        pipe = diffusers.LatentConsistencyModelPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
        asked = {"num_inference_steps": 4, "guidance_scale": scale, "output_type": "pt"}
        return pipe(TEXTS, generator=generators, **asked).images

    def mine(loaded: sfumato.System, scale: float) -> torch.Tensor:
        inputs = Inputs(n=2, text=TEXTS, size=(16, 16))
        return (loaded.run(inputs, loaded.resolve(guidance=scale), seed=SEEDS).low_res + 1) / 2

    expected = theirs(path, 8.5)
    assert expected.std() > 0.05
    torch.testing.assert_close(mine(system, 8.5), expected, rtol=0, atol=1e-3)
    other = mine(system, 2.0)
    assert (other - expected).abs().max() > 1e-2
    torch.testing.assert_close(other, theirs(path, 2.0), rtol=0, atol=1e-3)
    sfumato.save(system, tmp_path / "again", layout="unet-diffusers")
    assert torch.equal(theirs(tmp_path / "again", 8.5), expected)


def test_the_published_latent_consistency_net_both_ways() -> None:
    (part,) = LAYOUTS["unet-diffusers"].parts
    sizes = {"cross_attention_dim": 768, "attention_head_dim": 8, "time_cond_proj_dim": 256}
    with torch.device("meta"):
        state = diffusers.UNet2DConditionModel(**sizes).state_dict()
    config = part.config(part.settings({n: tuple(v.shape) for n, v in state.items()}, sizes))
    with torch.device("meta"):
        net = part.build(config)
    assert sum(p.numel() for p in net.parameters()) == 859_602_884
    rows = part.names(config)
    back = rows.save(rows.load(state, where="published"), where="ours")
    assert {n: v.shape for n, v in back.items()} == {n: v.shape for n, v in state.items()}
    assert {k: part.published(config, {})[k] for k in sizes} == sizes
