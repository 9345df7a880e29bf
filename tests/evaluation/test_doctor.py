"""The doctor against systems that are exact by construction, and broken on purpose in one part each."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from PIL import Image
from torch import nn

from sfumato import cli
from sfumato.checkpoints.native import Parts
from sfumato.core.image import to_float
from sfumato.core.png import save_png
from sfumato.core.types import Conditioning
from sfumato.data.datasets import ImageFolder
from sfumato.diffusion.guidance import CFG
from sfumato.diffusion.parameterization import PARAMETERIZATIONS, target
from sfumato.diffusion.schedules import SCHEDULES, Flow
from sfumato.evaluation.doctor import Examination, examine
from sfumato.nets.autoencoder import Autoencoder, AutoencoderConfig, DiagonalGaussian
from sfumato.nets.text import TextTransformer, TextTransformerConfig
from sfumato.systems.conditioning import LabelConfig, TokenTextConfig
from sfumato.systems.config import LatentsConfig, PixelsConfig, StageConfig, SystemConfig
from sfumato.systems.options import SampleOptions
from sfumato.systems.system import assemble
from sfumato.text.tokenizers import Tokenizer

COUNT, SIDE = 8, 8
WORDS = ("red", "green", "blue", "black", "white", "gray", "pink", "brown")
PLAN = Examination(pictures=COUNT, batch=COUNT, steps=12)
LATENTS = LatentsConfig(mean=(0.2,), std=(1.15,))  # of evenly distributed pixels, times 2


class Blocks(Autoencoder):
    """A lossless first stage: blocks of 2x2 pixels become channels, scaled and shifted."""

    def __init__(self) -> None:
        super().__init__(
            AutoencoderConfig(
                channels=4,
                mults=(1, 1),
                blocks=0,
                z_channels=12,
                embed_dim=12,
                norm_groups=2,
                mid_attention=False,
            )
        )

    def encode(self, image):
        mean = nn.functional.pixel_unshuffle(image, 2) * 2.0 + 0.2
        return DiagonalGaussian(mean, torch.full_like(mean, -30.0))

    def decode(self, z, *, quantize=True):
        return nn.functional.pixel_shuffle((z - 0.2) / 2.0, 2)


class Posterior(nn.Module):
    """The exact denoiser of a known set of pictures: E[x0 | x_t, what is told], in a parameterization.

    p(k | x_t, c) is proportional to N(x_t; alpha z_k, sigma^2) p(k | c), where p(k | c) is nearly all on the
    picture whose key, a label or a text embedding, is nearest to c, or even for what is null.
    """

    def __init__(self, clean, keys, null, schedule, speaks) -> None:
        super().__init__()
        self.clean = nn.Parameter(clean)
        self.register_buffer("keys", keys)
        self.register_buffer("null", null)
        self.schedule, self.speaks = schedule, speaks

    def forward(self, x, t, cond: Conditioning):
        level = self.schedule((t / getattr(self.schedule, "multiplier", 1.0)).double())
        alpha, sigma = (v.float().view(-1, 1) for v in (level.alpha, level.sigma.clamp_min(1e-3)))
        distance = (x.flatten(1)[:, None] - alpha[..., None] * self.clean.flatten(1)).square().sum(-1)
        logits = -distance / (2 * sigma**2) + self.prior(cond, len(x))
        x0 = (logits.softmax(1) @ self.clean.flatten(1)).view_as(x)
        eps = (x - alpha.view(-1, 1, 1, 1) * x0) / sigma.view(-1, 1, 1, 1)
        return target(PARAMETERIZATIONS[self.speaks], level, x0, eps)

    def prior(self, cond, n):
        told = cond.pooled if cond.pooled is not None else cond.label
        if told is None:
            return torch.zeros(n, COUNT)
        told = told.float().view(n, -1)
        near = torch.cdist(told, torch.cat([self.keys, self.null])).argmin(1)
        prior = torch.full((n, COUNT), 0.01).log()
        for row, k in enumerate(near.tolist()):
            prior[row, slice(None) if k == COUNT else k] = 0.0
        return prior


@pytest.fixture
def folder(tmp_path):
    """Eight pictures of random blots with captions and labels."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for i, word in enumerate(WORDS):
        pixels = torch.randint(0, 256, (3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
        save_png(tmp_path / "data" / f"{i}.png", pixels)
        rows.append({"file_name": f"{i}.png", "text": f"{word} blot", "label": i})
    write(tmp_path / "data", rows)
    return tmp_path / "data"


def write(folder, rows):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def tower(tokenizer, seed):
    torch.manual_seed(seed)
    config = TextTransformerConfig(vocab_size=tokenizer.vocab_size, context=8, width=16, depth=1, heads=2)
    return TextTransformer(config).eval()


def a_system(
    folder, told="text", *, declared="eps", speaks=None, codec=LATENTS, encoder_seed=1, autoencoder=None
):
    """An exact system whose parts can be exchanged for wrong ones after its denoiser was made."""
    schedule = Flow(multiplier=1000.0) if declared == "flow" else SCHEDULES["scaled_linear"](steps=1000)
    images = to_float(ImageFolder(folder).images())
    with torch.no_grad():
        if isinstance(codec, PixelsConfig):
            clean = images
        else:
            clean = (Blocks().encode(images).mean - LATENTS.mean[0]) / LATENTS.std[0]
        tokenizer = Tokenizer.train([f"{word} blot" for word in WORDS], vocab_size=120, context=8)
        embed = lambda texts: tower(tokenizer, 1)(*tokenizer(texts))[1]  # noqa: E731
        if told == "text":
            keys, null = embed([f"{word} blot" for word in WORDS]), embed([""])
        else:
            keys, null = torch.arange(COUNT).float()[:, None], torch.tensor([[float(COUNT + 1)]])
    conditioner = {"text": (TokenTextConfig(),), "label": (LabelConfig(num_classes=COUNT + 1),), "": ()}[told]
    stage = StageConfig(
        schedule=schedule,
        parameterization=declared,
        conditioners=conditioner,
        codec=codec,
        shape=tuple(clean.shape[1:]),
        defaults=SampleOptions(sampler="ddim", steps=4, guidance=CFG(2.0)),
    )
    nets = {
        "denoiser": Posterior(clean, keys, null, schedule, speaks or declared),
        "autoencoder": autoencoder or Blocks(),
        "text": tower(tokenizer, encoder_seed),
    }
    return assemble(SystemConfig(stages=(stage,)), Parts(nets, {"text": tokenizer}))


def failed(diagnosis):
    return [check.name for check in diagnosis.checks if check.passed is False]


@pytest.mark.parametrize("told", ["text", "label", ""])
@pytest.mark.parametrize("declared", ["eps", "v", "flow"])
def test_a_system_that_is_right_passes_every_check(told, declared, folder):
    diagnosis = examine(a_system(folder, told, declared=declared), folder, examination=PLAN)
    assert failed(diagnosis) == []
    assert diagnosis.broken is None
    assert diagnosis.line() == "nothing is broken"
    names = {check.name for check in diagnosis.checks if check.passed}
    assert {"decode(encode) PSNR", "latent mean and std", "prediction", "x0 from noise"} <= names
    assert ("captions and pictures" in names) == (told == "text")
    assert ("labels and pictures" in names) == (told == "label")
    assert ("guidance" in names) == bool(told)


def test_a_system_on_pixels_has_no_latent_scale(folder):
    diagnosis = examine(a_system(folder, codec=PixelsConfig()), folder, examination=PLAN)
    assert failed(diagnosis) == []
    assert {c.name: c.passed for c in diagnosis.checks}["latent mean and std"] is None


@pytest.mark.parametrize("factor", [1 / 5.5, 5.5, 1.6])
def test_a_wrong_latent_scale_is_named_with_the_right_one(factor, folder):
    system = a_system(folder, codec=replace(LATENTS, std=(1.15 * factor,)))
    diagnosis = examine(system, folder, examination=PLAN)
    assert diagnosis.broken.part == "latent scale"
    assert "set mean (" in diagnosis.line()
    assert "\n" not in diagnosis.line()


@pytest.mark.parametrize(
    ("speaks", "declared"), [("eps", "v"), ("v", "eps"), ("x0", "v"), ("v", "flow"), ("eps", "flow")]
)
def test_a_net_that_predicts_something_else_is_named_by_what_it_predicts(speaks, declared, folder):
    diagnosis = examine(a_system(folder, declared=declared, speaks=speaks), folder, examination=PLAN)
    assert diagnosis.line() == (
        f"broken: parameterization: the net predicts like {speaks}, declared {declared}; declare {speaks}"
    )
    scale = next(check for check in diagnosis.checks if check.name == "latent mean and std")
    assert scale.passed


@pytest.mark.parametrize("seed", [2, 3, 4])
def test_a_text_encoder_with_weights_of_nobody_is_named(seed, folder):
    diagnosis = examine(a_system(folder, encoder_seed=seed), folder, examination=PLAN)
    assert diagnosis.broken.part == "text encoder"
    assert "prediction" not in failed(diagnosis)


@pytest.mark.parametrize("shift", [1, -1])
def test_labels_that_are_off_by_one_are_named(shift, folder):
    system = a_system(folder, "label")
    shown = [{**row, "label": (row["label"] + shift) % (COUNT + 1)} for row in rows_of(folder)]
    write(folder, [row for row in shown if row["label"] != COUNT])
    diagnosis = examine(system, folder, examination=PLAN)
    assert diagnosis.broken.part == "labels"
    assert f"off by one: label {-shift:+d} fits" in diagnosis.line()


def test_labels_beyond_the_classes_are_named(folder):
    system = a_system(folder, "label")
    write(folder, [{**row, "label": row["label"] + 5} for row in rows_of(folder)])
    diagnosis = examine(system, folder, examination=PLAN)
    assert diagnosis.line() == "broken: labels: labels 9, 10, 11, 12 are outside 0..8"


def test_labels_that_count_from_one_are_named(folder):
    system = a_system(folder, "label")
    rows = [{**row, "label": row["label"] + 2} for row in rows_of(folder)]
    write(folder, [{**rows[0], "label": 1}, *rows[1:]])
    assert (
        "off by one: labels run from 1 to 9, the system counts from 0"
        in examine(system, folder, examination=PLAN).line()
    )


def test_labels_in_another_order_are_named(folder):
    system = a_system(folder, "label")
    order = [3, 7, 0, 5, 1, 6, 2, 4]
    write(folder, [{**row, "label": order[row["label"]]} for row in rows_of(folder)])
    diagnosis = examine(system, folder, examination=PLAN)
    assert diagnosis.broken.part == "labels"
    assert "another order" in diagnosis.line()


def test_an_autoencoder_without_its_weights_is_named(folder):
    torch.manual_seed(0)
    fresh = Autoencoder(Blocks().config).eval()
    diagnosis = examine(a_system(folder, autoencoder=fresh), folder, examination=PLAN)
    assert diagnosis.broken.part == "autoencoder"


@pytest.mark.parametrize("size", [0.0, 1.0])
def test_a_denoiser_without_its_weights_is_named(size, folder):
    class Noisy(Posterior):
        def forward(self, x, t, cond):
            return (
                size * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) + 0 * self.clean.sum()
            )

    system = a_system(folder, declared="v")
    system.parts.nets["denoiser"].__class__ = Noisy
    diagnosis = examine(system, folder, examination=PLAN)
    assert diagnosis.broken.part == "denoiser"
    assert "one-batch overfit" in failed(diagnosis)  # no gradient reaches its weights


def test_a_denoiser_that_is_told_nothing_is_named(folder, monkeypatch):
    monkeypatch.setattr(Posterior, "prior", lambda self, cond, n: torch.zeros(n, COUNT))
    diagnosis = examine(a_system(folder), folder, examination=PLAN)
    assert diagnosis.broken.part == "guidance"
    assert "alike with and without" in diagnosis.line()


def test_captions_of_another_language_are_named(folder):
    system = a_system(folder)
    write(folder, [{**row, "text": f"tache numero {i}"} for i, row in enumerate(rows_of(folder))])
    diagnosis = examine(system, folder, examination=PLAN)
    assert diagnosis.broken.part == "captions"
    write(folder, [{**row, "text": ""} for row in rows_of(folder)])
    assert "8 of 8 pictures have no caption" in examine(system, folder, examination=PLAN).line()


def test_samples_that_are_not_finite_are_named(folder):
    system = a_system(folder)

    class Overflowing(Posterior):
        def forward(self, x, t, cond):
            out = super().forward(x, t, cond)
            return out / 0 if len(x) == 2 * min(4, COUNT) and float(t[0]) == 999.0 else out

    system.parts.nets["denoiser"].__class__ = Overflowing
    diagnosis = examine(system, folder, examination=replace(PLAN, batch=7))
    assert diagnosis.broken.part == "sampling"


def test_the_examination_leaves_the_system_as_it_was(folder):
    system = a_system(folder)
    before = {k: v.clone() for k, v in system.parts.nets["denoiser"].state_dict().items()}
    examine(system, folder, examination=PLAN)
    assert all(torch.equal(v, before[k]) for k, v in system.parts.nets["denoiser"].state_dict().items())
    assert all(p.grad is None for net in system.parts.nets.values() for p in net.parameters())


def test_the_command_prints_the_checks_and_says_by_its_exit_code_whether_they_pass(
    folder, monkeypatch, capsys
):
    doctor = import_module("sfumato.cli.doctor")  # the attribute of that name is the verb
    flags = ["--data", str(folder), "--pictures", "8", "--steps", "2"]
    monkeypatch.setattr(doctor, "load", lambda path, device: a_system(folder))
    assert cli.main(["doctor", "system", *flags]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "nothing is broken"
    assert "captions and pictures" in out
    assert "FAIL" not in out
    monkeypatch.setattr(doctor, "load", lambda path, device: a_system(folder, speaks="v"))
    assert cli.main(["doctor", "system", *flags, "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["broken"] == "parameterization"
    assert "predicts like v, declared eps" in said["diagnosis"]
    assert {"name", "passed", "found", "wanted", "verdict"} <= said["checks"][0].keys()


def test_a_saved_system_without_training_is_broken(tiny_folder, tmp_path, capsys):
    for i, color in enumerate(("red", "green", "blue")):
        image = Image.new("RGB", (16, 16), "white")
        image.paste(color, (2 * i, 3, 9, 12))
        save_png(tmp_path / "pictures" / f"{i}.png", image)
        (tmp_path / "pictures" / f"{i}.txt").write_text(f"{color} heart")
    flags = ["--data", str(tmp_path / "pictures"), "--steps", "1"]
    assert cli.main(["doctor", str(tiny_folder), *flags]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("broken: autoencoder: ")


def test_wrong_input_is_one_line(tiny_folder, tmp_path, capsys):
    assert cli.main(["doctor", str(tiny_folder), "--data", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("sfumato: the data folder")
    assert cli.main(["doctor", str(tiny_folder), "--data", str(tmp_path), "--pictures", "0"]) == 2
    assert "pictures is 0" in capsys.readouterr().err
