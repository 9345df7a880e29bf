"""LoRA files and learned words on Stable Diffusion, against diffusers with merged weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sfumato
from sfumato import cli
from sfumato.checkpoints.layouts import LAYOUTS
from sfumato.checkpoints.lora_files import write_lora
from sfumato.core.types import Inputs
from sfumato.systems.adapting import adapted, read_for
from sfumato.systems.words import taught

diffusers = pytest.importorskip("diffusers")

TEXTS, NEGATIVES, SEEDS, STEPS = ["red heart", "a heart, blue"], ["dull", "red"], [3, 4], 5


def theirs(pipe: Any, **options: Any) -> torch.Tensor:
    """What a pipeline of diffusers draws, (B, 3, H, W) in [0, 1]."""
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    options = {"num_inference_steps": STEPS, "guidance_scale": 7.5, "output_type": "pt"} | options
    return pipe(TEXTS, negative_prompt=NEGATIVES, generator=generators, **options).images


def ours(system: sfumato.System, texts: list[str] = TEXTS, **inputs: Any) -> torch.Tensor:
    given = Inputs(n=2, text=texts, negative=NEGATIVES, size=(16, 16), **inputs)
    return (system.run(given, system.resolve(steps=STEPS), seed=SEEDS).low_res + 1) / 2


def pairs(
    layers: dict[str, torch.nn.Module], seed: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """Random (down, up, alpha) for layers of diffusers' nets, ranks and alphas of all kinds."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for i, (name, layer) in enumerate(layers.items()):
        rank, weight = 2 + i % 3, layer.weight
        down = torch.randn(rank, *weight.shape[1:], generator=generator) / 8
        up = torch.randn(weight.shape[0], rank, *(1,) * (weight.ndim - 2), generator=generator) / 4
        made[name] = down, up, float(1 + i % 4)
    return made


def chosen(net: torch.nn.Module, pattern: str) -> dict[str, torch.nn.Module]:
    kinds = torch.nn.Linear | torch.nn.Conv2d
    return {n: m for n, m in net.named_modules() if isinstance(m, kinds) and re.search(pattern, n)}


@torch.no_grad()
def merge(net: torch.nn.Module, made: dict[str, Any], scale: float) -> None:
    """W + scale alpha / rank up down, the definition."""
    for name, (down, up, alpha) in made.items():
        weight = net.get_submodule(name).weight
        weight += scale * alpha / len(down) * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)


def kohya(prefix: str, made: dict[str, Any]) -> dict[str, torch.Tensor]:
    state = {}
    for name, (down, up, alpha) in made.items():
        start = prefix + name.replace(".", "_")
        state |= {f"{start}.lora_down.weight": down, f"{start}.lora_up.weight": up}
        state[f"{start}.alpha"] = torch.tensor(alpha)
    return state


