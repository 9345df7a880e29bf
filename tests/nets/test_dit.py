"""DiT: zero at birth, any size, text by cross-attention prepared once."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from sfumato.core.types import Conditioning
from sfumato.nets.dit import DiT, DiTConfig
from sfumato.nets.dit_block import MODULATIONS, Told
from sfumato.nets.patches import patchify, rotate, rotation, sincos_positions, unpatchify

TEXT = DiTConfig(width=32, depth=2, heads=2, text_dim=12, pooled_dim=10, num_classes=5, qk_norm=True)


def conditioning(batch: int = 2) -> Conditioning:
    g = torch.Generator().manual_seed(1)
    mask = torch.tensor([[True] * 4, [True] * 2 + [False] * 2])[:batch]
    return Conditioning(
        label=torch.arange(batch),
        tokens=torch.randn(batch, 4, 12, generator=g),
        pooled=torch.randn(batch, 10, generator=g),
        mask=mask,
    )


def awake(config: DiTConfig) -> DiT:
    """A net whose zero-initialized layers are random too, so that everything reaches the output."""
    torch.manual_seed(0)
    net = DiT(config)
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return net.eval()


OPTIONS = {
    "qk_norm": True,
    "rope": True,
    "swiglu": True,
    "shared_modulation": True,
    "registers": 3,
    "spare_channels": 4,
    "null_label": False,
}
DESIGNS = list(MODULATIONS)


@pytest.mark.parametrize("shared", [False, True])
def test_a_fresh_net_is_zero_and_its_blocks_are_the_identity(shared: bool) -> None:
    net = DiT(replace(TEXT, shared_modulation=shared))
    x = torch.randn(2, 4, 8, 8)
    assert net(x, torch.rand(2), conditioning()).abs().max() == 0
    tokens, parts = torch.randn(2, 16, 32), net.modulations(torch.randn(2, 2, 32))
    kv = net.blocks[0].cross.project(torch.randn(2, 4, 12))
    assert torch.equal(net.blocks[0](tokens, parts[0], kv, Told(None, None, None)), tokens)


@pytest.mark.parametrize("block", DESIGNS)
def test_every_design_reads_time_and_class_and_starts_at_zero(block: str) -> None:
    config = DiTConfig(width=32, depth=2, heads=2, num_classes=5, block=block)
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([1.0, 400.0]), Conditioning(label=torch.tensor([0, 3]))
    assert DiT(config)(x, t, cond).abs().max() == 0
    net = awake(config)
    out = net(x, t, cond)
    assert out.shape == x.shape
    assert (out - net(x, t + 200, cond)).abs().amax(dim=(1, 2, 3)).min() > 1e-4
    assert (out - net(x, t, Conditioning(label=torch.tensor([1, 5])))).abs().amax(dim=(1, 2, 3)).min() > 1e-4
    # A picture does not depend on its company.
    torch.testing.assert_close(net(x[1:], t[1:], Conditioning(label=cond.label[1:])), out[1:])


def test_in_context_is_a_plain_transformer_on_two_more_tokens() -> None:
    """Against torch's own layer: pre-norm, tanh GELU aside, which is why the feed-forward is zero here."""
    net = awake(DiTConfig(width=32, depth=1, heads=2, num_classes=5, block="in_context"))
    block = net.blocks[0]
    torch.nn.init.zeros_(block.mlp.down.weight), torch.nn.init.zeros_(block.mlp.down.bias)
    x, t, cond = torch.randn(2, 4, 4, 4), torch.rand(2), Conditioning(label=torch.tensor([0, 5]))
    mha = torch.nn.MultiheadAttention(32, 2, batch_first=True)
    mha.load_state_dict(
        {
            "in_proj_weight": block.attention.qkv.weight,
            "in_proj_bias": block.attention.qkv.bias,
            "out_proj.weight": block.attention.out.weight,
            "out_proj.bias": block.attention.out.bias,
        }
    )
    tokens = torch.cat(
        [net.signals(t, cond), net.patches(patchify(x, 2)) + sincos_positions(2, 2, 32)], dim=1
    )
    h = block.norm1(tokens)
    tokens = (tokens + mha(h, h, h)[0])[:, 2:]
    torch.testing.assert_close(net(x, t, cond), unpatchify(net.out(net.norm(tokens)), (2, 2), 2))


