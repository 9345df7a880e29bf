"""What measures likeness for an autoencoder: LPIPS from its files, or the net that stands in for it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sfumato.checkpoints.layouts.lpips import heads_map, squeeze_map, vgg_map
from sfumato.checkpoints.native import Folder, Parts, read_folder, write_folder
from sfumato.families import RECIPES
from sfumato.nets.perceptual import PerceptualConfig, PerceptualNet, SqueezeConfig, SqueezePerceptualNet
from sfumato.training.batches import open_folder
from sfumato.training.history import read_log
from sfumato.training.jobs.build import build
from sfumato.training.jobs.job import Place
from sfumato.training.recipe import Recipe
from sfumato.training.run import train
from sfumato.training.task import Moment

NARROW = {
    "vgg": (vgg_map, PerceptualNet, PerceptualConfig(widths=(2, 3, 4, 5, 6))),
    "squeeze": (squeeze_map, SqueezePerceptualNet, SqueezeConfig(stem=4, fires=((2, 3),) * 8)),
}


@pytest.fixture(params=NARROW)
def lpips(request, tmp_path) -> tuple[torch.nn.Module, dict[str, Path]]:
    """A narrow net with random weights, and its files as torchvision and LPIPS name what is in them."""
    names, kind, config = NARROW[request.param]
    net = kind(config)
    for weight in net.weights:
        torch.nn.init.uniform_(weight)
    state = dict(net.named_parameters())
    files = {"lpips_trunk": tmp_path / "trunk.safetensors", "lpips_heads": tmp_path / "heads.safetensors"}
    heads = heads_map(len(net.weights)).save(
        {k: v for k, v in state.items() if k.startswith("weights.")}, where=""
    )
    save_file({k: v.contiguous() for k, v in heads.items()}, files["lpips_heads"])
    trunk = names(config).save({k: v for k, v in state.items() if k.startswith("trunk.")}, where="")
    save_file({k: v.contiguous() for k, v in trunk.items()}, files["lpips_trunk"])
    return net, files


def toy(pictures: Path, out: Path, name: str = "toy-autoencoder", **task) -> Recipe:
    recipe = RECIPES[name]()
    trainer = replace(recipe.trainer, device="cpu", quiet=True, images=8, log_every=4, preview_every=0)
    data = replace(recipe.data, path=pictures, size=32 if "lpips_trunk" in task else 16)
    return replace(recipe, data=data, trainer=trainer, task=replace(recipe.task, **task), out=out)


def test_lpips_of_two_files_is_what_the_autoencoder_is_told_of(lpips, pictures, tmp_path, caplog):
    net, files = lpips
    recipe = toy(pictures, tmp_path / "run", **files, perceptual_start=0.0, adversarial=0.0, kl=0.0, l2=0.0)
    place = Place(tmp_path, torch.device("cpu"), open_folder(recipe.data), recipe.about, "")
    with caplog.at_level(logging.WARNING):
        job = build(recipe, place)
    assert "stands in" not in caplog.text
    assert type(job.task.perceptual) is type(net)
    x, y = (torch.rand(2, 3, 32, 32) * 2 - 1 for _ in range(2))
    torch.testing.assert_close(job.task.perceptual(x, y), net(x, y))
    assert not any(p.requires_grad for p in job.task.perceptual.parameters())
    assert set(job.task.modules) == {"autoencoder"}  # nothing of it is trained, or published
    batch = job.batches(0)

    def silent(mean):
        return torch.zeros_like(mean)

    (loss,) = job.task.losses(batch, silent, Moment(0, 8))
    autoencoder = job.task.modules["autoencoder"]
    decoded = autoencoder.decode(autoencoder.encode(batch.images).mean)
    wanted = (batch.images - decoded).abs().mean() + 0.5 * net(batch.images, decoded).mean()
    torch.testing.assert_close(loss.value, wanted)


def test_a_run_with_the_files_of_lpips_logs_the_distance_and_publishes_no_net_of_it(
    lpips, pictures, tmp_path
):
    recipe = toy(pictures, tmp_path / "run", **lpips[1], perceptual_start=0.0)
    published = read_folder(train(recipe))
    assert set(published.parts.nets) == {"autoencoder"}
    assert str(tmp_path) not in published.card
    assert all(row["generator/perceptual"] > 0 for row in read_log(recipe.folder / "log.jsonl"))


def test_the_stand_in_says_so_and_how_to_get_the_real_one(pictures, tmp_path, caplog):
    net = PerceptualNet(PerceptualConfig(widths=(2, 3), convs=(1, 1)))
    write_folder(tmp_path / "net" / "system", Folder(Parts({"perceptual": net}), {}))
    with caplog.at_level(logging.WARNING):
        recipe = toy(pictures, tmp_path / "run", perceptual_net=tmp_path / "net")
        place = Place(tmp_path, torch.device("cpu"), open_folder(recipe.data), recipe.about, "")
        job = build(recipe, place)
    assert f"the perceptual net of {tmp_path / 'net'} stands in for LPIPS" in caplog.text
    assert "task.lpips_trunk and task.lpips_heads" in caplog.text
    x, y = (torch.rand(2, 3, 16, 16) * 2 - 1 for _ in range(2))
    torch.testing.assert_close(job.task.perceptual(x, y), net(x, y))


def test_without_either_there_is_no_perceptual_loss(pictures, tmp_path):
    recipe = toy(pictures, tmp_path / "run", perceptual_start=0.0)
    train(recipe)
    assert not any("generator/perceptual" in row for row in read_log(recipe.folder / "log.jsonl"))


@pytest.mark.parametrize("missing", ["lpips_trunk", "lpips_heads"])
def test_a_file_of_lpips_that_is_not_there_is_one_line_before_the_first_step(missing, pictures, tmp_path):
    save_file({"features.0.weight": torch.zeros(1)}, tmp_path / "some.safetensors")
    files = dict.fromkeys(("lpips_trunk", "lpips_heads"), tmp_path / "some.safetensors")
    recipe = toy(pictures, tmp_path / "run", **{**files, missing: tmp_path / "none.safetensors"})
    with pytest.raises(ValueError, match=r"none\.safetensors") as error:
        train(recipe)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_codes_in_use_are_in_the_log_of_a_vq_run(pictures, tmp_path):
    recipe = toy(pictures, tmp_path / "run")
    net = replace(recipe.task.net, kind="vq", codebook_size=8)
    recipe = replace(recipe, task=replace(recipe.task, net=net))
    train(recipe)
    rows = read_log(recipe.folder / "log.jsonl")
    assert rows
    for row in rows:
        assert 1 / 8 <= row["generator/codes_used"] <= 1
        assert 1 <= row["generator/codes_perplexity"] <= 8 * row["generator/codes_used"] + 1e-6
