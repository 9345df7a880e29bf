"""ControlNets and T2I-Adapters: the pictures of diffusers, whole files, the command line."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import sfumato
from sfumato import cli
from sfumato.checkpoints.layouts import LAYOUTS
from sfumato.core.image import from_pil, to_float
from sfumato.core.types import Inputs
from sfumato.nets.controlled import ControlUse
from sfumato.systems.adapting import controlled

diffusers = pytest.importorskip("diffusers")

TEXTS, NEGATIVES, SEEDS, STEPS = ["red heart", "a heart, blue"], ["dull", "red"], [3, 4], 5


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
        for j, p in enumerate(net.parameters()):
            generator = torch.Generator().manual_seed(1000 * i + j)
            torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.1, generator=generator)
        net.save_pretrained(paths[-1])
    return paths


def theirs(pipe: Any, **options: Any) -> torch.Tensor:
    """What a pipeline of diffusers draws, (B, 3, H, W) in [0, 1]."""
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    options = {"num_inference_steps": STEPS, "guidance_scale": 7.5, "output_type": "pt"} | options
    images = pipe(TEXTS, negative_prompt=NEGATIVES, generator=generators, **options).images
    # The pipeline with adapters knows no "pt".
    return images if isinstance(images, torch.Tensor) else torch.from_numpy(images).permute(0, 3, 1, 2)


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
def test_controlled_pictures_are_the_same(name: str, tiny_stable: Path, controls: list[Path]) -> None:
    chosen, uses = zip(*USES[name], strict=True)
    nets = [diffusers.ControlNetModel.from_pretrained(controls[i]) for i in chosen]
    pictures = hints(len(uses))
    pipe = diffusers.StableDiffusionControlNetPipeline.from_pretrained(tiny_stable, controlnet=nets)
    expected = theirs(
        pipe,
        image=pictures,
        controlnet_conditioning_scale=[u.scale for u in uses],
        control_guidance_start=[u.start for u in uses],
        control_guidance_end=[u.stop for u in uses],
        guess_mode=uses[0].guess,
        height=16,
        width=16,
    )
    system = plain = sfumato.load(tiny_stable)
    for i, use in zip(chosen, uses, strict=True):
        system = controlled(system, controls[i], use)
    # Guided steps amplify the rounding of float32.
    hint = torch.cat([to_float(from_pil(picture)) for picture in pictures])[None].expand(2, -1, -1, -1)
    drawn = ours(system, hint=hint)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-3)
    assert (drawn - ours(plain)).abs().max() > 0.01
    assert system.fingerprint != plain.fingerprint


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two T2I-Adapters for it; the last one reads gray pictures."""
    paths = []
    for channels in (3, 1):
        paths.append(tmp_path_factory.mktemp("adapter") / "net")
        net = diffusers.T2IAdapter(
            in_channels=channels, channels=[32, 64], num_res_blocks=1, downscale_factor=2
        )
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(channels))
        net.save_pretrained(paths[-1])
    return paths


def summed(system: sfumato.System, *added: tuple[Path, float]) -> sfumato.System:
    for path, scale in added:
        system = controlled(system, path, ControlUse(scale=scale))
    return system


def test_pictures_with_t2i_adapters_are_the_same(tiny_stable: Path, adapters: list[Path]) -> None:
    colored, other = hints(2)
    gray = other.convert("L")
    nets = [diffusers.T2IAdapter.from_pretrained(path) for path in adapters]
    draw = diffusers.StableDiffusionAdapterPipeline.from_pretrained
    size = {"height": 16, "width": 16}
    one = theirs(draw(tiny_stable, adapter=nets[0]), image=[colored] * 2, **size)
    both = theirs(
        draw(tiny_stable, adapter=nets),
        image=[[colored] * 2, [gray] * 2],
        adapter_conditioning_scale=[0.7, 0.4],
        **size,
    )
    plain = sfumato.load(tiny_stable)
    system = controlled(plain, adapters[0])
    (seen,), pair = ([to_float(from_pil(v))[None] for v in some] for some in ([colored], [colored, gray]))
    drawn = ours(system, hint=seen.expand(2, -1, -1, -1))
    torch.testing.assert_close(drawn, one, rtol=0, atol=1e-3)
    assert (drawn - ours(plain)).abs().max() > 0.01
    assert system.fingerprint != plain.fingerprint
    system = summed(plain, (adapters[0], 0.7), (adapters[1], 0.4))
    drawn = ours(system, hint=torch.cat(pair, dim=1).expand(2, -1, -1, -1))
    torch.testing.assert_close(drawn, both, rtol=0, atol=1e-3)
    assert (drawn - one).abs().max() > 0.01
    with pytest.raises(ValueError, match="picture 2 of the hint has colors, and the net that reads it takes"):
        system.generate("red", hint=[colored, other], size=16, steps=2)