def peft(prefix: str, made: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Without alphas, and so with the factor in the second half."""
    state = {}
    for name, (down, up, alpha) in made.items():
        state |= {
            f"{prefix}{name}.lora_A.weight": down,
            f"{prefix}{name}.lora_B.weight": up * (alpha / len(down)),
        }
    return state


def processors(prefix: str, made: dict[str, Any]) -> dict[str, torch.Tensor]:
    state = {}
    for name, (down, up, alpha) in made.items():
        layer, which = name.removesuffix(".0").rsplit(".", 1)
        start = f"{prefix}{layer}.processor.{which}_lora"
        state |= {f"{start}.down.weight": down, f"{start}.up.weight": up * (alpha / len(down))}
    return state


EVERY = r"attn|proj_(in|out)|ff\.net|resnets|samplers"  # with the convolutions of LoCon
ATTENTION = r"attn[12]\.to_"
TEXT = r"q_proj|v_proj|out_proj|fc1"  # of q, k and v one has none
NATIVE = "base_model.model."
FORMS = {
    "kohya": (EVERY, lambda u, t: kohya("lora_unet_", u) | kohya("lora_te_text_model_", t)),
    "kohya-sdxl-names": (
        EVERY,
        lambda u, t: original(kohya("lora_unet_", u)) | kohya("lora_te1_text_model_", t),
    ),
    "peft": (EVERY, lambda u, t: peft("unet.", u) | peft("text_encoder.text_model.", t)),
    "peft-native": (
        EVERY,
        lambda u, t: peft("base_model.model.", u) | peft("base_model.model.text_model.", t),
    ),
    "processors": (ATTENTION, lambda u, t: processors("unet.", u)),
    "oldest": (ATTENTION, lambda u, t: processors("", u)),
}


def original(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The U-Net's names as single files have them, for this net of two levels of one block."""
    table = {
        "down_blocks_0_resnets_0": "input_blocks_1_0",
        "down_blocks_0_attentions_0": "input_blocks_1_1",
        "down_blocks_0_downsamplers_0_conv": "input_blocks_2_0_op",
        "down_blocks_1_resnets_0": "input_blocks_3_0",
        "mid_block_resnets_0": "middle_block_0",
        "mid_block_attentions_0": "middle_block_1",
        "mid_block_resnets_1": "middle_block_2",
        "up_blocks_0_resnets_0": "output_blocks_0_0",
        "up_blocks_0_resnets_1": "output_blocks_1_0",
        "up_blocks_0_upsamplers_0_conv": "output_blocks_1_1_conv",
        "up_blocks_1_resnets_0": "output_blocks_2_0",
        "up_blocks_1_attentions_0": "output_blocks_2_1",
        "up_blocks_1_resnets_1": "output_blocks_3_0",
        "up_blocks_1_attentions_1": "output_blocks_3_1",
        "conv1": "in_layers_2",
        "conv2": "out_layers_3",
        "time_emb_proj": "emb_layers_1",
        "conv_shortcut": "skip_connection",
    }
    renamed = {}
    for key, value in state.items():
        name = key
        for old, new in table.items():
            name = re.sub(rf"(?<![a-z0-9]){old}(?![a-z0-9])", new, name)
        renamed[name] = value
    assert not any("down_blocks" in name or "up_blocks" in name for name in renamed)
    return renamed


@pytest.mark.parametrize("form", sorted(FORMS))
def test_lora_files_draw_what_merged_weights_draw(form: str, tiny_stable: Path, tmp_path: Path) -> None:
    pattern, write = FORMS[form]
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_stable)
    both = pairs(chosen(pipe.unet, pattern), 0), pairs(chosen(pipe.text_encoder, TEXT), 1)
    save_file(write(*both), tmp_path / "lora.safetensors")
    merge(pipe.unet, both[0], 0.6)
    if "text" in str(write(*both).keys()):
        merge(pipe.text_encoder, both[1], 0.6)
    expected = theirs(pipe, height=16, width=16)
    system = sfumato.load(tiny_stable, adapter=tmp_path / "lora.safetensors", adapter_scale=0.6)
    drawn = ours(system)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-3)  # guided steps amplify the rounding
    assert (drawn - ours(sfumato.load(tiny_stable))).abs().max() > 0.01


