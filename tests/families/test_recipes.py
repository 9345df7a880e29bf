from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sfumato
from sfumato.checkpoints.native import Folder, Parts, write_folder
from sfumato.cli.parsing import parse
from sfumato.cli.runs import Flags
from sfumato.conditioners.label import LabelCond
from sfumato.core.config import from_json, to_json
from sfumato.core.random import Noise
from sfumato.families import RECIPES
from sfumato.nets import NETS
from sfumato.nets.autoencoder import Autoencoder, AutoencoderConfig
from sfumato.nets.embedding import EmbedderConfig, Feature
from sfumato.systems.config import About
from sfumato.systems.system import load_system
from sfumato.training.batches import open_folder
from sfumato.training.jobs.build import build
from sfumato.training.jobs.job import Job, Place
from sfumato.training.optim import PhaseOptimizer
from sfumato.training.recipe import Recipe
from sfumato.training.run import train
from sfumato.training.task import Moment

TOYS = [name for name in RECIPES if name.startswith("toy-")]


def toy(name: str, pictures: Path, out: Path, **trainer) -> Recipe:
    """A toy whose results go below `out`, and what it builds upon is trained there first."""
    recipe = RECIPES[name]()
    for field in ("init", "embedder", "clip"):
        if (needed := getattr(recipe.task, field, None)) is not None:
            train(toy(needed.name, pictures, out, images=16))
            recipe = replace(recipe, task=replace(recipe.task, **{field: out / needed.name}))
    settings = replace(recipe.trainer, device="cpu", quiet=True, **trainer)
    return replace(recipe, data=replace(recipe.data, path=pictures), trainer=settings, out=out / name)


def flat(state, prefix=""):
    if isinstance(state, dict):
        return {
            k: v for key in state if key != "seconds" for k, v in flat(state[key], f"{prefix}/{key}").items()
        }
    if isinstance(state, list):
        return {k: v for i, item in enumerate(state) for k, v in flat(item, f"{prefix}/{i}").items()}
    return {prefix: state}


def newest(out: Path) -> dict:
    return flat(torch.load(sorted((out / "checkpoints").iterdir())[-1] / "state.pt", weights_only=True))


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_survives_json_and_builds_its_nets(name):
    recipe = RECIPES[name]()
    assert recipe.name == name
    assert recipe == RECIPES[name]()
    assert from_json(Recipe, json.dumps(to_json(recipe))) == recipe
    if getattr(recipe.task, "net", None) is None:  # that of the system it begins from, or two towers
        return
    kind = next(kind for kind in NETS.values() if kind.config is type(recipe.task.net))
    with torch.device("meta"):
        assert sum(p.numel() for p in kind.net(recipe.task.net).parameters()) > 0


OBJECTIVE = "--task.objective."
DISCRETE = ["--task.schedule.kind", "discrete", "--task.prediction", "eps"]
VARIANTS = {
    "latents": (
        "toy-dit",
        ["--task.autoencoder", "AUTOENCODER", "--task.posterior", "sample"]
        + [f"--task.net.{side}-channels=4" for side in ("in", "out")],
    ),
    "captions and labels": ("toy-dit", ["--task.net.num-classes", "3", "--task.dropout", "0.5"]),
    "min-SNR with offset noise": (
        "toy-dit",
        [*DISCRETE, f"{OBJECTIVE}weight.kind", "min_snr", f"{OBJECTIVE}offset-noise", "0.1"],
    ),
    "hybrid": (
        "toy-dit",
        [*DISCRETE, "--task.learned-var", "--task.net.out-channels=6", f"{OBJECTIVE}vlb=1"],
    ),
    "velocity of embeddings": (
        "toy-prior",
        ["--task.schedule.kind", "discrete", "--task.prediction", "v", f"{OBJECTIVE}weight.kind", "min_snr"],
    ),
    "convolutions": ("toy-lora", ["--task.lora.targets", "*", "--task.lora.rank", "1"]),
}


