"""GLIDE's files as systems: the published walks beside plain loops, holes, the vocabulary, CLIP guidance."""

from __future__ import annotations

import gzip
import json

import pytest
import torch

import sfumato
from sfumato.core.random import Noise
from sfumato.core.types import Conditioning, Inputs
from sfumato.diffusion.guidance import CFG, Guided
from sfumato.diffusion.spacings import respaced_indices
from sfumato.nets.attention import AttentionConfig
from sfumato.nets.blocks import BlockConfig
from sfumato.nets.embedding import EmbedderConfig, EmbeddingConfig, Feature, TokensConfig
from sfumato.nets.noised_clip import NoisedText, NoisedTextConfig, NoisedVision, NoisedVisionConfig
from sfumato.nets.text import TextTransformer, TextTransformerConfig
from sfumato.nets.unet import UNet, UNetConfig, levels
from sfumato.systems.guiding import guided_by
from sfumato.text.clip import clip_tokenizer
from sfumato.text.glide import glide_tokenizer

CONFIG = {"num_head_channels": 16, "xf_heads": 2, "image_size": 8, "noise_schedule": "squaredcos_cap_v2"}
UP = CONFIG | {"small_size": 4, "noise_schedule": "linear", "timestep_respacing": "fast27"}
SEEDS = [5, 6]
TEXTS = ["a Low fox", ""]


def stirred(kind: type[torch.nn.Module], config: object) -> torch.nn.Module:
    """The same random weights each time, none of them zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = kind(config)
        for p in net.parameters():
            p.data += 0.1 * torch.randn_like(p)
    return net.eval()


def vocabulary(folder) -> None:
    """GPT-2's files in small: the bytes, three merges, the end; gzipped as GLIDE ships them."""
    letters = sorted(chr(n) for n in (*range(33, 127), *range(161, 173), *range(174, 324)))
    words = [*letters, "lo", "low", "\u0120low", "<|endoftext|>"]
    ids = json.dumps({word: i for i, word in enumerate(words)})
    (folder / "encoder.json.gz").write_bytes(gzip.compress(ids.encode()))
    (folder / "vocab.bpe.gz").write_bytes(gzip.compress("#version: 0.2\nl o\nlo w\n\u0120 low\n".encode()))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glide")
    vocabulary(folder)
    attention = AttentionConfig(kind="appended", head_dim=16)
    pooled = EmbedderConfig(kind="linear", features=(Feature(field="pooled", dim=16),))
    for name, inputs in {"base": 3, "base_fill": 7, "up": 6, "up_fill": 10, "odd": 5}.items():
        net = UNetConfig(
            in_channels=inputs,
            out_channels=6,
            levels=levels(32, (1, 1), 1, attention=attention, at=(1,)),
            middle=attention,
            embedding=EmbeddingConfig(time_dim=32, dim=128, extras=(pooled,)),
            tokens=TokensConfig(dim=16),
            block=BlockConfig(film=True, resample="residual"),
        )
        text = TextTransformerConfig(vocab_size=260, context=7, width=16, depth=1, heads=2, padding="learned")
        nets = {"net": stirred(UNet, net), "text": stirred(TextTransformer, text)}
        sfumato.save_nets(nets, folder / f"{name}.pt", layout="glide")
    return folder


def test_the_tokenizer_is_gpt2_s_in_lower_case_without_ends(tmp_path):
    vocabulary(tmp_path)
    tokenizer = glide_tokenizer([tmp_path], 6)
    ids, mask = tokenizer(["LOW low", "", "lowlow", "low " * 9])
    low, spaced, end = tokenizer.vocab_size - 3, tokenizer.vocab_size - 2, tokenizer.vocab_size - 1
    assert ids[0].tolist() == [low, spaced, *[end] * 4]
    assert mask.sum(1).tolist() == [2, 0, 2, 6]
    assert ids[1].tolist() == [end] * 6
    again = type(tokenizer).from_json(tokenizer.to_json())
    assert torch.equal(again(["LOW low"])[0], ids[:1])
    assert tokenizer.unknown("fox") == []
    assert glide_tokenizer([tmp_path / "none"], 6) is None


