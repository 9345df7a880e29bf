"""Files of GLIDE: every published name, the recorded text transformer, the U-Net, wrong settings."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sfumato
from sfumato.checkpoints.layouts import LAYOUTS
from sfumato.core.types import Conditioning
from sfumato.nets.presets import UNETS
from sfumato.nets.text import TextTransformer, TextTransformerConfig

GOLDEN = Path(__file__).parents[2] / "golden"
# Outputs are of order 1; float32 sums in another order.
CLOSE = {"rtol": 0, "atol": 1e-5}
FILES = {
    "glide_base": ("base", "glide-base"),
    "glide_base_inpaint": ("base_inpaint", "glide-base-inpaint"),
    "glide_upsample": ("upsample", "glide-upsampler"),
    "glide_upsample_inpaint": ("upsample_inpaint", "glide-upsampler-inpaint"),
}
NET, TEXT = LAYOUTS["glide"].parts
SMALL = {
    "text_ctx": 6,
    "xf_width": 32,
    "xf_layers": 2,
    "xf_heads": 2,
    "xf_final_ln": True,
    "xf_padding": True,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 6,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "dropout": 0.1,
    "channel_mult": [1, 2],
    "use_fp16": False,
    "num_heads": 1,
    "num_head_channels": 16,
    "num_heads_upsample": -1,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "cache_text_emb": False,
}


def names_of(**changes: object) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a file of the reference with these settings."""
    shapes: dict[str, tuple[int, ...]] = {}
    settings = {**SMALL, "effective_in_channels": 3, "tokenizer_n_vocab": 40, **changes}
    for part in (NET, TEXT):
        config = part.config(settings)
        with torch.device("meta"):
            net = part.build(config)
        written = part.rows(config, settings).save(net.state_dict(), where=part.name)
        shapes |= {name: tuple(v.shape) for name, v in written.items()}
    return shapes


def written(tmp_path: Path, random_file, **changes: object) -> tuple[Path, dict[str, torch.Tensor]]:
    state = random_file(names_of(**changes))
    save_file(state, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors", state


@pytest.mark.parametrize("name", FILES)
def test_every_name_of_a_published_file_both_ways(name):
    shapes = json.loads(gzip.decompress((GOLDEN / "layouts" / f"{name}.json.gz").read_bytes()))
    shapes = {key: tuple(shape) for key, shape in shapes.items()}
    assert [layout for layout, kind in LAYOUTS.items() if kind.fits(shapes)] == ["glide"]
    stem, preset = FILES[name]
    given = LAYOUTS["glide"].files[stem]
    theirs = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    back: dict[str, torch.Tensor] = {}
    for part in (NET, TEXT):
        own = given if part is NET else {k: v for k, v in given.items() if k in part.known}
        settings = part.settings(shapes, own)
        config = part.config(settings)
        with torch.device("meta"):
            net = part.build(config)
        ours = part.rows(config, settings).load(theirs, where=name)
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in net.state_dict().items()}
        back |= part.rows(config, settings).save(ours, where=name)
        assert part.config(part.published(config, {})) == config
        if part is NET:
            assert config == UNETS[preset]()
            assert settings["noise_schedule"] == ("squaredcos_cap_v2" if "base" in stem else "linear")
        else:
            assert config == TextTransformerConfig(
                vocab_size=50257, context=128, width=512, depth=16, heads=8, padding="learned"
            )
    assert {k: tuple(v.shape) for k, v in back.items()} == shapes


@torch.no_grad()
def test_the_recorded_text_transformer(random_file, tmp_path):
    """In a file whose U-Net is of random weights."""
    text = load_file(GOLDEN / "glide_text/model.safetensors")
    io = load_file(GOLDEN / "glide_text/io.safetensors")
    sizes = {"text_ctx": 24, "xf_width": 64, "xf_layers": 3, "xf_heads": 4, "tokenizer_n_vocab": 512}
    path, state = written(tmp_path, random_file, **sizes)
    assert {k: v.shape for k, v in text.items()} == {k: state[k].shape for k in text}
    save_file({**state, **text}, path)
    nets = sfumato.load_nets(path, config={**SMALL, **sizes})
    tokens, pooled = nets["text"](io["in.tokens"], io["in.mask"])
    torch.testing.assert_close(tokens.mT, io["out.xf_out"], **CLOSE)
    assert torch.equal(pooled, tokens[:, -1])
    other = nets["text"](io["in.tokens"], ~io["in.mask"])[0]
    assert (other - tokens).abs().max() > 0.1


