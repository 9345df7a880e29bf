"""What every U-Net promises, whatever its shape."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sfumato.core.types import Conditioning
from sfumato.nets.attention import AttentionConfig, token_readers
from sfumato.nets.blocks import BlockConfig
from sfumato.nets.embedding import EmbedderConfig, EmbeddingConfig, Feature, TokensConfig
from sfumato.nets.presets import UNETS
from sfumato.nets.unet import LevelConfig, UNet, UNetConfig, levels

BATCH = 2
# One row against a batch, one memory layout against another: float32 sums in another order, outputs near 1.
CLOSE = {"rtol": 0.0, "atol": 1e-5}
PLAIN = AttentionConfig(heads=2)
EXTRAS = (
    EmbedderConfig(kind="table", features=(Feature(field="label", dim=4),)),
    EmbedderConfig(kind="linear", features=(Feature(field="pooled", dim=5),)),
)


def config(kind: str = "transformer", **changes: object) -> UNetConfig:
    attention = AttentionConfig(kind=kind, heads=2)
    base = UNetConfig(
        in_channels=3,
        out_channels=6,
        levels=levels(8, (1, 2), 1, attention=attention, at=(1,)),
        middle=attention,
        embedding=EmbeddingConfig(time_dim=8, dim=16, extras=EXTRAS),
        tokens=None if kind == "self" else TokensConfig(dim=7, masked=True),
        block=BlockConfig(
            norm_groups=4, film=kind == "appended", resample="residual" if kind == "self" else "conv"
        ),
    )
    return replace(base, **changes)


def conditioning(batch: int = BATCH) -> Conditioning:
    return Conditioning(
        label=torch.arange(batch) % 4,
        pooled=torch.randn(batch, 5),
        tokens=torch.randn(batch, 4, 7),
        mask=torch.arange(4) < torch.arange(1, batch + 1)[:, None],
    )


def awake(net: UNet) -> UNet:
    """With no parameter at zero, so that everything shows in the output."""
    for p in net.parameters():
        nn.init.normal_(p, std=0.2) if p.ndim > 1 else nn.init.normal_(
            p, mean=float(p.detach().mean()), std=0.1
        )
    return net.eval()


def inputs(batch: int = BATCH, size: tuple[int, int] = (8, 8)) -> tuple[Tensor, Tensor, Conditioning]:
    return torch.randn(batch, 3, *size), torch.linspace(1.5, 900.0, batch), conditioning(batch)


KINDS = ["self", "appended", "transformer"]


def test_fresh_net_predicts_zero() -> None:
    assert torch.equal(UNet(config())(*inputs()), torch.zeros(BATCH, 6, 8, 8))


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_matters(kind: str) -> None:
    """Every parameter has a gradient, and x, t and each conditioning change the output."""
    net = awake(UNet(config(kind)))
    x, t, cond = inputs()
    y = net(x, t, cond)
    y.square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []
    others = [
        net(x + 1, t, cond),
        net(x, t + 1, cond),
        net(x, t, replace(cond, label=cond.label + 1)),
        net(x, t, replace(cond, pooled=cond.pooled + 1)),
    ]
    if kind != "self":
        others.append(net(x, t, replace(cond, tokens=cond.tokens + 1)))
        others.append(net(x, t, replace(cond, mask=~cond.mask)))
    assert all((y - other).abs().max() > 1e-4 for other in others)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_independent(kind: str) -> None:
    net = awake(UNet(config(kind)))
    x, t, cond = inputs(3)
    with torch.no_grad():
        together = net(x, t, cond)
        for i in range(3):
            row = slice(i, i + 1)
            alone = net(x[row], t[row], cond.map(lambda v, row=row: v[row]))
            torch.testing.assert_close(alone, together[row], **CLOSE)


@pytest.mark.parametrize("kind", ["appended", "transformer"])
def test_prepare_changes_nothing_but_the_work(kind: str) -> None:
    net = awake(UNet(config(kind)))
    x, t, cond = inputs()
    prepared = net.prepare(cond)
    assert len(prepared.kv) == len(token_readers(net)) == net.num_readers > 0
    assert net.prepare(prepared) is prepared
    with torch.no_grad():
        assert torch.equal(net(x, t, prepared), net(x, t, cond))
        # The tokens themselves are not read again.
        assert torch.equal(net(x, t, replace(prepared, tokens=None)), net(x, t, cond))


def test_prepare_of_a_net_without_tokens_is_the_conditioning() -> None:
    cond = conditioning()
    assert UNet(config("self")).prepare(cond) is cond


def test_copies_keep_the_order_of_their_readers() -> None:
    net = awake(UNet(config()))
    x, t, cond = inputs()
    twin = copy.deepcopy(net)
    assert [r.slot for r in token_readers(twin)] == list(range(net.num_readers))
    assert torch.equal(twin(x, t, net.prepare(cond)), net(x, t, cond))


def error(got: Tensor, want: Tensor) -> float:
    """Root mean square difference over the spread of what is wanted."""
    return float((got.to(want) - want).square().mean().sqrt() / want.std())


# bfloat16 keeps 8 bits: up to 0.4 % per rounding, and some ten of them follow one another in these nets.
BFLOAT16 = 0.03


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-5), (torch.bfloat16, BFLOAT16)])
def test_other_precisions(kind: str, dtype: torch.dtype, bound: float) -> None:
    """Weights of another dtype take float32 inputs."""
    net = awake(UNet(config(kind)))
    x, t, cond = inputs()
    with torch.no_grad():
        exact = net(x, t, cond)
        cast = net.to(dtype)(x, t, cond)
    assert cast.dtype == dtype
    assert error(cast, exact) < bound


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str) -> None:
    net = awake(UNet(config(kind)))
    x, t, cond = inputs()
    with torch.no_grad():
        exact, prepared = net(x, t, cond), net.prepare(cond)
        with torch.autocast("cpu", torch.bfloat16):
            cast, from_prepared = net(x, t, cond), net(x, t, prepared)
    assert error(cast, exact) < BFLOAT16
    assert error(from_prepared, exact) < BFLOAT16


@pytest.mark.parametrize("kind", KINDS)
def test_channels_last(kind: str) -> None:
    net = awake(UNet(config(kind)))
    x, t, cond = inputs(size=(8, 12))
    with torch.no_grad():
        want = net(x, t, cond)
        last = net.to(memory_format=torch.channels_last)(
            x.contiguous(memory_format=torch.channels_last), t, cond
        )
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, want, **CLOSE)


def test_halves_make_the_whole() -> None:
    """What a ControlNet or a classifier takes from the net."""
    net = awake(UNet(config()))
    x, t, cond = inputs()
    encoded = net.encoder(x, t, net.prepare(cond))
    assert len(encoded.skips) == len(net.decoder)
    assert encoded.h.shape == (BATCH, 16, 4, 4)
    assert torch.equal(net.decode(encoded), net(x, t, cond))


def test_an_empty_caption_is_no_nan() -> None:
    net = awake(UNet(config()))
    x, t, cond = inputs()
    assert torch.isfinite(net(x, t, replace(cond, mask=torch.zeros_like(cond.mask)))).all()


def test_mask_is_ignored_unless_configured() -> None:
    net = awake(UNet(config(tokens=TokensConfig(dim=7))))
    x, t, cond = inputs()
    assert torch.equal(net(x, t, cond), net(x, t, replace(cond, mask=None)))


@settings(max_examples=25)
@given(
    widths=st.lists(st.sampled_from([4, 8, 12]), min_size=1, max_size=3),
    blocks=st.lists(st.integers(1, 2), min_size=3, max_size=3),
    at=st.sets(st.integers(0, 2)),
    resample=st.sampled_from(["conv", "conv_asymmetric", "residual"]),
    film=st.booleans(),
    middle=st.booleans(),
)
def test_any_shape_fits_together(
    widths: list[int], blocks: list[int], at: set[int], resample: str, film: bool, middle: bool
) -> None:
    stack = tuple(
        LevelConfig(channels=w, blocks=blocks[i], attention=PLAIN if i in at else None)
        for i, w in enumerate(widths)
    )
    shape = config(
        "self",
        levels=stack,
        middle=PLAIN if middle else None,
        block=BlockConfig(norm_groups=2, film=film, resample=resample),
        embedding=EmbeddingConfig(time_dim=8, dim=16),
    )
    net = awake(UNet(shape))
    y = net(torch.randn(1, 3, 2 * shape.factor, 3 * shape.factor), torch.tensor([3.0]), Conditioning())
    assert y.shape == (1, 6, 2 * shape.factor, 3 * shape.factor)
    assert torch.isfinite(y).all()


def test_wrong_inputs_are_named() -> None:
    net = UNet(config())
    x, t, cond = inputs()
    with pytest.raises(ValueError, match="x has 4 channels; this U-Net needs 3"):
        net(torch.randn(BATCH, 4, 8, 8), t, cond)
    with pytest.raises(ValueError, match="x is 9x8; both sides must be multiples of 2"):
        net(torch.randn(BATCH, 3, 8, 9), t, cond)
    with pytest.raises(ValueError, match=r"needs cond\.tokens"):
        net(x, t, replace(cond, tokens=None))
    with pytest.raises(ValueError, match=r"needs cond\.label"):
        net(x, t, replace(cond, label=None))
    with pytest.raises(ValueError, match=r"cond\.pooled has shape \(2, 6\); this network needs \(batch, 5\)"):
        net(x, t, replace(cond, pooled=torch.randn(BATCH, 6)))
    with pytest.raises(ValueError, match=r"cond\.tokens has shape \(2, 4, 8\)"):
        net(x, t, replace(cond, tokens=torch.randn(BATCH, 4, 8)))
    with pytest.raises(ValueError, match="prepare it with this net"):
        net(x, t, replace(cond, kv=net.prepare(cond).kv[1:]))


def test_wrong_configurations_are_named() -> None:
    with pytest.raises(ValueError, match="level 0 has 10 channels; norm_groups 4 must divide it"):
        config(levels=levels(10, (1,), 1))
    with pytest.raises(ValueError, match="reads tokens"):
        UNet(config("transformer", tokens=None))
    with pytest.raises(ValueError, match="has 2 features: give one"):
        EmbedderConfig(kind="table", features=(Feature(field="label", dim=4), Feature(field="aug", dim=4)))
    with pytest.raises(ValueError, match="'pool' alone has heads"):
        EmbedderConfig(kind="linear", features=(Feature(field="pooled", dim=4),), heads=2)
    with pytest.raises(ValueError, match="give both or none"):
        TokensConfig(dim=4, image_tokens=2)
    with pytest.raises(ValueError, match="did you mean 'sd15'"):
        UNETS["sd1.5"]


def test_levels() -> None:
    stack = levels(192, (0.5, 1, 2), (1, 2, 3), attention=PLAIN, at=(2,))
    assert [level.channels for level in stack] == [96, 192, 384]
    assert [level.blocks for level in stack] == [1, 2, 3]
    assert [level.attention for level in stack] == [None, None, PLAIN]


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("sd15", [8, 8, 8, None]),
        ("sd2", [5, 10, 20, None]),
        ("sdxl-base", [None, 10, 20]),
        ("sdxl-refiner", [None, 12, 24, None]),
        ("adm-imagenet128", [None, None, 4, 4, 4]),
        ("adm-imagenet256", [None, None, None, 8, 16, 16]),
        ("glide-base", [None, 6, 9, 12]),
        ("ldm-imagenet-cfg", [None, 1, 1, 1]),
    ],
)
def test_presets_have_the_published_heads(name: str, heads: list[int | None]) -> None:
    """Head counts leave no trace in the shapes of the weights, so the parameter counts cannot see them."""
    stack = UNETS[name]().levels
    assert [level.attention and level.attention.heads_of(level.channels) for level in stack] == heads
