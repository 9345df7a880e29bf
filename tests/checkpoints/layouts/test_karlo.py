"""Files of Karlo: every published name, nets against diffusers, both layouts of one net, wrong settings."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import sfumato
from sfumato.checkpoints.layouts import LAYOUTS
from sfumato.core.types import Conditioning
from sfumato.nets.presets import UNETS
from sfumato.nets.prior import Prior, PriorConfig

GOLDEN = Path(__file__).parents[2] / "golden/layouts"
HEADS = {"attention_head_dim": 64}
FILES = {
    "karlo_prior_original": ("karlo-prior", {"xf_heads": 32}),
    "karlo_prior_diffusers": ("karlo-prior-diffusers", {}),
    "karlo_decoder_original": (
        "karlo-decoder",
        LAYOUTS["karlo-decoder"].files["decoder-ckpt-step=01000000-of-01000000"],
    ),
    "karlo_decoder_diffusers": ("karlo-decoder-diffusers", HEADS),
    "karlo_text_proj_diffusers": ("karlo-text-proj-diffusers", {}),
    "karlo_sr_original": ("karlo-sr", {"image_size": 256}),
    "karlo_sr_diffusers": ("karlo-sr-diffusers", {}),
}
SIZES = {"dim": 12, "text_dim": 12, "context": 6, "width": 32, "depth": 2, "heads": 4}


@pytest.mark.parametrize("name", FILES)
def test_every_name_of_a_published_file_both_ways(name):
    shapes = json.loads(gzip.decompress((GOLDEN / f"{name}.json.gz").read_bytes()))
    shapes = {key: tuple(shape) for key, shape in shapes.items()}
    layout, given = FILES[name]
    assert next(one for one, kind in LAYOUTS.items() if kind.fits(shapes)) == layout
    back: dict[str, torch.Tensor] = {}
    for part in LAYOUTS[layout].parts:
        own = {k.removeprefix(part.prefix): v for k, v in shapes.items() if k.startswith(part.prefix)}
        config = part.config(part.settings(own, given))
        with torch.device("meta"):
            net = part.build(config)
        theirs = {key: torch.empty(shape, device="meta") for key, shape in own.items()}
        ours = part.names(config).load(theirs, where=name)
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in net.state_dict().items()}
        saved = part.names(config).save(ours, where=name)
        back |= {part.prefix + k: v for k, v in saved.items()}
        told = {k: v for k, v in part.published(config, {}).items() if k in part.known}
        assert part.config(part.settings(own, told or given)) == config
        if name == "karlo_decoder_original" and part.name == "net":
            assert config == UNETS["karlo-decoder"]()
        if layout.startswith("karlo-sr"):
            assert config == UNETS["karlo-upsampler"]()
        if layout == "karlo-prior":
            assert config == PriorConfig()
    assert {k: tuple(v.shape) for k, v in back.items()} == shapes


def conditioning(mask: torch.Tensor) -> Conditioning:
    tokens, pooled = torch.randn(3, 6, 12), torch.randn(3, 12)
    return Conditioning(tokens=tokens, pooled=pooled, mask=mask)


@torch.no_grad()
def test_the_prior_of_diffusers_and_both_layouts(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    sizes = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2}
    theirs = diffusers.PriorTransformer(**sizes, embedding_dim=12, num_embeddings=6).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    theirs.save_pretrained(tmp_path / "prior")
    nets = sfumato.load_nets(tmp_path / "prior")
    assert nets["net"].config == PriorConfig(**SIZES, moments=True)
    x, t = torch.randn(3, 12), torch.tensor([0, 41, 999])
    for mask in (torch.ones(3, 6).bool(), torch.arange(6) < torch.tensor([[1], [4], [6]])):
        cond = conditioning(mask)
        expected = theirs(x, t, cond.pooled, cond.tokens, mask).predicted_image_embedding
        assert expected.std() > 0.1
        torch.testing.assert_close(nets["net"](x, t, cond), expected, rtol=0, atol=1e-5)
    sfumato.save_nets(nets, tmp_path / "again", layout="karlo-prior-diffusers")
    again = sfumato.load_nets(tmp_path / "again")["net"].state_dict()
    assert all(torch.equal(v, again[k]) for k, v in nets["net"].state_dict().items())


@torch.no_grad()
def test_the_original_layout_with_and_without_its_prefix(tmp_path):
    torch.manual_seed(0)
    net = Prior(PriorConfig(**SIZES)).eval()
    sfumato.save_nets({"net": net}, tmp_path / "a.pt", layout="karlo-prior")
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    assert all(name.startswith("model.") for name in state)
    save_file({k.removeprefix("model."): v for k, v in state.items()}, tmp_path / "b.safetensors")
    torch.save({"state_dict": state}, tmp_path / "c.ckpt")
    for name in ("a.pt", "b.safetensors", "c.ckpt"):
        read = sfumato.load_nets(tmp_path / name, config={"xf_heads": 4})["net"].state_dict()
        assert all(torch.equal(v, read[k]) for k, v in net.state_dict().items())
    # q, k and v of one head stand together in the file.
    rows = state["model.transformer.resblocks.0.attn.c_qkv.weight"].reshape(4, 3, 8, 32)
    assert torch.equal(rows[:, 1].flatten(0, 1), net.blocks[0].attention.qkv.weight[32:64])
    with pytest.raises(ValueError, match=r"no tensor tells the heads of the prior: give config=\{'xf_heads'"):
        sfumato.load_nets(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"the config says text_ctx 9, the tensors say 6$"):
        sfumato.load_nets(tmp_path / "a.pt", config={"xf_heads": 4, "text_ctx": 9})
    with pytest.raises(ValueError, match="holds mean and std"):
        sfumato.save_nets({"net": net}, tmp_path / "d", layout="karlo-prior-diffusers")


@torch.no_grad()
def test_what_was_prepared_gives_what_is_read_at_once():
    torch.manual_seed(0)
    net = Prior(PriorConfig(**SIZES)).eval()
    cond = conditioning(torch.tensor([[1, 1, 0, 0, 0, 0], [1] * 6, [0] * 6]).bool())
    x, t = torch.randn(3, 12), torch.full((3,), 7.0)
    ready = net.prepare(cond)
    assert len(ready.kv) == 2
    assert ready.kv[0][0].shape == (3, 4, 7, 8)
    assert torch.equal(net(x, t, ready), net(x, t, cond))
    assert torch.isfinite(net(x, t, cond)).all()  # without a visible token, too
    moved = cond.map(torch.clone)
    moved.tokens[0, 2:] += 1  # padding
    torch.testing.assert_close(net(x, t, moved), net(x, t, cond))
    moved.tokens[1, 2] += 1
    assert not torch.allclose(net(x, t, moved)[1], net(x, t, cond)[1], atol=1e-3)


@torch.no_grad()
def test_both_nets_of_super_resolution(tmp_path):
    part = LAYOUTS["karlo-sr"].parts[0]
    sizes = {"model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "out_channels": 3}
    settings = {**sizes, "in_channels": 3, "effective_in_channels": 6, "attention_resolutions": []}
    settings |= {
        "use_scale_shift_norm": False,
        "resblock_updown": True,
        "dropout": 0.0,
        "num_heads_upsample": -1,
    }
    config = part.config({**settings, "num_head_channels": -1, "num_heads": None})
    nets = {name: part.build(config) for name in ("net", "last_step")}
    for net in nets.values():
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.1)
    sfumato.save_nets(nets, tmp_path / "sr.pt", layout="karlo-sr")
    read = sfumato.load_nets(tmp_path / "sr.pt", config={"model_channels": 32, "in_channels": 3})
    for name, net in nets.items():
        assert read[name].config == config
        assert all(torch.equal(v, read[name].state_dict()[k]) for k, v in net.state_dict().items())
        sfumato.save_nets({"net": net}, tmp_path / name, layout="karlo-sr-diffusers")
    diffusers = pytest.importorskip("diffusers")
    x, t = torch.randn(1, 6, 8, 8), torch.tensor([416])
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "last_step").eval()
    expected = theirs(x, t).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(nets["last_step"](x, t, Conditioning()), expected, rtol=0, atol=1e-5)
