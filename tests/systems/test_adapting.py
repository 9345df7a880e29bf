"""Drawing with an adapter file, against the system whose weights hold the same change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import sfumato
from sfumato import cli
from sfumato.checkpoints.adapters import write_adapters
from sfumato.nets.lora import LoraConfig, fresh, merged_copy
from sfumato.systems.adapting import adapted
from sfumato.systems.system import load_system


@pytest.fixture
def adapters(tiny_folder, tmp_path):
    """Adapters of denoiser and text tower with something in them, and their file."""
    system = load_system(tiny_folder)
    lora = {"denoiser": LoraConfig(rank=2, targets=("*",)), "text": LoraConfig(rank=1)}
    made = {name: fresh(system.parts.nets[name], config) for name, config in lora.items()}
    for adapter in made.values():
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.3)
    write_adapters(tmp_path / "adapter.safetensors", made, lora, base=system.fingerprint)
    return made, tmp_path / "adapter.safetensors"


def drawn(system):
    return np.asarray(system.generate("red heart", seed=3)[0])


def test_it_draws_what_merged_weights_draw_and_the_base_stays(adapters, tiny_folder):
    made, path = adapters
    base, merged = load_system(tiny_folder), load_system(tiny_folder)
    before = drawn(base)
    for name, adapter in made.items():
        net = merged.parts.nets[name]
        net.load_state_dict(merged_copy(net, adapter).state_dict())
    changed = adapted(base, path)
    assert np.array_equal(drawn(changed), drawn(merged))
    assert not np.array_equal(drawn(changed), before)
    assert np.array_equal(drawn(base), before)
    assert not any(type(m).__name__.startswith("Adapted") for m in base.parts.nets["denoiser"].modules())
    assert changed.parts.nets["autoencoder"] is base.parts.nets["autoencoder"]


def test_scale_is_a_factor_on_the_change(adapters, tiny_folder):
    _, path = adapters
    base = sfumato.load(tiny_folder)
    none, half, full = (sfumato.load(tiny_folder, adapter=path, adapter_scale=s) for s in (0.0, 0.5, 1.0))
    assert np.array_equal(drawn(none), drawn(base))
    weights = [s.parts.nets["denoiser"].patches.weight for s in (base, half, full)]
    torch.testing.assert_close(weights[1], (weights[0] + weights[2]) / 2)
    assert len({s.fingerprint for s in (base, none, half, full)}) == 4


def test_another_base_is_refused(adapters, tiny_folder, tmp_path):
    _, path = adapters
    other = load_system(tiny_folder)
    with torch.no_grad():
        other.parts.nets["denoiser"].out.bias[0] += 1
    fingerprint = sfumato.save(other, tmp_path / "other")
    said = rf"adapts a system with the fingerprint {load_system(tiny_folder).fingerprint}, and tiny has "
    with pytest.raises(ValueError, match=said + fingerprint) as error:
        sfumato.load(tmp_path / "other", adapter=path)
    assert "\n" not in str(error.value)


def test_a_picture_is_drawn_again_with_the_same_adapter(adapters, tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--system", str(tiny_folder), "--adapter", str(adapters[1]), "--adapter-scale", "0.8"]
    assert cli.main(["generate", "red heart", "--seed", "3", "--out", "a.png", *flags]) == 0
    assert cli.main(["rerun", "a.png", *flags]) == 0
    assert "same bytes" in capsys.readouterr().out
    assert cli.main(["rerun", "a.png", *flags[:2]]) == 1
    assert "tiny with adapter.safetensors" in capsys.readouterr().err


def test_what_is_no_adapter_is_one_line(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for path, said in (
        (tmp_path / "none.safetensors", "none.safetensors"),
        (tiny_folder / "text.safetensors", "is no adapter of sfumato"),
    ):
        assert cli.main(["generate", "x", "--system", str(tiny_folder), "--adapter", str(path)]) == 2
        told = capsys.readouterr()
        assert said in told.err
        assert told.err.count("\n") == 1
        assert told.out == ""
        assert not (tmp_path / "out").exists()
