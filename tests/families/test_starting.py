"""Runs that begin from a trained system: full fine-tuning, adapters, and what does not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sfumato.checkpoints.adapters import read_adapters
from sfumato.checkpoints.native import read_folder
from sfumato.core.types import Inputs
from sfumato.families import RECIPES
from sfumato.nets.controlnet import fresh_control
from sfumato.nets.lora import LoraConfig, attach, merge, restore
from sfumato.systems.adapting import controlled
from sfumato.systems.system import load_system
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


def test_a_control_net_alone_is_trained_and_steers_its_base(pictures, tmp_path):
    train(toy("toy-unet", pictures, tmp_path / "base", images=8))
    base = load_system(tmp_path / "base/system")
    before = weights(tmp_path / "base/system")
    out = tmp_path / "run"
    recipe = toy("toy-control", pictures, out, images=32, init=tmp_path / "base")
    system = train(replace(recipe, trainer=replace(recipe.trainer, preview_every=32)))
    assert set(read_folder(system).parts.nets) == {"control"}
    assert list((out / "previews").iterdir())
    control = weights(system, "control")
    copied = {name.removeprefix("encoder."): v for name, v in control.items() if name.startswith("encoder.")}
    assert all(v.shape == before[f"encoder.{name}"].shape for name, v in copied.items())
    assert any(v.abs().sum() > 0 for name, v in control.items() if name.startswith("zero."))
    steered = controlled(base, system)
    white, black = (torch.full((1, 3, 16, 16), value) for value in (1.0, -1.0))
    drawn = [steered.run(Inputs(n=1, text=["red bar"], hint=hint)).low_res for hint in (white, black)]
    assert not torch.equal(*drawn)
    fresh = fresh_control(base.parts.nets["denoiser"], 1)
    untouched = controlled(base, fresh).run(Inputs(n=1, text=["red bar"], hint=white)).low_res
    assert torch.equal(untouched, base.run(Inputs(n=1, text=["red bar"])).low_res)


def test_what_a_control_net_cannot_be_trained_on(base, pictures, tmp_path):
    with pytest.raises(ValueError, match="draws with a DiT, and a ControlNet steers a U-Net: set"):
        train(toy("toy-control", pictures, tmp_path / "run", init=base))
    with pytest.raises(ValueError, match="control needs init, the folder of a trained system"):
        toy("toy-control", pictures, tmp_path / "run", init=None, net=RECIPES["toy-unet"]().task.net)
    with pytest.raises(ValueError, match="control leaves the net of init as it is: set net to None"):
        toy("toy-control", pictures, tmp_path / "run", lora=LoraConfig(rank=2))
    recipe = toy("toy-control", pictures, tmp_path / "run", init=base)
    with pytest.raises(ValueError, match=r"a ControlNet has no validation loss; leave out validation\.split"):
        train(replace(recipe, validation=replace(recipe.validation, share=0.2)))
