from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sfumato.core.types import Conditioning
from sfumato.families import RECIPES
from sfumato.nets import NETS
from sfumato.nets.classifier import NoisyClassifierConfig
from sfumato.nets.clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from sfumato.nets.controlnet import ControlNetConfig
from sfumato.nets.dit import DiT, DiTConfig
from sfumato.nets.lora import (
    LoraConfig,
    attach,
    detach,
    extract,
    fresh,
    inject,
    merge,
    merged_copy,
    restore,
    set_weight,
    targets,
    unmerge,
)
from sfumato.nets.noised_clip import NoisedTextConfig, NoisedVisionConfig
from sfumato.nets.perceptual import PerceptualConfig, SqueezeConfig
from sfumato.nets.prior import PriorConfig
from sfumato.nets.t2i_adapter import T2IAdapterConfig
from sfumato.nets.t5 import T5Config
from sfumato.nets.tags import fused
from sfumato.nets.text import TextTransformer, TextTransformerConfig
from sfumato.nets.token_prior import TokenPriorConfig
from sfumato.nets.told import ClassMapConfig
from sfumato.nets.unclip import LastStepConfig

TEXT = CLIPTextConfig(vocab=20, context=8, width=16, depth=1, heads=2, hidden=32, embed=16)
VISION = CLIPVisionConfig(side=32, patch=8, width=16, depth=1, heads=2, hidden=32, embed=16)
# EDM2's layers normalize their own weights and are none that adapters know; the others have no layer.
ALONE = ("class_token", "edm2", "embedding_moments", "null_image")
EVERY = LoraConfig(rank=2, alpha=3.0, targets=("*",))


def noisy(module: nn.Module, std: float = 0.3) -> nn.Module:
    """The module with random weights: zeros would hide what is wrong."""
    for p in module.parameters():
        nn.init.normal_(p, std=std)
    return module


