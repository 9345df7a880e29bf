"""Computing with image embeddings: spherical paths and means, axes, pictures drawn back from their noise."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import sfumato
from sfumato.checkpoints.native import Parts
from sfumato.cli import main
from sfumato.core.png import save_png
from sfumato.core.types import Inputs
from sfumato.diffusion.guidance import CFG, LogitCFG
from sfumato.diffusion.schedules import Discrete, Flow
from sfumato.nets.blocks import BlockConfig
from sfumato.nets.clip import CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from sfumato.nets.embedding import EmbedderConfig, EmbeddingConfig, Feature
from sfumato.nets.prior import Prior, PriorConfig
from sfumato.nets.token_prior import TokenPrior, TokenPriorConfig
from sfumato.nets.unet import UNet, UNetConfig, levels
from sfumato.systems.algebra import Axes, Space, difference, slerp, spherical_mean
from sfumato.systems.conditioning import ClipTextConfig, ImageEmbedConfig
from sfumato.systems.config import StageConfig, SystemConfig
from sfumato.systems.options import SampleOptions
from sfumato.systems.request import options_for
from sfumato.systems.system import System, assemble
from sfumato.text.tokenizers import Tokenizer

DIM = 8


def space(*, dim: int = DIM, tokens: bool = False) -> Space:
    """A prior, of diffusion or of tokens, and a decoder of pictures of 8 pixels with random weights."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["red bar", "blue bar"], vocab_size=64, context=6, end_highest=True)
    shape = {"width": 16, "depth": 1, "heads": 2, "hidden": 32, "embed": DIM}
    text = CLIPText(CLIPTextConfig(vocab=tokenizer.vocab_size, context=6, **shape))
    vision = CLIPVision(CLIPVisionConfig(side=8, patch=4, **shape))
    embedder = EmbedderConfig(kind="linear", features=(Feature(field="image_embed", dim=DIM),))
    net = UNet(
        UNetConfig(
            in_channels=3,
            out_channels=3,
            levels=levels(8, (1,), 1),
            embedding=EmbeddingConfig(time_dim=8, dim=16, extras=(embedder,)),
            block=BlockConfig(norm_groups=4),
        )
    )
    torch.nn.init.normal_(net.conv_out.weight, std=0.02)
    read = {"dim": dim, "text_dim": 16, "context": 6, "width": 16, "depth": 1, "heads": 2}
    prior = TokenPrior(TokenPriorConfig(**read, kept=5, buckets=9)) if tokens else Prior(PriorConfig(**read))
    base = {"schedule": Discrete(formula="cosine"), "defaults": SampleOptions(steps=3, guidance=CFG(2.0))}
    drawing = {"schedule": Flow(), "defaults": SampleOptions(steps=1, guidance=LogitCFG(2.0))}
    stages = (
        StageConfig(
            name="prior",
            net="prior",
            parameterization="x0",
            shape=(dim,),
            emits="image_embed",
            conditioners=(ClipTextConfig(pooled=True, mask=True),),
            **(drawing if tokens else base),
        ),
        StageConfig(
            name="decoder",
            net="decoder",
            parameterization="v",
            shape=(3, 8, 8),
            conditioners=(ImageEmbedConfig(unit=True),),
            **base,
        ),
    )
    nets = {"prior": prior, "decoder": net, "text_encoder": text, "image_encoder": vision}
    return Space(assemble(SystemConfig(stages=stages), Parts(nets, {"tokenizer": tokenizer})))


def test_slerp_keeps_angle_and_length():
    a, b = torch.randn(2, 5, DIM, dtype=torch.float64)
    angle = F.cosine_similarity(a, b).acos()
    for t in (0.0, 0.25, 0.5, 1.0):
        c = slerp(a, b, t)
        torch.testing.assert_close(
            F.cosine_similarity(a, c).clamp(-1, 1).acos(), t * angle, rtol=0, atol=1e-7
        )
        torch.testing.assert_close(c.norm(dim=1), torch.lerp(a.norm(dim=1), b.norm(dim=1), t))
    assert torch.allclose(slerp(a, 2 * a, 0.5), 1.5 * a)
    with pytest.raises(ValueError, match="widths 8 and 7: they are of different CLIPs"):
        slerp(a, b[:, :-1], 0.5)


