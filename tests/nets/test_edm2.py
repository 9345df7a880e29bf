"""EDM2: recorded operations and blocks of the reference, the whole net against a plain function."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from sfumato.checkpoints.layouts import LAYOUTS
from sfumato.core.types import Conditioning
from sfumato.diffusion import PARAMETERIZATIONS, VE, Denoiser
from sfumato.nets.edm2 import EDM2, EDM2Config, MPBlock, mp_cat, mp_silu, mp_sum, normalize

GOLDEN = Path(__file__).parents[1] / "golden" / "edm2"
IO = load_file(GOLDEN / "blocks.safetensors")
SHAPES = {
    name: tuple(shape) for name, shape in json.loads((GOLDEN / "names.json").read_text("utf-8")).items()
}
CONFIG = EDM2Config(
    width=32, mults=(1, 2), blocks=2, attention_levels=(1,), head_dim=32, num_classes=10, resolution=16,
    logvar_features=32,
)  # fmt: skip
SETTINGS = {"channels_per_head": 32}
PART = LAYOUTS["edm2"].parts[0]


def state() -> dict[str, torch.Tensor]:
    """Random tensors in the reference's names, some of them the recorded ones."""
    made = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    return made | {k.removeprefix("model."): v for k, v in IO.items() if k.startswith("model.")}


def loaded(tensors: dict[str, torch.Tensor]) -> EDM2:
    net = EDM2(CONFIG)
    net.load_state_dict(PART.names(CONFIG).load(tensors, where="random"))
    return net.eval()


def test_every_name_both_ways():
    settings = PART.settings(SHAPES, SETTINGS)
    assert PART.config(settings) == CONFIG
    assert LAYOUTS["edm2"].fits(SHAPES)
    tensors = state()
    net = loaded(tensors)
    back = PART.names(CONFIG).save(net.state_dict(), where="net")
    assert set(back) == set(tensors)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    published = PART.published(CONFIG, {})
    assert published == {name: settings[name] for name in published}


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("mp_silu", lambda a, b, c: mp_silu(a)),
        ("mp_sum_.3", lambda a, b, c: mp_sum(a, c, 0.3)),
        ("mp_cat", lambda a, b, c: mp_cat(a, b, 0.5)),
        ("mp_cat_.3", lambda a, b, c: mp_cat(a, b, 0.3)),
        ("normalize_all", lambda a, b, c: normalize(a)),
        ("normalize_dim1", lambda a, b, c: normalize(a, 1)),
    ],
)
def test_operations_are_the_recorded_ones(name, ours):
    torch.testing.assert_close(
        ours(*(IO[f"in.op/{x}"] for x in "abc")), IO[f"out.op/{name}"], rtol=0, atol=1e-6
    )


@torch.no_grad()
def test_blocks_are_the_recorded_ones():
    """An encoder block with skip convolution and attention, a decoder block after a concatenation."""
    net = loaded(state())
    t = IO["in.sigma"].log() / 4
    signal = net._signal(t, Conditioning(label=IO["in.labels"].argmax(1)), torch.float32)
    out = net.encoder[3](IO["inter.enc.8x8_down"], signal)
    torch.testing.assert_close(out, IO["inter.enc.8x8_block0"], rtol=0, atol=1e-5)
    joined = mp_cat(IO["inter.dec.16x16_up"], IO["inter.enc.16x16_block1"], 0.5)
    decoder = net.decoder[6]
    assert decoder.skip == 32
    torch.testing.assert_close(decoder(joined, signal), IO["inter.dec.16x16_block0"], rtol=0, atol=1e-5)
    torch.testing.assert_close(net.log_variance(t), IO["out.logvar"].flatten(), rtol=0, atol=1e-6)


def pixel(x: torch.Tensor, dim: int) -> torch.Tensor:
    return x / (1e-4 + x.square().mean(dim, keepdim=True).sqrt())


def share(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    return ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)


def silu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x) / 0.596


def convolved(s, name: str, x: torch.Tensor, gain: torch.Tensor | float = 1.0) -> torch.Tensor:
    w = s[f"{name}.weight"]
    norm = w.flatten(1).norm(dim=1) / math.sqrt(w[0].numel()) + 1e-4
    w = w / norm.reshape(-1, *[1] * (w.ndim - 1)) * gain / math.sqrt(w[0].numel())
    return x @ w.T if w.ndim == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)


