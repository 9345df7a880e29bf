"""SDXL: the pictures of diffusers' pipelines, base and refiner, and files that both read."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers

import sfumato
from sfumato import cli
from sfumato.core.image import from_pil, to_float
from sfumato.core.png import read_record
from sfumato.core.types import Inputs
from sfumato.families.sdxl import refined
from sfumato.nets.controlled import ControlUse
from sfumato.systems.adapting import controlled

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

TEXTS, NEGATIVES, SEEDS, STEPS = ["red heart", "a heart, blue"], ["dull", "red"], [3, 4], 10
SCHEDULER = {
    **{"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    **{"steps_offset": 1, "timestep_spacing": "leading"},
}
REFINER = {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False}
SIZES = {"original_size": (40, 24), "crop": (3, 5), "target_size": (20, 18)}


def words(folder: Path, pad: str) -> transformers.CLIPTokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{c}</w>" for c in alphabet), "<|startoftext|>", "<|endoftext|>"]
    tokens.insert(0, tokens.pop(tokens.index("!")))  # id 0, as in the published vocabulary
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", "utf-8")
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    return transformers.CLIPTokenizer(*files, pad_token=pad, model_max_length=77)


def pipeline(path: Path, *, refiner: bool) -> None:
    """A whole pipeline of tiny random nets as diffusers writes it; heads of width 64, as in published ones.

    Towers differ in width, by which diffusers tells them apart in a single file.
    """
    torch.manual_seed(1 + refiner)
    path.mkdir()
    tower = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 1}
    tower |= {"vocab_size": 514, "eos_token_id": 2}
    wide = tower | {"hidden_size": 128, "num_attention_heads": 2, "projection_dim": 128}
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**tower, hidden_act="quick_gelu"))
    text_2 = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**wide, hidden_act="gelu"))
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=128 if refiner else 192,
        attention_head_dim=(1, 1),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=128 + 256 * (5 if refiner else 6),
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        scaling_factor=0.13025,
    )
    for net in (unet, vae, text, text_2):
        for p in net.parameters():
            torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.1)
    if refiner:  # the second tower is the base's
        text_2 = transformers.CLIPTextModelWithProjection.from_pretrained(path.parent / "base/text_encoder_2")
    shared = {
        **{"unet": unet, "vae": vae, "text_encoder_2": text_2, "tokenizer_2": words(path / "w2", "!")},
        **{"scheduler": diffusers.EulerDiscreteScheduler(**SCHEDULER), "add_watermarker": False},
    }
    if refiner:
        diffusers.StableDiffusionXLImg2ImgPipeline(
            **shared, text_encoder=None, tokenizer=None, **REFINER
        ).save_pretrained(path)
    else:
        one = words(path / "w1", "<|endoftext|>")
        diffusers.StableDiffusionXLPipeline(**shared, text_encoder=text, tokenizer=one).save_pretrained(path)
    file = path / "scheduler/scheduler_config.json"
    # The published folders have what other schedulers left behind, too, which Euler's does not read.
    left = {"set_alpha_to_one": False, "skip_prk_steps": True, "clip_sample": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | left))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sdxl")
    pipeline(path / "base", refiner=False)
    pipeline(path / "refiner", refiner=True)
    return path


def drawn(pipe: diffusers.DiffusionPipeline, **options: object) -> torch.Tensor:
    """What diffusers draws, (B, 3, H, W) in [0, 1], or its latents."""
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    asked = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "output_type": "pt", **options}
    return pipe(TEXTS, generator=generators, **asked).images


def base(path: Path) -> diffusers.DiffusionPipeline:
    return diffusers.StableDiffusionXLPipeline.from_pretrained(path)


def refiner(path: Path) -> diffusers.DiffusionPipeline:
    return diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(path)


def ours(system: sfumato.System, steps: int = STEPS, **inputs: object) -> torch.Tensor:
    asked = Inputs(n=2, text=TEXTS, size=(16, 16), **inputs)
    return (system.run(asked, system.resolve(steps=steps), seed=SEEDS).low_res + 1) / 2


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    assert b.std() > 0.05
    torch.testing.assert_close(a, b, rtol=0, atol=1e-3)  # guided steps amplify the rounding of float32


def test_an_adapter_draws_the_same_pictures(folders: Path, tmp_path: Path) -> None:
    """Its maps are behind the change of resolution of the level without attention; for 4 of 10 steps."""
    net = diffusers.T2IAdapter(
        channels=[32, 64], num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter_xl"
    )
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    net.save_pretrained(tmp_path / "net")
    pixels = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8)
    picture = Image.fromarray(pixels.numpy())
    pipe = diffusers.StableDiffusionXLAdapterPipeline.from_pretrained(folders / "base", adapter=net)
    asked = {"image": [picture] * 2, "height": 16, "width": 16}
    expected = drawn(pipe, adapter_conditioning_scale=0.7, adapter_conditioning_factor=0.45, **asked)
    system = controlled(sfumato.load(folders / "base"), tmp_path / "net", ControlUse(scale=0.7, stop=0.45))
    hint = to_float(from_pil(picture))[None].expand(2, -1, -1, -1)
    same(ours(system, hint=hint), expected)
    assert (drawn(pipe, adapter_conditioning_scale=0.7, **asked) - expected).abs().max() > 0.01


def test_the_base_draws_the_same_pictures(folders: Path) -> None:
    """Zeros stand for no negative prompt; an empty one is another thing; sizes and crops are told."""
    pipe, system = base(folders / "base"), sfumato.load(folders / "base")
    options = system.config.stages[0].defaults
    assert (options.sampler, options.steps, options.guidance.scale) == ("euler", 50, 5.0)
    plain = drawn(pipe, height=16, width=16)
    same(ours(system), plain)
    told = {"original_size": (40, 24), "crops_coords_top_left": (3, 5), "target_size": (20, 18)}
    expected = drawn(pipe, height=16, width=16, negative_prompt=NEGATIVES, **told)
    same(ours(system, negative=NEGATIVES, **SIZES), expected)
    assert (expected - plain).abs().max() > 0.05
    assert (ours(system, negative=["", ""]) - plain).abs().max() > 0.05
    image = system.generate(TEXTS[0], seed=SEEDS[0], steps=STEPS, negative=NEGATIVES[0], size=16, **SIZES)
    assert ((to_float(from_pil(image[0])) + 1) / 2 - expected[0]).abs().max() < 3e-3  # of 255 steps


def test_the_refiner_edits_a_picture_as_diffusers_does(folders: Path) -> None:
    system = sfumato.load(folders / "refiner")
    picture = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latent = system.stages[0].codec.encode(picture)
    options = {"image": latent, "strength": 0.3, "negative_prompt": NEGATIVES, "aesthetic_score": 7.0}
    expected = drawn(refiner(folders / "refiner"), **options)
    # Ours does all the steps that are asked for, and diffusers the same share of them.
    asked = {"steps": 3, "image": picture, "strength": 0.3, "negative": NEGATIVES}
    same(ours(system, aesthetic=7.0, **asked), expected)
    assert (ours(system, **asked) - expected).abs().max() > 1e-3
    with pytest.raises(ValueError, match="there is none; give an image"):
        ours(system)


def test_the_refiner_goes_on_where_the_base_stops(folders: Path, tmp_path: Path) -> None:
    first, last = sfumato.load(folders / "base"), sfumato.load(folders / "refiner")
    system = refined(first, last)
    sizes = {"height": 16, "width": 16}
    latent = drawn(base(folders / "base"), **sizes, denoising_end=0.8, output_type="latent")
    vae = base(folders / "base").vae
    pipe = refiner(folders / "refiner")
    pipe.vae = vae
    expected = drawn(pipe, image=latent, denoising_start=0.8)
    same(ours(system), expected)
    assert (ours(first) - expected).abs().max() > 0.05
    assert sorted(system.parts.nets) == ["net", "refiner", "text_encoder", "text_encoder_2", "vae"]
    sfumato.save(system, tmp_path / "both")
    assert torch.equal(ours(sfumato.load(tmp_path / "both")), ours(system))
    with pytest.raises(ValueError, match="are not SDXL and its refiner"):
        refined(last, first)
    with pytest.raises(ValueError, match="pipelines of Stable Diffusion have one stage"):
        sfumato.save(system, tmp_path / "no", layout="unet-diffusers")


@pytest.mark.parametrize("kind", ["base", "refiner"])
def test_folders_and_files_are_written_bit_for_bit(kind: str, folders: Path, tmp_path: Path) -> None:
    """Read again, and by diffusers, with the same numbers."""
    system = sfumato.load(folders / kind)
    picture = torch.zeros(2, 3, 16, 16) if kind == "refiner" else None
    drawing = ours(system, 3, image=picture)
    sfumato.save(system, tmp_path / "folder", layout="unet-diffusers")
    assert torch.equal(ours(sfumato.load(tmp_path / "folder"), 3, image=picture), drawing)
    pipe = (base if kind == "base" else refiner)(tmp_path / "folder")
    layout = "sdxl-compvis" if kind == "base" else "sdxl-refiner-compvis"
    file = tmp_path / "model.safetensors"
    sfumato.save(system, file, layout=layout)
    copy_words(folders, tmp_path)
    again = sfumato.load(file)
    stage = again.config.stages[0]
    assert stage.conditioners[0] == system.config.stages[0].conditioners[0]
    pink, options = Image.new("RGB", (16, 16), (200, 40, 90)), {"size": 16, "steps": 4}
    one, other = (s.generate("a", image=pink, **options)[0] for s in (again, system))
    assert one.tobytes() == other.tobytes()
    for name, net in system.parts.nets.items():
        tensors = again.parts.nets[name].state_dict()
        assert all(torch.equal(v, tensors[n]) for n, v in net.state_dict().items())
    single = type(pipe).from_single_file(str(file), config=str(folders / kind), local_files_only=True)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        theirs, mine = getattr(single, name), getattr(pipe, name)
        assert (theirs is None) == (mine is None)
        if mine is not None:
            tensors = theirs.state_dict()
            assert all(torch.equal(v, tensors[n]) for n, v in mine.state_dict().items())


def copy_words(folders: Path, to: Path) -> None:
    (to / "tokenizer").mkdir()
    for name in ("vocab.json", "merges.txt"):
        text = (folders / "base/w1" / name).read_text("utf-8")
        (to / "tokenizer" / name).write_text(text, "utf-8")


def test_the_first_stage_computes_in_full_precision_where_its_config_says(
    folders: Path, tmp_path: Path
) -> None:
    system = sfumato.load(folders / "base", dtype=torch.float16)
    assert {p.dtype for p in system.parts.nets["vae"].parameters()} == {torch.float32}
    assert torch.float16 in {p.dtype for p in system.parts.nets["net"].parameters()}
    with torch.autocast("cpu", torch.bfloat16):
        assert system.stages[0].codec.decode(torch.zeros(1, 4, 8, 8)).dtype == torch.float32
    sfumato.save(sfumato.load(folders / "base"), tmp_path / "p", layout="unet-diffusers")
    config = json.loads((tmp_path / "p/vae/config.json").read_text())
    assert config["force_upcast"]
    (tmp_path / "p/vae/config.json").write_text(json.dumps(config | {"force_upcast": False}))
    half = sfumato.load(tmp_path / "p", dtype=torch.float16)
    assert torch.float16 in {p.dtype for p in half.parts.nets["vae"].parameters()}


def test_what_single_files_say_of_themselves(folders: Path, tmp_path: Path) -> None:
    """Markers of a prediction of v and of a rescaled schedule; averages on request; standalone tensors."""
    system, file = sfumato.load(folders / "base"), tmp_path / "a.safetensors"
    sfumato.save(system, file, layout="sdxl-compvis")
    copy_words(folders, tmp_path)
    state = load_file(file)
    averages = {
        f"model_ema.{n.removeprefix('model.').replace('.', '')}": v + 1
        for n, v in state.items()
        if n.startswith("model.diffusion_model.")
    }
    extra = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0), "denoiser.sigmas": torch.zeros(1000)}
    save_file(state | averages | extra, file)
    marked = sfumato.load(file)
    stage = marked.config.stages[0]
    assert (stage.parameterization, stage.schedule.zero_snr, stage.shape) == ("v", True, (4, 128, 128))
    averaged = sfumato.load(file, config={"use_ema": True, "parameterization": "eps", "zero_snr": False})
    assert averaged.config.stages[0].parameterization == "eps"
    weight = averaged.parts.nets["net"].state_dict()["conv_out.weight"]
    assert torch.equal(weight, system.parts.nets["net"].state_dict()["conv_out.weight"] + 1)
    stage = {n: v for n, v in state.items() if n.startswith("first_stage_model.")}
    for prefix in ("first_stage_model.", "vae.", ""):
        cut = {n.replace("first_stage_model.", prefix): v for n, v in stage.items()}
        save_file(cut, tmp_path / "vae.safetensors")
        vae = sfumato.load_nets(tmp_path / "vae.safetensors")["vae"]
        assert torch.equal(vae.decoder.conv_in.weight, system.parts.nets["vae"].decoder.conv_in.weight)
    save_file(state, file)
    with pytest.raises(ValueError, match=r"has no averages of its net \(no tensor 'model_ema.diffusion"):
        sfumato.load(file, config={"use_ema": True})
    with pytest.raises(ValueError, match="files of layout 'sdxl-compvis' have another schedule"):
        sfumato.save(marked, tmp_path / "b.safetensors", layout="sdxl-compvis")
    with pytest.raises(ValueError, match="files of layout 'sd1-compvis' have another text towers"):
        sfumato.save(system, tmp_path / "b.safetensors", layout="sd1-compvis")
    assert not (tmp_path / "b.safetensors").exists()


def test_half_precision_and_shards(folders: Path, tmp_path: Path) -> None:
    """Folders of a variant, whole and in shards with the names of both ages."""
    pipe = base(folders / "base").to(torch.float16)
    pictures = []
    for size, index in (("10GB", ""), ("200KB", "safetensors.index.fp16.json")):
        path = tmp_path / size
        pipe.save_pretrained(path, variant="fp16", max_shard_size=size)
        found = sorted(p.name for p in (path / "unet").glob("*.json"))
        assert any(index in name for name in found)
        pictures.append(ours(sfumato.load(path), 2))
        assert not (path / "unet/diffusion_pytorch_model.safetensors").exists()
    assert torch.equal(*pictures)


def test_a_long_prompt_is_cut_with_a_notice_or_read_in_pieces(folders: Path) -> None:
    system = sfumato.load(folders / "base")
    conditioner = system.stages[0].conditioner
    text = ["red heart and so on " * 8]
    with pytest.warns(UserWarning, match=r"has more than 75 tokens; '.* on' is not read: say less"):
        cut = conditioner(Inputs(text=text, size=(16, 16)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        long = conditioner(Inputs(text=text, size=(16, 16), reading=sfumato.Reading(chunks=3)))
    assert cut.tokens.shape == (1, 77, 192)
    assert long.tokens.shape == (1, 231, 192)
    torch.testing.assert_close(cut.tokens, long.tokens[:, :77])
    torch.testing.assert_close(cut.pooled, long.pooled)
    assert not torch.equal(long.tokens[:, 77:154], long.tokens[:, 154:])
    reading = sfumato.Reading(chunks=2)
    pictures = [system.generate(t, negative="dull", size=16, steps=2, reading=reading) for t in ("a", text)]
    assert pictures[0][0].tobytes() != pictures[1][0].tobytes()


def test_the_command_tells_what_is_cut_and_draws_again(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--steps", "1", "--size", "16", "--out", str(tmp_path), "--system", str(folders / "base")]
    text = "red heart and so on " * 8
    assert cli.main(["generate", text, *asked]) == 0
    said = capsys.readouterr()
    assert said.err.startswith("sfumato: the prompt 'red heart and so on red ")
    assert said.err.count("\n") == 1
    assert cli.main(["generate", text, "--prompt-chunks", "3", "--clip-skip", "1", *asked]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    record = read_record(Path(said.out.strip()))
    assert record["reading"] == {"weights": False, "chunks": 3, "skip": 1}
    assert cli.main(["rerun", said.out.strip(), "--system", str(folders / "base")]) == 0
    assert capsys.readouterr().out.endswith("same bytes\n")
