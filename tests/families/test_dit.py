"""DiT and SiT files as systems: the published ways to draw, plain loops beside them, wrong files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sfumato
from sfumato.checkpoints.foreign import Foreign
from sfumato.cli import main
from sfumato.core.random import Noise
from sfumato.core.types import Conditioning, Inputs
from sfumato.diffusion.guidance import CFG
from sfumato.diffusion.spacings import respaced_indices
from sfumato.families.assembly import system_of
from sfumato.nets.autoencoder import Autoencoder, AutoencoderConfig
from sfumato.nets.dit import DiT, DiTConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "dit"
CONFIG = {"num_heads": 4, "input_size": 8}
SHAPE = (2, 4, 8, 8)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def system(layout: str, **more: object) -> sfumato.System:
    return sfumato.load(GOLDEN / f"{layout}_model.safetensors", layout=layout, config=CONFIG, **more)


def latents(system: sfumato.System, labels: list[int], **request: object) -> torch.Tensor:
    options = system.resolve(**request)
    return system.run(Inputs(n=len(labels), label=torch.tensor(labels)), options, seed=5).latent


def guided(net: DiT, x: torch.Tensor, t: float, labels: list[int], scale: float) -> torch.Tensor:
    """forward_with_cfg in the references' way; the rows of cond."""
    label = torch.tensor([*labels, *[10] * len(labels)])
    out = net(torch.cat([x, x]), torch.full((2 * len(x),), t), Conditioning(label=label))
    cond, null = out.chunk(2)
    return torch.cat([null[:, :3] + scale * (cond[:, :3] - null[:, :3]), cond[:, 3:]], dim=1)


@pytest.mark.parametrize("scale", [1.0, 1.5, 4.0])
def test_ancestral_walk_is_a_plain_loop_of_the_reference_s_formulas(scale):
    """Respaced tables, learned range, guidance on three channels, in float32; 1e-5 of the largest value."""
    dit = system("dit")
    net, labels, steps = dit.parts.nets["net"], [3, 7], 10
    bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    kept = respaced_indices(1000, str(steps))
    noise = Noise([5, 6])
    x = noise(torch.zeros(SHAPE))
    for i in reversed(range(steps)):
        now, before = float(bar[kept[i]]), float(bar[kept[i - 1]]) if i else 1.0
        beta = 1 - now / before
        out = guided(net, x, kept[i], labels, scale)
        eps, share = out[:, :4], (out[:, 4:] + 1) / 2
        x0 = math.sqrt(1 / now) * x - math.sqrt(1 / now - 1) * eps
        mean = math.sqrt(before) * beta / (1 - now) * x0 + math.sqrt(1 - beta) * (1 - before) / (1 - now) * x
        if i:
            low = math.log(beta * (1 - before) / (1 - now))
            mean = mean + torch.exp(0.5 * (share * math.log(beta) + (1 - share) * low)) * noise(x)
        x = mean
    ours = latents(dit, labels, steps=steps, guidance=scale)
    assert (ours - x).abs().max() < 1e-5 * x.abs().max()


@pytest.mark.parametrize("sections", ["ddim10", "10"])
def test_ddim_walk_is_a_plain_loop(sections):
    dit = system("dit")
    net, labels = dit.parts.nets["net"], [3, 7]
    bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    kept = respaced_indices(1000, sections)
    x = Noise([5, 6])(torch.zeros(SHAPE))
    for i in reversed(range(10)):
        now, before = float(bar[kept[i]]), float(bar[kept[i - 1]]) if i else 1.0
        eps = guided(net, x, kept[i], labels, 2.0)[:, :4]
        x0 = (x - math.sqrt(1 - now) * eps) / math.sqrt(now)
        x = math.sqrt(before) * x0 + math.sqrt(1 - before) * eps
    request = {"steps": 10, "guidance": 2.0, "sampler": "ddim", "spacing_knobs": {"sections": sections}}
    ours = latents(dit, labels, **request)
    assert (ours - x).abs().max() < 1e-5 * x.abs().max()


def test_sit_walk_is_a_plain_loop():
    """Time from noise to data, unscaled; Heun-free Euler-Maruyama, last step without noise."""
    sit = system("sit")
    net, labels, steps = sit.parts.nets["net"], [3, 7], 8
    noise = Noise([5, 6])
    x = noise(torch.zeros(SHAPE))
    times = torch.linspace(0, 0.96, steps, dtype=torch.float64).tolist()
    for i, t in enumerate(times):
        v = guided(net, x, t, labels, 1.5)
        drift = v + (1 - t) * (t * v - x) / (1 - t)
        last = i + 1 == steps
        x = x + drift * (0.04 if last else times[1])
        x = x if last else x + math.sqrt(2 * (1 - t) * times[1]) * noise(x)
    ours = latents(sit, labels, steps=steps, guidance=1.5)
    assert (ours - x).abs().max() < 1e-5 * x.abs().max()
    ode = latents(sit, labels, steps=steps, guidance=1.5, sampler="heun", spacing_knobs={})
    assert ode.isfinite().all()
    assert not torch.allclose(ode, ours)


