from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn

from sfumato.core.config import from_json, to_json
from sfumato.nets.dit import DiT, DiTConfig
from sfumato.nets.tags import fused, tagged
from sfumato.training.muon import Muon, orthogonalize
from sfumato.training.optim import OptimConfig, PhaseOptimizer, lr_factor, roles


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 48)
        self.conv_in = nn.Conv2d(4, 48, 3)
        self.hidden = nn.Linear(48, 64)
        self.tagged = tagged(nn.Linear(64, 64), "edge")
        self.norm = nn.LayerNorm(64)
        self.frozen = nn.Linear(64, 64).requires_grad_(False)
        self.positions = nn.Parameter(torch.zeros(40, 48))

    def forward(self) -> torch.Tensor:
        h = self.tagged(self.hidden(self.table.weight + self.positions))
        return self.norm(h).square().mean() + self.conv_in(torch.ones(1, 4, 3, 3)).square().mean()


def test_roles_come_from_layers_shapes_and_tags():
    toy = Toy()
    table = roles([toy])
    assert table[toy.hidden.weight] == ("matrix", 1)
    assert table[toy.conv_in.weight] == ("edge", 1)
    assert table[toy.tagged.weight] == ("edge", 1)
    assert table[toy.table.weight] == table[toy.positions] == ("embedding", 1)
    assert table[toy.hidden.bias].role == table[toy.norm.weight].role == "vector"
    assert toy.frozen.weight not in table


def test_tags_of_the_transformers_reach_the_optimizer():
    dit = DiT(DiTConfig(width=64, depth=1, heads=2, text_dim=32))
    table = roles([dit])
    assert table[dit.blocks[0].attention.qkv.weight] == ("matrix", 3)
    assert table[dit.blocks[0].cross.kv.weight] == ("matrix", 2)
    assert table[dit.blocks[0].modulation.weight] == ("matrix", 6)
    assert table[dit.blocks[0].mlp.up.weight] == ("matrix", 1)
    edges = {name for name, p in dit.named_parameters() if table[p].role == "edge"}
    assert edges == {f"{name}.weight" for name in ("patches", "time.0", "time.2", "modulation", "out")}


@pytest.mark.parametrize("kind", ["adamw", "Muon", "sgd"])
def test_every_trainable_parameter_is_in_exactly_one_group(kind):
    toy = Toy()
    optimizer = PhaseOptimizer([toy], OptimConfig(kind=kind))
    held = [id(p) for o, _ in optimizer._optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in toy.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["AdamW", "muon", "SGD"])
def test_weight_decay_shrinks_matrices_and_nothing_else(kind):
    toy = Toy()
    before = {name: p.detach().clone() for name, p in toy.named_parameters()}
    optimizer = PhaseOptimizer([toy], OptimConfig(kind=kind, lr=0.1, muon_lr=0.1, weight_decay=0.5))
    for p in toy.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(0, 1, 10**9)
    for name, p in toy.named_parameters():
        shrunk = name in ("hidden.weight", "tagged.weight", "conv_in.weight")
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if shrunk else 1.0))


def test_muon_moves_hidden_matrices_orthogonally_and_adamw_the_rest():
    torch.manual_seed(0)
    toy = Toy()
    before = toy.hidden.weight.detach().clone()
    optimizer = PhaseOptimizer([toy], OptimConfig(kind="muon", muon_lr=0.01, clip=0.0))
    optimizer.backward(toy())
    optimizer.step(0, 1, 10**9)
    moved = (toy.hidden.weight.detach() - before) / (0.01 * (64 / 48) ** 0.5)
    values = torch.linalg.svdvals(moved)
    # The gradient has low rank, so only singular values away from zero reach the band of the quintic.
    assert values.max() < 1.3
    assert (values > 0.5).sum() > 10
    assert not torch.equal(toy.table.weight, toy.positions)