def test_a_pipeline_with_its_adapter(tiny_stable: Path, adapters: list[Path], tmp_path: Path) -> None:
    pipe = diffusers.StableDiffusionAdapterPipeline.from_pretrained(
        tiny_stable, adapter=diffusers.T2IAdapter.from_pretrained(adapters[0])
    )
    pipe.save_pretrained(tmp_path / "theirs")
    (picture,) = hints(1)
    pair = [sfumato.load(tmp_path / "theirs"), controlled(sfumato.load(tiny_stable), adapters[0])]
    sfumato.save(pair[0], tmp_path / "kept")
    drawn = [
        system.generate("red", hint=picture, size=16, steps=2)[0].tobytes()
        for system in (*pair, sfumato.load(tmp_path / "kept"))
    ]
    assert drawn[0] == drawn[1] == drawn[2]


def test_an_adapter_beside_a_control_net(
    tiny_stable: Path, controls: list[Path], adapters: list[Path]
) -> None:
    """Each reads its own picture and is switched off by its own scale, in either order."""
    plain, pictures = sfumato.load(tiny_stable), hints(2)
    hint = torch.cat([to_float(from_pil(v)) for v in pictures])[None].expand(2, -1, -1, -1)
    adapted = ours(summed(plain, (adapters[0], 0.7)), hint=hint[:, :3])
    steered = ours(summed(plain, (controls[0], 0.5)), hint=hint[:, 3:])
    for scales, alone in (((0.7, 0.0), adapted), ((0.0, 0.5), steered)):
        pair = (adapters[0], scales[0]), (controls[0], scales[1])
        torch.testing.assert_close(ours(summed(plain, *pair), hint=hint), alone, rtol=0, atol=1e-5)
        turned = hint.roll(3, dims=1)
        torch.testing.assert_close(ours(summed(plain, *pair[::-1]), hint=turned), alone, rtol=0, atol=1e-5)
    both = ours(summed(plain, (adapters[0], 0.7), (controls[0], 0.5)), hint=hint)
    assert min((both - adapted).abs().max(), (both - steered).abs().max()) > 0.01


def test_a_controlled_system_is_kept_and_drawn_from_pictures(
    tiny_stable: Path, controls: list[Path], tmp_path: Path
) -> None:
    system = controlled(sfumato.load(tiny_stable), controls[0], ControlUse(scale=0.5))
    (picture,) = hints(1)
    first = system.generate("red", hint=picture, size=16, steps=2)[0]
    assert first.tobytes() != system.generate("red", hint=hints(2)[1], size=16, steps=2)[0].tobytes()
    sfumato.save(system, tmp_path / "kept")
    with pytest.raises(ValueError, match="has no place for the ControlNets and T2I-Adapters of this system"):
        sfumato.save(system, tmp_path / "theirs", layout="unet-diffusers")
    again = sfumato.load(tmp_path / "kept")
    assert again.generate("red", hint=[picture], size=16, steps=2)[0].tobytes() == first.tobytes()
    with pytest.raises(
        ValueError, match="1 ControlNets or T2I-Adapters read a picture each, and there is no hint"
    ):
        system.generate("red", size=16, steps=2)
    with pytest.raises(
        ValueError, match=r"1 ControlNets or T2I-Adapters read .* 3 channels .* a hint of 6 channels"
    ):
        system.generate("red", hint=hints(2), size=16, steps=2)