@pytest.mark.parametrize(
    ("name", "flags"), [*((name, []) for name in TOYS), *VARIANTS.values()], ids=[*TOYS, *VARIANTS]
)
def test_two_steps_are_finite_and_reach_every_parameter(name, flags, pictures, tmp_path):
    if "AUTOENCODER" in flags:
        net = Autoencoder(AutoencoderConfig(channels=8, mults=(1, 2), blocks=1, norm_groups=4, patch=1))
        write_folder(tmp_path / "first", Folder(Parts({"autoencoder": net}), {}))
        flags = [flag.replace("AUTOENCODER", str(tmp_path / "first")) for flag in flags]
    _reach_every_parameter(
        parse(Flags, "train", flags, default=Flags(recipe=toy(name, pictures, tmp_path))).recipe
    )


def test_a_field_of_the_metadata_gives_the_classes(pictures, tmp_path):
    lines = (pictures / "metadata.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    (pictures / "metadata.jsonl").write_text(
        "\n".join(json.dumps({k: v for k, v in row.items() if k != "label"}) for row in rows)
    )
    recipe = toy("toy-classes", pictures, tmp_path, images=4)
    data = replace(recipe.data, label="concept", split="train")
    assert open_folder(data).classes == ("blue", "green", "red")
    assert set(open_folder(data).labels) == {1, 2}  # blue ones are held out, and leave their number free
    system = load_system(train(replace(recipe, data=data)))
    (label,) = system.config.stages[0].conditioners
    assert label.names == ("blue", "green", "red")
    with pytest.raises(ValueError, match="no field 'shade'"):
        open_folder(replace(data, label="shade"))


def test_runs_share_a_folder_of_latents(pictures, tmp_path, monkeypatch):
    net = Autoencoder(AutoencoderConfig(channels=8, mults=(1, 2), blocks=1, norm_groups=4, patch=1))
    write_folder(tmp_path / "first", Folder(Parts({"autoencoder": net}), {}))
    recipe = toy("toy-dit", pictures, tmp_path, images=4)
    shape = replace(recipe.task.net, in_channels=4, out_channels=4, patch=2)
    task = replace(recipe.task, net=shape, autoencoder=tmp_path / "first", latents=tmp_path / "shared")
    train(replace(recipe, task=task, out=tmp_path / "a"))
    assert [path.suffix for path in (tmp_path / "shared").iterdir()] == [".safetensors"]

    def encode(self, image):
        raise AssertionError("encoded again")

    monkeypatch.setattr(Autoencoder, "encode", encode)
    train(replace(recipe, task=task, out=tmp_path / "b"))
    assert not (tmp_path / "b/latents").exists()
    with pytest.raises(AssertionError, match="encoded again"):
        train(replace(recipe, task=replace(task, latents=None), out=tmp_path / "c"))


def test_labels_reach_every_parameter_of_a_unet(pictures, tmp_path):
    recipe = toy("toy-unet", pictures, tmp_path)
    table = EmbedderConfig(kind="table", features=(Feature(field="label", dim=4),))
    net = replace(recipe.task.net, embedding=replace(recipe.task.net.embedding, extras=(table,)))
    job = _reach_every_parameter(replace(recipe, task=replace(recipe.task, net=net, dropout=0.5)))
    assert job.task.conditioner.parts[1] == LabelCond(3)


def _reach_every_parameter(recipe: Recipe) -> Job:
    folder = open_folder(recipe.data)
    job = build(recipe, Place(recipe.out, torch.device("cpu"), folder, About(), ""))
    optimizers = {
        phase: PhaseOptimizer([job.task.modules[m] for m in p.modules], p.optim or recipe.optim)
        for phase, p in job.task.phases.items()
    }
    touched: dict[int, bool] = {}
    # A net whose last layer starts at zero passes gradients to the layers before it after its first step.
    for step in range(4):
        for loss in job.task.losses(job.batches(4 * step), Noise(range(4)), Moment(60, 64)):
            assert torch.isfinite(loss.value)
            optimizers[loss.phase].backward(loss.value)
            for p in optimizers[loss.phase].parameters:
                assert p.grad is not None
                assert torch.isfinite(p.grad).all()
                touched[id(p)] = touched.get(id(p), False) or bool(p.grad.any())
            optimizers[loss.phase].step(4 * step, 4 * step + 4, 64)
    names = {
        id(p): f"{m}.{n}" for m, module in job.task.modules.items() for n, p in module.named_parameters()
    }
    # While no logit is beyond the margin of the hinge, real and fake pull the last bias equally hard.
    last_bias = (
        f"discriminator.net.{len(job.task.modules['discriminator'].net) - 1}.bias"
        if "discriminator" in job.task.modules
        else ""
    )
    assert {names[i] for i in names if not touched.get(i)} <= {last_bias}
    return job