def test_several_lora_files_add_up_and_are_written_in_both_forms(tiny_stable: Path, tmp_path: Path) -> None:
    system = sfumato.load(tiny_stable)
    unet = diffusers.UNet2DConditionModel.from_pretrained(tiny_stable / "unet")
    made = [pairs(chosen(unet, EVERY), seed) for seed in (0, 1)]
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    save_file(kohya("lora_unet_", made[0]), files[0])
    save_file(peft("unet.", made[1]), files[1])
    for one, scale in zip(made, (0.5, -0.25), strict=True):
        merge(unet, one, scale)
    both = adapted(system, files, scale=[0.5, -0.25])
    expected = LAYOUTS["unet-diffusers"].parts[0].names(system.parts.nets["net"].config)
    merged = expected.load(unet.state_dict(), where="merged")
    for name, value in both.parts.nets["net"].state_dict().items():
        torch.testing.assert_close(value, merged[name], rtol=1e-5, atol=1e-6)
    adapters = read_for(system, files[0])
    for form in ("kohya", "peft"):
        write_lora(
            tmp_path / f"{form}.safetensors",
            {"unet": adapters["net"]},
            {"unet": system.parts.nets["net"]},
            form,
        )
        again = adapted(system, tmp_path / f"{form}.safetensors").parts.nets["net"].state_dict()
        for name, value in adapted(system, files[0]).parts.nets["net"].state_dict().items():
            torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-6)
    first, written = load_file(files[0]), load_file(tmp_path / "kohya.safetensors")
    assert {n: v.shape for n, v in first.items()} == {n: v.shape for n, v in written.items()}
    assert all(torch.equal(v, written[n]) for n, v in first.items())


def test_lora_alpha_of_peft_is_read(tiny_stable: Path, tmp_path: Path) -> None:
    state = {"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 64)}
    state |= {n.replace("_A", "_B"): torch.ones(64, 2) for n in state}
    told = {"unet.lora_alpha": 8, "unet.r": 2}
    save_file(state, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(told)})
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "r": 2}))
    save_file(
        {n.replace("unet.", "base_model.model."): v for n, v in state.items()},
        folder / "adapter_model.safetensors",
    )
    for path in (tmp_path / "a.safetensors", folder):
        (pair,) = read_for(sfumato.load(tiny_stable), path)["net"].pairs.values()
        assert torch.equal(pair.delta(), torch.full((64, 64), 8 / 2 * 2.0))


def test_lora_tensors_without_a_layer_are_named(tiny_stable: Path, tmp_path: Path) -> None:
    system, file = sfumato.load(tiny_stable), tmp_path / "a.safetensors"
    unet = diffusers.UNet2DConditionModel.from_pretrained(tiny_stable / "unet")
    state = kohya("lora_unet_", pairs(chosen(unet, ATTENTION), 0))
    save_file(state | {"lora_unet_nowhere.alpha": torch.tensor(1.0)}, file)
    with pytest.raises(ValueError, match=r"1 tensors fit no layer of .*: 'lora_unet_nowhere.alpha'"):
        adapted(system, file)
    save_file({n: v[:, :3].clone() if "attn2_to_k.lora_down" in n else v for n, v in state.items()}, file)
    with pytest.raises(ValueError, match=r"for '.*attention2.token_k' lacks a half, or has other shapes"):
        adapted(system, file)
    save_file({"lora_unet_x.hada_w1_a": torch.ones(2, 2)}, file)
    with pytest.raises(ValueError, match="it looks like a LoHa or LoKr adapter: sfumato does not read these"):
        adapted(system, file)
    assert not any(type(m).__name__.startswith("Adapted") for m in system.parts.nets["net"].modules())


def words(path: Path, form: str, vectors: torch.Tensor) -> Path:
    if form == "a1111":
        data = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "x", "step": 3}
        torch.save(data, path / "cat.pt")
    elif form == "original":
        torch.save({"string_to_param": torch.nn.ParameterDict({"*": vectors})}, path / "cat.pt")
    else:
        key = {"a1111-safetensors": "emb_params", "diffusers": "cat"}[form]
        save_file({key: vectors}, path / "cat.safetensors")
    return next(path.glob("cat.*"))


