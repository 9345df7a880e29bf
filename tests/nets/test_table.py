from __future__ import annotations

import pytest
import torch
from torch import nn

from sfumato.nets import NETS


def test_every_tag_names_a_config_and_its_network():
    for tag, kind in NETS.items():
        assert kind.config.__name__.endswith("Config"), tag
        assert issubclass(kind.net, nn.Module), tag


def test_tag_of_a_network_and_back():
    kind = NETS["text_transformer"]
    with torch.device("meta"):
        net = kind.net(kind.config(vocab_size=4, context=2, width=4, depth=1, heads=1))
    assert NETS.tag(net) == "text_transformer"
    with pytest.raises(ValueError, match=r"no tag for network Linear: list it in sfumato\.nets\.NETS"):
        NETS.tag(nn.Linear(1, 1))


def test_an_unknown_tag_is_told_the_known_ones():
    assert "dit" in NETS
    assert "dti" not in NETS
    with pytest.raises(ValueError, match=r"unknown network 'dti'; did you mean 'dit'\? allowed: autoencoder"):
        NETS["dti"]