@pytest.mark.parametrize("name", ["toy-autoencoder", "toy-dit", "toy-lora"])
def test_a_stopped_run_ends_as_an_uninterrupted_one_bit_for_bit(name, pictures, tmp_path):
    whole = toy(name, pictures, tmp_path / "whole", images=48, save_every=16, preview_every=24)
    train(whole)
    # Besides, one of them reads ahead and the other does not.
    parts = replace(whole, out=tmp_path / "parts", data=replace(whole.data, ahead=2))
    # Stopped at 32 of 48 images: the discriminator of the autoencoder starts at 19 and is heard from 24.
    _stop_at(32, parts)
    train(parts)
    a, b = newest(whole.folder), newest(parts.folder)
    assert a.keys() == b.keys()
    different = [
        k for k in a if not (torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k])
    ]
    assert different == []
    assert a["/images"] == 48
    logs = [
        [json.loads(x) for x in (r.folder / "log.jsonl").read_text().splitlines()] for r in (whole, parts)
    ]
    assert [(r["images"], [v for k, v in r.items() if "loss" in k]) for r in logs[0]] == [
        (r["images"], [v for k, v in r.items() if "loss" in k]) for r in logs[1]
    ]
    for weights in (whole.folder / "system").glob("*.safetensors"):
        assert weights.read_bytes() == (parts.folder / "system" / weights.name).read_bytes()


def test_the_chain_of_recipes_gives_a_system_that_draws(pictures, tmp_path):
    (pictures / "ATTRIBUTION.txt").write_text("Drawn by a test.")
    perceptual = train(toy("toy-perceptual", pictures, tmp_path, images=8))
    recipe = toy("toy-autoencoder", pictures, tmp_path, images=8)
    recipe = replace(recipe, task=replace(recipe.task, perceptual_net=perceptual, perceptual_start=0.0))
    first = train(recipe)
    assert "generator/perceptual" in (recipe.folder / "log.jsonl").read_text()
    recipe = toy("toy-dit", pictures, tmp_path, images=8)
    net = replace(recipe.task.net, in_channels=4, out_channels=4, patch=2)
    recipe = replace(
        recipe, task=replace(recipe.task, net=net, autoencoder=recipe.folder.parent / "toy-autoencoder")
    )
    path = train(recipe)
    assert path == recipe.folder / "system"
    system = load_system(path)
    assert system.about.attribution == "Drawn by a test."
    assert "Drawn by a test." in system.card
    assert str(tmp_path) not in (path / "MODEL_CARD.md").read_text() + (path / "system.json").read_text()
    codec = system.stages[0].codec
    assert isinstance(codec.autoencoder, Autoencoder)
    assert len(codec.std) == 4
    (image,) = system.generate(["red bar 0"], seed=3)
    assert image.size == (16, 16)
    assert (recipe.folder / "previews" / "000000000008.png").is_file()
    assert first.is_dir()


def test_another_recipe_does_not_continue_the_run(pictures, tmp_path):
    recipe = toy("toy-perceptual", pictures, tmp_path, images=8)
    train(recipe)
    before = newest(recipe.folder)
    changed = replace(recipe, optim=replace(recipe.optim, eps=0.5))
    with pytest.raises(ValueError, match=r"another recipe \(optim\.eps: 1e-08 -> 0\.5\)"):
        train(changed)
    assert same(newest(recipe.folder), before)
    train(replace(recipe, trainer=replace(recipe.trainer, images=16)))
    assert newest(recipe.folder)["/images"] == 16


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("toy-dit", {"data": {"path": Path("nowhere")}}, "nowhere does not exist"),
        ("toy-dit", {"trainer": {"batch": 13}}, "trainer.batch 13 is more than the 12 pictures"),
        ("toy-dit", {"trainer": {"device": "abacus"}}, "device 'abacus'"),
        (
            "toy-dit",
            {"task": {"autoencoder": Path("none")}},
            "no trained Autoencoder at none; train one with",
        ),
        ("toy-autoencoder", {"task": {"perceptual_net": Path("none")}}, "no trained PerceptualNet at none"),
        ("toy-dit", {"data": {"split": "test"}}, "no picture has split = 'test'"),
        ("toy-dit", {"data": {"even": "shade"}}, "no field 'shade'"),
        ("toy-autoencoder", {"data": {"size": 18}}, "multiples of 4"),
    ],
)
def test_mistakes_are_told_in_one_line_before_the_first_step(name, change, message, pictures, tmp_path):
    recipe = toy(name, pictures, tmp_path)
    recipe = replace(
        recipe, **{part: replace(getattr(recipe, part), **values) for part, values in change.items()}
    )
    with pytest.raises(ValueError, match=message) as error:
        train(recipe)
    assert "\n" not in str(error.value)
    assert not (recipe.folder / "checkpoints").exists()


