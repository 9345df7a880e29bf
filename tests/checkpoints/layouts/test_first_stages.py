"""The nine first stages of latent diffusion: published names both ways, and diffusers' classes of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import sfumato
from sfumato.checkpoints.layouts import LAYOUTS
from sfumato.nets.autoencoder import Autoencoder, AutoencoderConfig
from sfumato.nets.presets import AUTOENCODERS

diffusers = pytest.importorskip("diffusers")

GOLDEN = Path(__file__).parents[2] / "golden/layouts"
TINY = AutoencoderConfig(
    kind="vq",
    channels=32,
    mults=(1, 2, 2),
    blocks=1,
    attention_levels=(2,),
    z_channels=3,
    embed_dim=3,
    codebook_size=48,
    legacy_commitment=True,
)
PREFIX = "first_stage_model."


def published(file: str) -> Any:
    return json.loads(gzip.decompress((GOLDEN / f"{file}.json.gz").read_bytes()))


def empty(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def shapes_of(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(v.shape) for name, v in state.items()}


def same(layout: str, state: dict[str, Tensor], name: str) -> Autoencoder:
    """A meta net of the named config whose every tensor has one place in the layout, and back."""
    (part,) = LAYOUTS[layout].parts
    config = part.config(part.settings(shapes_of(state), {}))
    assert config == AUTOENCODERS[name]()
    with torch.device("meta"):
        net = Autoencoder(config)
    ours = part.names(config).load(state, where=name)
    assert shapes_of(ours) == shapes_of(net.state_dict())
    assert shapes_of(part.names(config).save(ours, where=name)) == shapes_of(state)
    return net


@pytest.mark.parametrize("name", [n for n in AUTOENCODERS if n != "kl-f4-upscaler"])
def test_published_files_both_ways_and_as_a_class_of_diffusers(name: str) -> None:
    """Among them those with attention in their levels, which diffusers' own converter loses."""
    net = same("vae-compvis", empty(published("ldm_first_stages_original")[name]), name)
    kind, build = ("vq", diffusers.VQModel) if name.startswith("vq") else ("vae", diffusers.AutoencoderKL)
    (part,) = LAYOUTS[f"{kind}-diffusers"].parts
    settings = part.published(net.config, {})
    with torch.device("meta"):
        theirs = build(**settings)
    written = part.names(net.config).save(net.state_dict(), where=name)
    assert shapes_of(written) == shapes_of(theirs.state_dict())


def test_a_folder_of_vq_f4_both_ways() -> None:
    same("vq-diffusers", empty(published("vq_f4_diffusers")), "vq-f4")


def randomized() -> Any:
    """A VQModel of diffusers in the shape of TINY."""
    torch.manual_seed(0)
    theirs = diffusers.VQModel(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=3,
        num_vq_embeddings=48,
        scaling_factor=1.0,
    )
    for p in theirs.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.1)
    torch.nn.init.normal_(theirs.quantize.embedding.weight, mean=1.0, std=0.4)  # where the latents are
    return theirs.eval()


@torch.no_grad()
def test_diffusers_computes_the_same_and_reads_what_is_written(tmp_path: Path) -> None:
    theirs = randomized()
    theirs.save_pretrained(tmp_path / "a")
    vae = sfumato.load_nets(tmp_path / "a")["vae"]
    assert vae.config == TINY
    x = torch.rand(2, 3, 16, 32) * 2 - 1
    latents = theirs.encode(x).latents
    torch.testing.assert_close(vae.encode(x).mean, latents, rtol=1e-5, atol=1e-5)
    assert len(vae.quantize(latents).codes.unique()) > 8
    for quantize in (True, False):
        expected = theirs.decode(latents, force_not_quantize=not quantize).sample
        # Float32 sums in another order, relative to outputs of several units.
        close = {"rtol": 0, "atol": 1e-5 * float(expected.abs().max())}
        torch.testing.assert_close(vae.decode(latents, quantize=quantize), expected, **close)
    told = {"scaling_factor": 0.5}
    sfumato.save_nets({"vae": vae}, tmp_path / "b", layout="vq-diffusers", config=told)
    again = diffusers.VQModel.from_pretrained(tmp_path / "b")
    assert (again.config.scaling_factor, again.config.vq_embed_dim) == (0.5, 3)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in theirs.state_dict().items())


def test_a_folder_and_a_file_are_the_same_net(tmp_path: Path) -> None:
    """Old configs say nothing of the width of a code; training files have losses beside the net."""
    randomized().save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert config["vq_embed_dim"] is None
    vae = sfumato.load_nets(tmp_path / "a")["vae"]
    sfumato.save_nets({"vae": vae}, tmp_path / "b.safetensors", layout="vae-compvis")
    state = load_file(tmp_path / "b.safetensors")
    assert {"encoder.down.2.attn.0.q.weight", "quantize.embedding.weight"} <= state.keys()
    whole = {f"{PREFIX}{k}": v for k, v in state.items()}
    for content in (state | {"loss.perceptual_loss.lin0.model.1.weight": torch.zeros(1)}, whole):
        save_file(content, tmp_path / "c.safetensors")
        again = sfumato.load_nets(tmp_path / "c.safetensors")["vae"]
        assert again.config == TINY
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in vae.state_dict().items())


def test_what_a_class_cannot_hold_is_refused(tmp_path: Path) -> None:
    for layout, message in (
        ("vae-diffusers", "AutoencoderKL computes no vq model .* save it as a sfumato system"),
        ("vq-diffusers", "VQModel computes no kl model"),
    ):
        net = Autoencoder(TINY if layout == "vae-diffusers" else AutoencoderConfig(channels=32, mults=(1,)))
        with pytest.raises(ValueError, match=message):
            sfumato.save_nets({"vae": net}, tmp_path / "a", layout=layout)
    randomized().save_pretrained(tmp_path / "b")
    config = json.loads((tmp_path / "b/config.json").read_text())
    (tmp_path / "b/config.json").write_text(json.dumps(config | {"norm_type": "spatial"}))
    with pytest.raises(ValueError, match="the config says norm_type spatial, the tensors say group"):
        sfumato.load_nets(tmp_path / "b")
