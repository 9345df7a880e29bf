"""guided-diffusion's files as systems: walks beside plain loops of the reference's formulas, wrong files."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

import sfumato
from sfumato import cli
from sfumato.checkpoints.native import Folder, Parts, write_folder
from sfumato.core.image import load
from sfumato.core.random import Noise
from sfumato.core.types import Conditioning, Inputs
from sfumato.diffusion.guidance import Guided
from sfumato.diffusion.spacings import respaced_indices
from sfumato.evaluation.npz import PictureFile
from sfumato.evaluation.pictures import Generated
from sfumato.nets.attention import AttentionConfig
from sfumato.nets.blocks import BlockConfig
from sfumato.nets.classifier import NoisyClassifier, NoisyClassifierConfig
from sfumato.nets.embedding import EmbedderConfig, EmbeddingConfig, Feature
from sfumato.nets.unet import UNet, UNetConfig, levels

HEADS = {"num_head_channels": 16, "image_size": 8}
SEEDS = [5, 6]


def unet(inputs: int = 3, outputs: int = 6, classes: int | None = 4, width: int = 32) -> UNetConfig:
    labels = EmbedderConfig(kind="table", features=(Feature(field="label", dim=classes or 1),))
    attention = AttentionConfig(head_dim=16)
    return UNetConfig(
        in_channels=inputs,
        out_channels=outputs,
        levels=levels(width, (1, 1), 1, attention=attention, at=(1,)),
        middle=attention,
        embedding=EmbeddingConfig(time_dim=width, dim=4 * width, extras=(labels,) if classes else ()),
        block=BlockConfig(film=True, resample="residual"),
    )


def stirred(kind: type[torch.nn.Module], config: object) -> torch.nn.Module:
    """The same random weights each time, none of them zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = kind(config)
        for p in net.parameters():
            p.data += 0.1 * torch.randn_like(p)
    return net.eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adm")
    shapes = {
        "base": unet(),
        "free": unet(classes=None),
        "fixed": unet(outputs=3, classes=None),
        "up": unet(inputs=6),
        "odd": unet(inputs=4),
    }
    for name, config in shapes.items():
        sfumato.save_nets({"net": stirred(UNet, config)}, folder / f"{name}.pt", layout="adm")
    return folder


def classifier(classes: int = 4, size: int = 8) -> dict[str, torch.nn.Module]:
    config = NoisyClassifierConfig(encoder=unet(classes=None), num_classes=classes, size=size, head_dim=16)
    return {"classifier": stirred(NoisyClassifier, config)}


def bars(schedule: str, steps: int) -> Tensor:
    if schedule == "linear":
        betas = torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64)
    else:
        f = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        betas = torch.tensor([min(1 - b / a, 0.999) for a, b in pairwise(f)], dtype=torch.float64)
    return torch.cumprod(1 - betas, 0)


def walk(
    net, label, schedule, respacing, *, clip, ddim=False, eta=0.0, learned=True, grad=None, scale=0.0
) -> Tensor:
    """p_sample_loop and ddim_sample_loop over the spaced tables, in float64 but for the net."""
    kept, noise = respaced_indices(1000, respacing), Noise(SEEDS)
    bar = bars(schedule, 1000)[kept]
    before = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
    beta = 1 - bar / before
    small = beta * (1 - before) / (1 - bar)
    x = noise(torch.zeros(2, 3, 8, 8)).double()
    for i in reversed(range(len(kept))):
        out = net(x.float(), torch.full((2,), float(kept[i])), Conditioning(label=label)).double()
        e, v = out.chunk(2, 1) if learned else (out, None)
        pull = scale * grad(x.float(), kept[i]).double() if grad is not None else 0.0
        x0 = (x - (1 - bar[i]).sqrt() * e) / bar[i].sqrt()
        x0 = x0.clamp(-1, 1) if clip else x0
        if ddim:
            e = (x - bar[i].sqrt() * x0) / (1 - bar[i]).sqrt() - (1 - bar[i]).sqrt() * pull
            x0 = (x - (1 - bar[i]).sqrt() * e) / bar[i].sqrt()
            spread = eta * small[i].sqrt()
            x = before[i].sqrt() * x0 + (1 - before[i] - spread**2).clamp_min(0).sqrt() * e
            x = x + spread * noise(x.float()).double() if i and eta else x
            continue
        mean = beta[i] * before[i].sqrt() / (1 - bar[i]) * x0
        mean = mean + (1 - before[i]) * (1 - beta[i]).sqrt() / (1 - bar[i]) * x
        low = small[max(i, 1)].log()
        log_var = (
            (v + 1) / 2 * beta[i].log() + (1 - (v + 1) / 2) * low if v is not None else beta[max(i, 1)].log()
        )
        x = mean + log_var.exp() * pull
        x = x + (0.5 * log_var).exp() * noise(x.float()).double() if i else x
    return x


