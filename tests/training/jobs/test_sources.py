"""The scale of latents and embeddings that a published system stores, against the pictures themselves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.checkpoints.native import Folder, Parts, read_folder, write_folder
from sfumato.core.random import Noise
from sfumato.families import RECIPES
from sfumato.nets.autoencoder import Autoencoder, AutoencoderConfig
from sfumato.nets.perceptual import PerceptualConfig, PerceptualNet
from sfumato.training.batches import open_folder
from sfumato.training.jobs.build import build
from sfumato.training.jobs.job import Job, Place
from sfumato.training.recipe import Recipe
from sfumato.training.run import train


def toy(name: str, pictures: Path, out: Path, **task) -> Recipe:
    recipe = RECIPES[name]()
    trainer = replace(recipe.trainer, device="cpu", quiet=True, images=8, preview_every=0)
    data = replace(recipe.data, path=pictures)
    return replace(recipe, data=data, trainer=trainer, task=replace(recipe.task, **task), out=out)


@pytest.fixture
def autoencoder(tmp_path) -> Path:
    """One whose latents are far from zero mean and unit variance, each channel in its own way."""
    net = Autoencoder(AutoencoderConfig(channels=8, mults=(1, 2), blocks=1, norm_groups=4, patch=2))
    with torch.no_grad():
        net.quant_conv.weight[:4] *= torch.tensor([0.5, 3.0, 0.1, 9.0]).view(4, 1, 1, 1)
        net.quant_conv.bias[:4] = torch.tensor([1.0, -2.0, 0.0, 5.0])
        net.quant_conv.bias[4:] = torch.tensor([-1.0, 1.0, -3.0, 2.0])  # logarithms of variances
    write_folder(tmp_path / "first", Folder(Parts({"autoencoder": net}), {}))
    return tmp_path / "first"


def latent_dit(pictures, autoencoder, out, **task) -> Recipe:
    recipe = toy("toy-dit", pictures, out, autoencoder=autoencoder, **task)
    net = replace(recipe.task.net, in_channels=4, out_channels=4, patch=2)
    return replace(recipe, task=replace(recipe.task, net=net))


def posterior(pictures: Path, autoencoder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Means and variances (C, N h w) of every picture, one picture at a time, in float64."""
    net = read_folder(autoencoder).parts.nets["autoencoder"].double()
    means, variances = [], []
    for path in pictures.glob("*.png"):
        x = torch.from_numpy(np.asarray(Image.open(path).convert("RGB"), dtype=np.float64) / 127.5 - 1)
        with torch.no_grad():
            h = net.quant_conv(net.encoder(x.permute(2, 0, 1)[None]))[0].numpy()
        means.append(h[:4].reshape(4, -1))
        variances.append(np.exp(h[4:]).reshape(4, -1))
    return np.concatenate(means, 1), np.concatenate(variances, 1)


def stored(system: Path) -> tuple[list[float], list[float]]:
    codec = json.loads((system / "system.json").read_text())["system"]["stages"][0]["codec"]
    return codec["mean"], codec["std"]


def job(recipe: Recipe) -> Job:
    place = Place(recipe.out, torch.device("cpu"), open_folder(recipe.data), recipe.about, "")
    return build(recipe, place)


def measured(recipe: Recipe) -> tuple[list[float], list[float]]:
    """Mean and std in what a run of the recipe would publish."""
    built = job(recipe)
    write_folder(recipe.out / "system", built.result(built.task.modules))
    return stored(recipe.out / "system")


def test_the_published_system_holds_the_scale_that_was_measured(autoencoder, pictures, tmp_path):
    recipe = latent_dit(pictures, autoencoder, tmp_path / "run", posterior="mean")
    mean, std = stored(train(recipe))
    means, _ = posterior(pictures, autoencoder)
    np.testing.assert_allclose(mean, means.mean(1), rtol=1e-4, atol=1e-5)  # encoded in float32
    np.testing.assert_allclose(std, means.std(1), rtol=1e-4)
    assert max(std) > 10 * min(std)  # one number for all would not do


@pytest.mark.parametrize("cache", [True, False], ids=["cached", "surveyed"])
@pytest.mark.parametrize("kind", ["sample", "mean"])
def test_a_sample_of_the_posterior_varies_more_than_its_mean(kind, cache, autoencoder, pictures, tmp_path):
    recipe = latent_dit(pictures, autoencoder, tmp_path / "run", posterior=kind, cache=cache)
    mean, std = measured(recipe)
    means, variances = posterior(pictures, autoencoder)
    wanted = np.sqrt(means.var(1) + (variances.mean(1) if kind == "sample" else 0))
    np.testing.assert_allclose(mean, means.mean(1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(std, wanted, rtol=1e-4)


def test_augmented_pictures_are_measured_as_they_are(autoencoder, pictures, tmp_path):
    recipe = latent_dit(pictures, autoencoder, tmp_path / "run", posterior="mean")
    shifted = replace(recipe, data=replace(recipe.data, shift=3))
    assert measured(recipe) == measured(shifted)


def test_training_latents_have_zero_mean_and_unit_spread_in_that_scale(autoencoder, pictures, tmp_path):
    recipe = latent_dit(pictures, autoencoder, tmp_path / "run", posterior="mean")
    built = job(replace(recipe, trainer=replace(recipe.trainer, batch=12)))
    z = built.task.clean(built.batches(0), Noise(range(12)))  # an epoch
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3), correction=0), torch.ones(4), atol=1e-4, rtol=0)


def test_a_system_that_is_taken_up_keeps_its_scale(autoencoder, pictures, tmp_path):
    base = latent_dit(pictures, autoencoder, tmp_path / "base")
    scale = measured(base)
    for path in list(pictures.glob("1*.png")):
        path.write_bytes((pictures / "0.png").read_bytes())
    again = replace(base.task, autoencoder=None, init=base.folder)
    assert measured(replace(base, task=again, out=tmp_path / "again")) == scale
    assert measured(replace(base, out=tmp_path / "fresh")) != scale


def test_the_scale_of_embeddings_is_measured_and_a_feature_that_is_always_off_stays(pictures, tmp_path):
    net = PerceptualNet(PerceptualConfig(widths=(4, 8), convs=(1, 1)))
    with torch.no_grad():
        net.trunk.stages[1][0].weight[0] = 0
        net.trunk.stages[1][0].bias[0] = -1
    write_folder(tmp_path / "net", Folder(Parts({"perceptual": net}), {}))
    mean, std = measured(toy("toy-prior", pictures, tmp_path / "run", embedder=tmp_path / "net"))
    rows = []
    for path in pictures.glob("*.png"):
        x = torch.from_numpy(np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 127.5 - 1)
        with torch.no_grad():
            taps = net.trunk(x.permute(2, 0, 1)[None])
        rows.append(np.concatenate([tap[0].numpy().mean((1, 2), dtype=np.float64) for tap in taps]))
    table = np.stack(rows)
    np.testing.assert_allclose(mean, table.mean(0), atol=1e-5)
    alive = table.std(0) > 0
    assert not alive[4]
    np.testing.assert_allclose(np.array(std)[alive], table.std(0)[alive], rtol=1e-3)
    assert (np.array(std)[~alive] == 1).all()