@pytest.mark.parametrize(
    ("kind", "options", "reference"),
    [
        ("sgd", {"momentum": 0.9, "nesterov": True}, torch.optim.SGD),
        ("RAdam", {"betas": (0.8, 0.95)}, torch.optim.RAdam),
        ("adafactor", {"d": 2.0}, torch.optim.Adafactor),
        ("rprop", {}, torch.optim.Rprop),
    ],
)
def test_an_optimizer_of_torch_does_what_it_does_alone(kind, options, reference):
    torch.manual_seed(0)
    ours, theirs = Toy(), Toy()
    theirs.load_state_dict(ours.state_dict())
    config = OptimConfig(kind=kind, lr=0.02, options=options, lr_schedule="constant", clip=0.0)
    optimizer = PhaseOptimizer([ours], config)
    decay = {} if kind == "rprop" else {"weight_decay": 0.0}
    alone = reference([p for p in theirs.parameters() if p.requires_grad], lr=0.02, **decay, **options)
    for i in range(3):
        optimizer.backward(ours())
        optimizer.step(i, i + 1, 3)
        alone.zero_grad()
        theirs().backward()
        alone.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_optimizer_of_torch_resumes_exactly():
    config = OptimConfig(kind="nadam", lr=0.02, weight_decay=0.1)
    first, second = Toy(), Toy()
    one = PhaseOptimizer([first], config)
    one.backward(first())
    one.step(0, 1, 9)
    second.load_state_dict(first.state_dict())
    two = PhaseOptimizer([second], config)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for toy, optimizer in ((first, one), (second, two)):
        optimizer.backward(toy())
        optimizer.step(1, 2, 9)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"kind": "adamm"}, r"unknown optimizer 'adamm'; did you mean 'adam'\? allowed: adadelta, .*muon"),
        ({"kind": "lbfgs"}, "unknown optimizer 'lbfgs'"),
        ({"kind": "sgd", "options": {"momentm": 0.9}}, "option of SGD 'momentm'; did you mean 'momentum'"),
        ({"kind": "sgd", "options": {"momentum": -1.0}}, "Invalid momentum value: -1"),
        ({"kind": "sgd", "options": {"momentum": "much"}}, "options of SGD"),
        ({"kind": "sgd", "options": {"lr": 1.0}}, r"set optim\.lr instead"),
        ({"kind": "rprop", "weight_decay": 0.1}, "weight_decay is 0.1, but Rprop has none"),
        ({"kind": "adamw", "options": {"amsgrad": True}}, "are for torch's optimizers"),
    ],
)
def test_wrong_optimizers_and_options_are_one_line(bad, said):
    with pytest.raises(ValueError, match=said) as error:
        OptimConfig(**bad)
    assert "\n" not in str(error.value)


def test_options_survive_json_with_their_types():
    config = OptimConfig(kind="radam", options={"betas": (0.8, 0.95), "decoupled_weight_decay": True})
    assert from_json(OptimConfig, json.dumps(to_json(config))) == config
    with pytest.raises(ValueError, match="unknown optimizer 'sgdd'; did you mean 'sgd'"):
        from_json(OptimConfig, {"kind": "sgdd"})


def test_adamw_is_fused_and_updates_as_the_plain_one_does():
    torch.manual_seed(0)
    ours, theirs = Toy(), Toy()
    theirs.load_state_dict(ours.state_dict())
    optimizer = PhaseOptimizer([ours], OptimConfig(lr=0.02, lr_schedule="constant", betas=(0.8, 0.95)))
    assert all(o.defaults["fused"] for o, _ in optimizer._optimizers)
    optimizer.backward(ours())
    optimizer.step(0, 1, 9)
    theirs().backward()
    torch.optim.AdamW(theirs.parameters(), 0.02, (0.8, 0.95), weight_decay=0.0, foreach=False).step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(48, 96), (96, 48), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orthogonalize_reaches_the_band_of_its_quintic_in_the_dtype_it_was_given(shape, dtype):
    torch.manual_seed(0)
    # Singular values over two decades, which is what five steps are made for.
    u, _, v = torch.linalg.svd(torch.randn(shape, dtype=dtype), full_matrices=False)
    matrix = u @ torch.diag(torch.logspace(-2, 0, min(shape), dtype=dtype)) @ v
    result = orthogonalize(matrix)
    assert result.dtype == dtype
    assert result.shape == shape
    values = torch.linalg.svdvals(result)
    assert 0.6 < values.min() < values.max() < 1.3  # the published band is about [0.7, 1.2]
    in_its_basis = u.T @ result @ v.T  # the iteration is a polynomial of singular values: it turns no vector
    off_diagonal = in_its_basis - torch.diag(in_its_basis.diagonal())
    assert off_diagonal.abs().max() < 1e-3  # float32 rounding through five steps


def test_fused_matrices_are_orthogonalised_one_by_one():
    torch.manual_seed(0)
    layer = fused(nn.Linear(40, 120, bias=False), 3)
    layer.weight.grad = torch.randn(120, 40) * torch.tensor([1.0, 1e-3, 1e3]).repeat_interleave(40)[:, None]
    before = layer.weight.detach().clone()
    optimizer = PhaseOptimizer([layer], OptimConfig(kind="muon", muon_lr=1.0, clip=0.0))
    optimizer.step(0, 1, 10**9)
    moved = before - layer.weight.detach()
    for part in moved.chunk(3):
        values = torch.linalg.svdvals(part)
        assert 0.6 < values.median() < values.max() < 1.3  # each whole, whatever the size of the others