@pytest.mark.parametrize("block", DESIGNS)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_with_every_design_trains_all_of_its_parameters(option: str, block: str) -> None:
    if option == "shared_modulation" and not MODULATIONS[block]:
        with pytest.raises(ValueError, match=f"block '{block}' has no modulation to share; use adaln_zero"):
            replace(TEXT, block=block, shared_modulation=True)
        return
    net = awake(replace(TEXT, **{"qk_norm": False, "block": block, option: OPTIONS[option]}))
    net(torch.randn(2, 4, 6, 8), torch.rand(2), conditioning()).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


def test_options_change_the_output_and_spare_channels_do_not() -> None:
    plain = awake(replace(TEXT, qk_norm=False))
    x, t, cond = torch.randn(2, 4, 8, 8), torch.rand(2), conditioning()
    rope = DiT(replace(plain.config, rope=True))
    rope.load_state_dict(plain.state_dict())
    assert (rope(x, t, cond) - plain(x, t, cond)).abs().max() > 1e-3
    spare = DiT(replace(plain.config, spare_channels=4))
    state = {k: torch.cat([v, v + 1]) if k.startswith("out.") else v for k, v in plain.state_dict().items()}
    spare.load_state_dict(state)
    torch.testing.assert_close(spare(x, t, cond), plain(x, t, cond))


def test_rotation_makes_attention_a_function_of_the_distance() -> None:
    """A query and a key a step apart have the same product wherever on the grid they are, on both axes."""
    turn = rotation(5, 6, 16)
    q, k = torch.randn(2, 1, 1, 1, 16).expand(2, 1, 1, 30, 16)
    scores = (rotate(q, turn)[0, 0] @ rotate(k, turn)[0, 0].T).unflatten(0, (5, 6)).unflatten(2, (5, 6))
    for rows, columns in ((1, 0), (0, 2), (2, 1)):
        apart = [scores[r, c, r + rows, c + columns] for r in range(5 - rows) for c in range(6 - columns)]
        torch.testing.assert_close(torch.stack(apart), apart[0].expand(len(apart)), rtol=1e-4, atol=1e-4)
    assert (scores[0, 0, 1, 0] - scores[0, 0, 0, 1]).abs() > 1e-3
    cos, sin = rotation(5, 6, 16, extra=2)
    assert cos.shape == (32, 16)
    assert (cos[:2] == 1).all()
    assert (sin[:2] == 0).all()


@pytest.mark.parametrize("block", DESIGNS)
def test_modulations_of_a_walk_in_one_batch(block: str) -> None:
    """All steps at once give what each step gives by itself, to rounding."""
    net = awake(DiTConfig(width=32, depth=2, heads=2, num_classes=5, block=block))
    x, cond = torch.randn(2, 4, 8, 8), Conditioning(label=torch.tensor([0, 3]))
    times = torch.tensor([900.0, 500.0, 3.0])
    many = Conditioning(label=cond.label.repeat(3))
    signals = net.signals(times.repeat_interleave(2), many)
    modulations = net.modulations(signals)
    for i, t in enumerate(times):
        rows = slice(2 * i, 2 * i + 2)
        out = net.transform(x, cond, signals[rows], [m[rows] for m in modulations])
        torch.testing.assert_close(out, net(x, t.expand(2), cond))


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (6, r"label 6 is out of range: this DiT has classes 0\.\.4, and 5 is the null class$"),
        (-1, "label -1 is out of range"),
    ],
)
def test_a_label_out_of_range_is_one_clear_line(label: int, message: str) -> None:
    net, cond = (
        DiT(replace(TEXT, text_dim=None, pooled_dim=None)),
        Conditioning(label=torch.tensor([0, label])),
    )
    with pytest.raises(ValueError, match=message):
        net(torch.randn(2, 4, 8, 8), torch.rand(2), cond)
    with pytest.raises(ValueError, match=message):
        net.prepare(cond)
    without = DiT(replace(net.config, null_label=False))
    with pytest.raises(ValueError, match=r"label 5 is out of range: this DiT has classes 0\.\.4$"):
        without(torch.randn(1, 4, 8, 8), torch.rand(1), Conditioning(label=torch.tensor([5])))


def test_prepared_text_gives_the_same_output() -> None:
    net = awake(TEXT)
    x, t, cond = torch.randn(2, 4, 8, 8), torch.rand(2), conditioning()
    assert torch.equal(net(x, t, cond), net(x, t, net.prepare(cond)))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("field", ["tokens", "pooled", "label", "mask"])
def test_every_kind_of_conditioning_reaches_the_output(field: str, shared: bool) -> None:
    net = awake(replace(TEXT, shared_modulation=shared))
    x, t, cond = torch.randn(2, 4, 8, 8), torch.rand(2), conditioning()
    changed = dict(cond.items())
    changed[field] = ~changed[field] if field == "mask" else changed[field] + 1
    assert (net(x, t, cond) - net(x, t, Conditioning(**changed))).abs().max() > 1e-4