def test_defaults_are_the_published_ones():
    (stage,) = system("dit").config.stages
    assert (stage.defaults.sampler, stage.defaults.steps) == ("ddpm", 250)
    assert stage.defaults.guidance == CFG(4.0, channels=3)
    assert (stage.learned_var, stage.emits, stage.shape) == (True, "latent", (4, 8, 8))
    (stage,) = system("sit").config.stages
    assert stage.parameterization == "velocity"
    assert not stage.learned_var


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    net = Autoencoder(AutoencoderConfig(channels=32, mults=(1, 2), blocks=1))
    sfumato.save_nets({"vae": net}, tmp_path / "vae.pt", layout="vae-compvis")
    return tmp_path / "vae.pt"


def test_with_a_first_stage_it_draws_pictures(vae, tmp_path, capsys):
    dit = system("dit", vae=vae)
    assert dit.config.stages[0].codec.std == (1 / 0.18215,)
    image = dit.generate(label=[3], steps=2, seed=1)[0]
    assert image.size == (16, 16)
    sfumato.save(dit, tmp_path / "native")
    again = sfumato.load(tmp_path / "native")
    assert again.generate(label=[3], steps=2, seed=1)[0].tobytes() == image.tobytes()
    assert set(sfumato.load_nets(tmp_path / "native")) == {"net", "vae"}
    assert main(["info", str(tmp_path / "native")]) == 0
    assert "dit, " in (printed := capsys.readouterr().out)
    assert "original convention" in printed
    with pytest.raises(ValueError, match=r"label \[11\] holds a class outside 0\.\.9"):
        dit.generate(label=[11], steps=2)


def test_info_of_a_foreign_file(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    args = ["info", str(GOLDEN / "sit_model.safetensors"), "--layout", "sit"]
    assert main([*args, "--config", str(tmp_path / "config.json")]) == 0
    printed = capsys.readouterr().out
    assert "velocity" in printed
    assert "original convention" in printed


@pytest.mark.parametrize("layout", ["dit", "sit"])
def test_a_system_is_written_as_the_file_it_came_from(layout, tmp_path):
    sfumato.save(system(layout), tmp_path / "a.safetensors", layout=layout)
    written, original = (
        load_file(tmp_path / "a.safetensors"),
        load_file(GOLDEN / f"{layout}_model.safetensors"),
    )
    assert set(written) == set(original)
    assert all(torch.equal(v, original[k]) for k, v in written.items() if k != "pos_embed")
    torch.testing.assert_close(written["pos_embed"], original["pos_embed"], rtol=0, atol=1e-7)


def test_what_does_not_fit_is_one_clear_line(vae, tmp_path, tiny_system, tiny_folder):
    with pytest.raises(ValueError, match=r"diffusers' class computes time_shift 1\.0, this DiT 0\.0"):
        sfumato.save(system("dit", vae=vae), tmp_path / "p", layout="dit-diffusers")
    assert not (tmp_path / "p").exists()
    with pytest.raises(ValueError, match="DiTPipeline needs a first stage with one scale"):
        sfumato.save(system("dit"), tmp_path / "p", layout="dit-diffusers")
    stage = replace(tiny_system.config.stages[0], parameterization="velocity")
    config = replace(tiny_system.config, stages=(stage,))
    with pytest.raises(ValueError, match="computes text_dim None, this DiT 16"):
        sfumato.save(replace(tiny_system, config=config), tmp_path / "a.pt", layout="sit")
    with pytest.raises(ValueError, match="is no file of another program: leave out layout"):
        sfumato.load(tiny_folder, layout="dit")
    with pytest.raises(ValueError, match="there is no denoiser among vae; this is a first stage"):
        sfumato.load(vae)
    wide = Autoencoder(AutoencoderConfig(channels=32, mults=(1, 2), blocks=1, z_channels=3, embed_dim=3))
    sfumato.save_nets({"vae": wide}, tmp_path / "wide.pt", layout="vae-compvis")
    with pytest.raises(ValueError, match="the first stage has 3 latent channels, the DiT 4"):
        system("dit", vae=tmp_path / "wide.pt")
    save_file({"a": torch.ones(1)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="of no known layout"):
        sfumato.load(tmp_path / "b.safetensors")


def test_without_a_null_class_nothing_is_guided():
    net = DiT(DiTConfig(width=32, depth=1, heads=2, out_channels=8, num_classes=3, null_label=False))
    made = system_of(Foreign({"net": net}, {"net": "dit"}, {"net": {"input_size": 8}}))
    assert made.config.stages[0].defaults.guidance == CFG()
    assert latents(made, [0, 2], steps=2).shape == SHAPE
    with pytest.raises(ValueError, match=r"label 3 is out of range: this DiT has classes 0\.\.2$"):
        latents(made, [0, 2], steps=2, guidance=2.0)


def test_without_classes_a_dit_is_a_system_too():
    net = DiT(DiTConfig(width=32, depth=1, heads=2, out_channels=8))
    made = system_of(Foreign({"net": net}, {"net": "dit"}, {"net": {"input_size": 8}}))
    assert made.config.stages[0].conditioners == ()
    assert made.run(Inputs(n=2), made.resolve(steps=2), seed=0).latent.shape == SHAPE
