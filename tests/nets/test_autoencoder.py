"""The first stages against diffusers', and the quantizer and the posterior against their formulas."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from sfumato.nets.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    DiagonalGaussian,
    Downsample,
    VectorQuantizer,
)
from sfumato.nets.presets.first_stages import AUTOENCODERS

# Both sides sum the same terms in float32 in another order; outputs are of order 1.
TOLERANCE = 1e-5
TINY = AutoencoderConfig(channels=16, mults=(1, 2), blocks=1, norm_groups=8, z_channels=4, embed_dim=4)
TINY_VQ = replace(TINY, kind="vq", z_channels=3, embed_dim=3, codebook_size=32, legacy_commitment=True)

LEAVES = [("conv_shortcut", "skip"), ("group_norm", "norm"), (r"to_([qkv])", r"\1"), (r"to_out\.0", "out")]


def names(config: AutoencoderConfig) -> dict[str, str]:
    """Prefix in diffusers' layout -> prefix in ours."""
    table = {"quant_conv.": "quant_conv.", "post_quant_conv.": "post_quant_conv.", "quantize.": "quantizer."}
    last = len(config.mults) - 1
    for half, blocks, resample in (("encoder", "down", "downsamplers"), ("decoder", "up", "upsamplers")):
        table[f"{half}.conv_in."] = f"{half}.conv_in."
        table[f"{half}.conv_norm_out."] = f"{half}.norm_out."
        table[f"{half}.conv_out."] = f"{half}.conv_out."
        for theirs, ours in (("resnets.0", 0), ("attentions.0", 1), ("resnets.1", 2)):
            table[f"{half}.mid_block.{theirs}."] = f"{half}.middle.{ours}."
        for i in range(last + 1):
            attends = (i if half == "encoder" else last - i) in config.attention_levels
            step = 2 if attends else 1
            count = config.blocks + (half == "decoder")
            for j in range(count):
                table[f"{half}.{blocks}_blocks.{i}.resnets.{j}."] = f"{half}.levels.{i}.{step * j}."
                table[f"{half}.{blocks}_blocks.{i}.attentions.{j}."] = f"{half}.levels.{i}.{step * j + 1}."
            table[f"{half}.{blocks}_blocks.{i}.{resample}.0."] = f"{half}.levels.{i}.{step * count}."
    return table


def load(net: Autoencoder, state: dict[str, Tensor]) -> None:
    """Copy a diffusers state dict into ours; every tensor on both sides is used."""
    table, ours, renamed = names(net.config), net.state_dict(), {}
    for key, value in state.items():
        prefix = max((p for p in table if key.startswith(p)), key=len)
        rest = key.removeprefix(prefix)
        for pattern, replacement in LEAVES:
            rest = re.sub(pattern, replacement, rest)
        renamed[table[prefix] + rest] = value.reshape(ours[table[prefix] + rest].shape)
    net.load_state_dict(renamed)


def randomized(module: nn.Module) -> nn.Module:
    """Biases and norms away from their initial zeros and ones, so that a swap of two shows."""
    for p in module.parameters():
        if p.ndim == 1:
            nn.init.normal_(p, mean=float(p.detach().mean()), std=0.2)
    return module.eval()


