"""Files of GLIDE's noised CLIP: every published name, and what they compute, written once more."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sfumato
from sfumato.checkpoints.layouts import LAYOUTS
from sfumato.nets.noised_clip import NoisedTextConfig, NoisedVisionConfig

GOLDEN = Path(__file__).parents[2] / "golden" / "layouts"
SMALL = {
    "text_encoder.": NoisedTextConfig(width=24, depth=2, heads=2, vocab=40, context=7, embed=12),
    "image_encoder.": NoisedVisionConfig(width=24, depth=2, heads=3, size=8, patch=4, times=50, embed=12),
}


@pytest.mark.parametrize("kind", ["text", "image"])
def test_every_name_of_a_published_file_both_ways(kind):
    packed = (GOLDEN / f"glide_clip_{kind}.json.gz").read_bytes()
    shapes = {key: tuple(shape) for key, shape in json.loads(gzip.decompress(packed)).items()}
    name = f"glide-clip-{kind}"
    assert [layout for layout, one in LAYOUTS.items() if one.fits(shapes)] == [name]
    (part,) = LAYOUTS[name].parts
    config = part.config(part.settings(shapes, LAYOUTS[name].files[f"clip_{kind}_enc"]))
    assert config == (NoisedTextConfig() if kind == "text" else NoisedVisionConfig())
    with torch.device("meta"):
        net = part.build(config)
    rows = part.names(config)
    ours = rows.load({key: torch.empty(shape, device="meta") for key, shape in shapes.items()}, where=name)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in net.state_dict().items()}
    assert {k: tuple(v.shape) for k, v in rows.save(ours, where=name).items()} == shapes
    assert part.config(part.published(config, {})) == config


@pytest.fixture
def state(random_file):
    shapes = {}
    for part in LAYOUTS["glide-clip"].parts:
        config = SMALL[part.prefix]
        with torch.device("meta"):
            net = part.build(config)
        written = part.names(config).save(net.state_dict(), where="")
        shapes |= {part.prefix + name: tuple(v.shape) for name, v in written.items()}
    return random_file(shapes)


class Reading:
    """A tower over its own names, in plain operations."""

    def __init__(self, state, prefix: str, heads: int) -> None:
        self.of = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        self.heads = heads

    def linear(self, name, x):
        y = x @ self.of[f"{name}.w"].T
        return y + self.of[f"{name}.b"] if f"{name}.b" in self.of else y

    def norm(self, name, x):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * self.of[f"{name}.g"] + self.of[f"{name}.b"]

    def blocks(self, x, causal):
        for i in range(2):
            at, b = f"blocks.block_{i}", len(x)
            h = self.norm(f"{at}.f_attn.ln", x)
            q, k, v = (
                self.linear(f"{at}.f_attn.f_{n}", h).reshape(b, -1, self.heads, 24 // self.heads)
                for n in "qkv"
            )
            scores = torch.einsum("bthc,bshc->bhts", q, k) / math.sqrt(24 // self.heads)
            if causal:
                scores = scores + torch.full(scores.shape[2:], -1e10).triu(1)
            read = torch.einsum("bhts,bshc->bthc", scores.softmax(-1), v).reshape(b, -1, 24)
            x = x + self.linear(f"{at}.f_attn.f_c", read)
            h = self.linear(f"{at}.f_mlp.f_1", self.norm(f"{at}.f_mlp.ln", x))
            x = x + self.linear(f"{at}.f_mlp.f_2", 0.5 * h * (1 + torch.erf(h / 2**0.5)))
        return self.norm("blocks.output.ln", x) @ self.of["blocks.output.f.w"].T


@torch.no_grad()
def test_towers_compute_what_the_file_means(state, tmp_path):
    save_file(state, tmp_path / "a.safetensors")
    config = {"text_kwargs": {"n_head": 2}, "image_kwargs": {"n_head": 3}}
    nets = sfumato.load_nets(tmp_path / "a.safetensors", layout="glide-clip", config=config)
    ids, length = torch.randint(40, (3, 7)), torch.tensor([7, 2, 4])
    text = Reading(state, "text_encoder.", 2)
    x = text.of["blocks.input.w_voc"][ids] + text.of["blocks.input.w_pos"]
    expected = text.blocks(x, causal=True)[torch.arange(3), length - 1]
    torch.testing.assert_close(nets["clip_text"](ids, length), expected, rtol=0, atol=1e-5)
    cut = nets["clip_text"](ids[:, :4], length.clamp(max=4))
    torch.testing.assert_close(cut[1:], expected[1:], rtol=0, atol=1e-5)  # what comes later is not read

    image = Reading(state, "image_encoder.", 3)
    pixels, t = torch.rand(2, 3, 8, 8) * 2 - 1, torch.tensor([0, 49])
    mean = torch.tensor([122.77093945, 116.74601272, 104.09373519]).view(3, 1, 1)
    std = torch.tensor([68.50053285, 66.63215831, 70.32316309]).view(3, 1, 1)
    patches = ((pixels + 1) * 127.5 - mean).div(std).reshape(2, 3, 2, 4, 2, 4)
    kernel = image.of["blocks.input.patch_proj"]
    h = torch.einsum("bcxiyj,wcij->bxyw", patches, kernel).reshape(2, 4, 24)
    h = torch.cat([image.of["blocks.input.w_t"][t][:, None], h], 1) + image.of["blocks.input.w_pos"]
    expected = image.blocks(image.norm("blocks.input.ln", h), causal=False)[:, 0]
    torch.testing.assert_close(nets["clip_image"](pixels, t.float()), expected, rtol=0, atol=1e-5)

    sfumato.save_nets(nets, tmp_path / "b.safetensors", layout="glide-clip")
    written = load_file(tmp_path / "b.safetensors")
    assert set(written) == set(state)
    assert all(torch.equal(written[key], v) for key, v in state.items())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "no tensor tells the heads: give config="),
        ({"n_head_state": 64}, "the config says n_head_state 64, the tensors say 24"),
        ({"n_head": 2, "n_embd": 24}, "the config says n_embd 24, the tensors say 12"),
    ],
)
def test_a_config_that_is_not_the_file_s_is_one_line(config, message, state, tmp_path):
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        sfumato.load_nets(tmp_path / "a.safetensors", config=config)
    assert "\n" not in str(error.value)
