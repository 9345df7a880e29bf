"""Validation of toy runs: what it measures, what it keeps, and that it leaves the training alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sfumato.checkpoints.native import Folder, Parts, write_folder
from sfumato.core.config import to_json
from sfumato.core.random import Noise
from sfumato.core.types import Denoised
from sfumato.core.world import ALONE
from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.objective import Objective
from sfumato.diffusion.schedules import Discrete, Flow
from sfumato.diffusion.times import LossSecondMoment, Uniform
from sfumato.families import RECIPES
from sfumato.nets.perceptual import PerceptualConfig, PerceptualNet
from sfumato.systems.system import load_system
from sfumato.training.batches import DataConfig, open_folder
from sfumato.training.held_out import HeldOut, ValidationConfig, hold_out
from sfumato.training.history import LOSS, read_log
from sfumato.training.jobs.build import build
from sfumato.training.jobs.job import Place
from sfumato.training.recipe import Recipe, differences
from sfumato.training.run import train
from sfumato.training.state import Checkpoints
from sfumato.training.tasks.autoencoding import AutoencodingConfig
from sfumato.training.validation import VELOCITY, DenoisingLoss, ReconstructionLoss, Validation, _by_level


def toy(name, pictures, out, *, split="held_out", **trainer) -> Recipe:
    recipe = RECIPES[name]()
    settings = {"device": "cpu", "quiet": True, "images": 48, "validate_every": 16, "save_every": 16}
    settings |= {"preview_every": 0} | trainer
    return replace(
        recipe,
        data=replace(recipe.data, path=pictures, split="train"),
        trainer=replace(recipe.trainer, **settings),
        validation=ValidationConfig(split=split, draws=2),
        out=out,
    )


def newest(out: Path) -> dict:
    return torch.load(sorted((out / "checkpoints").iterdir())[-1] / "state.pt", weights_only=True)


def validations(out: Path) -> dict[int, float]:
    return {int(row["images"]): row[LOSS] for row in read_log(out / "log.jsonl") if LOSS in row}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["toy-dit", "toy-autoencoder"])
def test_training_has_the_same_bits_with_and_without_it(name, pictures, tmp_path, same):
    train(toy(name, pictures, tmp_path / "with"))
    train(toy(name, pictures, tmp_path / "without", split=None))
    assert list(validations(tmp_path / "with")) == [16, 32, 48]
    assert validations(tmp_path / "without") == {}
    assert not (tmp_path / "without" / "best").exists()
    states = [newest(tmp_path / n) for n in ("with", "without")]
    assert [state.pop("shown")["validation"] for state in states] == [48, 0]
    assert [state["log"].pop("lines") for state in states] == [6, 3]
    assert same(*states)
    load = {"toy-dit": "denoiser", "toy-autoencoder": "autoencoder"}[name]
    weights = [tmp_path / n / "system" / f"{load}.safetensors" for n in ("with", "without")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_resumed_run_measures_and_keeps_what_an_uninterrupted_one_does(
    pictures, tmp_path, monkeypatch, same
):
    whole, parts = (toy("toy-dit", pictures, tmp_path / n, validate_every=8) for n in ("whole", "parts"))
    train(whole)
    save = Checkpoints.save

    def cut(self, state, at):
        if at == 32:
            raise RuntimeError("power cut")
        return save(self, state, at)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", cut)
        with pytest.raises(RuntimeError, match="power cut"):
            train(parts)
    assert 24 in validations(parts.folder)  # beyond the checkpoint at 16, and measured again
    train(parts)
    assert validations(whole.folder) == validations(parts.folder)
    assert same(newest(whole.folder), newest(parts.folder))
    assert files(whole.folder / "best") == files(parts.folder / "best")
    assert load_system(whole.folder / "best").stages[0].shape == (3, 16, 16)


def test_the_loss_is_the_objective_of_the_averaged_system_at_fixed_draws(pictures, tmp_path):
    recipe = toy("toy-dit", pictures, tmp_path)
    data = replace(recipe.data, split=None)
    _, folder = hold_out(open_folder(data), recipe.validation, data)
    place = Place(tmp_path, torch.device("cpu"), open_folder(recipe.data), recipe.about, "")
    job = build(recipe, place)
    measure = DenoisingLoss(recipe.task.objective, sampled=False)
    held = HeldOut(folder, 4, 3)
    for parameter in job.task.modules["denoiser"].parameters():  # a fresh net says zero
        torch.nn.init.normal_(parameter, std=0.05)
    with torch.no_grad():
        first, again = (measure(job.result(job.task.modules), held) for _ in range(2))
        alone = DenoisingLoss(recipe.task.objective, sampled=False)(
            job.result(job.task.modules), HeldOut(folder, 1, 3)
        )
        inputs = held.inputs(slice(0, 4))
        cond = job.task.conditioner(inputs)
        clean = held.images(slice(0, 4), torch.device("cpu"))
        noises = [Noise(range(4)).fork(f"validation/draw {k}") for k in range(3)]
        expected = torch.stack(
            [recipe.task.objective(job.task.denoiser, clean, cond, noise).loss for noise in noises]
        )
    assert first == again
    assert first[LOSS] == pytest.approx(float(expected.mean()), rel=1e-5)
    assert alone == pytest.approx(first, rel=1e-5)  # float32 sums in another order


@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [(Flow(multiplier=1000.0), "flow"), (Discrete(), "eps"), (Discrete(), "v")],
    ids=["flow", "eps", "v"],
)
def test_the_velocity_error_is_that_of_one_path_for_every_objective(
    schedule, prediction, pictures, tmp_path, monkeypatch
):
    """A denoiser that always says x0 = 0 loses the same whatever it is told in: |x0|^2 / fraction^2."""
    recipe = toy("toy-dit", pictures, tmp_path)
    recipe = replace(recipe, task=replace(recipe.task, schedule=schedule, prediction=prediction))
    held = HeldOut(open_folder(recipe.data), 4, 2)
    job = build(recipe, Place(tmp_path, torch.device("cpu"), open_folder(recipe.data), recipe.about, ""))
    monkeypatch.setattr(
        Denoiser, "__call__", lambda self, x, level, cond: Denoised(torch.zeros_like(x), x, None)
    )
    measure = DenoisingLoss(recipe.task.objective, sampled=False, velocity=True)
    with torch.no_grad():
        numbers = measure(job.result(job.task.modules), held)
    squares = held.images(slice(0, 8), torch.device("cpu")).double().square().flatten(1).mean(1)
    expected = []
    for rows in held.rows():
        for draw in range(2):
            noise = Noise(range(rows.start, rows.stop)).fork(f"validation/flow {draw}")
            at = 0.05 + 0.9 * noise.uniform(torch.empty(rows.stop - rows.start, dtype=torch.float64))
            expected.append(squares[rows] / at**2)
    assert len(held.rows()) == 2
    assert numbers[VELOCITY] == pytest.approx(float(torch.cat(expected).mean()), rel=1e-6)
    assert {f"{VELOCITY}/0.00-0.25", f"{VELOCITY}/0.75-1.00"} <= set(numbers)


def test_the_velocity_error_of_a_flow_net_is_its_loss(pictures, tmp_path):
    """The parameterization flow predicts the velocity itself: at the same draws both are one number."""
    recipe = toy("toy-dit", pictures, tmp_path)
    job = build(recipe, Place(tmp_path, torch.device("cpu"), open_folder(recipe.data), recipe.about, ""))
    for parameter in job.task.modules["denoiser"].parameters():  # a fresh net says zero
        torch.nn.init.normal_(parameter, std=0.05)
    held = HeldOut(open_folder(recipe.data), 8, 200)
    measure = DenoisingLoss(Objective(times=Uniform()), sampled=False, velocity=True)
    with torch.no_grad():
        numbers = measure(job.result(job.task.modules), held)
    # Two estimates from 1600 draws each, the one without a tenth of the times.
    assert numbers[VELOCITY] == pytest.approx(numbers[LOSS], rel=0.05)
    assert numbers[f"{VELOCITY}/0.25-0.50"] == pytest.approx(numbers[f"{LOSS}/0.25-0.50"], rel=0.05)


def test_embeddings_of_held_out_pictures_are_measured(pictures, tmp_path):
    net = PerceptualNet(PerceptualConfig(widths=(4, 8), convs=(1, 1)))
    write_folder(tmp_path / "net", Folder(Parts({"perceptual": net}), {}))
    recipe = toy("toy-prior", pictures, tmp_path / "run", images=16)
    recipe = replace(recipe, task=replace(recipe.task, embedder=tmp_path / "net"))
    system = load_system(train(recipe))
    (found,) = validations(recipe.folder).values()
    data = replace(recipe.data, split=None)
    _, folder = hold_out(open_folder(data), recipe.validation, data)
    held = HeldOut(folder, 4, 2)
    (rows,) = held.rows()
    (stage,) = system.stages
    with torch.no_grad():
        taps = net.trunk(held.images(rows, torch.device("cpu")))
        vectors = torch.cat([tap.flatten(2).mean(2) for tap in taps], 1)
        z = (vectors - torch.tensor(stage.codec.mean)) / torch.tensor(stage.codec.std)
        cond = stage.conditioner(held.inputs(rows))
        expected = [
            recipe.task.objective(
                stage.denoiser, z, cond, Noise(range(4)).fork(f"validation/draw {k}")
            ).loss.mean()
            for k in range(2)
        ]
    assert found == pytest.approx(float(sum(expected)) / 2, rel=1e-4)  # six digits in the log
    assert (recipe.folder / "best").is_dir()


def test_bins_are_quarters_of_the_noise_fraction_and_empty_ones_are_left_out():
    losses = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    found = _by_level(LOSS, losses, torch.tensor([0.1, 0.2, 0.6, 1.0]))
    assert found == {
        LOSS: 3.75,
        f"{LOSS}/0.00-0.25": 1.5,
        f"{LOSS}/0.50-0.75": 4.0,
        f"{LOSS}/0.75-1.00": 8.0,
    }


def test_a_time_sampler_that_learns_is_left_alone(pictures, tmp_path):
    times = LossSecondMoment(steps=10)
    measure = DenoisingLoss(Objective(times=times), sampled=True)
    assert isinstance(measure.objective.times, Uniform)


def test_a_first_stage_is_measured_by_its_reconstruction(pictures, tmp_path):
    recipe = toy("toy-autoencoder", pictures, tmp_path)
    data = replace(recipe.data, split=None)
    _, folder = hold_out(open_folder(data), recipe.validation, data)
    job = build(recipe, Place(tmp_path, torch.device("cpu"), open_folder(recipe.data), recipe.about, ""))
    held = HeldOut(folder, 3, 1)
    with torch.no_grad():
        found = ReconstructionLoss(AutoencodingConfig(l1=2.0, l2=0.5), None)(
            job.result(job.task.modules), held
        )
        image = held.images(slice(0, 4), torch.device("cpu"))
        net = job.task.modules["autoencoder"]
        error = net.decode(net.encode(image).mean) - image
    assert found[LOSS] == pytest.approx(2 * float(error.abs().mean()) + 0.5 * float(error.square().mean()))
    assert 0 < found["validation/psnr"] < 30


def test_only_a_better_system_replaces_the_best(tmp_path, tiny_system):
    losses = iter([3.0, 2.0, 2.5, float("nan"), 1.0])
    cards = iter("abcde")

    def result():
        return Folder(tiny_system.parts, to_json(tiny_system.config), {}, next(cards))

    held = SimpleNamespace(world=ALONE)
    validation = Validation(lambda folder, held: {LOSS: next(losses)}, result, held, tmp_path)
    kept = []
    for images in range(1, 6):
        validation(images)
        kept.append((tmp_path / "best" / "MODEL_CARD.md").read_text())
    assert kept == ["a", "b", "b", "b", "e"]


def test_the_best_so_far_is_read_from_the_log_unless_its_system_is_gone(tmp_path, tiny_folder):
    validation = Validation(lambda folder, held: {}, lambda: None, None, tmp_path)
    rows = [{"images": 10, LOSS: 0.5}, {"images": 20, "a/loss": 0.1}, {"images": 30, LOSS: 0.2}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert validation._logged(25) == float("inf")
    (tmp_path / "best").mkdir()
    assert validation._logged(25) == 0.5


def test_a_task_without_a_measure_says_so(pictures, tmp_path):
    with pytest.raises(ValueError, match="do not work with a caption_words task") as error:
        train(toy("toy-perceptual", pictures, tmp_path))
    assert "\n" not in str(error.value)


def test_runs_of_before_may_go_on(pictures, tmp_path):
    """A recipe.json that knows nothing of validation is that of a run without one."""
    recipe = toy("toy-dit", pictures, tmp_path, split=None)
    old = to_json(recipe)
    del old["validation"], old["trainer"]["validate_every"], old["trainer"]["trackers"]
    assert differences(old, recipe) == []
    assert differences(old, replace(recipe, validation=ValidationConfig(split="held_out"))) == [
        "validation.split: None -> held_out"
    ]
    assert DataConfig().split is None