class Small(nn.Module):
    """A convolution with stride and padding, a fused linear layer, and a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1, dilation=2, padding_mode="reflect")
        self.point = nn.Conv2d(4, 4, 1)
        self.qkv = fused(nn.Linear(4, 12), 3)
        self.out = nn.Linear(12, 5)

    def forward(self, x):
        return self.out(self.qkv(self.point(self.conv(x)).flatten(2).mT))


@pytest.fixture
def net():
    return noisy(Small())


def picture():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def plain_unet(config):
    """The same without text, as that of a classifier is."""
    levels = tuple(replace(level, attention=None) for level in config.levels)
    return replace(config, levels=levels, middle=None, tokens=None)


def small_net(tag):
    """A net of each kind at toy size."""
    tasks = {name: RECIPES[f"toy-{name}"]().task for name in ("autoencoder", "dit", "prior", "unet")}
    configs = {
        "autoencoder": tasks["autoencoder"].net,
        "class_map": ClassMapConfig(classes=10, channels=3),
        "clip": CLIPConfig(text=TEXT, vision=VISION),
        "clip_vision": VISION,
        "clip_text": TEXT,
        "controlnet": ControlNetConfig(encoder=tasks["unet"].net, hint_widths=(4, 8)),
        "discriminator": tasks["autoencoder"].discriminator,
        "dit": tasks["dit"].net,
        "last_step": LastStepConfig(net=plain_unet(tasks["unet"].net)),
        "mlp": tasks["prior"].net,
        "prior": PriorConfig(dim=16, text_dim=16, context=5, width=16, depth=1, heads=2),
        "t5": T5Config(vocab_size=20, width=16, depth=1, heads=2, head_dim=8, hidden=32),
        "noisy_classifier": NoisyClassifierConfig(
            encoder=plain_unet(tasks["unet"].net), num_classes=5, pool="adaptive", size=32, head_dim=8
        ),
        "noised_text": NoisedTextConfig(width=16, depth=1, heads=2, vocab=20, context=8, embed=16),
        "noised_vision": NoisedVisionConfig(
            width=16, depth=1, heads=2, size=32, patch=8, times=1000, embed=16
        ),
        "perceptual": PerceptualConfig(widths=(4, 8), convs=(1, 1)),
        "perceptual_squeeze": SqueezeConfig(stem=4, fires=((2, 3),) * 8),
        "t2i_adapter": T2IAdapterConfig(widths=(8, 16), blocks=1),
        "text_transformer": tasks["dit"].text,
        "token_prior": TokenPriorConfig(
            dim=16, text_dim=16, context=5, width=16, depth=1, heads=2, kept=4, buckets=8
        ),
        "unet": tasks["unet"].net,
    }
    return noisy(NETS[tag].net(configs[tag]), 0.1).eval()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_fresh_adapter_changes_no_bit_and_a_trained_one_does(net, layout):
    net = net.to(memory_format=layout).eval()
    x = picture().to(memory_format=layout)
    before = net(x)
    adapter = inject(net, EVERY)
    assert list(adapter.pairs) == ["conv", "point", "qkv", "out"]
    assert torch.equal(net(x), before)
    noisy(adapter)
    assert not torch.allclose(net(x), before)


def test_a_pair_computes_its_definition(net):
    layer = net.out
    adapter = noisy(inject(net, LoraConfig(rank=2, alpha=3.0, targets=("out",))))
    pair, x = adapter.pairs["out"], torch.randn(7, 12)
    wanted = F.linear(x, layer.weight, layer.bias) + 3.0 / 2 * (x @ pair.down.weight.T) @ pair.up.weight.T
    torch.testing.assert_close(layer(x), wanted)


def test_the_parts_of_a_fused_layer_have_pairs_of_their_own(net):
    pair = noisy(inject(net, LoraConfig(rank=2, targets=("qkv",)))).pairs["qkv"]
    assert pair.down.weight.shape == (6, 4)
    assert pair.up.weight.shape == (12, 2)
    x = torch.randn(3, 4)
    with torch.no_grad():
        pair.up.weight[4:8] = 0  # the second of three
    change = net.qkv(x) - F.linear(x, net.qkv.weight, net.qkv.bias)
    assert change[:, 4:8].abs().max() < 1e-6
    first = x @ pair.down.weight[:2].T @ pair.up.weight[:4].T
    torch.testing.assert_close(change[:, :4], first)


@pytest.mark.parametrize("tag", [tag for tag in NETS if tag not in ALONE])
def test_merging_computes_the_same_in_every_net_and_comes_back_bit_for_bit(tag):
    net = small_net(tag)
    base = {k: v.clone() for k, v in net.state_dict().items()}
    adapter = noisy(inject(net, EVERY), 0.1)
    assert len(adapter.pairs) == sum(isinstance(m, nn.Linear | nn.Conv2d) for m in net.modules())
    beside = called(net)
    merge(net)
    assert all(pair.shape == net.get_submodule(n).weight.shape for n, pair in adapter.pairs.items())
    torch.testing.assert_close(called(net), beside, atol=1e-4, rtol=1e-4)  # the same sum in another order
    assert not torch.equal(net.state_dict()[f"{next(iter(adapter.pairs))}.weight"], base_of(base, adapter))
    unmerge(net)
    assert torch.equal(called(net), beside)
    detach(net)
    assert all(torch.equal(v, base[k]) for k, v in net.state_dict().items())
    assert not any(type(m).__name__.startswith("Adapted") for m in net.modules())


def base_of(base, adapter):
    return base[f"{next(iter(adapter.pairs))}.weight"]


def called(net):
    """The net at fixed arguments of whatever it takes."""
    g = torch.Generator().manual_seed(2)
    x, t = torch.randn(2, 3, 32, 32, generator=g), torch.tensor([3.0, 400.0])
    cond = Conditioning(
        tokens=torch.randn(2, 5, 16, generator=g),
        mask=torch.ones(2, 5, dtype=torch.bool),
        pooled=torch.randn(2, 16, generator=g),
    )
    ids, hint = torch.arange(10).view(2, 5), torch.rand(2, 3, 64, 64, generator=g)
    own = {
        "Autoencoder": lambda: net.decode(net.encode(x).mean),
        "PerceptualNet": lambda: net.trunk(x)[-1],
        "SqueezePerceptualNet": lambda: net.trunk(x)[-1],
        "TextTransformer": lambda: net(ids, torch.ones(2, 5, dtype=torch.bool))[0],
        "ClassMap": lambda: net(ids[:, None].expand(2, 4, 5)[..., :4], 2),
        "CLIP": lambda: torch.cat([net.vision(x), net.text(ids).embedding]),
        "CLIPText": lambda: net(ids).last,
        "CLIPVision": lambda: net(x),
        "NoisedText": lambda: net(ids, torch.tensor([5, 4])),
        "NoisedVision": lambda: net(x, t),
        "T5Encoder": lambda: net(ids)[0],
        "Prior": lambda: net(x[:, 0, 0, :16], t, cond),
        "Discriminator": lambda: net(x),
        "ControlNet": lambda: net(x, t, replace(cond, hint=hint)).middle,
        "T2IAdapter": lambda: net(hint)[-1],
        "TokenPrior": lambda: net.logits(ids % 8, cond),
        "MLP": lambda: net(x[:, :, 0, :4].flatten(1), t, cond),
    }
    with torch.no_grad():
        return own.get(type(net).__name__, lambda: net(x, t, cond))()


def test_adapters_add_up_with_their_weights_merged_or_not(net):
    x = picture()
    first, second = noisy(inject(net, EVERY, name="a")), noisy(inject(net, EVERY, name="b"))
    set_weight(net, "a", 0.5)
    set_weight(net, "b", -2.0)
    wanted = (
        copy.deepcopy(net.out.weight) + 0.5 * first.pairs["out"].delta() - 2 * second.pairs["out"].delta()
    )
    beside = net(x)
    merge(net)
    torch.testing.assert_close(net.out.weight, wanted)
    torch.testing.assert_close(net(x), beside, atol=1e-4, rtol=1e-4)
    set_weight(net, "b", 0.0)  # takes effect on merged weights too
    detached = copy.deepcopy(net)
    detach(detached, name="b")
    assert torch.equal(detached.out.weight, net.out.weight)
    unmerge(net)
    assert not torch.equal(net(x), beside)


def test_the_net_keeps_its_names_and_parameters(net):
    names, count = list(net.state_dict()), len(list(net.parameters()))
    adapter = noisy(inject(net, EVERY))
    assert list(net.state_dict()) == names
    assert len(list(net.parameters())) == count
    net.load_state_dict(net.state_dict())
    net.requires_grad_(False)
    net(picture()).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())
    assert all(p.grad is None for p in net.parameters())
    assert list(adapter.state_dict()) == [
        f"{n}.{h}.weight" for n in ("conv", "point", "qkv", "out") for h in ("down", "up")
    ]


@pytest.mark.parametrize("merged", [False, True])
def test_a_deep_copy_is_a_net_of_its_own(net, merged):
    noisy(inject(net, EVERY))
    if merged:
        merge(net)
    twin = copy.deepcopy(net)
    assert torch.equal(twin(picture()), net(picture()))
    detach(twin)
    assert torch.equal(net(picture()), copy.deepcopy(net)(picture()))
    assert not torch.allclose(twin(picture()), net(picture()))


def test_pairs_move_with_their_net(net):
    adapter = noisy(inject(net, EVERY))
    merge(net)
    net.double()
    assert {p.dtype for p in adapter.parameters()} == {torch.float64}
    unmerge(net)
    assert net(picture().double()).dtype == torch.float64


def test_float32_pairs_act_on_a_half_precision_net(net):
    net = net.bfloat16().requires_grad_(False)
    adapter = noisy(inject(net, EVERY))
    y = net(picture().bfloat16())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in adapter.parameters())


def test_a_merged_copy_is_plain_and_leaves_the_net_alone(net):
    x = picture()
    noisy(inject(net, EVERY))
    other = noisy(fresh(net, EVERY))
    beside = net(x)
    whole = merged_copy(net)
    torch.testing.assert_close(whole(x), beside, atol=1e-4, rtol=1e-4)
    assert type(whole.out) is nn.Linear
    assert torch.equal(net(x), beside)
    swapped = merged_copy(net, other)
    detach(net)
    attach(net, other)
    torch.testing.assert_close(swapped(x), net(x), atol=1e-4, rtol=1e-4)


def test_extract_and_restore_give_the_same_bits_and_keep_ranks_and_alphas_of_their_own(net):
    noisy(net)
    adapter = noisy(inject(net, EVERY))
    wanted = net(picture())
    tensors = extract(adapter)
    assert tensors["qkv.alpha"] == 3.0
    detach(net)
    again = restore(net, tensors)
    attach(net, again)
    assert torch.equal(net(picture()), wanted)
    detach(net)
    mixed = restore(
        net,
        {"out.down.weight": torch.ones(1, 12), "out.up.weight": torch.ones(5, 1)}
        | {k: v for k, v in tensors.items() if k.startswith("conv")},
    )
    assert [(p.rank, p.alpha) for p in mixed.pairs.values()] == [(1, 1.0), (2, 3.0)]


def test_the_default_targets_are_the_projections_of_attention():
    dit = DiT(DiTConfig(width=8, depth=1, heads=2, text_dim=4))
    assert list(targets(dit, LoraConfig().targets)) == [
        "blocks.0.attention.qkv",
        "blocks.0.attention.out",
        "blocks.0.cross.q",
        "blocks.0.cross.kv",
        "blocks.0.cross.out",
    ]
    tower = TextTransformer(TextTransformerConfig(vocab_size=9, width=8, depth=1, heads=2))
    assert list(targets(tower, LoraConfig().targets)) == ["blocks.0.attention.qkv", "blocks.0.attention.out"]
    unet = targets(small_net("unet"), LoraConfig().targets)
    assert {n.rsplit(".", 1)[1] for n in unet} == {"q", "k", "v", "token_k", "token_v", "out"}
    assert all("attention" in n for n in unet)


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (
            lambda net: targets(net, ("out", "to_q")),
            "lora target 'to_q' fits no linear or convolution layer of Small; "
            "its layers: conv, out, point, qkv",
        ),
        (
            lambda net: targets(nn.Sequential(nn.Linear(2, 2)), LoraConfig().targets),
            "of Sequential; its layers: *",
        ),
        (lambda net: inject(net, EVERY) and inject(net, EVERY), "an adapter 'default' is attached already"),
        (
            lambda net: inject(net, EVERY) and set_weight(net, "x", 1.0),
            "no adapter 'x' is attached; attached: default",
        ),
        (
            lambda net: attach(nn.Linear(2, 2), fresh(net, EVERY)),
            "'conv' of shape (4, 3, 3, 3), which in Linear is not",
        ),
        (lambda net: restore(net, {"out.up.weight": torch.ones(5, 1)}), "holds half a pair for 'out'"),
        (
            lambda net: restore(net, {"out.weight": torch.ones(5, 1)}),
            "'out.weight' is no tensor of an adapter",
        ),
        (
            lambda net: restore(
                net, {"out.down.weight": torch.ones(1, 11), "out.up.weight": torch.ones(5, 1)}
            ),
            "pair for 'out' has shapes (1, 11) and (5, 1), the layer needs (1, 12) and (5, 1)",
        ),
        (lambda net: LoraConfig(rank=0), "lora with rank 0"),
        (lambda net: LoraConfig(alpha=-1.0), "alpha -1.0"),
    ],
)
def test_mistakes_are_one_line(net, act, said):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the text is compared below)
        act(net)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_nothing_is_attached_if_part_of_an_adapter_does_not_fit(net):
    adapter = fresh(net, EVERY)
    net.out = nn.Linear(12, 6)
    with pytest.raises(ValueError, match=r"'out' of shape \(5, 12\), which in Small is of shape \(6, 12\)"):
        attach(net, adapter)
    assert type(net.conv) is nn.Conv2d
