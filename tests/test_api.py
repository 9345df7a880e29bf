from __future__ import annotations

import numpy as np
import pytest
import torch

import sfumato
from sfumato import api


def same(a, b):
    return np.array_equal(np.asarray(a), np.asarray(b))


def test_load_generate_save(tiny_folder, tmp_path):
    system = sfumato.load(tiny_folder)
    images = system.generate(text=["red heart", "blue heart"], seed=4)
    assert [image.size for image in images] == [(16, 16), (16, 16)]
    fingerprint = sfumato.save(system, tmp_path / "copy")
    assert fingerprint == system.fingerprint
    assert same(
        sfumato.load(str(tmp_path / "copy")).generate("red heart", seed=4)[0],
        system.generate("red heart", seed=4)[0],
    )


def test_generate_in_one_call(tiny_folder):
    system = sfumato.load(tiny_folder)
    expected = system.generate("red heart", seed=1, steps=2)[0]
    assert same(sfumato.generate("red heart", system=system, seed=1, steps=2)[0], expected)
    assert same(sfumato.generate("red heart", system=tiny_folder, seed=1, steps=2)[0], expected)


def test_without_a_path_the_bundled_system_is_loaded(tiny_folder, monkeypatch):
    monkeypatch.setattr(api, "BUNDLED", tiny_folder)
    assert sfumato.load().about.name == "tiny"
    monkeypatch.setattr(api, "BUNDLED", tiny_folder / "gone")
    with pytest.raises(ValueError, match=r"the bundled system is missing at .*gone; install sfumato again"):
        sfumato.load()


def test_device_and_dtype(tiny_folder):
    system = sfumato.load(tiny_folder, device="auto", dtype=torch.bfloat16)
    assert system.stages[0].denoiser.net.out.weight.dtype == torch.bfloat16
    assert sfumato.load(tiny_folder, device=torch.device("cpu")).stages[0].device == torch.device("cpu")
    with pytest.raises(ValueError, match=r"device 'gpu' cannot be used \(.*\); try cpu or auto"):
        sfumato.load(tiny_folder, device="gpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_accelerator_draws_the_same_picture(tiny_folder):
    here = sfumato.load(tiny_folder, device="cpu").generate(["red heart"] * 2, seed=3)
    there = sfumato.load(tiny_folder, device="cuda").generate(["red heart"] * 2, seed=3)
    for a, b in zip(here, there, strict=True):
        # Noise is drawn on the CPU; what remains is the rounding of other kernels, TF32 included.
        assert np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max() <= 4


def test_train_by_name_or_recipe(monkeypatch):
    from sfumato.families import RECIPES
    from sfumato.training import run

    seen = []
    monkeypatch.setattr(run, "train", seen.append)
    sfumato.train("toy-dit")
    sfumato.train(RECIPES["toy-unet"]())
    assert [recipe.name for recipe in seen] == ["toy-dit", "toy-unet"]
    with pytest.raises(ValueError, match=r"unknown recipe 'toy-dti'; did you mean 'toy-dit'\?"):
        sfumato.train("toy-dti")