@pytest.mark.parametrize(
    ("changes", "channels"),
    [
        ({}, 3),
        ({"effective_in_channels": 7}, 7),
        ({"effective_in_channels": 6, "xf_padding": False, "num_res_blocks": 2}, 6),
        ({"effective_in_channels": 10, "resblock_updown": False}, 10),
        ({"num_head_channels": -1, "num_heads": 4, "use_scale_shift_norm": False}, 3),
    ],
)
@torch.no_grad()
def test_it_computes_what_the_file_means(changes, channels, reading, random_file, tmp_path):
    """`in_channels` of the config counts those of one picture."""
    config = SMALL | {k: v for k, v in changes.items() if k != "effective_in_channels"}
    path, state = written(tmp_path, random_file, **changes)
    nets = sfumato.load_nets(path, layout="glide", config=config)
    x, t = torch.randn(2, channels, 8, 16), torch.tensor([3, 999])
    ids, mask = torch.randint(40, (2, 6)), torch.tensor([[1, 1, 1, 0, 0, 0], [0] * 6]).bool()
    tokens, pooled = nets["text"](ids, mask)
    width, n = config["num_head_channels"], config["num_res_blocks"]
    file = reading(state, lambda c: c // width if width > 0 else config["num_heads"])
    emb = file.embedded(t, file.linear("transformer_proj", pooled))
    down = {n + 1} if config["resblock_updown"] else set()
    expected = file.unet(x, emb, down, tokens)
    assert expected.std() > 0.1
    out = nets["net"](x, t, Conditioning(tokens=tokens, pooled=pooled))
    torch.testing.assert_close(out, expected, **CLOSE)

    sfumato.save_nets(nets, tmp_path / "b.safetensors", layout="glide")
    again = load_file(tmp_path / "b.safetensors")
    assert set(again) == set(state)
    assert all(torch.equal(again[key], v) for key, v in state.items())


@torch.no_grad()
def test_text_attention_by_head_and_erf_gelu(random_file, tmp_path):
    """The reference's block, written over the names of the file, without padding."""
    path, state = written(tmp_path, random_file, xf_padding=False, xf_layers=1)
    net = sfumato.load_nets(path, config=SMALL | {"xf_padding": False, "xf_layers": 1})["text"]
    ids = torch.randint(40, (2, 6))

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    x = state["token_embedding.weight"][ids] + state["positional_embedding"]
    block = "transformer.resblocks.0"
    qkv = linear(f"{block}.attn.c_qkv", norm(f"{block}.ln_1", x)).reshape(2, 6, 2, 3, 16)
    q, k, v = qkv.unbind(3)
    weights = torch.einsum("bthc,bshc->bhts", q, k).div(4).softmax(-1)
    x = x + linear(f"{block}.attn.c_proj", torch.einsum("bhts,bshc->bthc", weights, v).reshape(2, 6, 32))
    h = linear(f"{block}.mlp.c_fc", norm(f"{block}.ln_2", x))
    x = x + linear(f"{block}.mlp.c_proj", 0.5 * h * (1 + torch.erf(h / 2**0.5)))
    tokens, pooled = net(ids, torch.zeros(2, 6).bool())
    torch.testing.assert_close(tokens, norm("final_ln", x), **CLOSE)
    assert torch.equal(pooled, tokens[:, -1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"xf_heads": None}, r"no tensor tells the heads of the text transformer: give config="),
        ({"xf_layers": 3}, r"the config says xf_layers 3, the tensors say 2$"),
        ({"text_ctx": 5}, r"the config says text_ctx 5, the tensors say 6$"),
        ({"xf_final_ln": False}, r"xf_final_ln False is not supported; allowed: True$"),
        ({"in_channels": 2}, r"the config says in_channels 2, the tensors say 3$"),
    ],
)
def test_a_config_that_is_not_the_file_s_is_one_line(changes, message, random_file, tmp_path):
    path, _ = written(tmp_path, random_file)
    with pytest.raises(ValueError, match=message) as error:
        sfumato.load_nets(path, config=SMALL | changes)
    assert "\n" not in str(error.value)


def test_a_file_holds_both_nets_or_is_not_written(random_file, tmp_path):
    path, _ = written(tmp_path, random_file)
    nets = sfumato.load_nets(path, config=SMALL)
    with pytest.raises(ValueError, match="a file of layout 'glide' holds net, text together; got net"):
        sfumato.save_nets({"net": nets["net"]}, tmp_path / "b.pt", layout="glide")
    masked = TextTransformer(TextTransformerConfig(vocab_size=40, context=6, width=32, depth=2, heads=2))
    with pytest.raises(ValueError, match="reads its padding and this one does not"):
        sfumato.save_nets({"net": nets["net"], "text": masked}, tmp_path / "b.pt", layout="glide")
    assert not (tmp_path / "b.pt").exists()