def options(config: AutoencoderConfig) -> dict[str, object]:
    """The arguments of diffusers' classes for our configuration."""
    attends = [i in config.attention_levels for i in range(len(config.mults))]
    return {
        "block_out_channels": tuple(config.channels * m for m in config.mults),
        "down_block_types": tuple("AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attends),
        "up_block_types": tuple(
            "AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attends)
        ),
        "layers_per_block": config.blocks,
        "latent_channels": config.z_channels,
        "norm_num_groups": config.norm_groups,
        "mid_block_add_attention": config.mid_attention,
    }


@pytest.mark.parametrize(
    "config",
    [TINY, replace(TINY, mults=(1, 2, 2), blocks=2), replace(TINY, mid_attention=False)],
    ids=["two levels", "three levels", "no attention"],
)
def test_kl_computes_what_diffusers_computes(config: AutoencoderConfig) -> None:
    reference = randomized(AutoencoderKL(**options(config)))
    net = Autoencoder(config).eval()
    load(net, reference.state_dict())
    image = torch.rand(2, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        theirs, ours = reference.encode(image).latent_dist, net.encode(image)
        torch.testing.assert_close(ours.mean, theirs.mean, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(ours.logvar, theirs.logvar, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(ours.kl(), theirs.kl(), rtol=1e-5, atol=0)
        decoded = reference.decode(theirs.mean).sample
        torch.testing.assert_close(net.decode(theirs.mean), decoded, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("attention", [(), (1,)], ids=["middle only", "second level"])
def test_vq_computes_what_diffusers_computes(attention: tuple[int, ...]) -> None:
    config = replace(TINY_VQ, attention_levels=attention)
    sizes = {"num_vq_embeddings": config.codebook_size, "vq_embed_dim": config.embed_dim}
    reference = VQModel(**options(config), **sizes)
    nn.init.normal_(randomized(reference).quantize.embedding.weight)
    net = Autoencoder(config).eval()
    load(net, reference.state_dict())
    image = torch.rand(2, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        theirs, ours = reference.encode(image).latents, net.encode(image).mean
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)
        z, loss, (_, _, codes) = reference.quantize(theirs)
        quantized = net.quantize(theirs)
        assert torch.equal(quantized.codes.flatten(), codes.flatten())
        torch.testing.assert_close(quantized.z, z, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(quantized.loss, loss, rtol=1e-5, atol=0)
        for quantize in (True, False):
            want = reference.decode(theirs, force_not_quantize=not quantize).sample
            torch.testing.assert_close(net.decode(theirs, quantize=quantize), want, rtol=0, atol=TOLERANCE)


def test_posterior_against_torch_distributions() -> None:
    posterior = DiagonalGaussian(torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2))
    std = (0.5 * posterior.logvar).exp()
    want = kl_divergence(Normal(posterior.mean, std), Normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(posterior.kl(), want, rtol=1e-5, atol=1e-5)
    zero = DiagonalGaussian(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))
    assert zero.kl().item() == 0.0
    eps = torch.randn(3, 4, 2, 2)
    torch.testing.assert_close(posterior.sample(eps), Normal(posterior.mean, std).icdf(Normal(0, 1).cdf(eps)))


def test_log_variance_is_clamped() -> None:
    net = Autoencoder(TINY)
    nn.init.zeros_(net.quant_conv.weight)
    for bias, want in ((1e3, 20.0), (-1e3, -30.0)):
        nn.init.constant_(net.quant_conv.bias, bias)
        assert net.encode(torch.zeros(1, 3, 8, 8)).logvar.unique().tolist() == [want]


def test_codes_are_the_nearest() -> None:
    quantizer = VectorQuantizer(16, 3)
    nn.init.normal_(quantizer.embedding.weight)
    z = torch.randn(2, 3, 4, 5)
    out = quantizer(z)
    distance = torch.cdist(z.permute(0, 2, 3, 1).reshape(-1, 3), quantizer.embedding.weight)
    assert torch.equal(out.codes.flatten(), distance.argmin(1))
    torch.testing.assert_close(out.z, quantizer.lookup(out.codes), rtol=0, atol=1e-6)
    assert out.z.shape == z.shape


def test_gradient_goes_straight_through() -> None:
    """What follows the quantizer moves the encoder as if nothing stood between, and not the codebook."""
    quantizer = VectorQuantizer(16, 3)
    z, weight = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(2, 3, 4, 5)
    (quantizer(z).z * weight).sum().backward()
    assert torch.equal(z.grad, weight)
    assert quantizer.embedding.weight.grad is None


@pytest.mark.parametrize(("legacy", "on_encoder", "on_codebook"), [(True, 1.0, 0.25), (False, 0.25, 1.0)])
def test_which_term_beta_weighs(legacy: bool, on_encoder: float, on_codebook: float) -> None:
    """One code at the origin: the gradients are 2 z / n times the weight of their term."""
    quantizer = VectorQuantizer(1, 3, beta=0.25, legacy=legacy)
    nn.init.zeros_(quantizer.embedding.weight)
    z = torch.randn(1, 3, 2, 2, requires_grad=True)
    quantizer(z).loss.backward()
    torch.testing.assert_close(z.grad, on_encoder * 2 * z.detach() / z.numel())
    want = -on_codebook * 2 * z.detach().sum((0, 2, 3)) / z.numel()
    torch.testing.assert_close(quantizer.embedding.weight.grad[0], want)


def test_beta_weighs_the_commitment_as_in_the_paper_but_in_the_published_stages() -> None:
    assert not AutoencoderConfig(kind="vq", codebook_size=2).legacy_commitment
    assert not VectorQuantizer(2, 2).legacy
    assert all(AUTOENCODERS[name]().legacy_commitment for name in AUTOENCODERS if name.startswith("vq"))


def test_downsampling_pads_right_and_bottom() -> None:
    """With all weights one, each output is the number of pixels that it sees."""
    down = Downsample(1)
    nn.init.ones_(down.conv.weight)
    nn.init.zeros_(down.conv.bias)
    assert down(torch.ones(1, 1, 4, 4))[0, 0].tolist() == [[9.0, 6.0], [6.0, 4.0]]


def test_vq_quantizes_in_the_decoder() -> None:
    net = Autoencoder(TINY_VQ)
    image = torch.rand(1, 3, 8, 8)
    posterior = net.encode(image)
    assert torch.equal(posterior.logvar, torch.full_like(posterior.mean, -30.0))
    codes = net.quantize(posterior.mean).codes
    on_codes = net.quantizer.lookup(codes)
    assert not torch.equal(posterior.mean, on_codes)
    torch.testing.assert_close(net.decode(posterior.mean), net.decode(on_codes, quantize=False))


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_shapes_and_factor(patch: int) -> None:
    net = Autoencoder(replace(TINY, patch=patch))
    assert net.config.factor == 2 * patch
    image = torch.rand(1, 3, 16, 24)
    z = net.encode(image).mean
    assert z.shape == (1, 4, 16 // net.config.factor, 24 // net.config.factor)
    assert net.decode(z).shape == image.shape


def test_bfloat16() -> None:
    """8 bits are up to 0.4 % per rounding, and some ten of them follow one another."""
    net = randomized(Autoencoder(TINY))
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        want = net.decode(net.encode(image).mean)
        net.bfloat16()
        got = net.decode(net.encode(image.bfloat16()).mean)
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).square().mean().sqrt() < 0.03 * want.std()


def test_every_parameter_learns() -> None:
    for config in (replace(TINY, attention_levels=(0, 1)), TINY_VQ):
        net = Autoencoder(config)
        z = net.encode(torch.rand(2, 3, 8, 8))
        loss = net.decode(z.sample(torch.randn_like(z.mean))).square().mean()
        loss = loss + (net.quantize(z.mean).loss if config.kind == "vq" else z.kl().mean())
        loss.backward()
        missing = [n for n, p in net.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
        assert missing == []


def test_errors() -> None:
    with pytest.raises(ValueError, match="codebook"):
        AutoencoderConfig(kind="vq")
    with pytest.raises(ValueError, match="codebook"):
        AutoencoderConfig(codebook_size=16)
    with pytest.raises(ValueError, match=r"embed_dim \(3\) must equal z_channels \(4\)"):
        AutoencoderConfig(quant_conv=False, embed_dim=3)
    with pytest.raises(ValueError, match="image is 9x8; both sides must be multiples of 2"):
        Autoencoder(TINY).encode(torch.rand(1, 3, 8, 9))
    with pytest.raises(ValueError, match="no codebook"):
        Autoencoder(TINY).quantize(torch.rand(1, 4, 2, 2))