def reference(
    s: dict[str, torch.Tensor], x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """The net written down once more, in the names of its file; labels are rows of 0 and 1."""
    conv = partial(convolved, s)

    def block(name: str, x: torch.Tensor) -> torch.Tensor:
        if name.endswith("down"):
            x = F.avg_pool2d(x, 2)
        if name.endswith("up"):
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        skip = f"{name}.conv_skip" if f"{name}.conv_skip.weight" in s else None
        if ".enc." in name:
            x = pixel(conv(skip, x) if skip else x, 1)
        y = conv(f"{name}.conv_res0", silu(x))
        y = y * (conv(f"{name}.emb_linear", emb, s[f"{name}.emb_gain"]) + 1)[..., None, None]
        y = conv(f"{name}.conv_res1", silu(y))
        x = share(conv(skip, x) if skip and ".dec." in name else x, y, 0.3)
        if f"{name}.attn_qkv.weight" in s:
            b, c, h, w = x.shape
            qkv = pixel(conv(f"{name}.attn_qkv", x).reshape(b, c // 32, 32, 3, h * w), 2)
            q, k, v = qkv.unbind(3)
            weights = torch.einsum("nhcq,nhck->nhqk", q, k / math.sqrt(32)).softmax(3)
            y = torch.einsum("nhqk,nhck->nhcq", weights, v).reshape(b, c, h, w)
            x = share(x, conv(f"{name}.attn_proj", y), 0.3)
        return x.clamp(-256, 256)

    waves = torch.cos(torch.outer(t, s["unet.emb_fourier.freqs"]) + s["unet.emb_fourier.phases"]) * 2**0.5
    emb = silu(share(conv("unet.emb_noise", waves), conv("unet.emb_label", labels * math.sqrt(10)), 0.5))
    x = conv("unet.enc.16x16_conv", torch.cat([x, torch.ones_like(x[:, :1])], 1))
    skips = [x]
    for name in ("16x16_block0", "16x16_block1", "8x8_down", "8x8_block0", "8x8_block1"):
        x = block(f"unet.enc.{name}", x)
        skips.append(x)
    coarse, fine = ("8x8_in0", "8x8_in1"), ("16x16_up",)
    for name in (
        *coarse,
        *(f"8x8_block{i}" for i in range(3)),
        *fine,
        *(f"16x16_block{i}" for i in range(3)),
    ):
        if "block" in name:
            a, b = x, skips.pop()
            scale = math.sqrt((a.shape[1] + b.shape[1]) * 2)
            x = torch.cat(
                [a * scale * 0.5 / math.sqrt(a.shape[1]), b * scale * 0.5 / math.sqrt(b.shape[1])], 1
            )
        x = block(f"unet.dec.{name}", x)
    return conv("unet.out_conv", x, s["unet.out_gain"])


@torch.no_grad()
def test_the_whole_net_is_the_plain_function():
    tensors = state()
    net = loaded(tensors)
    x, t = torch.randn(3, 4, 16, 16), torch.tensor([-1.5, 0.0, 1.1])
    labels = torch.tensor([0, 7, 10])  # the last is none
    rows = F.one_hot(labels, 11)[:, :10].float()
    out = net(x, t, Conditioning(label=labels))
    expected = reference(tensors, x, t, rows)
    assert expected.std() > 0.1
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)  # sums of some hundred terms, 12 blocks
    torch.testing.assert_close(
        net(x, t, Conditioning()), reference(tensors, x, t, 0 * rows), rtol=1e-4, atol=1e-4
    )


def test_training_keeps_the_weights_at_unit_magnitude():
    net = loaded(state()).train()
    denoiser = Denoiser(net, VE(), PARAMETERIZATIONS["edm"])
    level = VE()(torch.tensor([-1.0, 0.5], dtype=torch.float64))
    denoiser(
        torch.randn(2, 4, 16, 16), level, Conditioning(label=torch.tensor([0, 10]))
    ).x0.square().sum().backward()
    weight = net.conv_in.weight.detach()
    torch.testing.assert_close(weight.flatten(1).square().mean(1).sqrt(), torch.ones(32), rtol=0, atol=1e-3)
    frozen = {"logvar.weight", "logvar_fourier.freqs"}
    assert {n for n, p in net.named_parameters() if p.grad is None} == frozen & dict(
        net.named_parameters()
    ).keys()


def test_any_size_and_what_does_not_fit_is_one_clear_line():
    net = loaded(state())
    x, t = torch.randn(1, 4, 8, 20), torch.zeros(1)
    assert net(x, t, Conditioning(label=torch.tensor([3]))).shape == x.shape
    with pytest.raises(ValueError, match="8x7: both sides must be multiples of 2"):
        net(x[..., :7], t, Conditioning())
    with pytest.raises(
        ValueError, match=r"label 11 is out of range: this net has classes 0\.\.9, and 10 is none"
    ):
        net(x, t, Conditioning(label=torch.tensor([11])))
    with pytest.raises(ValueError, match=r"attention at level 1 .* head_dim 48 divide its width"):
        EDM2Config(width=32, mults=(1, 2), attention_levels=(1,), head_dim=48)


def test_published_sizes():
    """Millions of parameters of the paper's table: XS, S, M, XXL; `unet` alone, without the log-variance."""
    for width, millions in ((128, 125), (192, 280), (256, 498), (448, 1523)):
        with torch.device("meta"):
            net = EDM2(EDM2Config(width=width))
        assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=1)
    assert isinstance(net.decoder[0], MPBlock)