@pytest.mark.parametrize("form", ["a1111", "original", "a1111-safetensors", "diffusers"])
def test_learned_words_draw_the_same(form: str, tiny_stable: Path, tmp_path: Path) -> None:
    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    file = words(tmp_path, form, vectors)
    system = taught(sfumato.load(tiny_stable), file)
    texts = ["a cat, red", "Cat heart catcat"]
    ids = system.parts.tokenizers["tokenizer"](texts)[0]
    old = sfumato.load(tiny_stable).parts.tokenizers["tokenizer"]
    size = old.vocab_size
    assert [i for i in ids[0].tolist() if i >= size] == [size, size + 1, size + 2]
    assert (ids[1] >= size).sum() == 3  # capitals do not count, and a part of a word is no word
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_stable)
    pipe.load_textual_inversion({"cat": vectors}, token="cat")
    pipe.set_progress_bar_config(disable=True)
    hidden = pipe.text_encoder(
        torch.tensor(
            [
                pipe.tokenizer(
                    pipe.maybe_convert_prompt(texts[0], pipe.tokenizer), padding="max_length"
                ).input_ids
            ]
        )
    )[0]
    cond = system.stages[0].conditioner(Inputs(n=2, text=texts))
    torch.testing.assert_close(cond.tokens[:1], hidden, rtol=1e-5, atol=1e-5)
    sfumato.save(system, tmp_path / "kept")
    again = sfumato.load(tmp_path / "kept").stages[0].conditioner(Inputs(n=2, text=texts))
    assert torch.equal(again.tokens, cond.tokens)
    with pytest.raises(ValueError, match="the word 'cat' was taught before"):
        taught(system, file, word="cat")
    with pytest.raises(ValueError, match="was taught words, which a CLIPTextModel has not"):
        sfumato.save(system, tmp_path / "p", layout="unet-diffusers")


def test_the_end_of_a_text_is_pooled_whatever_words_there_are(tiny_stable: Path, tmp_path: Path) -> None:
    system = sfumato.load(tiny_stable)
    changed = taught(system, words(tmp_path, "diffusers", torch.ones(1, 32)))
    net = changed.parts.nets["text_encoder"]
    ids = changed.parts.tokenizers["tokenizer"](["cat red", "red"])[0]
    found = net(ids)
    ends = [row.tolist().index(net.config.end) for row in ids]
    assert torch.equal(found.pooled, found.last[[0, 1], ends])
    plain = system.parts.nets["text_encoder"](ids[1:])
    torch.testing.assert_close(plain.pooled, found.pooled[1:])


def test_words_of_another_base_are_refused(tiny_stable: Path, tmp_path: Path) -> None:
    system = sfumato.load(tiny_stable)
    save_file({"clip_l": torch.ones(2, 24), "clip_g": torch.ones(2, 40)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"vectors of width 24, 40, and .* of width 32: it is"):
        taught(system, tmp_path / "a.safetensors")
    save_file({"clip_l": torch.ones(2, 40), "clip_g": torch.ones(2, 32)}, tmp_path / "a.safetensors")
    assert taught(system, tmp_path / "a.safetensors").parts.nets["text_encoder"].tokens.weight[-1].eq(1).all()
    with pytest.raises(
        ValueError, match=r"is no embedding of textual inversion: it looks like a first stage"
    ):
        taught(system, tiny_stable / "vae/diffusion_pytorch_model.safetensors")


KINDS = {
    "a LoRA": {"lora_unet_x.lora_down.weight": torch.ones(2, 2), "b": torch.ones(1)},
    "an embedding of learned words": {"emb_params": torch.ones(2, 8)},
    "a T2I-Adapter": {"adapter.body.0.resnets.0.block1.weight": torch.ones(1), "b": torch.ones(1)},
    "Flux": {"double_blocks.0.img_attn.qkv.weight": torch.ones(1), "b": torch.ones(1)},
}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_what_is_no_system_is_called_by_its_name(kind: str, tmp_path: Path, capsys: Any) -> None:
    save_file(KINDS[kind], tmp_path / "a.safetensors")
    for verb in (["info"], ["generate", "x", "--system"]):
        assert cli.main([*verb, str(tmp_path / "a.safetensors")]) == 2
        said = capsys.readouterr().err
        assert f"it looks like {kind}: " in said
        assert said.count("\n") == 1