def test_the_mean_on_the_sphere_is_slerp_of_two_and_the_centre_of_many():
    a, b = torch.randn(2, DIM, dtype=torch.float64)
    torch.testing.assert_close(spherical_mean(torch.stack([a, b]), [1, 3]), slerp(a[None], b[None], 0.75)[0])
    centre = F.normalize(torch.randn(DIM, dtype=torch.float64), dim=0)
    around = torch.randn(4, DIM, dtype=torch.float64)
    around = F.normalize(around - (around @ centre)[:, None] * centre, dim=1)
    ring = torch.cat([0.6 * centre + 0.8 * around, 0.6 * centre - 0.8 * around])
    torch.testing.assert_close(spherical_mean(ring, [1.0] * 8), centre)
    with pytest.raises(ValueError, match="give one each, none below 0"):
        spherical_mean(ring, [1.0])


def test_a_text_difference_turns_towards_the_change_of_meaning():
    image, text, base = torch.randn(3, 1, DIM, dtype=torch.float64)
    assert torch.allclose(difference(image, text, base, 0.0), image)
    change = F.normalize(text, dim=1) - F.normalize(base, dim=1)
    moved = [float(F.cosine_similarity(difference(image, text, base, t), change)) for t in (0, 0.25, 0.5, 1)]
    assert moved == sorted(moved)
    assert moved[-1] == pytest.approx(1)