WALKS = {
    "ancestral": ("base", "linear", "3", {"clip": True}),
    "cosine, unclipped": ("base", "cosine", "ddim4", {"clip": False}),
    "sections": ("free", "cosine", "2,1", {"clip": True}),
    "ddim": ("base", "linear", "3", {"clip": True, "ddim": True}),
    "ddim, eta": ("base", "linear", "3", {"clip": True, "ddim": True, "eta": 0.7}),
    "fixed large": ("fixed", "linear", "3", {"clip": True, "learned": False}),
    "classifier": ("base", "cosine", "3", {"clip": True, "scale": 3.0}),
    "classifier, ddim": ("free", "linear", "ddim4", {"clip": True, "ddim": True, "scale": 1.5}),
}


@pytest.mark.parametrize("case", WALKS)
@torch.no_grad()
def test_a_walk_is_a_plain_loop_of_the_reference_s_formulas(case, files):
    """The nets round in float32, and the first step of the cosine divides that by an alpha of 5e-5."""
    name, schedule, respacing, how = WALKS[case]
    config = HEADS | {"noise_schedule": schedule, "timestep_respacing": respacing}
    config |= {"clip_denoised": how["clip"], "use_ddim": how.get("ddim", False)}
    guide = classifier() if "scale" in how else None
    system = sfumato.load(files / f"{name}.pt", config=config)
    system = sfumato.guided(system, guide) if guide else system
    label = torch.tensor([1, 3])

    def grad(x: Tensor, t: int) -> Tensor:
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            told = guide["classifier"](x, torch.full((2,), float(t)))
            told.log_softmax(1)[range(2), label].sum().backward()
        return x.grad

    knobs = {"knobs": {"eta": how["eta"]}} if "eta" in how else {}
    scale = {"guidance": how["scale"]} if guide else {}
    options = system.resolve(**knobs, **scale)
    done = system.run(Inputs(n=2, label=label), options, seed=SEEDS).low_res
    told = label if name == "base" else None
    expected = walk(system.parts.nets["net"], told, schedule, respacing, grad=grad if guide else None, **how)
    assert expected.std() > 0.1
    torch.testing.assert_close(done, expected.clamp(-1, 1).float(), rtol=0, atol=5e-4)


@torch.no_grad()
def test_an_upsampler_reads_the_picture_enlarged_without_corners(files):
    config = HEADS | {"noise_schedule": "linear", "timestep_respacing": "3", "small_size": 4}
    system = sfumato.load(files / "up.pt", config=config)
    (stage,) = system.stages
    small = torch.rand(2, 3, 4, 4) * 2 - 1
    cond = stage.conditioner(Inputs(n=2, low_res=small, label=torch.tensor([0, 1])))
    expected = torch.nn.functional.interpolate(small, (8, 8), mode="bilinear", align_corners=False)
    assert torch.equal(cond.concat, expected)
    assert (stage.name, stage.pixels) == ("upsampler", (8, 8))
    assert system.run(Inputs(n=2, low_res=small, label=torch.tensor([0, 1]))).low_res.shape == (2, 3, 8, 8)


def test_a_guided_system_is_kept_with_its_guide(files, tmp_path):
    config = HEADS | {"noise_schedule": "linear", "timestep_respacing": "2"}
    system = sfumato.guided(sfumato.load(files / "base.pt", config=config), classifier(), scale=2.5)
    assert system.stages[0].defaults.guidance == Guided(2.5)
    sfumato.save(system, tmp_path / "system")
    again = sfumato.load(tmp_path / "system")
    asked = Inputs(n=1, label=torch.tensor([2]))
    first, free = (again.run(asked, again.resolve(guidance=g)).low_res for g in (2.5, 0))
    # Convolutions sum in another order over memory that is laid out otherwise, and x0 divides by alpha.
    torch.testing.assert_close(first, system.run(asked).low_res, rtol=0, atol=2e-3)
    assert (first - free).abs().max() > 2e-2
    assert again.generate(label=[2])[0].size == (8, 8)


def test_published_files_say_steps_schedule_and_scale(files):
    """By the name alone; 512 px would take a large net, the table does not."""
    path = files / "128x128_diffusion.pt"
    sfumato.save_nets({"net": UNet(unet(width=64))}, path, layout="adm", config={})
    system = sfumato.load(path, config={"num_heads": 4})
    (stage,) = system.config.stages
    assert (stage.shape, stage.defaults.steps, stage.schedule.formula) == ((3, 128, 128), 250, "linear")
    assert system.resolve(steps=20)["base"].steps == 20


