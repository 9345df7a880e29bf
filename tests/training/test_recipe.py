from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sfumato.core.config import to_json
from sfumato.nets.autoencoder import AutoencoderConfig
from sfumato.training.batches import DataConfig
from sfumato.training.optim import OptimConfig
from sfumato.training.recipe import Recipe, differences, retuned
from sfumato.training.tasks.autoencoding import AutoencodingConfig
from sfumato.training.trainer import TrainerConfig

RECIPE = Recipe(
    name="some",
    task=AutoencodingConfig(net=AutoencoderConfig()),
    data=DataConfig(),
    trainer=TrainerConfig(images=100),
)


def test_the_run_folder_has_a_default():
    assert RECIPE.folder == Path("runs/some")
    assert replace(RECIPE, out=Path("x")).folder == Path("x")


def test_differences_name_each_field_that_changes_what_is_computed():
    changed = replace(
        RECIPE,
        optim=OptimConfig(betas=(0.5, 0.99)),
        trainer=replace(RECIPE.trainer, batch=7),
        task=replace(RECIPE.task, net=AutoencoderConfig(mults=(1, 2))),
    )
    assert differences(to_json(RECIPE), changed) == [
        "optim.betas: [0.9, 0.99] -> [0.5, 0.99]",
        "task.net.mults: [1, 2, 4, 4] -> [1, 2]",
        "trainer.batch: 64 -> 7",
    ]


def test_length_cadence_and_places_may_change():
    trainer = replace(RECIPE.trainer, images=10**6, log_every=1, save_every=2, device="cpu", quiet=True)
    moved = replace(RECIPE, trainer=trainer, out=Path("elsewhere"), data=replace(RECIPE.data, path=Path("d")))
    assert differences(to_json(RECIPE), moved) == []
    assert differences(to_json(RECIPE), replace(moved, data=replace(moved.data, size=32))) == [
        "data.size: 64 -> 32"
    ]


def test_what_helps_a_run_that_broke_may_change_and_is_told():
    critic = replace(RECIPE.task.discriminator_optim, lr=1e-5)
    changed = replace(
        RECIPE,
        optim=OptimConfig(lr=5e-4, warmup=100),
        task=replace(RECIPE.task, discriminator_optim=critic),
        trainer=replace(RECIPE.trainer, keep=5),
    )
    assert differences(to_json(RECIPE), changed) == []
    assert retuned(to_json(RECIPE), changed) == [
        "optim.lr: 0.001 -> 0.0005",
        "optim.warmup: 0 -> 100",
        "task.discriminator_optim.lr: 0.0004 -> 1e-05",
    ]
    assert retuned(to_json(RECIPE), RECIPE) == []


def test_a_recipe_of_another_program_version_differs_by_its_missing_fields():
    old = to_json(RECIPE)
    del old["optim"]["momentum"]
    assert differences(old, RECIPE) == ["optim.momentum: None -> 0.95"]


def test_a_switch_that_is_newer_than_the_run_and_off_changes_nothing():
    old = to_json(RECIPE)
    del old["data"]["flip"], old["data"]["even"]
    assert differences(old, RECIPE) == []
    assert differences(old, replace(RECIPE, data=DataConfig(flip=True))) == ["data.flip: None -> True"]
