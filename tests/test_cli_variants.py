"""Kinds of parts chosen by flags, and a run of two steps with each."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from sfumato import cli
from sfumato.cli.runs import Flags
from sfumato.cli.variants import choices, choose
from sfumato.core.png import save_png
from sfumato.diffusion.weights import MinSNR, Simple
from sfumato.families import RECIPES
from sfumato.nets.lora import LoraConfig

OBJECTIVE = "--task.objective."
DISCRETE = ["--task.schedule.kind", "discrete", "--task.prediction", "eps"]
LEARNED = ["--task.learned-var", "--task.net.out-channels", "6"]


def test_a_kind_is_put_in_place_and_its_settings_stay_flags():
    recipe = RECIPES["toy-dit"]()
    args = ["--task.objective.weight.kind=min_snr", "--task.objective.weight.gamma", "3"]
    chosen, left = choose(recipe, args)
    assert chosen.task.objective.weight == MinSNR()
    assert left == args
    assert recipe.task.objective.weight == Simple()
    assert choose(recipe, ["--trainer.images", "8"]) == (recipe, ["--trainer.images", "8"])


def test_a_part_can_be_made_and_taken_away():
    recipe = RECIPES["toy-lora"]()
    assert choose(recipe, ["--task.lora_text.rank", "4"])[0].task.lora_text == LoraConfig()
    chosen, left = choose(recipe, ["--task.lora-text.rank", "4", "--task.lora", "None"])
    assert (chosen.task.lora, left) == (None, ["--task.lora-text.rank", "4"])


def test_help_names_the_kinds():
    said = list(choices(RECIPES["toy-dit"]()))
    assert "--task.objective.weight.kind {simple,min_snr,p2,edm,sigmoid}" in said
    assert "--task.lora.{rank,alpha,targets}" in said
    assert not any(line.startswith("--task.kind") for line in said)


def test_a_part_without_a_name_of_its_own_adds_nothing_to_the_flags():
    flags = Flags(recipe=RECIPES["toy-dit"]())
    chosen, _ = choose(flags, ["--task.objective.weight.kind", "min_snr"])
    assert chosen.recipe.task.objective.weight == MinSNR()
    assert list(choices(flags)) == list(choices(flags.recipe))


def test_an_unknown_kind_is_one_line(capsys):
    assert cli.main(["train", "toy-dit", "--task.objective.weight.kind", "minsnr"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("sfumato: unknown --task.objective.weight.kind 'minsnr'; did you mean 'min_snr'?")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "flags",
    [
        [
            *(f"{OBJECTIVE}weight.kind", "min_snr", f"{OBJECTIVE}weight.gamma", "3"),
            f"{OBJECTIVE}offset-noise=0.1",
        ],
        [*DISCRETE, f"{OBJECTIVE}weight.kind", "p2", f"{OBJECTIVE}times.kind", "uniform"],
        ["--task.uncertainty", "16"],
        [
            *(
                "--task.schedule.kind",
                "ve",
                "--task.prediction",
                "edm",
                f"{OBJECTIVE}times.kind",
                "log_normal",
            ),
            *(f"{OBJECTIVE}weight.kind", "edm"),
        ],
        [*DISCRETE, *LEARNED, f"{OBJECTIVE}vlb", "0.001", f"{OBJECTIVE}times.kind", "loss_second_moment"],
    ],
    ids=["min_snr", "p2", "uncertainty", "edm", "hybrid"],
)
def test_every_objective_trains_from_the_command_line(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for i, color in enumerate(("red", "green", "blue", "black")):
        save_png(f"data/{i}.png", Image.new("RGB", (16, 16), color))
        Path(f"data/{i}.txt").write_text(f"{color} square")
    code = cli.main(["train", "toy-dit", "--trainer.images", "8", "--trainer.quiet", *flags])
    assert code == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in Path("runs/toy-dit/log.jsonl").read_text().splitlines()]
    losses = [row["denoiser/loss"] for row in rows if "denoiser/loss" in row]
    assert losses
    assert all(map(math.isfinite, losses))
    state = torch.load(next(Path("runs/toy-dit/checkpoints").glob("0*")) / "state.pt", weights_only=True)
    if "--task.uncertainty" in flags:
        assert state["modules"]["uncertainty"]["out.weight"].any()
        assert "uncertainty" not in state["average"]["modules"]
    if "loss_second_moment" in flags:
        assert int(state["memories"]["times"]["counts"].sum()) == 8