MISTAKES = {
    "no schedule": ("base", {}, {}, r"no tensor tells the noise schedule: give config=\{'noise_schedule'"),
    "a schedule": ("base", {"noise_schedule": "sine"}, {}, r"unknown noise_schedule 'sine'"),
    "a size": (
        "base",
        {"noise_schedule": "linear", "image_size": None},
        {},
        r"no tensor tells the size of the",
    ),
    "channels": ("odd", {"noise_schedule": "linear"}, {}, r"has 4 input and 6 output channels"),
    "a multiple": (
        "up",
        {"noise_schedule": "linear", "small_size": 5},
        {},
        r"small_size is 5, and image_size",
    ),
    "classes": ("base", {"noise_schedule": "linear"}, {"classes": 5}, r"knows 5 classes and the denoiser 4;"),
    "pictures": (
        "base",
        {"noise_schedule": "linear"},
        {"size": 16},
        r"of 16x16 with 3 channels, and",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(case, files):
    name, config, guide, message = MISTAKES[case]
    nets = classifier(**guide)

    def make() -> None:
        sfumato.guided(sfumato.load(files / f"{name}.pt", config=HEADS | config), nets)

    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_a_request_that_the_system_cannot_take_is_one_line(files):
    config = HEADS | {"noise_schedule": "linear", "timestep_respacing": "2"}
    base = sfumato.load(files / "base.pt", config=config)
    free = sfumato.guided(sfumato.load(files / "free.pt", config=config), classifier())
    with pytest.raises(ValueError, match="always told a class: give label, from 0 to 3"):
        base.generate()
    with pytest.raises(ValueError, match=r"guidance 3 needs something to leave out"):
        base.generate(label=[1], guidance=3.0)
    with pytest.raises(ValueError, match=r"this stage has no classifier or CLIP that could guide it"):
        base.generate(label=[1], guidance=Guided(2.0))
    with pytest.raises(ValueError, match=r"label is none; give one for each of 1 pictures, from 0 to 3"):
        free.generate()
    with pytest.raises(ValueError, match=r"label is \[4\]; give one"):
        free.generate(label=[4])
    with pytest.raises(ValueError, match=r"this stage draws 12x12 with 3; choose one of the same size"):
        free.generate(label=[1], size=12)
    with pytest.raises(ValueError, match="a guide is a noisy classifier, or both towers of a noised CLIP; g"):
        sfumato.guided(base, base.parts.nets)


def test_the_command_takes_a_class_and_a_guide(files, tmp_path, monkeypatch, capsys):
    config = HEADS | {"noise_schedule": "linear", "timestep_respacing": "2"}
    sfumato.save(sfumato.load(files / "base.pt", config=config), tmp_path / "system")
    net = classifier()["classifier"]
    write_folder(tmp_path / "run" / "system", Folder(Parts({"classifier": net}), {}, {}, ""))
    monkeypatch.chdir(tmp_path)
    command = ["--system", "system", "--device", "cpu"]
    for out, flags in (("a", ["--guide", "run"]), ("b", ["--guide", "run", "--guidance", "0"]), ("c", [])):
        drawn = ["generate", "", "--label", "2", "--out", f"{out}.png", *flags, *command]
        assert cli.main(drawn) == 0
    assert cli.main(["rerun", "a.png", "--guide", "run", *command]) == 0
    a, b, c = (load(tmp_path / f"{name}.png").tobytes() for name in "abc")
    assert a != b == c
    assert cli.main(["generate", "", "--guide", "run", *command]) == 2
    assert "the classifier guides to a class and label is none" in capsys.readouterr().err


def test_samples_for_the_evaluator_go_through_the_classes(files, tmp_path):
    config = HEADS | {"noise_schedule": "linear", "timestep_respacing": "2"}
    free = sfumato.guided(sfumato.load(files / "free.pt", config=config), classifier())
    for system in (sfumato.load(files / "base.pt", config=config), free):
        drawn = Generated(system, n=6, seed=3, texts=None, request={})
        with PictureFile(tmp_path / "s.npz", (6, *drawn.size)) as file:
            file.add(drawn(range(6)))
        arrays = np.load(tmp_path / "s.npz")["arr_0"]
        assert (arrays.shape, arrays.dtype) == ((6, 8, 8, 3), np.uint8)
        alone = system.generate(label=[1], seed=8)[0]  # the sixth picture, of class 5 - 4
        assert np.abs(arrays[5].astype(int) - np.asarray(alone)).max() <= 1