def test_truncation_keeps_the_axes_of_most_variance():
    rows = torch.randn(200, DIM, dtype=torch.float64) * torch.arange(DIM, 0, -1) + 3
    axes = Axes.of(rows)
    errors = [float((axes.truncated(rows, k) - rows).square().mean()) for k in range(DIM + 1)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-20
    values = torch.linalg.eigvalsh(torch.cov(rows.mT, correction=0)).flip(0)
    assert errors[3] * DIM == pytest.approx(float(values[3:].sum()))


def test_pictures_are_drawn_again_from_their_noise_and_embedding():
    own = space()
    image = torch.rand(2, 3, 8, 8) * 1.2 - 0.6
    z = own.pictures(image)
    assert z.square().mean(1) == pytest.approx([1.0, 1.0])
    plain = replace(own.decoder.defaults, guidance=CFG(1.0))
    stages = (own.system.stages[0], replace(own.decoder, defaults=plain))
    unguided = Space(replace(own.system, stages=stages))
    noise = unguided.inverted(image, z, steps=200)
    again = unguided.decode(z, noise=noise, steps=200)
    assert float((again - image).abs().max()) < 0.05  # of the 200 steps, and none of the first half
    assert float((unguided.decode(z, seed=1, steps=200) - image).abs().mean()) > 0.2
    varied = unguided.decode(z, noise=noise, eta=1.0, steps=20)
    assert not torch.allclose(varied, again, atol=0.05)


@pytest.mark.parametrize("tokens", [False, True])
def test_embeddings_of_texts_and_of_the_prior_draw_pictures_too(tokens, tmp_path):
    own = space(tokens=tokens)
    texts = ["red bar", "blue bar"]
    drawn = own.drawn_by_prior(texts, seed=3)
    assert drawn.shape == own.texts(texts).shape == (2, DIM)
    assert own.decode(drawn, seed=3).shape == (2, 3, 8, 8)
    both = own.system.run(Inputs(n=2, text=texts), seed=3)
    assert torch.equal(own.decode(drawn, seed=3), both.low_res)
    torch.testing.assert_close(own.drawn_by_prior(texts[1:], seed=4), drawn[1:])
    sfumato.save(own.system, tmp_path / "system")
    assert torch.equal(Space(sfumato.load(tmp_path / "system")).drawn_by_prior(texts, seed=3), drawn)


def test_a_prior_of_tokens_draws_the_same_whatever_the_steps():
    own = space(tokens=True)
    prior, inputs = own.system.stages[0], Inputs(n=3, text=["red bar", "blue bar", ""])
    drawn = own.drawn_by_prior(inputs.text)
    steps = {"prior": options_for(prior.defaults, {"steps": 6, "sampler": "ddpm"})}
    torch.testing.assert_close(own.system.run(inputs, steps, only=["prior"]).image_embed, drawn)
    guided = {"prior": options_for(prior.defaults, {"guidance": 5})}
    assert guided["prior"].guidance == LogitCFG(5.0)
    assert not torch.allclose(own.system.run(inputs, guided, only=["prior"]).image_embed, drawn)


@pytest.mark.parametrize("tokens", [False, True])
def test_the_candidate_nearest_to_its_text_stays(tokens):
    own = space(tokens=tokens)
    inputs, (prior, decoder) = Inputs(n=2, text=["red bar", "blue bar"]), own.system.stages
    text = prior.conditioner(inputs).pooled
    scores = []
    for count in (1, 2, 6):
        options = {"prior": replace(prior.defaults, candidates=count)}
        found = own.system.run(inputs, options, only=["prior"], seed=5).image_embed
        scores.append(F.cosine_similarity(found, text))
    assert bool((scores[1] >= scores[0]).all() and (scores[2] >= scores[1]).all())
    assert bool((scores[2] > scores[0]).any())
    with pytest.raises(ValueError, match="only a prior does; set it to 1"):
        own.system.run(
            replace(inputs, image_embed=text),
            {"decoder": replace(decoder.defaults, candidates=2)},
            only=["decoder"],
        )


@pytest.mark.parametrize(
    ("inputs", "only", "message"),
    [
        (
            Inputs(n=1),
            ["decoder"],
            "draws 1 pictures from image embeddings, and there is none; run the prior",
        ),
        (Inputs(n=1, image_embed=torch.ones(1, 5)), ["decoder"], r"image_embed has shape \(\d, 5\)"),
        (
            Inputs(n=1, text=["a"]),
            ["prior"],
            r"reads cond.pooled of shape \(9,\) for each picture and got \(8,\)",
        ),
    ],
)
def test_embeddings_of_another_clip_are_one_line(inputs, only, message):
    own = space(dim=9 if only == ["prior"] else DIM)
    with pytest.raises(ValueError, match=message) as error:
        own.system.run(inputs, only=only)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "rows"),
    [
        (["vary", "PICTURES", "--eta", "0.5"], 1),
        (["interpolate", "PICTURES"], 2.5),
        (["difference", "PICTURES", "--text", "red bar", "--base", "blue bar"], 1),
        (["sources", "PICTURES", "--text", "red bar"], 3),
        (["truncate", "PICTURES"], 1),
    ],
)
def test_the_command_writes_one_sheet(flags, rows, tmp_path, capsys):
    sfumato.save(space().system, tmp_path / "system")
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for i, file in enumerate(files):
        save_png(file, torch.full((3, 8, 8), 40 * i, dtype=torch.uint8))
    args = [str(f) for flag in flags for f in (files if flag == "PICTURES" else [flag])]
    out = tmp_path / "sheet.png"
    assert main(["algebra", *args, "--system", str(tmp_path / "system"), "--n", "2", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    with Image.open(out) as sheet:
        assert sheet.size == (2 * 10 - 2, math.ceil(rows) * 10 - 2)


def test_wrong_input_of_the_command_is_one_line(tmp_path, capsys):
    sfumato.save(space().system, tmp_path / "system")
    save_png(tmp_path / "a.png", torch.zeros(3, 8, 8, dtype=torch.uint8))
    args = ["algebra", "vary", str(tmp_path / "a.png"), "--system", str(tmp_path / "system")]
    assert main([*args, "--n", "1", "--out", str(tmp_path / "b.png")]) == 2
    assert "n 1 and 1 pictures; give at least 2 and 1" in capsys.readouterr().err
    assert not (tmp_path / "b.png").exists()


def test_a_system_without_embeddings_is_refused():
    own = space().system
    bare = System(own.stages[:1], own.config, own.parts)
    with pytest.raises(ValueError, match="draws from no image embeddings"):
        Space(bare)
