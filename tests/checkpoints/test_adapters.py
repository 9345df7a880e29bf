from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sfumato.checkpoints.adapters import read_adapters, write_adapters
from sfumato.nets.lora import LoraConfig, attach, inject, restore

CONFIG = LoraConfig(rank=2, alpha=3.0, targets=("0", "2"))


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def test_a_file_gives_every_net_its_adapter_back(tmp_path):
    nets = {"denoiser": net(0), "text": net(1)}
    adapters = {name: inject(n, CONFIG) for name, n in nets.items()}
    for adapter in adapters.values():
        for p in adapter.parameters():
            nn.init.normal_(p)
    path = tmp_path / "deep" / "adapter.safetensors"
    write_adapters(path, adapters, {"denoiser": CONFIG, "text": CONFIG}, base="abc")
    read = read_adapters(path)
    assert read.base == "abc"
    assert read.lora == {"denoiser": CONFIG, "text": CONFIG}
    x = torch.randn(5, 3)
    for seed, (name, adapted) in enumerate(nets.items()):
        fresh = net(seed)
        attach(fresh, restore(fresh, read.tensors[name]))
        assert torch.equal(fresh(x), adapted(x))


def test_whole_weights_are_not_taken_for_an_adapter(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"conv.weight": torch.zeros(1)}, path)
    with pytest.raises(
        ValueError, match=r"is no adapter of sfumato: it holds 1 tensors such as 'conv\.weight'"
    ):
        read_adapters(path)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match="cut short"):
        read_adapters(path)
