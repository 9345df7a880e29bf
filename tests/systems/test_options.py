from __future__ import annotations

import pytest

from sfumato.core.config import from_json, to_json
from sfumato.diffusion.constraints import Dynamic
from sfumato.diffusion.guidance import CFG, InstructPix2Pix
from sfumato.diffusion.sampling import SAMPLERS
from sfumato.diffusion.schedules import Discrete, Flow
from sfumato.systems.options import SampleOptions
from sfumato.systems.start import Continue, FromImage, FromNoise


@pytest.mark.parametrize(
    "options",
    [
        SampleOptions(),
        SampleOptions(
            sampler="ddpm",
            knobs={"variance": "large"},
            steps=7,
            spacing="leading",
            spacing_knobs={"offset": 1},
        ),
        SampleOptions(guidance=CFG(3.5, channels=3, interval=(0.1, 0.8)), threshold=Dynamic(0.95, 1.5)),
        SampleOptions(guidance=InstructPix2Pix(), start=FromNoise("sigma", 0.997), window=(0.0, 0.8)),
        SampleOptions(start=FromImage(5, 3)),
        SampleOptions(start=Continue()),
    ],
)
def test_options_are_json(options):
    assert from_json(SampleOptions, to_json(options)) == options


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"sampler": "dpmpp-2m"}, r"unknown sampler 'dpmpp-2m'; did you mean 'dpmpp_2m'\? allowed: .*euler"),
        ({"sampler": "nonsense"}, "unknown sampler 'nonsense'; allowed: "),
        ({"spacing": "karas"}, r"unknown spacing 'karas'; did you mean 'karras'\?"),
        (
            {"sampler": "ddim", "knobs": {"etta": 1}},
            r"unknown knob of sampler 'ddim' 'etta'; did you mean 'eta'\?",
        ),
        ({"sampler": "euler", "knobs": {"eta": 1}}, "unknown knob of sampler 'euler' 'eta'; allowed: none"),
        ({"spacing_knobs": {"rho": 7}}, "unknown knob of spacing 'trailing' 'rho'; allowed: clean_end"),
        ({"steps": 0}, "steps is 0; allowed: a whole number of at least 1"),
        ({"steps": -3}, "steps is -3"),
        ({"steps": 2.5}, r"steps is 2\.5"),
        ({"steps": True}, "steps is True"),
        ({"window": (0.8, 0.2)}, r"window is \(0\.8, 0\.2\); allowed: 0 <= start < stop <= 1"),
    ],
)
def test_wrong_options_are_named(wrong, said):
    with pytest.raises(ValueError, match=said) as error:
        SampleOptions(**wrong)
    assert "\n" not in str(error.value)


def test_from_json_says_where():
    with pytest.raises(ValueError, match=r"^config: .*unknown sampler 'x'"):
        from_json(SampleOptions, {"sampler": "x"})
    with pytest.raises(ValueError, match=r"guidance.*cfg"):
        from_json(SampleOptions, {"guidance": {"kind": "cgf"}})


def test_knobs_are_bound():
    assert SampleOptions(sampler="ddim").step() is SAMPLERS["ddim"]
    assert SampleOptions(sampler="ddim", knobs={"eta": 0.5}).step().keywords == {"eta": 0.5}


def test_grid_and_its_window():
    assert len(SampleOptions(steps=10).grid(Flow())) == 10
    assert len(SampleOptions(steps=10, window=(0.0, 0.8)).grid(Flow())) == 8
    leading = SampleOptions(steps=50, spacing="leading", spacing_knobs={"offset": 1, "clean_end": False})
    assert leading.grid(Discrete(formula="scaled_linear")).t[0] == 981