def test_a_whole_file_with_its_control_net(tiny_stable: Path, controls: list[Path], tmp_path: Path) -> None:
    system = controlled(sfumato.load(tiny_stable), controls[0])
    state = {}
    for part in LAYOUTS["sd1-control-compvis"].parts:
        net = system.parts.nets["control1" if part.name == "control" else part.name]
        tensors = part.names(net.config).save(net.state_dict(), where="test")
        state |= {part.prefix + name: v.contiguous().clone() for name, v in tensors.items()}
    save_file(state, tmp_path / "whole.safetensors")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tiny_stable.parent / name, tmp_path)
    file, config = tmp_path / "whole.safetensors", {"num_heads": 4}
    assert len(sfumato.load(file, config=config).config.stages[0].controls) == 1
    again = controlled(sfumato.load(tiny_stable), sfumato.load_nets(file, config=config)["control"])
    hint = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(ours(again, hint=hint), ours(system, hint=hint), rtol=0, atol=1e-5)


def test_what_does_not_fit_is_not_controlled(tiny_stable: Path, adapters: list[Path], tmp_path: Path) -> None:
    system = sfumato.load(tiny_stable)
    other = diffusers.ControlNetModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=4,
        conditioning_embedding_out_channels=(8, 12),
    )
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="another base, a U-Net with tokens of width 24; this one has 32"):
        controlled(system, tmp_path / "other")
    with pytest.raises(ValueError, match="unet holds UNet, not one ControlNet or T2I-Adapter"):
        controlled(system, tiny_stable / "unet")
    with pytest.raises(ValueError, match="a T2I-Adapter has no guess mode; leave out guess"):
        controlled(system, adapters[0], ControlUse(guess=True))
    diffusers.T2IAdapter(channels=[32, 32], num_res_blocks=1, downscale_factor=2).save_pretrained(
        tmp_path / "narrow"
    )
    with pytest.raises(ValueError, match=r"takes maps of widths \(32, 32\) .* this one takes \(32, 64, 64\)"):
        controlled(system, tmp_path / "narrow")
    with pytest.raises(ValueError, match="the hint is 32x32 pixels; this T2I-Adapter needs 16x16 here"):
        ours(controlled(system, adapters[0]), hint=torch.rand(2, 3, 32, 32))
    with pytest.raises(ValueError, match=r"control from 0.5 to 0.5 of the walk; allowed: 0 <= start < stop"):
        ControlUse(start=0.5, stop=0.5)


def test_parts_of_a_system_say_what_they_are_for(
    tiny_stable: Path, controls: list[Path], adapters: list[Path], tmp_path: Path
) -> None:
    torch.save({"string_to_param": {"*": torch.ones(1, 8)}, "name": "x"}, tmp_path / "a.pt")
    for path, said in (
        (tmp_path / "a.pt", "it looks like an embedding of learned words"),
        (controls[0], "this is a ControlNet: add it to a system of its base with --control"),
        (adapters[0], "this is a T2I-Adapter: add it to a system of its base with --control"),
        (tiny_stable / "vae/diffusion_pytorch_model.safetensors", "this is a first stage: give it as vae"),
    ):
        with pytest.raises(ValueError, match=said) as error:
            sfumato.load(path)
        assert "\n" not in str(error.value)


def test_the_command_draws_with_all_of_it(
    tiny_stable: Path, controls: list[Path], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file({"cat": torch.ones(1, 32)}, tmp_path / "cat.safetensors")
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_"
    lora = {f"{layer}A.weight": torch.ones(2, 64), f"{layer}B.weight": torch.ones(64, 2)}
    save_file(lora, tmp_path / "lora.safetensors")
    hints(1)[0].save("hint.png")
    flags = ["--system", tiny_stable, "--adapter", "lora.safetensors", "--words", "cat.safetensors"]
    flags += ["--control", f"{controls[0]}=hint.png:0.5:0-0.8"]
    drawing = ["generate", "red cat", "--steps", "2", "--size", "16", "--out", "a.png"]
    assert cli.main([str(a) for a in drawing + flags]) == 0
    assert cli.main([str(a) for a in ["rerun", "a.png", *flags]]) == 0
    assert cli.main([str(a) for a in ["rerun", "a.png", *flags[:-1], f"{controls[0]}=hint.png:0.4"]]) == 1
    assert cli.main([str(a) for a in [*drawing, *flags[:-1], "nothing"]]) == 2