def test_masked_tokens_are_not_read() -> None:
    net = awake(TEXT)
    x, t, cond = torch.randn(2, 4, 8, 8), torch.rand(2), conditioning()
    changed = dict(cond.items())
    changed["tokens"] = torch.where(cond.mask[..., None], cond.tokens, torch.tensor(7.0))
    torch.testing.assert_close(net(x, t, cond), net(x, t, Conditioning(**changed)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_any_size_and_dtype(dtype: torch.dtype) -> None:
    """The output follows that of float32, as closely as the dtype allows."""
    single = awake(replace(TEXT, rope=True, registers=2, block="adaln"))
    net = awake(single.config).to(dtype)
    x, t, cond = torch.randn(2, 4, 6, 10), torch.tensor([3.0, 700.0]), conditioning()
    out = net(x.to(dtype), t, cond.to("cpu", dtype))
    assert out.shape == (2, 4, 6, 10)
    assert out.dtype == dtype
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(out.float(), single(x, t, cond), rtol=tolerance, atol=tolerance)


def test_wrong_size_and_missing_text_are_one_clear_line() -> None:
    net = DiT(TEXT)
    with pytest.raises(ValueError, match="5x8 is not a multiple of the patch size 2"):
        net(torch.randn(2, 4, 5, 8), torch.rand(2), conditioning())
    with pytest.raises(ValueError, match=r"x has shape \(2, 3, 8, 8\); this DiT needs \(batch, 4, H, W\)"):
        net(torch.randn(2, 3, 8, 8), torch.rand(2), conditioning())
    with pytest.raises(ValueError, match=r"needs cond\.label"):
        net(torch.randn(2, 4, 8, 8), torch.rand(2), Conditioning())


def test_patchify_round_trip() -> None:
    x = torch.randn(2, 3, 4, 6)
    assert patchify(x, 2).shape == (2, 6, 12)
    assert torch.equal(unpatchify(patchify(x, 2), (2, 3), 2), x)


def test_positions_scaled_to_a_base() -> None:
    """Twice the size visits the same coordinates at every other patch, as diffusers scales them."""
    fine, coarse = sincos_positions(8, 8, 16, 4)[0].unflatten(0, (8, 8)), sincos_positions(4, 4, 16)[0]
    assert torch.equal(fine[::2, ::2].reshape(16, 16), coarse)
    assert torch.equal(sincos_positions(4, 4, 16, 4)[0], coarse)


def test_positions_put_the_column_first() -> None:
    table = sincos_positions(2, 3, 8)[0]
    assert table.shape == (6, 8)
    assert table[1, 0].item() == pytest.approx(math.sin(1.0))  # row 0, column 1
    assert table[3, 4].item() == pytest.approx(math.sin(1.0))  # row 1, column 0
    assert table[3, 0] == 0


@pytest.mark.parametrize(
    "config", [TEXT, replace(TEXT, num_classes=None, registers=2), replace(TEXT, block="adaln")]
)
def test_a_planned_walk_is_the_net_itself(config: DiTConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """To rounding, at planned times and others; and the time embedding runs once per chunk of steps."""
    net, cond = awake(config), conditioning()
    cond = net.prepare(cond if config.num_classes else replace(cond, label=None))
    times = torch.linspace(999, 0, 40, dtype=torch.float64)
    plan, x = net.plan(times), torch.randn(2, 4, 8, 8)
    calls: list[int] = []
    signals = net.signals
    monkeypatch.setattr(net, "signals", lambda t, c: calls.append(len(t)) or signals(t, c))
    for time in times[[0, 1, 17, 39]].float():
        expected = net(x, time.expand(2), cond)
        calls.clear()
        torch.testing.assert_close(plan(x, time.expand(2), cond), expected)
        torch.testing.assert_close(plan(x, time.expand(2), cond), expected)
        assert calls in ([32], [], [16])
    calls.clear()
    mixed = torch.stack([times[3], times[5]]).float()
    torch.testing.assert_close(plan(x, mixed, cond), net(x, mixed, cond))
    between = torch.full((2,), 500.5)
    torch.testing.assert_close(plan(x, between, cond), net(x, between, cond))
    assert calls == [2, 2, 2, 2]
    other = replace(cond, pooled=cond.pooled + 1)
    torch.testing.assert_close(
        plan(x, times[:1].float().expand(2), other), net(x, times[:1].float().expand(2), other)
    )
    shared = DiT(replace(config, shared_modulation=True))
    assert shared.plan(times) is shared
