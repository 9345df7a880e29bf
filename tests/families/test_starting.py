"""Runs that begin from a trained system: full fine-tuning, adapters, and what does not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sfumato.checkpoints.adapters import read_adapters
from sfumato.checkpoints.native import read_folder
from sfumato.families import RECIPES
from sfumato.nets.lora import LoraConfig, attach, merge, restore
from sfumato.training.recipe import Recipe
from sfumato.training.run import train


def toy(name: str, pictures: Path, out: Path, images: int = 8, **task) -> Recipe:
    recipe = RECIPES[name]()
    settings = replace(recipe.trainer, device="cpu", quiet=True, images=images, preview_every=0)
    return replace(
        recipe,
        data=replace(recipe.data, path=pictures),
        trainer=settings,
        task=replace(recipe.task, **task),
        out=out,
    )


@pytest.fixture
def base(pictures, tmp_path):
    """A run of toy-dit of four steps."""
    train(toy("toy-dit", pictures, tmp_path / "base", images=16))
    return tmp_path / "base"


def weights(system: Path, net: str = "denoiser") -> dict[str, torch.Tensor]:
    return read_folder(system).parts.nets[net].state_dict()


def test_adapters_alone_change_and_their_file_gives_the_published_weights(base, pictures, tmp_path):
    both = {"lora": LoraConfig(rank=2), "lora_text": LoraConfig(rank=1)}
    system = train(toy("toy-lora", pictures, tmp_path / "run", images=16, init=base, **both))
    state = torch.load(next((tmp_path / "run" / "checkpoints").glob("0*")) / "state.pt", weights_only=True)
    assert all(k.endswith((".down.weight", ".up.weight")) for m in state["modules"].values() for k in m)
    file = read_adapters(tmp_path / "run" / "adapter.safetensors")
    assert file.base == read_folder(base / "system").fingerprint
    assert {k: v.rank for k, v in file.lora.items()} == {"denoiser": 2, "text": 1}
    for name, net in read_folder(base / "system").parts.nets.items():
        before = {k: v.clone() for k, v in net.state_dict().items()}
        adapter = restore(net, file.tensors[name])
        attach(net, adapter)
        merge(net)
        after = weights(system, name)
        assert all(torch.equal(v, after[k]) for k, v in net.state_dict().items())
        changed = {k for k in after if not torch.equal(after[k], before[k])}
        assert changed
        assert changed <= {f"{layer}.weight" for layer in adapter.pairs}
    assert "Fine-tuned from toy-dit" in (system / "MODEL_CARD.md").read_text()


def test_full_training_begins_with_weights_and_tokenizer_of_the_system(base, pictures, tmp_path):
    recipe = toy("toy-dit", pictures, tmp_path / "run", init=base)
    system = train(replace(recipe, optim=replace(recipe.optim, lr=1e-12)))
    before, after = weights(base / "system"), weights(system)
    assert all(torch.allclose(after[k], before[k], atol=1e-9) for k in before)
    assert (system / "tokenizer.json").read_bytes() == (base / "system" / "tokenizer.json").read_bytes()


def test_another_patch_size_is_refused_unless_partial(base, pictures, tmp_path):
    recipe = toy("toy-dit", pictures, tmp_path / "run", init=base)
    net = replace(recipe.task.net, patch=2)
    recipe = replace(recipe, task=replace(recipe.task, net=net))
    said = r"'patches\.weight' is of shape \(16, 12\) by task.net and of shape \(16, 48\)"
    with pytest.raises(ValueError, match=said):
        train(recipe)
    recipe = replace(
        recipe,
        out=tmp_path / "other",
        task=replace(recipe.task, partial=True),
        optim=replace(recipe.optim, lr=1e-12),
    )
    before, after = weights(base / "system"), weights(train(recipe))
    fresh = {k for k in before if after[k].shape != before[k].shape}
    assert fresh == {"patches.weight", "out.weight", "out.bias"}
    assert all(torch.allclose(after[k], before[k], atol=1e-9) for k in before.keys() - fresh)


def test_a_deeper_difference_is_refused_even_if_partial(base, pictures, tmp_path):
    recipe = toy("toy-dit", pictures, tmp_path / "run", init=base, partial=True)
    net = replace(recipe.task.net, depth=2)
    with pytest.raises(ValueError, match=r"'blocks\.1\.\S+' is of shape .* by task.net and absent in"):
        train(replace(recipe, task=replace(recipe.task, net=net)))


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"init": Path("nowhere")}, "there is no system at nowhere; task.init takes the folder of one"),
        ({"prediction": "x0"}, "task.prediction is x0, but .* was trained with flow"),
        ({"lora": LoraConfig(targets=("to_q",))}, "lora target 'to_q' fits no linear or convolution layer"),
    ],
)
def test_mistakes_are_one_line_before_the_first_step(task, said, base, pictures, tmp_path):
    recipe = toy("toy-lora", pictures, tmp_path / "run", **{"init": base} | task)
    with pytest.raises(ValueError, match=said) as error:
        train(recipe)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "run").glob("checkpoints/0*"))


def test_a_run_does_not_go_on_from_another_base(base, pictures, tmp_path):
    recipe = toy("toy-lora", pictures, tmp_path / "run", init=base)
    train(recipe)
    manifest = base / "system" / "system.json"
    data = json.loads(manifest.read_text())
    data["system"]["stages"][0]["defaults"]["steps"] = 7
    manifest.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="this run began from a system with the fingerprint"):
        train(replace(recipe, trainer=replace(recipe.trainer, images=16)))


def test_a_class_that_the_net_has_no_row_for_is_named(pictures, tmp_path):
    # The held-out third, blue, is class 0; the others are 1 and 2.
    recipe = toy("toy-classes", pictures, tmp_path / "run")
    net = replace(recipe.task.net, num_classes=2)
    said = r"labels are out of range, the first is 2 of .*; the net has 2 classes"
    with pytest.raises(ValueError, match=said):
        train(replace(recipe, task=replace(recipe.task, net=net)))


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"lora": LoraConfig()}, "lora needs init"),
        ({"net": None}, "no net needs init"),
        ({"learned_var": True}, r"learned_var needs objective\.vlb"),
        ({"init": Path("x"), "partial": True, "lora": LoraConfig()}, "partial leaves fresh layers"),
        ({"autoencoder": Path("a"), "embedder": Path("b")}, "choose what is to be denoised"),
    ],
)
def test_settings_that_exclude_each_other(task, said):
    with pytest.raises(ValueError, match=said):
        replace(RECIPES["toy-dit"]().task, **task)
