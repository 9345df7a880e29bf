"""The doctor finds what is wrong with the bundled system after its files were edited, by the command line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import sfumato
from sfumato.api import BUNDLED
from sfumato.cli import main
from sfumato.data.openmoji import render

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """The set that it was trained on."""
    pytest.importorskip("resvg_py")
    return render(tmp_path_factory.mktemp("openmoji"), size=64)


@pytest.fixture
def system(tmp_path):
    """A copy of it."""
    return shutil.copytree(BUNDLED, tmp_path / "system")


def edited(folder, change) -> None:
    path = folder / "system.json"
    told = json.loads(path.read_text())
    (stage,) = told["system"]["stages"]
    change(stage)
    path.write_text(json.dumps(told))


def diagnosis(folder, pictures, capsys) -> tuple[int, str]:
    code = main(["doctor", str(folder), "--data", str(pictures), "--split", "train", "--device", "cpu"])
    return code, capsys.readouterr().out.splitlines()[-1]


def test_the_bundled_system_is_sound(system, pictures, capsys):
    code, said = diagnosis(system, pictures, capsys)
    assert code == 0, said


def test_a_wrong_latent_scale(system, pictures, capsys):
    edited(system, lambda stage: stage["codec"].update(std=[3 * s for s in stage["codec"]["std"]]))
    code, said = diagnosis(system, pictures, capsys)
    assert code == 1
    assert said.startswith("broken: latent scale: ")


def test_a_flow_net_declared_v(system, pictures, capsys):
    edited(system, lambda stage: stage.update(parameterization="v"))
    code, said = diagnosis(system, pictures, capsys)
    assert code == 1
    assert said.startswith("broken: parameterization: the net predicts like flow, declared v")


def test_a_text_encoder_whose_weights_were_never_loaded(system, pictures, tmp_path, capsys):
    loaded = sfumato.load(system)
    tower = loaded.parts.nets["text"]
    torch.manual_seed(1)
    fresh = type(tower)(tower.config)
    tower.load_state_dict(fresh.state_dict())
    sfumato.save(loaded, tmp_path / "broken")
    code, said = diagnosis(tmp_path / "broken", pictures, capsys)
    assert code == 1
    assert said.startswith("broken: text encoder: ")