@torch.no_grad()
def test_the_base_guides_three_channels_and_keeps_the_variance_of_cond(files):
    """p_sample beside the notebook's model function; noise is ours, a row for each picture."""
    system = sfumato.load(files / "base.pt", config=CONFIG | {"timestep_respacing": "3"})
    nets, kept = system.parts.nets, respaced_indices(1000, "3")
    assert system.stages[0].defaults.guidance == CFG(3.0)
    done = system.run(Inputs(n=2, text=TEXTS), seed=SEEDS).low_res
    schedule = system.config.stages[0].schedule
    bar = schedule.alpha_bar[kept]
    before = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
    beta = 1 - bar / before
    small = (beta * (1 - before) / (1 - bar)).clamp_min(0)
    ids, mask = system.parts.tokenizers["tokenizer"]([*TEXTS, "", ""])
    tokens, pooled = nets["text"](ids, mask)
    noise = Noise(SEEDS)
    x = noise(torch.zeros(2, 3, 8, 8))
    for i in reversed(range(len(kept))):
        cond = Conditioning(tokens=tokens, pooled=pooled)
        out = nets["net"](torch.cat([x, x]), torch.full((4,), float(kept[i])), cond).double()
        c, u = out[:2, :3], out[2:, :3]
        e, v = u + 3 * (c - u), out[:2, 3:]
        x0 = ((x - (1 - bar[i]).sqrt() * e) / bar[i].sqrt()).clamp(-1, 1)
        mean = beta[i] * before[i].sqrt() / (1 - bar[i]) * x0
        mean = mean + (1 - before[i]) * (1 - beta[i]).sqrt() / (1 - bar[i]) * x
        log_var = (v + 1) / 2 * beta[i].log() + (1 - (v + 1) / 2) * small[max(i, 1)].log()
        x = (mean + (0.5 * log_var).exp() * noise(x) if i else mean).float()
    torch.testing.assert_close(done, x.clamp(-1, 1), rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_upsampler_walks_27_steps_of_ddim_from_cooler_noise_and_8_bits(files):
    system = sfumato.load(files / "up.pt", config=UP)
    net, text = system.parts.nets["net"], system.parts.nets["text"]
    small = torch.rand(2, 3, 4, 4) * 2 - 1
    done = system.run(Inputs(n=2, text=TEXTS, low_res=small), seed=SEEDS).low_res
    bits = ((small + 1) * 127.5).round() / 127.5 - 1
    read = torch.nn.functional.interpolate(bits, (8, 8), mode="bilinear")
    tokens, pooled = text(*system.parts.tokenizers["tokenizer"](TEXTS))
    kept = respaced_indices(1000, "fast27")
    assert kept[-2:] == [800, 997]
    bar = torch.cat([torch.ones(1, dtype=torch.float64), system.config.stages[0].schedule.alpha_bar[kept]])
    x = 0.997 * Noise(SEEDS)(torch.zeros(2, 3, 8, 8))
    for i in reversed(range(27)):
        t, cond = torch.full((2,), float(kept[i])), Conditioning(tokens=tokens, pooled=pooled)
        e = net(torch.cat([x, read], 1), t, cond)[:, :3].double()
        x0 = ((x - (1 - bar[i + 1]).sqrt() * e) / bar[i + 1].sqrt()).clamp(-1, 1)
        e = (x - bar[i + 1].sqrt() * x0) / (1 - bar[i + 1]).sqrt()
        x = (bar[i].sqrt() * x0 + (1 - bar[i]).sqrt() * e).float()
    torch.testing.assert_close(done, x.clamp(-1, 1), rtol=0, atol=1e-4)
    assert system.resolve(steps=5)["upsampler"].spacing_knobs == {}


@pytest.mark.parametrize("name", ["base_fill", "up_fill"])
@torch.no_grad()
def test_a_hole_is_filled_around_what_is_known(name, files):
    """The net is told x, the known part, where it is known, and the low resolution, in this order."""
    config = (UP if name == "up_fill" else CONFIG) | {"timestep_respacing": "3"}
    system = sfumato.load(files / f"{name}.pt", config=config)
    (stage,) = system.stages
    assert (stage.defaults.sampler, stage.defaults.start.kind) == ("ddpm", "fill")
    image, mask = torch.rand(2, 3, 8, 8) * 2 - 1, torch.zeros(2, 1, 8, 8)
    mask[:, :, 2:5, 2:] = 1
    low = torch.zeros(2, 3, 4, 4) if name == "up_fill" else None
    inputs = Inputs(n=2, text=TEXTS, image=image, mask=mask, low_res=low)
    concat = stage.conditioner(inputs).concat
    assert torch.equal(concat[:, :4], torch.cat([image * (1 - mask), 1 - mask], 1))
    seen = []
    done = system.run(inputs, observe=lambda p: seen.append(p.denoised.x0)).low_res
    assert len(seen) == 3
    assert all(torch.equal(x0 * (1 - mask), image * (1 - mask)) for x0 in seen)
    assert torch.equal(done * (1 - mask), image * (1 - mask))
    assert (done - image).abs().amax((1, 2, 3)).min() > 0.1
    assert system.run(Inputs(n=2, text=TEXTS, low_res=low)).low_res.shape == (2, 3, 8, 8)
    drawn = system.resolve(image=image, mask=mask)[stage.name]
    assert drawn.start.kind == "fill"


@torch.no_grad()
def test_clip_guides_to_the_text(files, tmp_path):
    vocabulary_of_clip(tmp_path)
    shape = {"width": 32, "depth": 1, "heads": 2, "embed": 16}
    towers = {
        "text": stirred(NoisedText, NoisedTextConfig(**shape, vocab=520, context=8)),
        "image": stirred(NoisedVision, NoisedVisionConfig(**shape, size=8, patch=4)),
    }
    for name, net in towers.items():
        sfumato.save_nets({name: net}, tmp_path / f"clip_{name}_enc.pt", layout=f"glide-clip-{name}")
    config = CONFIG | {"timestep_respacing": "3"}
    both = {}
    for name, net in towers.items():
        path, layout = tmp_path / f"clip_{name}_enc.pt", f"glide-clip-{name}"
        both |= sfumato.load_nets(path, layout=layout, config={"n_head_state": 16})
        pairs = zip(both[f"clip_{name}"].parameters(), net.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    tokenizer = clip_tokenizer(tmp_path, context=8)
    base = sfumato.load(files / "base.pt", config=config)
    with pytest.raises(ValueError, match="the noised CLIP has no vocabulary; copy bpe_simple"):
        sfumato.guided(base, both)
    system = guided_by(base, both, tokenizer)
    assert system.stages[0].defaults.guidance == Guided(3.0)
    asked = Inputs(n=1, text=["a fox"])
    walks = [system.run(asked, system.resolve(guidance=scale)).low_res for scale in (3, 0)]
    assert (walks[0] - walks[1]).abs().max() > 1e-3
    sfumato.save(system, tmp_path / "kept")
    assert torch.equal(sfumato.load(tmp_path / "kept").run(asked).low_res, walks[0])


def vocabulary_of_clip(folder) -> None:
    (folder / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress(b'"bpe_simple\nf o\nfo x</w>\n'))


def test_a_mistake_is_one_line(files, tmp_path):
    with pytest.raises(ValueError, match=r"GLIDE's vocabulary is missing; copy encoder\.json and vocab"):
        sfumato.load(files / "base.pt", config=CONFIG | {"tokenizer": str(tmp_path)})
    with pytest.raises(ValueError, match="this U-Net reads 5 channels and draws 6; a GLIDE system reads"):
        sfumato.load(files / "odd.pt", config={**CONFIG, "in_channels": 5})
