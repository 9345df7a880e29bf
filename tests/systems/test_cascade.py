from __future__ import annotations

import weakref

import pytest
import torch

import sfumato
from sfumato.checkpoints.native import Parts
from sfumato.core.types import Inputs
from sfumato.diffusion.schedules import Flow
from sfumato.nets.embedding import EmbedderConfig, EmbeddingConfig, Feature
from sfumato.nets.unet import UNet, UNetConfig, levels
from sfumato.systems import cascade as cascades
from sfumato.systems.conditioning import LabelConfig, LowResConfig
from sfumato.systems.config import StageConfig, SystemConfig
from sfumato.systems.options import SampleOptions
from sfumato.systems.system import System, assemble, save_system


def system(side: int, *, factor: int = 0, channels: int = 3, read: int = 3, name: str = "base") -> System:
    """Random weights; an upsampler if there is a factor, which reads pictures of `read` channels."""
    embedder = EmbedderConfig(kind="table", features=(Feature(field="label", dim=3),))
    net = UNet(
        UNetConfig(
            in_channels=channels + read * (factor > 0),
            out_channels=channels,
            levels=levels(32, (1,), 1),
            embedding=EmbeddingConfig(time_dim=8, dim=16, extras=(embedder,)),
        )
    )
    torch.nn.init.normal_(net.conv_out.weight, std=0.1)
    stage = StageConfig(
        name=name,
        schedule=Flow(),
        parameterization="flow",
        conditioners=(LabelConfig(num_classes=2), *((LowResConfig(factor=factor),) if factor else ())),
        shape=(channels, side, side),
        defaults=SampleOptions(sampler="euler", steps=2),
    )
    return assemble(SystemConfig(stages=(stage,)), Parts({"denoiser": net}))


LABELS = Inputs(n=2, label=torch.tensor([0, 1]))


def test_stages_run_in_order_and_keep_their_own_weights(tmp_path):
    base, up = system(8), system(32, factor=4)
    both = sfumato.cascade(base, up)
    assert [stage.name for stage in both.stages] == ["base", "base-2"]
    assert sorted(both.parts.nets) == ["denoiser", "denoiser-2"]
    small = base.run(LABELS).low_res
    made = both.run(LABELS)
    assert made.low_res.shape == (2, 3, 32, 32)
    assert torch.equal(both.run(LABELS, only=["base"]).low_res, small)
    later = Inputs(n=2, label=LABELS.label, low_res=small)
    assert torch.equal(both.run(later, only=["base-2"]).low_res, made.low_res)
    save_system(both, tmp_path / "both")  # the settings name the parts by their new names
    again = sfumato.load(tmp_path / "both").run(LABELS)  # in another memory format, hence the rounding
    torch.testing.assert_close(again.low_res, made.low_res, rtol=0, atol=1e-4)


def test_paths_hold_one_stage_at_a_time(tmp_path, monkeypatch):
    """No two of the networks are in memory together, and the pictures are the same."""
    folders = [tmp_path / "base", tmp_path / "up"]
    for one, folder in zip((system(8), system(32, factor=4)), folders, strict=True):
        save_system(one, folder)
    wanted = sfumato.cascade(*map(sfumato.load, folders)).run(LABELS).low_res
    alive, most = weakref.WeakSet(), []
    load = sfumato.load

    def counted(path, **options):
        read = load(path, **options)
        alive.add(read.parts.nets["denoiser"])
        most.append(sum(not next(net.parameters()).is_meta for net in alive))
        return read

    monkeypatch.setattr("sfumato.api.load", counted)
    both = sfumato.cascade(*folders)
    assert all(p.is_meta for net in both.parts.nets.values() for p in net.parameters())
    assert torch.equal(both.run(LABELS).low_res, wanted)
    assert most == [1, 1, 1, 1]
    assert all(next(net.parameters()).is_meta for net in alive)
    with pytest.raises(ValueError, match="reads its weights from other folders by turns"):
        save_system(both, tmp_path / "both")


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ([], "a cascade of no systems"),
        ([{"side": 32, "factor": 4}, {"side": 8}], "'base-2' cannot follow 'base': it reads no picture"),
        ([{"side": 16}, {"side": 32, "factor": 4}], "it enlarges 8x8 to 32x32 and is given 16x16"),
        ([{"side": 8, "channels": 1}, {"side": 32, "factor": 4}], "of 3 channels and is given one of 1"),
    ],
    ids=["none", "order", "size", "channels"],
)
def test_stages_that_do_not_join_are_refused(made, said):
    with pytest.raises(ValueError, match=said) as error:
        cascades.joined([system(**one) for one in made])
    assert "\n" not in str(error.value)


def test_what_is_shared_is_held_once():
    base = system(8)
    assert sorted(sfumato.cascade(base, system(32, factor=4), system(64, factor=2)).parts.nets) == [
        "denoiser",
        "denoiser-2",
        "denoiser-3",
    ]
    same = cascades.joined([base])
    assert list(same.parts.nets) == ["denoiser"]
    assert same.parts.nets["denoiser"] is base.parts.nets["denoiser"]
