from __future__ import annotations

import numpy as np
import pytest
import torch

from sfumato.checkpoints.native import Parts
from sfumato.diffusion.guidance import CFG
from sfumato.diffusion.schedules import Flow
from sfumato.nets.dit import DiT, DiTConfig
from sfumato.systems.conditioning import LabelConfig
from sfumato.systems.config import StageConfig, SystemConfig
from sfumato.systems.options import SampleOptions
from sfumato.systems.request import classes_of
from sfumato.systems.system import System, assemble

NAMES = ("tench, Tinca tinca", "crane", "bird, crane", "Great White Shark")


@pytest.mark.parametrize(
    ("asked", "numbers"),
    [
        ([3, 0], [3, 0]),
        (["2", " 1 "], [2, 1]),
        (["tench"], [0]),
        (["tinca TINCA", "tench, Tinca tinca"], [0, 0]),
        (["great white shark", 2], [3, 2]),
        (["bird"], [2]),
    ],
)
def test_classes_by_number_or_name(asked, numbers):
    assert classes_of(asked, NAMES) == numbers


@pytest.mark.parametrize(
    ("asked", "names", "said"),
    [
        ("crane", NAMES, r"label 'crane' is the name of classes \[1, 2\]; give a number"),
        ("tensh", NAMES, "label 'tensh' is no class of this system; the nearest names are tench"),
        ("zzzzzzzz", NAMES, "label 'zzzzzzzz' is no class of this system; `sfumato info` lists their names"),
        ("tench", (), "label 'tench': the classes of this system have no names; give a number"),
    ],
)
def test_a_name_that_is_not_that_of_one_class(asked, names, said):
    with pytest.raises(ValueError, match=said):
        classes_of([asked], names)


@pytest.fixture(scope="module")
def of_classes() -> System:
    net = DiT(DiTConfig(in_channels=3, out_channels=3, patch=4, width=16, depth=1, heads=2, num_classes=4))
    random = torch.Generator().manual_seed(0)
    for weights in net.parameters():
        weights.data.normal_(0, 0.2, generator=random)
    stage = StageConfig(
        net="net",
        schedule=Flow(),
        parameterization="flow",
        conditioners=(LabelConfig(num_classes=4, names=NAMES),),
        shape=(3, 8, 8),
        defaults=SampleOptions(sampler="euler", steps=3, guidance=CFG(2.0)),
    )
    return assemble(SystemConfig(stages=(stage,)), Parts({"net": net}))


def test_a_system_that_reads_no_text_takes_the_prompt_for_a_class(of_classes):
    def drawn(*args, **request):
        return [np.asarray(image, dtype=int) for image in of_classes.generate(*args, **request)]

    by_number = drawn(label=[3, 0])
    assert np.abs(by_number[0] - by_number[1]).max() > 5
    for same in (drawn(["great white shark", "tench"]), drawn(["3", "0"]), drawn(label=[3, "tench"])):
        assert all((a == b).all() for a, b in zip(same, by_number, strict=True))
    assert (drawn("tench", n=2, seed=1)[0] == drawn(label=["tench"], seed=1)[0]).all()
    assert (drawn("")[0] == drawn()[0]).all()
    assert np.abs(drawn("")[0] - drawn("3")[0]).max() > 5
    with pytest.raises(ValueError, match=r"holds a class outside 0\.\.3"):
        drawn("7")