def test_muon_refuses_vectors():
    with pytest.raises(ValueError, match=r"matrices.*\(3,\)"):
        Muon({nn.Parameter(torch.zeros(3)): 1}, 0.1)


def test_muon_never_computes_in_bfloat16(monkeypatch):
    seen = []
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: seen.append(a.dtype) or product(a, b))
    p = nn.Parameter(torch.randn(40, 40))
    p.grad = torch.randn(40, 40)
    Muon({p: 1}, 0.1).step()
    assert seen
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize(
    ("schedule", "images", "expected"),
    [
        ("constant", 700, 1.0),
        ("cosine", 0, 1.0),
        ("cosine", 500, 0.1 + 0.9 * 0.5),
        ("cosine", 1000, 0.1),
        ("wsd", 750, 1.0),
        ("wsd", 900, 0.1 + 0.9 * 0.5),
        ("wsd", 1000, 0.1),
        ("inverse_sqrt", 90, 1.0),
        ("inverse_sqrt", 160, math.sqrt(90 / 160)),
        ("inverse_sqrt", 9000, 0.1),
        ("inverse_sqrt", 10**6, 0.1),
    ],
)
def test_lr_schedules_at_known_points(schedule, images, expected):
    config = OptimConfig(lr_schedule=schedule, final=0.1, decay=0.2, hold=90)
    assert lr_factor(config, images, images + 10, 1000) == pytest.approx(expected)


def test_warmup_rises_linearly_and_multiplies_the_schedule():
    config = OptimConfig(lr_schedule="cosine", warmup=100)
    assert lr_factor(config, 40, 50, 1000) == pytest.approx(0.5 * 0.5 * (1 + math.cos(math.pi * 0.04)))
    assert lr_factor(config, 100, 110, 1000) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.1)))


@pytest.mark.parametrize("images", [0, 25, 99, 100, 400, 6400])
def test_inverse_sqrt_is_the_transformers_schedule_where_hold_is_the_warmup(images):
    config = OptimConfig(lr_schedule="inverse_sqrt", warmup=100)
    step = images + 1  # one image per step; the fall is taken at the step's start, the rise at its end
    formula = math.sqrt(100) * min(max(images, 100) ** -0.5, step * 100**-1.5)  # eq. 3, scaled to a peak of 1
    assert lr_factor(config, images, step, 10**9) == pytest.approx(formula)


def test_inverse_sqrt_needs_to_know_when_to_fall():
    with pytest.raises(ValueError, match="hold and warmup are 0; one must be positive"):
        OptimConfig(lr_schedule="inverse_sqrt")


def test_clipping_bounds_the_gradient_and_reports_the_norm_before():
    toy = Toy()
    optimizer = PhaseOptimizer([toy], OptimConfig(clip=0.01))
    optimizer.backward(toy())
    raw = torch.cat([p.grad.flatten() for p in optimizer.parameters if p.grad is not None]).norm()
    assert optimizer.clip() == pytest.approx(float(raw), rel=1e-5)
    clipped = torch.cat([p.grad.flatten() for p in optimizer.parameters if p.grad is not None]).norm()
    assert float(clipped) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("share", [0.5, 1.0, 1.0000001, 3.0, math.inf])
def test_clipping_gives_the_bits_of_torch_and_leaves_small_gradients_alone(share):
    """Around the limit too, where torch's factor is 1 - 1e-6 of it; 0 = no limit."""
    toys = [Toy(), Toy()]
    toys[1].load_state_dict(toys[0].state_dict())
    for toy in toys:
        toy().backward()
    parameters = [p for p in toys[0].parameters() if p.grad is not None]
    norm = float(nn.utils.get_total_norm([p.grad for p in parameters]))
    limit = 0.0 if math.isinf(share) else share * norm
    optimizer = PhaseOptimizer([toys[1]], OptimConfig(clip=limit))
    versions = [p.grad._version for p in optimizer.parameters]
    nn.utils.clip_grad_norm_(parameters, limit or math.inf)
    assert float(optimizer.clip()) == norm
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(parameters, optimizer.parameters, strict=True))
    touched = [p.grad._version for p in optimizer.parameters] != versions
    assert touched == (0 < limit < norm + 1e-6)


def test_backward_leaves_other_modules_without_gradients():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    PhaseOptimizer([first], OptimConfig()).backward(second(first(torch.ones(1, 2))).sum())
    assert first.weight.grad is not None
    assert second.weight.grad is None


@pytest.mark.parametrize(
    "bad", [{"lr": 0.0}, {"muon_lr": -1.0}, {"warmup": -1}, {"hold": -1}, {"decay": 0.0}, {"final": 2.0}]
)
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ValueError, match="must be"):
        OptimConfig(**bad)