@pytest.mark.parametrize(
    ("net", "message"),
    [
        ({"in_channels": 4}, "in_channels 4 and out_channels 3, but what it denoises has 3 channels"),
        ({"text_dim": 8}, "does not fit its inputs"),
        ({"patch": 5}, "multiple of the patch"),
    ],
)
def test_a_net_that_does_not_fit_is_named(net, message, pictures, tmp_path):
    recipe = toy("toy-dit", pictures, tmp_path)
    recipe = replace(recipe, task=replace(recipe.task, net=replace(recipe.task.net, **net)))
    with pytest.raises(ValueError, match=message) as error:
        train(recipe)
    assert "\n" not in str(error.value)


def test_pictures_without_captions_are_refused(pictures, tmp_path):
    (pictures / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match="has a caption"):
        train(toy("toy-dit", pictures, tmp_path))
    with pytest.raises(ValueError, match="no words"):
        train(toy("toy-perceptual", pictures, tmp_path))


def test_damaged_pictures_are_listed_beside_the_run(pictures, tmp_path, caplog):
    rows = (pictures / "metadata.jsonl").read_text().splitlines()
    for k in range(10):
        (pictures / f"c{k}").mkdir()
        for i in range(12):
            (pictures / f"c{k}" / f"{i}.png").write_bytes((pictures / f"{i}.png").read_bytes())
            rows.append(rows[i].replace('"file_name": "', f'"file_name": "c{k}/'))
    (pictures / "metadata.jsonl").write_text("\n".join(rows))
    (pictures / "5.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    recipe = toy("toy-perceptual", pictures, tmp_path, images=140)
    train(recipe)
    listed = json.loads((recipe.folder / "skipped.json").read_text())
    assert [Path(name).name for name in listed] == ["5.png"]
    assert "1 of 132 pictures were damaged" in caplog.text


def test_damage_that_stops_a_run_is_listed_too(pictures, tmp_path):
    for i in range(12):
        (pictures / f"{i}.png").write_bytes(b"no picture" if i else (pictures / "0.png").read_bytes())
    recipe = toy("toy-perceptual", pictures, tmp_path, images=140)
    with pytest.raises(ValueError, match="pictures are damaged, more than 1 %"):
        train(recipe)
    assert len(json.loads((recipe.folder / "skipped.json").read_text())) > 1


def _stop_at(images: int, recipe: Recipe) -> None:
    """Train until a checkpoint at `images`, then fail as a power cut does."""
    from sfumato.training.state import Checkpoints

    class PowerCut(Exception):
        pass

    save = Checkpoints.save

    def save_and_fail(self, state, at):
        path = save(self, state, at)
        if at == images:
            raise PowerCut
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_fail)
        with pytest.raises(PowerCut):
            train(recipe)


def test_a_trained_cascade_draws_and_its_upsampler_reads_the_level(pictures, tmp_path):
    """Both toys, joined by their paths: text to 8 pixels to 16, and the level of noise makes a difference."""
    names = ("toy-imagen-base", "toy-imagen-upsampler")
    folders = [train(toy(name, pictures, tmp_path, images=16)) for name in names]
    both = sfumato.cascade(*folders)
    assert [(stage.name, stage.pixels) for stage in both.stages] == [
        ("base", (8, 8)),
        ("upsampler", (16, 16)),
    ]
    asked = {"seed": 3, "steps": 2}
    assert both.generate("red", **asked)[0].size == (16, 16)
    small = both.generate("red", only=["base"], **asked)[0]
    levels = [both.generate("red", low_res=small, aug=aug, **asked)[0].tobytes() for aug in (0.0, 0.5)]
    assert levels[0] != levels[1]
